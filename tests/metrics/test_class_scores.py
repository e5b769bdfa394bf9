from __future__ import annotations

import pytest
import torch

from med3dinsight_ext.metrics.classification import class_scores


def test_class_scores_of_hand_made_cases() -> None:
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    got = class_scores(probability, torch.tensor([0, 0, 0, 1]))
    assert got == {
        "balanced_accuracy": pytest.approx((2 / 3 + 0) / 2),
        "auroc": pytest.approx(2 / 3),
    }


def test_class_scores_skip_a_class_that_is_absent() -> None:
    probability = torch.eye(3)[[0, 1, 1]]
    got = class_scores(probability, torch.tensor([0, 1, 1]))
    assert got == {"balanced_accuracy": 1.0, "auroc": 1.0}


def test_one_class_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"two classes, got only class \[1\]"):
        class_scores(torch.rand(3, 2), torch.ones(3, dtype=torch.long))


def test_a_class_never_fitted_is_an_error() -> None:
    with pytest.raises(ValueError, match="among the 2 classes fitted, got class 2"):
        class_scores(torch.rand(3, 2), torch.tensor([0, 1, 2]))
