"""Plane-Slice-Aware Transformer: 3D features + (plane, position) -> one token per slice.

QTrans and PSPE of Med3DInsight (arXiv:2403.05141), with three differences that docs/method.md
explains: the memory carries a 3D position code, positions are continuous fractions, and all slices
of a volume share one memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

FREQUENCIES = 6  # octaves of the position code: the finest has a period of 1/16 of the extent


def axis_code(position: Tensor) -> Tensor:
    """Sine and cosine of a position at octave frequencies.

    Args:
        position: any shape, fraction of the extent, in [0, 1].

    Returns:
        position.shape + (2 * FREQUENCIES,)
    """
    angle = position[..., None] * (math.pi * 2.0 ** torch.arange(FREQUENCIES).to(position))
    return torch.cat((angle.sin(), angle.cos()), -1)


def at_least_float(values: Tensor) -> torch.dtype:
    """Type of positions beside ``values``: half precision would make slices the same."""
    return torch.promote_types(values.dtype, torch.float32)


def voxel_code(shape: Sequence[int], like: Tensor) -> Tensor:
    """Position code of every voxel of a grid: its x, y and z codes side by side.

    Args:
        shape: (x, y, z) of the grid.
        like: tensor of the wanted type and device.

    Returns:
        (x * y * z, 6 * FREQUENCIES), in the order of ``flatten``.
    """
    centres = [(torch.arange(n).to(like) + 0.5) / n for n in shape]
    return (
        axis_code(torch.stack(torch.meshgrid(*centres, indexing="ij"), -1)).flatten(3).flatten(0, 2)
    )


def slice_code(plane: Tensor, position: Tensor) -> Tensor:
    """Position code of plane slices: the code of the cut axis, zeros for the other two.

    Args:
        plane: (b, s) long, 0 sagittal (cuts x), 1 coronal (y), 2 axial (z).
        position: (b, s) fraction of the extent, in [0, 1].

    Returns:
        (b, s, 6 * FREQUENCIES): its dot product with ``voxel_code`` peaks on the slice.
    """
    cut = nn.functional.one_hot(plane, 3).to(position)
    return (cut[..., None] * axis_code(position)[..., None, :]).flatten(-2)


class Block(nn.Module):
    """One decoder layer (pre-norm): queries of a slice attend to each other, then to the volume.

    Args:
        hidden: width, divisible by ``heads``.
        heads: attention heads.
        ffn: width of the feed-forward layer.
        dropout: in attention and feed-forward.
    """

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.ffn = nn.Sequential(
            nn.Linear(hidden, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, hidden)
        )

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Refined queries (b, s, q, hidden).

        Args:
            query: (b, s, q, hidden).
            keys: (b, m, hidden) memory with its position code.
            values: (b, m, hidden) memory.
        """
        b, s, q, _ = query.shape
        own = rearrange(self.self_norm(query), "b s q c -> (b s) q c")
        own = self.self_attention(own, own, own, need_weights=False)[0]
        query = query + rearrange(own, "(b s) q c -> b s q c", b=b)
        # One sequence of s * q queries: the memory is projected to keys and values once a volume.
        read = rearrange(self.cross_norm(query), "b s q c -> b (s q) c")
        read = self.cross_attention(read, keys, values, need_weights=False)[0]
        query = query + rearrange(read, "b (s q) c -> b s q c", q=q)
        return query + self.ffn(self.ffn_norm(query))


class PSAT(nn.Module):
    """Plane-Slice-Aware Transformer: one token for each (plane, position), read from 3D features.

    A slice's token does not depend on the other slices of the call.

    Args:
        in_channels: channels of the features.
        out_channels: length of a slice token.
        hidden: width of the transformer, divisible by ``heads``.
        layers: number of decoder layers (paper: 6).
        heads: attention heads (paper: 8).
        queries: learned queries a slice (paper: 300).
        ffn: width of the feed-forward layers (paper: 1024).
        dropout: dropout in attention and feed-forward (paper: 0.1).
        readout: "mean" of a slice's queries, or "first" of them (paper).
        positions: False drops the position from the queries, an ablation: all slices of a plane
            get one token.

    Raises:
        ValueError: ``readout`` is unknown, or ``hidden`` is not divisible by ``heads``.

    Examples:
        >>> psat = PSAT(in_channels=32, out_channels=256)
        >>> features = torch.zeros(1, 32, 6, 6, 4)
        >>> plane, position = torch.tensor([[2, 2, 0]]), torch.tensor([[0.25, 0.75, 0.5]])
        >>> psat(features, plane, position).shape  # two axial slices and a sagittal one
        torch.Size([1, 3, 256])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        hidden: int = 256,
        layers: int = 2,
        heads: int = 8,
        queries: int = 4,
        ffn: int = 512,
        dropout: float = 0.0,
        readout: str = "mean",
        positions: bool = True,
    ) -> None:
        super().__init__()
        if readout not in ("mean", "first"):
            raise ValueError(f"readout must be 'mean' or 'first', got {readout!r}; correct the key")
        if hidden % heads:
            raise ValueError(
                f"hidden must be divisible by heads, got {hidden} and {heads}; change one of them"
            )
        self.readout = readout
        self.positions = positions
        self.out_channels = out_channels
        self.to_memory = nn.Sequential(nn.LayerNorm(in_channels), nn.Linear(in_channels, hidden))
        self.where = nn.Linear(6 * FREQUENCIES, hidden, bias=False)  # one code for keys and queries
        self.plane = nn.Embedding(3, hidden)
        self.queries = nn.Parameter(torch.randn(queries, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads, ffn, dropout) for _ in range(layers))
        self.to_token = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, out_channels))

    def forward(self, features: Tensor, plane: Tensor, position: Tensor) -> Tensor:
        """One (b, s, out_channels) token per plane slice.

        Args:
            features: (b, c, x, y, z) from any 3D encoder.
            plane: (b, s) long: 0 sagittal (cuts x), 1 coronal (y), 2 axial (z).
            position: (b, s) float: slice centre as a fraction of the extent, in [0, 1].
        """
        values = self.to_memory(rearrange(features, "b c x y z -> b (x y z) c"))
        position = position.to(at_least_float(values))
        keys = values + self.where(voxel_code(features.shape[2:], position).to(values))
        code = self.plane(plane)
        if self.positions:
            code = code + self.where(slice_code(plane, position).to(values))
        query = code[:, :, None] + self.queries
        for block in self.blocks:
            query = block(query, keys, values)
        token = query[:, :, 0] if self.readout == "first" else query.mean(2)
        return self.to_token(token)


class SlabPooling(nn.Module):
    """Baseline for `PSAT`: mean of the features that the slice cuts, then a linear layer.

    Between the centres of two feature planes the mean is their linear interpolation.

    Args:
        in_channels: channels of the features.
        out_channels: length of a slice token.
    """

    def __init__(self, in_channels: int, out_channels: int = 256) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.to_token = nn.Sequential(
            nn.LayerNorm(in_channels), nn.Linear(in_channels, out_channels)
        )

    def forward(self, features: Tensor, plane: Tensor, position: Tensor) -> Tensor:
        """One (b, s, out_channels) token per plane slice; arguments as those of `PSAT`."""
        means = [features.mean(other).mT for other in ((3, 4), (2, 4), (2, 3))]  # (b, n, c) an axis
        position = position.to(at_least_float(features))
        rows = torch.stack([interpolated(mean, position).to(mean) for mean in means], 2)
        cut = nn.functional.one_hot(plane, 3).to(rows)
        return self.to_token((cut[..., None] * rows).sum(2))


def interpolated(rows: Tensor, position: Tensor) -> Tensor:
    """Rows at fractional positions by linear interpolation, (b, s, c).

    Args:
        rows: (b, n, c), centred at (i + 0.5) / n.
        position: (b, s) fraction of the extent; outside the centres the nearest row counts.
    """
    last = rows.shape[1] - 1
    at = (position * (last + 1) - 0.5).clamp(0, last)[..., None]
    low = at.floor()
    below, above = (
        rows.gather(1, index.long().expand(-1, -1, rows.shape[2]))
        for index in (low, (low + 1).clamp(max=last))
    )
    return below.lerp(above, at - low)
