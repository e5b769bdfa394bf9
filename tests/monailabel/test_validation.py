"""The split of labelled cases for a round of training."""

from __future__ import annotations

from typing import Any

import pytest

from med3dinsight_ext.data.patients import place
from med3dinsight_ext.monailabel.app.validation import validation_split


def cases(count: int, values: set[int] | None = None) -> list[dict[str, Any]]:
    """Cases of patients 0, 1, 0, 1, 2, 3 and so on."""
    patients = [str(n % 2 if n < 4 else n - 2) for n in range(count)]
    return [
        {"image": str(n), "patient": patient, "values": values or {0, 1}}
        for n, patient in enumerate(patients)
    ]


def names(part: list[dict[str, Any]]) -> set[str]:
    return {item["image"] for item in part}


def test_no_label_that_is_added_moves_a_case_from_training_to_validation() -> None:
    trained: set[str] = set()
    held: set[str] = set()
    for count in range(2, 60):
        train, validation = map(names, validation_split(cases(count), 0.2))
        assert not trained & validation and train | validation == names(cases(count))
        trained, held = trained | train, validation
    assert held == {item["image"] for item in cases(59) if place(item["patient"]) < 0.2}
    assert 4 < len(held) < 25


def test_the_cases_of_a_patient_stay_in_one_part() -> None:
    train, validation = validation_split(cases(40), 0.5)
    assert validation and not {i["patient"] for i in train} & {i["patient"] for i in validation}


def test_one_patient_and_a_share_of_0_have_no_validation() -> None:
    same = [{**item, "patient": "p"} for item in cases(3)]
    assert validation_split(same, 0.9) == (same, [])
    assert validation_split(cases(9), 0) == (cases(9), [])


def test_something_is_left_to_train_on() -> None:
    train, validation = validation_split(cases(2), 0.99)
    assert len(train) == len(validation) == 1


def test_a_validation_without_a_class_is_none_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert validation_split(cases(20, {0}), 0.2) == (cases(20, {0}), [])
    assert "no case is for validation; the last epoch is kept" in caplog.text
    for patient in {item["patient"] for item in cases(20)}:  # the only one with the class
        items = [{**i, "values": {0, int(i["patient"] == patient)}} for i in cases(20)]
        train, validation = validation_split(items, 0.2)
        assert patient in {item["patient"] for item in validation} and train


def test_a_share_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"val_split must be in \[0, 1\), .* got 1.5"):
        validation_split(cases(3), 1.5)
