from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import med3dinsight_ext

# Run inside MONAI Label's own environment, or when imported.
ELSEWHERE = ("med3dinsight_ext.monailabel.app", "med3dinsight_ext.__main__")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(med3dinsight_ext.__path__, "med3dinsight_ext.")
    if not module.name.startswith(ELSEWHERE)
] + ["med3dinsight_ext"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_core_has_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    found = {test.name for module in modules for test in finder.find(module) if test.examples}
    names = {
        "cosine_loss",
        "info_nce_loss",
        "siglip_loss",
        "partial_transport_loss",
        "masked_mse",
        "regression_loss",
        "DeepSupervision",
        "AlignmentLoss",
        "solve",
        "PSAT",
        "Student",
        "Classifier",
        "Store",
        "window",
        "choose",
        "cut",
        "bootstrap",
        "scores",
        "case_scores",
        "Retrieval",
    }
    assert not names - {name.rpartition(".")[2] for name in found}
