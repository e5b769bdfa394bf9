"""Import hook that lets MONAI Label 0.8.5 run beside a CPU build of torch and beside pydicom 3.

- torchvision registers Python implementations for operators that only its compiled part defines.
  That part does not load beside a torch it was not compiled for, and there is no CPU build of it
  on PyPI; MONAI Label uses nothing of it. So the operators are defined before torchvision is
  imported, and are left alone if it defined them itself.
- pydicom_seg imports ``pydicom._storage_sopclass_uids``, which pydicom 3 no longer has; the UIDs
  themselves are still in ``pydicom.uid``.

Both work as an import hook, so that an interpreter that imports neither pays nothing. MONAI Label
starts its trainings as processes of its own: the hook has to be in all of an environment's
interpreters. ``label-install`` writes ``HOOK`` into that environment's site-packages, and no other
place imports this module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from med3dinsight_ext.io import torchvision_operators

HOOK = (
    "import importlib.util; importlib.util.find_spec('med3dinsight_ext') "
    "and importlib.import_module('med3dinsight_ext.monailabel.app.compatibility').install()\n"
)
UIDS = "pydicom._storage_sopclass_uids"


def install() -> None:
    """Put the hook in front of the other importers, once."""
    if not any(isinstance(finder, Repairs) for finder in sys.meta_path):
        sys.meta_path.insert(0, Repairs())


class Repairs(MetaPathFinder, Loader):
    """Defines operators when torchvision is imported, and makes the module of UIDs."""

    def __init__(self) -> None:
        self.library: object = None  # operators are gone when it is

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self.library is None:
            self.library = define_operators()
        if fullname == UIDS:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        import pydicom.uid

        names = [name for name in dir(pydicom.uid) if name.endswith("Storage")]
        vars(module).update({name: getattr(pydicom.uid, name) for name in names})


def define_operators() -> object:
    """Declare torchvision's operators, unless its compiled part works and will do so."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return ()
    return torchvision_operators.define_operators()
