"""Self-supervised adaptation of a 2D image encoder to slices, before it teaches.

Two random views of a slice are a pair (SimCLR, arXiv:2002.05709); no labels, no captions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, MapTransform, Randomizable
from monai.utils import MAX_SEED
from torch import Tensor, nn

from med3dinsight_ext.data.slicing import PLANES, plane_number
from med3dinsight_ext.embeddings.grids import read_slices
from med3dinsight_ext.teachers.adapted import write_adapted
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.training.provenance import cases

logger = logging.getLogger(__name__)


def numbered(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items, each with its ``number``.

    Raises:
        ValueError: there is none.
    """
    if not items:
        raise ValueError("volumes must be one or more to adapt a teacher, got none; check split")
    return [{**item, "number": number} for number, item in enumerate(items)]


class CutSlicesd(MapTransform):
    """The slices of a volume as the teacher sees them, (s, 3, size, size) uint8.

    Args:
        keys: "image", the path of a volume.
        size: pixels of a side.
        per_plane: slices drawn in each plane.
        planes: names of the planes.
        seed: of the draw.
    """

    def __init__(
        self,
        keys: str,
        size: int,
        per_plane: int,
        planes: Sequence[str] = PLANES,
        seed: int = 0,
    ) -> None:
        super().__init__(keys)
        self.settings = per_plane, seed, sorted({plane_number(p) for p in planes}), size

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        pictures = read_slices(data, *self.settings).pictures
        levels = (pictures * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return {**data, **dict.fromkeys(self.keys, levels)}


class RandViewsd(Randomizable, MapTransform):
    """Two random views of some of a volume's slices.

    Args:
        keys: slices (s, 3, size, size) uint8; replaced by (slices, 2, 3, size, size) in [0, 1].
        views: transforms of one slice (3, size, size) in [0, 1].
        slices: how many are drawn; with repeats where there are fewer.

    The volume's ``number`` and the slice's stand in ``label`` (slices, 2).
    """

    def __init__(self, keys: str, views: Sequence[Callable[..., Any]], slices: int) -> None:
        super().__init__(keys)
        self.views, self.slices = Compose(views), slices

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandViewsd:
        super().set_random_state(seed, state)
        self.views.set_random_state(int(self.R.randint(MAX_SEED, dtype="uint32")))
        return self

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        for key in self.keys:
            count = len(data[key])
            rows = torch.from_numpy(self.R.choice(count, self.slices, count < self.slices))
            pictures = data[key][rows].float() / 255
            pairs = [torch.stack([self._view(p), self._view(p)]) for p in pictures]
            data[key] = torch.stack(pairs)
            data["label"] = torch.stack([torch.full_like(rows, data["number"]), rows], 1)
        return data

    def _view(self, picture: Tensor) -> Tensor:
        return torch.as_tensor(self.views(picture)).as_subclass(Tensor).clamp(0, 1)


class ViewEncoder(nn.Module):
    """A teacher's image encoder, trainable, and a projection head behind it.

    The encoder stays in evaluation mode, as the teacher runs it: norms keep their statistics, which
    a batch of a few volumes would estimate badly.

    Args:
        teacher: its image tower is trained in place.
        device: where it computes.
        hidden: width of the head.
        dims: of the projection that the loss compares.

    Raises:
        ValueError: images and texts share the teacher's space, which the texts would not follow;
            its encoder is an adapted one; or there are several processes, whose slices would not
            be each other's negatives.
    """

    def __init__(
        self, teacher: Teacher, device: torch.device | str, hidden: int = 512, dims: int = 128
    ) -> None:
        super().__init__()
        if teacher.joint:
            raise ValueError(
                "teacher must have an image encoder apart from its text encoder to be adapted, got "
                "one space of both; choose teacher.bundled or teacher.pair"
            )
        if teacher.image.adapted:
            raise ValueError(
                "teacher must have its own weights to be adapted, got adapted ones; leave out "
                "teacher::weights"
            )
        if (ranks := idist.get_world_size()) > 1:
            raise ValueError(f"processes must be 1 to adapt a teacher, got {ranks}; leave torchrun")
        self.tower = teacher.on(device).image
        self.start = self.tower.name
        self.tower.fingerprint += "-in-training"  # its embeddings are no longer those of ``start``
        self.encoder = self.tower.model.requires_grad_(True)
        side = self.tower.size
        with torch.no_grad():
            width = self.tower.embed(torch.zeros(1, 3, side, side, device=device)).shape[1]
        head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dims))
        self.head = head.to(device)

    def train(self, mode: bool = True) -> ViewEncoder:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, views: Tensor) -> Tensor:
        """Projections (n, 2, dims) of views (…, 2, 3, size, size) in [0, 1]; n slices in all."""
        features = self.tower.embed(self.tower.normalised(views.flatten(0, -4)))
        return self.head(features).unflatten(0, (-1, 2))


class WriteAdapted:
    """Handler that writes the adapted weights at the end of the last epoch.

    It comes before ``last.ckpt`` of that epoch, so that a training that has ended has its file, and
    one that is started again leaves it as it is.

    Args:
        network: that is trained.
        loader: of its volumes.
        path: of the safetensors file.
        seed: of the training.
    """

    def __init__(self, network: ViewEncoder, loader: Any, path: str | Path, seed: int) -> None:
        self.network, self.loader, self.path, self.seed = network, loader, Path(path), seed

    def attach(self, engine: Engine) -> None:
        def last(engine: Engine, epoch: int) -> bool:
            return epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=last), self)

    def __call__(self, engine: Engine) -> None:
        loader = {"volumes": self.loader}
        about = {
            "tower": self.network.start,
            "seed": self.seed,
            "steps": engine.state.iteration,
            "volumes": cases(loader, {}, self.path.parent, hashed=True)["volumes"],
        }
        write_adapted(self.path, self.network.encoder, about)
        logger.info(f"wrote {self.path}; use it with --teacher::weights {self.path}")
