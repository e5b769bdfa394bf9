"""A folder of images, and the checks of labels that all datastores have in common."""

from __future__ import annotations

import errno
import filecmp
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore import local
from monailabel.datastore.local import LocalDatastore
from watchdog.events import FileSystemMovedEvent

from med3dinsight_ext.data.labels import read_label
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.monailabel.app.answers import NAME, AnswerLog
from med3dinsight_ext.monailabel.app.requests import STORED, check_extension, check_name
from med3dinsight_ext.monailabel.app.segments import described, renumber

logger = logging.getLogger(__name__)
CLASSES = "classes"  # of a label, in its information: the value is the index
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def copy(source: str, target: str) -> None:
    """Replace a file as a whole: a training may be reading it, or the disk may be full."""
    write_atomic(Path(target), lambda draft: shutil.copyfile(source, draft))


local.shutil = SimpleNamespace(copy=copy)


@contextmanager
def refused(prefix: str = "") -> Iterator[None]:
    """Answer 400 where a check fails, and 507 where a disk is full."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, f"{prefix}{error}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        text = f"disk must have room, got {error}; nothing was saved, free some and save again"
        raise HTTPException(507, text) from error


class LabelChecks:
    """Refuses labels that do not fit their image, and logs those that it saves."""

    names: list[str]
    changes = threading.RLock()  # the watcher of files has a thread of its own
    _datastore_path: str  # of the labels

    @property
    def log(self) -> AnswerLog:
        return AnswerLog(Path(self._datastore_path) / NAME)

    def segments(self, values: set[int], tag: str) -> list[dict[str, str]]:
        """Names of the segments in a label with these values; the nth is that of the value n."""
        return [{"name": name} for name in self.names[1:]]

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; answer 404 without its image, and 400 where it does not fit.

        Where ``label_info`` names the segments, their values become those of the classes.
        """
        store: Any = super()
        image = self.get_image_uri(image_id)  # type: ignore[attr-defined]
        if not image:
            raise HTTPException(404, f"image must be one of the datastore's, got {image_id!r}")
        with refused():
            check_extension(label_filename, "label")
            check_name(label_tag, "tag")
        with tempfile.TemporaryDirectory() as folder:
            with refused("refused, nothing was saved: "):
                if given := label_info.get("label_info"):
                    draft = Path(folder) / "label.nii.gz"
                    if renumber(label_filename, given, self.names, draft):
                        label_filename = str(draft)
                values = read_label({"image": image, "label": label_filename}, self.names)
                segments = described(self.segments(values, label_tag), given)
                info = label_info | {"label_info": segments, CLASSES: self.names}
            with refused(), self.changes:
                self._init_from_datastore_file()  # type: ignore[attr-defined]
                found: str = store.save_label(image_id, label_filename, label_tag, info)
        self.log.add(image=image_id, saved=label_tag, annotator=label_info.get("client_id"))
        return found

    def watch(self) -> None:
        """Take in files that other processes rename into place; MONAI Label sees only new ones."""
        if handler := getattr(self, "_handler", None):
            handler.on_moved = self._moved

    def _moved(self, event: FileSystemMovedEvent) -> None:
        store: Any = self
        path = Path(str(event.dest_path))
        with self.changes:
            store._init_from_datastore_file()
            item = store._datastore.objects.get(store._to_id(path.name)[0])
            places = {Path(store._datastore.image_path())}
            places |= {
                Path(store._datastore.label_path(tag)) for tag in (item.labels if item else ())
            }
            known = path.parent in places if item else path == Path(store._datastore_config_path)
            if not known:
                store.refresh()

    def refresh(self) -> None:
        with self.changes:
            super().refresh()  # type: ignore[misc]


class CheckedDatastore(LabelChecks, LocalDatastore):
    """A folder of images.

    Args:
        studies: the folder.
        names: of the classes; the label value is the index.
    """

    def __init__(self, studies: str, names: list[str]) -> None:
        self.names = names
        super().__init__(
            studies,
            extensions=["*.nii.gz", "*.nii"],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )
        self.watch()
        images: dict[str, list[str]] = {}
        for file in sorted(self._list_files(self._datastore.image_path(), self._extensions)):
            images.setdefault(self._to_id(file)[0], []).append(file)
        for name, files in images.items():
            if len(files) > 1:
                logger.warning("of %s one is image %s; rename others", ", ".join(files), name)

    def _to_id(self, file: str) -> tuple[str, str]:
        """Name of an image and its ending, which MONAI Label would cut out of the middle, too."""
        found = [e[1:] for e in self._extensions if file.endswith(e[1:])]
        ending = max(found, key=len) if found else ""
        return (file.removesuffix(ending), ending) if ending else super()._to_id(file)

    def _update_datastore_file(self, lock: bool = True) -> None:
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        path = Path(self._datastore_config_path)
        with FileLock(self._lock_file) if lock else nullcontext():
            self._ignore_event_config = True
            write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))
            self._config_ts = path.stat().st_mtime

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Save an image; answer 400 where its name is not a plain one, or another image's."""
        with refused():
            check_extension(image_filename, "image")
            if image_id:
                check_name(image_id, "image")
        name = image_id or self._to_id(Path(image_filename).name)[0]
        with self.changes:
            self._init_from_datastore_file()
            there = self.get_image_uri(name)
            if there and not filecmp.cmp(there, image_filename, shallow=False):
                raise HTTPException(
                    400,
                    f"image must have a new name, got {name!r}, which is another image here; "
                    "nothing was saved, choose another name",
                )
            return super().add_image(image_id, image_filename, image_info)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """As ``LabelChecks.save_label``; it replaces a file with another ending, too."""
        found = super().save_label(image_id, label_filename, label_tag, label_info)
        with self.changes:
            saved = Path(self.get_label_uri(image_id, label_tag))
            for ending in STORED:
                if (other := saved.with_name(f"{image_id}{ending}")) != saved:
                    other.unlink(missing_ok=True)
        return found
