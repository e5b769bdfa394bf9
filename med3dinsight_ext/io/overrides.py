"""Checks of command-line overrides."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from med3dinsight_ext.io.configs import CHANGED, EVALUATED, missing_shared
from med3dinsight_ext.io.errors import advice
from med3dinsight_ext.io.remote import COPY, is_remote

RUN_ARGUMENTS = (  # of ``monai.bundle run`` itself
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking",
    "args_file", "workflow_name", "workflow_type",
)  # fmt: skip
LITERALS = {"true": "True", "false": "False", "null": "None", "none": "None"}
FOLDERS = ("bundle_root", "ckpt_dir", "output_dir", "store_dir", "prepared")  # written to
TRACKING = {"mlflow": "shared/mlflow.json", "wandb": "shared/wandb.json"}  # in bundles/


def check_overrides(arguments: Sequence[str] | None = None) -> None:
    """Stop if an override on the command line names a key that the configs do not have.

    MONAI adds an unknown key silently, so that ``--learning_rat 0.1`` trains at the default rate.
    Lists need lists, and sizes as many numbers, also in overlays: ``--patch_size 64`` would fail
    hours later.
    A folder that is written to is no address, which pathlib takes for a folder named ``s3:``.
    MONAI writes ``::`` for ``#`` in any text, so that a folder ``run#3`` would be another one.

    Args:
        arguments: of ``python -m monai.bundle run``; default: this process's.

    Raises:
        SystemExit: names the key, and the nearest one or what it takes; or an address; or a file
            that the bundles share and ``config_file`` lacks; or MONAI's own settings of
            ``tracking``. Not an error type, so that MONAI does not wrap it in "Failed to evaluate".
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given: dict[str, Any] = {}
    for here, after in zip(arguments, [*arguments, ""][1:], strict=True):
        if here.startswith("--"):
            name, _, value = here[2:].partition("=")
            given[name] = value or after
    if "config_file" not in given and "args_file" not in given:
        return
    extra = ConfigParser.load_config_file(given["args_file"]) if "args_file" in given else {}
    given = {**extra, **given}
    files = given["config_file"]
    if isinstance(files, str) and files.startswith("["):
        files = DefaultParseValue(files)  # as monai.bundle takes it
    config = ConfigParser.load_config_files(files)
    _check_overlays([files] if isinstance(files, str) else files)
    if missing := missing_shared(config):
        names = " and ".join(f"bundles/shared/{name}" for name in missing)
        raise SystemExit(f"config_file must name {names} after configs/train.json, got {files}")
    config = {**_tracking_keys(given.get("tracking")), **config}
    for name, value in given.items():
        if name in RUN_ARGUMENTS:
            continue
        word = LITERALS.get(str(value).lower())
        if word and word != str(value):  # arrives as text, which is true
            raise SystemExit(f"override must be written as in Python, got --{name} {value}; {word}")
        parts = name.replace("#", "::").split("::")
        node: Any = config
        for depth, part in enumerate(parts):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            elif depth and isinstance(node, dict) and "_target_" in node:
                break  # an argument that the config leaves at its default; the target checks it
            else:
                known = list(node) if isinstance(node, dict) else []
                hint = advice(part, known, "see the config's first lines")
                raise SystemExit(f"override must name a key of the config, got --{name}; {hint}")
        else:
            if isinstance(node, bool) and str(value).lower() in ("yes", "no", "on", "off"):
                raise SystemExit(f"override must be True or False, got --{name} {value}")
            given_text, value = value, DefaultParseValue(value) if isinstance(value, str) else value
            texts = value if isinstance(value, (list, tuple)) else [given_text]
            if not isinstance(value, dict) and any(map(_changes, texts)):
                raise SystemExit(
                    f"--{name} must not contain {CHANGED}, for which MONAI writes ::, got "
                    f"{given_text}; rename or reword it"
                )
            _check_list("override", f"--{name} {value}", name, value, node)
            if name in FOLDERS and is_remote(value):
                raise SystemExit(f"--{name} must be a path on this machine, got {value}; {COPY}")


def _tracking_keys(settings: object) -> dict[str, Any]:
    """Keys that a file of tracking settings adds to a config."""
    if not isinstance(settings, str):
        return {}
    if settings in TRACKING:
        raise SystemExit(
            f"tracking must be bundles/{TRACKING[settings]}, got {settings}: MONAI's own settings, "
            "if it has any, read the loss from a list, and trainers here give one dict; name that "
            "file"
        )
    return dict(ConfigParser.load_config_file(settings).get("configs", {}))


def _check_overlays(files: Sequence[str]) -> None:
    """Check the lists of each file against the files before it."""
    before: dict[str, Any] = {}
    for file in files:
        content = ConfigParser.load_config_file(file)
        for name, value in content.items():
            _check_list(name, f"{name}: {value} in {file}", name, value, before.get(name))
        before |= content


def _check_list(what: str, given: str, name: str, value: Any, default: Any) -> None:
    """A key whose default is a list takes one; of numbers, unless it is a network's, as many.

    Args:
        what: for the message.
        given: for the message: the value and where it stands.
        name: of the key.
        value: to check.
        default: that the value replaces.
    """
    if not isinstance(default, list) or _is_expression(value):
        return
    numbers = bool(default) and all(isinstance(x, (int, float)) for x in default)
    if not isinstance(value, (list, tuple)):
        rule = "be a list"
    elif numbers and "::" not in name and len(value) != len(default):
        rule = f"have {len(default)} numbers"
    elif numbers and not all(isinstance(x, (int, float)) or _is_expression(x) for x in value):
        rule = "be a list of numbers"
    else:
        return
    shown = str(default).replace(" ", "") if numbers else default or [value]
    raise SystemExit(f"{what} must {rule}, got {given}; write it like {shown}")


def _changes(text: Any) -> bool:
    """Whether MONAI writes something else for a text that is no reference."""
    return isinstance(text, str) and CHANGED in text and not text.startswith(EVALUATED)


def _is_expression(value: Any) -> bool:
    """Whether MONAI evaluates it: ``$…`` and ``@…``."""
    return str(value).startswith(("$", "@"))
