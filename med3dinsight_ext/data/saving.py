"""Segmentations as files, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter
from monai.transforms import SaveImaged

from med3dinsight_ext.io.files import volume_stem, write_atomic

logger = logging.getLogger(__name__)


def output_name(meta: Mapping[str, Any], saver: Any) -> dict[str, Any]:
    """MONAI's ``output_name_formatter``: a series folder's name may have dots, and no ending."""
    return {"subject": f"{volume_stem(meta['filename_or_obj'])}.nii.gz", "idx": None}


class WholeWriter(NibabelWriter):
    """Writes beside the file's place first, so that no part of a file ever has its name."""

    def write(self, filename: Any, verbose: bool = False, **obj_kwargs: Any) -> None:
        write = super().write
        write_atomic(Path(filename), lambda draft: write(draft, **obj_kwargs), ".nii.gz")
        if verbose:
            logger.info(f"wrote {filename}")


class SaveSegmentationd(SaveImaged):
    """``SaveImaged`` by ``WholeWriter``, in one folder and under the images' names.

    Args:
        keys: of the segmentations.
        output_dir: folder of the files.
        **settings: more of ``SaveImaged``.

    Raises:
        ValueError: the folder cannot be written. MONAI's error would advise to install a writer.
    """

    def __init__(self, keys: Any, output_dir: str | Path, **settings: Any) -> None:
        own = {"separate_folder": False, "output_name_formatter": output_name}
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
