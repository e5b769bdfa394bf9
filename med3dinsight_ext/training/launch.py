"""Bundles run in this process, as ``python -m monai.bundle run`` runs them in another."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.overrides import TRACKING, check_overrides


def bundle_run(bundle: str | Path, overlays: Sequence[str], **overrides: Any) -> ConfigWorkflow:
    """``launch`` with the overrides as arguments."""
    return launch(bundle, overlays, overrides)


def launch(
    bundle: str | Path,
    overlays: Sequence[str],
    overrides: Mapping[str, Any],
    quiet: bool = False,
    verbose: bool = False,
) -> ConfigWorkflow:
    """Run a bundle, printing the command that does the same.

    Args:
        bundle: its folder, or its name in bundles/.
        overlays: config files in its configs/ or with an absolute path; the later ones win. The
            files that bundles share follow train.json.
        overrides: key to value; ``tracking`` may be "mlflow" or "wandb" for the settings of these
            bundles.
        quiet: print warnings and errors alone.
        verbose: print the messages of ignite and MONAI too.

    Raises:
        ValueError: an override names no key of the configs, or has another form than its value.
    """
    own = Path(bundle) / "configs"  # a run may be called as a bundle is
    configs = own if own.is_dir() else bundles_dir() / bundle / "configs"
    files = [path for name in overlays for path in with_shared(str(configs / name))]
    if (tracking := overrides.get("tracking")) in TRACKING:
        overrides = {**overrides, "tracking": str(bundles_dir() / TRACKING[tracking])}
    short = [os.path.relpath(file) for file in files]
    config = short[0] if len(files) == 1 else f"[{','.join(map(repr, short))}]"
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    if not quiet:
        shown = " ".join(quoted(word) for word in words)
        print(
            f"\n$ python -m monai.bundle run --config_file {quoted(config)} {shown}\n", flush=True
        )
    try:
        check_overrides(["--config_file", str(files), *words])
    except SystemExit as error:
        raise ValueError(str(error)) from None
    if not verbose:
        logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    logging_file = str(configs / "logging.conf")
    workflow = ConfigWorkflow(files, logging_file=logging_file, workflow_type="train", **overrides)
    if verbose:
        logging.getLogger("ignite").setLevel(logging.INFO)
    if quiet:
        logging.getLogger().setLevel(logging.WARNING)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def quoted(value: object) -> str:
    """A value for a shell: bare, in double quotes, or as ``shlex`` quotes it.

    Examples:
        >>> print(quoted("['a.json','b.yaml']"), quoted("$torch.device(0)"))
        "['a.json','b.yaml']" '$torch.device(0)'
    """
    text = str(value)
    if re.fullmatch(r"[\w./:-]+", text):
        return text
    return shlex.quote(text) if set(text) & set('$`"\\!') else f'"{text}"'
