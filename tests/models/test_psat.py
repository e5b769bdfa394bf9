import math

import numpy as np
import pytest
import torch

from med3dinsight_ext.models.psat import (
    PSAT,
    Block,
    SlabPooling,
    interpolated,
    slice_code,
    voxel_code,
)


@pytest.fixture
def psat() -> PSAT:
    torch.manual_seed(0)
    return PSAT(5, out_channels=7, hidden=16, layers=2, heads=4, queries=3, ffn=24).eval()


def slices(b: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, (b, s)), torch.rand(b, s)


def test_a_token_for_each_slice_from_an_uneven_grid(psat: PSAT) -> None:
    plane, position = slices(2, 4)
    assert psat(torch.randn(2, 5, 3, 1, 4), plane, position).shape == (2, 4, 7)


def test_adding_and_permuting_slices_leaves_the_others_tokens(psat: PSAT) -> None:
    features, (plane, position) = torch.randn(1, 5, 3, 2, 4), slices(1, 6)
    tokens = psat(features, plane, position)
    order = torch.randperm(6)
    assert torch.allclose(
        psat(features, plane[:, order], position[:, order]), tokens[:, order], atol=1e-5
    )
    assert torch.allclose(psat(features, plane[:, :1], position[:, :1]), tokens[:, :1], atol=1e-5)


def test_features_are_left_as_they_were(psat: PSAT) -> None:
    features = torch.randn(1, 5, 3, 2, 4)
    before = features.clone()
    psat(features, *slices(1, 2))
    assert torch.equal(features, before)


def test_permuting_the_voxels_changes_the_token(psat: PSAT) -> None:
    """Defect 3: without a position code on the memory, a slice can be found by content only."""
    features, question = torch.randn(1, 5, 4, 4, 4), slices(1, 2)
    shuffled = features.flatten(2)[..., torch.randperm(64)].view_as(features)
    assert (psat(features, *question) - psat(shuffled, *question)).abs().max() > 1e-3


def test_the_position_steers_attention_and_does_not_cancel(psat: PSAT) -> None:
    """Defect 2: the same code on every key leaves the softmax as it is."""
    block = psat.blocks[0]
    values = psat.to_memory(torch.randn(1, 64, 5))
    keys = values + psat.where(voxel_code((4, 4, 4), values))
    query = torch.randn(1, 1, 16)
    with_code = block.cross_attention(query, keys, values)[1]
    without = block.cross_attention(query, values, values)[1]
    assert (with_code - without).abs().max() > 1e-4


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_slice_code_is_nearest_to_the_voxels_on_its_slice(plane: int) -> None:
    shape, index = (6, 4, 8), 2
    voxels = voxel_code(shape, torch.zeros(1))
    code = slice_code(torch.tensor([[plane]]), torch.tensor([[(index + 0.5) / shape[plane]]]))
    score = (voxels @ code[0, 0]).view(shape)
    best = (score > score.max() - 1e-4).nonzero()
    assert (best[:, plane] == index).all()
    assert len(best) == score.numel() / shape[plane]


def test_any_position_works_where_a_table_would_end(psat: PSAT) -> None:
    """Defect 10: positions are fractions, so that an axis of 600 slices is as good as one of 5."""
    position = (torch.arange(600) + 0.5)[None] / 600
    tokens = psat(torch.randn(1, 5, 2, 2, 2), torch.full((1, 600), 2), position)
    assert tokens.isfinite().all()
    assert (tokens[0, 1:] - tokens[0, :-1]).abs().amax(1).min() > 0


def test_a_block_is_torchs_decoder_layer_where_keys_are_values() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 12, 0.0)
    oracle = torch.nn.TransformerDecoderLayer(
        8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attention": "self_attn",
        "cross_attention": "multihead_attn",
        "ffn.0": "linear1",
        "ffn.3": "linear2",
        "self_norm": "norm1",
        "cross_norm": "norm2",
        "ffn_norm": "norm3",
    }
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {}
    for name, value in block.state_dict().items():
        start = next(n for n in names if name.startswith(n + "."))
        state[names[start] + name.removeprefix(start)] = value
    oracle.load_state_dict(state)
    query, memory = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 8)
    found = block(query, memory, memory)
    for i in range(3):  # a slice's queries attend to each other
        assert torch.allclose(found[:, i], oracle(query[:, i], memory), atol=1e-5)


def test_a_block_weighs_values_by_keys() -> None:
    torch.manual_seed(0)
    block = Block(8, 1, 12, 0.0).eval()
    query, keys, values = torch.randn(1, 1, 1, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    with torch.no_grad():  # a query on its own attends to itself
        start = query[0, 0] + block.self_attention.out_proj(
            block.self_norm(query[0, 0]) @ block.self_attention.in_proj_weight[16:].mT
        )
        wq, wk, wv = block.cross_attention.in_proj_weight.chunk(3)
        score = block.cross_norm(start) @ wq.mT @ (keys[0] @ wk.mT).mT / math.sqrt(8)
        read = block.cross_attention.out_proj(score.softmax(1) @ (values[0] @ wv.mT))
        expected = start + read
        expected = expected + block.ffn(block.ffn_norm(expected))
        assert torch.allclose(block(query, keys, values)[0, 0], expected, atol=1e-5)


def test_tokens_equal_the_steps_written_out(psat: PSAT) -> None:
    features, (plane, position) = torch.randn(2, 5, 3, 2, 4), slices(2, 3)
    values = psat.to_memory(features.flatten(2).mT)
    grid = [
        [(x + 0.5) / 3, (y + 0.5) / 2, (z + 0.5) / 4]
        for x in range(3)
        for y in range(2)
        for z in range(4)
    ]

    def waves(t: float) -> list[float]:
        angles = [math.pi * 2**octave * t for octave in range(6)]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    codes = torch.tensor([[w for t in place for w in waves(t)] for place in grid])
    keys = values + codes @ psat.where.weight.mT
    for b in range(2):
        for s in range(3):
            code = torch.zeros(3, 12)
            code[plane[b, s]] = torch.tensor(waves(float(position[b, s])))
            start = psat.plane.weight[plane[b, s]] + code.flatten() @ psat.where.weight.mT
            query = (start + psat.queries)[None, None]
            for block in psat.blocks:
                query = block(query, keys[b : b + 1], values[b : b + 1])
            expected = psat.to_token(query[0, 0].mean(0))
            assert torch.allclose(psat(features, plane, position)[b, s], expected, atol=1e-4)


def test_defaults_are_those_of_the_docs() -> None:
    psat = PSAT(4)
    assert psat.queries.shape == (4, 256) and len(psat.blocks) == 2 and psat.out_channels == 256
    assert psat.to_token[1].out_features == 256 and psat.where.bias is None
    block = psat.blocks[0]
    assert block.self_attention.num_heads == block.cross_attention.num_heads == 8
    assert (block.ffn[0].out_features, block.ffn[2].p, block.self_attention.dropout) == (512, 0, 0)
    assert SlabPooling(4).to_token[1].out_features == SlabPooling(4).out_channels == 256


def test_dropout_is_in_attention_and_feed_forward() -> None:
    block = PSAT(4, hidden=16, dropout=0.3).blocks[0]
    assert block.ffn[2].p == block.self_attention.dropout == block.cross_attention.dropout == 0.3


def test_ffn_has_the_width_it_was_given() -> None:
    """Defect 1: heads were passed in the width's place."""
    assert PSAT(4, hidden=16, heads=8, ffn=40).blocks[0].ffn[0].out_features == 40


def test_paper_sizes_are_arguments() -> None:
    psat = PSAT(4, 512, 768, layers=6, heads=8, queries=300, ffn=1024, dropout=0.1, readout="first")
    assert (len(psat.blocks), psat.queries.shape) == (6, (300, 768))


def test_first_readout_reads_the_first_query() -> None:
    torch.manual_seed(0)
    psat = PSAT(4, 8, 16, 0, 4, 2, 8, readout="first")
    features, question = torch.randn(1, 4, 2, 2, 2), slices(1, 1)
    before = psat(features, *question)
    with torch.no_grad():
        psat.queries[1] += 5
    assert torch.equal(psat(features, *question), before)


def test_gradient_reaches_features_and_every_parameter(psat: PSAT) -> None:
    features = torch.randn(2, 5, 2, 3, 2, requires_grad=True)
    psat(features, torch.tensor([[0, 1, 2]] * 2), torch.rand(2, 3)).square().sum().backward()
    assert features.grad is not None and (features.grad != 0).any()
    silent = [name for name, p in psat.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_unknown_readout_and_uneven_heads_are_errors() -> None:
    with pytest.raises(ValueError, match="readout must be 'mean' or 'first', got 'last'"):
        PSAT(4, readout="last")
    with pytest.raises(ValueError, match="hidden must be divisible by heads, got 10 and 4"):
        PSAT(4, hidden=10, heads=4)


def test_without_positions_all_slices_of_a_plane_get_one_token() -> None:
    torch.manual_seed(0)
    psat = PSAT(5, 7, 16, 1, 4, 2, 8, positions=False)
    tokens = psat(torch.randn(1, 5, 3, 2, 4), torch.tensor([[2, 2, 0]]), torch.rand(1, 3))
    assert torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-6)
    assert (tokens[:, 0] - tokens[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_pooling_is_the_mean_of_the_slice_that_is_cut(plane: int) -> None:
    pooling, features = SlabPooling(5, 7), torch.randn(2, 5, 3, 4, 6)
    n = features.shape[2 + plane]
    position = (torch.arange(n) + 0.5)[None].expand(2, n) / n
    token = pooling(features, torch.full((2, n), plane), position)
    for i in range(n):
        mean = features.select(2 + plane, i).mean((2, 3))
        assert torch.allclose(token[:, i], pooling.to_token(mean), atol=1e-5)


def test_between_rows_pooling_interpolates_as_numpy_does() -> None:
    rows, position = torch.randn(1, 5, 3), torch.cat((torch.rand(1, 40), torch.eye(2)[:1]), 1)
    found = interpolated(rows, position)
    centres = (np.arange(5) + 0.5) / 5
    for c in range(3):
        expected = np.interp(position[0].numpy(), centres, rows[0, :, c].numpy())
        assert np.allclose(found[0, :, c].numpy(), expected, atol=1e-5)


def test_pooling_of_a_slice_is_independent_of_the_others() -> None:
    pooling, features = SlabPooling(4, 6), torch.randn(1, 4, 1, 5, 3)
    plane, position = torch.tensor([[0, 1, 2, 1]]), torch.rand(1, 4)
    tokens = pooling(features, plane, position)
    for i in range(4):
        alone = pooling(features, plane[:, i : i + 1], position[:, i : i + 1])
        assert torch.allclose(alone[:, 0], tokens[:, i], atol=1e-6)
    features[..., 2] += 9  # the last of three planes; a slice in the first does not depend on it
    low = pooling(features, torch.tensor([[2]]), torch.tensor([[0.1]]))
    features[..., 2] -= 9
    assert torch.allclose(
        pooling(features, torch.tensor([[2]]), torch.tensor([[0.1]])), low, atol=1e-5
    )


def test_pooling_passes_gradient_to_features_and_weights() -> None:
    pooling, features = SlabPooling(4, 6), torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    pooling(features, torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.5]])).square().sum().backward()
    assert features.grad is not None and features.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in pooling.parameters())


def test_mixed_precision_tells_all_slices_of_a_plane_apart() -> None:
    torch.manual_seed(0)
    position = ((torch.arange(300) + 0.5) / 300)[None]
    plane, features = torch.full((1, 300), 2), torch.randn(1, 8, 4, 4, 60).cumsum(-1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens = PSAT(8, 16).eval()(features.bfloat16(), plane, position)[0]
    assert len(tokens.unique(dim=0)) > 290
