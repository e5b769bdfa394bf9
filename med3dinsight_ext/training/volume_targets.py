"""Volume-level teaching: the pooled features of a frozen 2D encoder as targets of whole volumes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dinsight_ext.data.settings import described
from med3dinsight_ext.embeddings.shards import (
    check_unchanged,
    merge_ranks,
    paths_of,
    rank_share,
    without,
)
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.errors import causes
from med3dinsight_ext.io.files import HashMemo, keyed_path, write_atomic
from med3dinsight_ext.io.remote import local_path
from med3dinsight_ext.models.teacher_classifier import TeacherFeatures

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when this file changes what is stored


class VolumeTargets:
    """``TeacherFeatures`` of each volume, standardised over all, kept in files.

    Args:
        root: of the files, one a volume.
        features: of a volume as the network gets it.
        transforms: from an item to its image (1, x, y, z) in [0, 1], without chance.
        device: where the encoder runs.
    """

    def __init__(
        self,
        root: str | Path,
        features: TeacherFeatures,
        transforms: Sequence[Any],
        device: torch.device | str = "cpu",
    ) -> None:
        self.root = local_path(root, "store_dir")
        self.features, self.load = features, Compose(transforms)
        self.device = torch.device(device)
        self._made = [FORMAT, features.fingerprint().hex(), described(list(transforms))]
        self._hashes = HashMemo(self.root / "files.jsonl")

    def fill(self, items: Sequence[dict[str, Any]], skip_bad: bool = False) -> list[dict[str, Any]]:
        """The good items, each with ``content``, a hash of its image, and features as ``label``.

        Features are (d,), of mean 0 and variance 1 over all items.

        Args:
            items: image and modality.
            skip_bad: leave bad volumes out with a warning, instead of raising.

        Raises:
            ValueError: fewer than two items, as one volume has no variance; or volumes are bad.
        """
        if len(items) < 2:
            raise ValueError(
                f"volumes must be two or more for volume-level teaching, got {len(items)}; add some"
            )
        bad: dict[str, str] = {}
        paths = paths_of(items, range(len(items)), self._path, bad)
        own = [(items[n], paths[n]) for n in rank_share(len(items)) if n in paths]
        missing = [(item, path) for item, path in own if not path.exists()]
        for item, path in Bar(missing, "encode", unit="volume", disable=not missing):
            try:
                self._write(item, path)
            except (ValueError, RuntimeError) as error:  # transforms raise the latter
                cause = next((e for e in causes(error) if isinstance(e, ValueError)), None)
                if cause is None:
                    raise
                bad[str(item["image"])] = str(cause)
        self.features.teacher.free()
        good = without(items, merge_ranks(bad), skip_bad)
        kept = [n for n in paths if str(items[n]["image"]) in good]
        rows = torch.stack([load_file(paths[n])["features"] for n in kept])
        rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)
        contents = ("".join(self._hashes.content(str(items[n]["image"]))) for n in kept)
        return [
            {**items[n], "label": row, "content": content}
            for n, row, content in zip(kept, rows, contents, strict=True)
        ]

    def _path(self, item: dict[str, Any]) -> Path:
        content = self._hashes.content(str(item["image"]))
        made = [*self._made, *content, item.get("modality")]
        return keyed_path(self.root / "volumes", made, ".safetensors")

    @torch.no_grad()
    def _write(self, item: dict[str, Any], path: Path) -> None:
        volume = self.load(item)["image"].as_subclass(Tensor).to(self.device)
        check_unchanged(item, path, self._path)
        found = {"features": self.features(volume[None])[0].float().cpu().contiguous()}
        write_atomic(path, lambda draft: save_file(found, draft))
