"""Segmentations as files, whole or not at all, and the names of what is written of images."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter
from monai.transforms import SaveImaged

from med3dinsight_ext.io.files import volume_stem, write_atomic

logger = logging.getLogger(__name__)


class OutputStems:
    """Paths, without an ending, of what is written of images; no two images share one.

    Args:
        folder: of the files; it gets the subfolders that the images have below ``root``.
        root: folder of the images; others are named by their file alone.
    """

    def __init__(self, folder: str | Path, root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        # Links keep their own names: those of git-annex lead to a file named by a hash.
        self.root = None if root is None else Path(os.path.abspath(root))
        self._images: dict[Path, str] = {}

    def __call__(self, image: str) -> Path:
        """Stem of an image's files.

        Raises:
            ValueError: it is that of another image.
        """
        parent = Path(os.path.abspath(image)).parent
        below = self.root is not None and parent.is_relative_to(self.root)
        folder = parent.relative_to(self.root) if below and self.root else Path()
        stem = self.folder / folder / volume_stem(image)
        if self._images.setdefault(stem, image) != image:
            raise ValueError(
                f"images must have names of their own, got {self._images[stem]} and {image}, both "
                f"{stem.name}; give the folder above them as dataset_dir"
            )
        return stem


class WholeWriter(NibabelWriter):
    """Writes beside the file's place first, so that no part of a file ever has its name."""

    def write(self, filename: Any, verbose: bool = False, **obj_kwargs: Any) -> None:
        write = super().write
        write_atomic(Path(filename), lambda draft: write(draft, **obj_kwargs), ".nii.gz")
        if verbose:
            logger.info(f"wrote {filename}")


class SaveSegmentationd(SaveImaged):
    """``SaveImaged`` by ``WholeWriter``, under the names of ``OutputStems``.

    Args:
        keys: of the segmentations.
        output_dir: folder of the files.
        root: of the images; see ``OutputStems``.
        **settings: more of ``SaveImaged``.

    Raises:
        ValueError: the folder cannot be written, where MONAI's error would advise to install a
            writer; or two images have one name.
    """

    def __init__(
        self, keys: Any, output_dir: str | Path, root: str | Path | None = None, **settings: Any
    ) -> None:
        stems = OutputStems(output_dir, root)

        def name(meta: Mapping[str, Any], saver: Any) -> dict[str, Any]:
            # With an ending, as MONAI cuts one off, and the folder of a series may have dots.
            return {"subject": f"{stems(str(meta['filename_or_obj']))}.nii.gz", "idx": None}

        own = {"separate_folder": False, "data_root_dir": output_dir, "output_name_formatter": name}
        super().__init__(keys, output_dir=output_dir, writer=WholeWriter, **own | settings)
        self.folder = output_dir

    def __call__(self, data: Any) -> Any:
        try:
            return super().__call__(data)
        except (OSError, RuntimeError) as error:  # MONAI keeps only the text of the writer's error
            cause = re.search(r"\[Errno \d+\].*$", str(error).strip())
            if cause is None:
                raise
            raise ValueError(
                f"output_dir must be a folder that can be written, got {cause[0]} in "
                f"{self.folder}; free space or correct its rights, and start again"
            ) from error
