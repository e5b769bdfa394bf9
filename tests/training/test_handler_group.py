"""Handlers under names."""

from __future__ import annotations

from typing import Any

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from running import BUNDLES, merged

from med3dinsight_ext.training.handler_group import HandlerGroup

ORDERS = {
    "pretrain": ["epoch_seed", "lr_schedule", "stop_on_nan", "validation"],
    "seg-finetune": ["epoch_seed", "freeze_encoder", "lr_schedule", "stop_on_nan", "ema",
                     "validation"],
    "cls-finetune": ["epoch_seed", "linear_probe_init", "freeze_encoder", "lr_schedule",
                     "stop_on_nan", "ema", "validation"],
}  # fmt: skip
LOGS = {
    "pretrain": ["tensorboard", "progress", "history", "pictures"],
    "seg-finetune": ["pictures", "tensorboard", "progress", "history"],
    "cls-finetune": ["tensorboard", "progress", "history"],
}


class Log:
    """A handler that appends its name to a list at the end of each epoch."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.seen.append(self.name))


def logged(changes: dict[str, Any]) -> list[str]:
    """Names of the handlers that one epoch calls, in their order."""
    seen: list[str] = []
    names = ("first", "second", "third")
    config: dict[str, Any] = {
        "train_handlers": {
            name: {"_target_": "test_handler_group.Log", "name": name, "seen": "$@seen()"}
            for name in names
        },
        "seen": "$lambda: LOG",
        "group": {
            "_target_": "med3dinsight_ext.training.handler_group.HandlerGroup",
            "handlers": "@train_handlers",
        },
    }
    parser = ConfigParser(config)
    parser.globals["LOG"] = seen
    for key, value in changes.items():
        parser.set(value, key)
    group = parser.get_parsed_content("group")
    assert isinstance(group, HandlerGroup)
    engine = Engine(lambda engine, batch: None)
    group.attach(engine)
    engine.run([0], max_epochs=1)
    return seen


def test_handlers_run_in_the_order_of_the_mapping() -> None:
    assert logged({}) == ["first", "second", "third"]


def test_an_overlay_disables_a_handler_by_name() -> None:
    assert logged({"train_handlers::second::_disabled_": True}) == ["first", "third"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_bundles_attach_their_handlers_in_order(bundle: str) -> None:
    config = merged(bundle, "train.json")
    expected = [*ORDERS[bundle], *LOGS[bundle]]
    assert list(config["train_handlers"]) == expected
    (group,) = config["train"]["handlers"]  # MONAI Label reads a list of components
    assert group["_target_"].endswith("HandlerGroup") and group["handlers"] == "@train_handlers"
