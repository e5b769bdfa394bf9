"""Command line: a command's module is imported when the command runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

from fire import Fire
from fire.core import FireExit
from fire.decorators import SetParseFn
from fire.parser import DefaultParseValue

from med3dinsight_ext import __version__
from med3dinsight_ext.io.errors import TRACEBACK, advice, wrong_input

PROGRAM = "python -m med3dinsight_ext"
COMMANDS = {
    "plan": "med3dinsight_ext.workflows.plan",
    "pretrain": "med3dinsight_ext.workflows.pretrain",
    "finetune": "med3dinsight_ext.workflows.finetune",
    "predict": "med3dinsight_ext.workflows.predict",
    "evaluate": "med3dinsight_ext.workflows.evaluate",
    "ask": "med3dinsight_ext.slice_tokens.ask",
    "quickstart": "med3dinsight_ext.quickstart.quickstart",
    "doctor": "med3dinsight_ext.doctor.doctor",
    "split": "med3dinsight_ext.data.manifests.split",
    "bundles": "med3dinsight_ext.io.bundles.bundles",
    "init": "med3dinsight_ext.io.bundles.init",
    "captions": "med3dinsight_ext.reports.caption_page.captions",
    "transfer-report": "med3dinsight_ext.training.transfer.transfer_report",
    "label": "med3dinsight_ext.monailabel.server.label",
    "label-install": "med3dinsight_ext.monailabel.server.install",
    "label-bundle": "med3dinsight_ext.monailabel.label_bundle.label_bundle",
    "publish": "med3dinsight_ext.publishing.publish.publish",
    "verify": "med3dinsight_ext.publishing.verify.verify",
    "export": "med3dinsight_ext.publishing.export.export",
    "push": "med3dinsight_ext.publishing.push.push",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: default: this process's.

    Raises:
        SystemExit: 2 for an unknown command or flag, 1 for wrong input.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), "--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        stop(2, f"unknown command {name}", advice(name, COMMANDS, f"see {PROGRAM} --help"))
    else:
        if not sys.stderr.isatty():  # in a file the bars of libraries are noise
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        given = parsed(name, rest[:-1])
        module, _, function = COMMANDS[name].rpartition(".")
        named = definition(name).args
        order = [argument.arg for argument in named.args] if named.vararg else []
        listed = [given.pop(key) for key in order]
        listed += given.pop(named.vararg.arg) if named.vararg else ()
        try:
            getattr(importlib.import_module(module), function)(*listed, **given)
        except Exception as error:
            if (shown := wrong_input(error)) is None:
                raise
            stop(1, str(shown))


def usage() -> str:
    """Help on all commands, from the first lines of their docstrings."""
    lines = [
        f"{name:<17}{(ast.get_docstring(definition(name)) or '').splitlines()[0]}"
        for name in COMMANDS
    ]
    end = f"{PROGRAM} COMMAND --help shows the arguments; {TRACEBACK}=1 shows tracebacks"
    return "\n".join([f"{PROGRAM} COMMAND ...", "", *lines, "", end])


def parsed(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a command, which is parsed but not imported.

    Raises:
        SystemExit: after help, or for a missing or unknown argument.
    """
    node = definition(name)
    known = [f"--{argument.arg}" for argument in (*node.args.args, *node.args.kwonlyargs)]
    see = f"see {PROGRAM} {name} --help"
    for flag in (word.partition("=")[0].replace("-", "_") for word in arguments):
        option = flag.replace("__", "--", 1)
        if flag.startswith("__") and option not in (*known, "--help", "--") and not node.args.kwarg:
            stop(2, f"unknown flag {option}", advice(option, known, see))
    kinds = {
        argument.arg: ast.unparse(argument.annotation) if argument.annotation else ""
        for argument in (*node.args.args, *node.args.kwonlyargs)
    }
    switches = {f"--{key}" for key, kind in kinds.items() if kind == "bool"}
    words = list(arguments)
    for n, word in enumerate(words):
        flag, _, value = word.partition("=")
        value = value or "".join(words[n + 1 : n + 2])
        if flag not in switches or value in ("True", "False"):
            continue
        if value.lower() in ("true", "false", "yes", "no"):
            stop(2, f"{flag} must be True or False, got {value}", see)
        if word == flag:  # Fire takes the next word, as a file's name, for its value
            words[n] = f"{word}=True"
    given: list[dict[str, Any]] = []
    scope: dict[str, Any] = {"given": given}
    node.body = [*node.body[:1], *ast.parse("given.append(locals())").body]
    module = ast.parse("from __future__ import annotations")
    module.body.append(node)
    exec(compile(ast.fix_missing_locations(module), name, "exec"), scope)
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            help_asked = {"-h", "--help"} & {*arguments}
            command = SetParseFn(str)(scope[node.name])
            Fire(command, ["--", "--help"] if help_asked else words, name)
    except FireExit as ended:
        if not ended.code:
            print("NAME" + text.getvalue().partition("NAME")[2].rstrip())
            raise SystemExit(0) from None
        fault = text.getvalue().partition("ERROR: ")[2].partition("\n")[0]
        fault = fault.replace("The function received no value for", "no value for")
        stop(2, fault[:1].lower() + fault[1:], see)
    found = given[-1]
    more = found.pop(node.args.kwarg.arg) if node.args.kwarg else {}
    for key, kind in kinds.items():
        found[key] = valued(found[key], kind)
    return found | {key: valued(value, "") for key, value in more.items()}


def valued(value: Any, kind: str) -> Any:
    """An argument's value: text stays text where that is asked for, as names of files do.

    Args:
        value: as it was written, or the default.
        kind: annotation of the argument.
    """
    if not isinstance(value, str):
        return value
    listed = "Sequence" in kind and value.startswith(("[", "("))
    if kind.startswith("str") and value != "None" and not listed:
        return value
    return DefaultParseValue(value)


def definition(name: str) -> ast.FunctionDef:
    """Source of a command's function."""
    module, _, function = COMMANDS[name].rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    nodes = ast.parse(Path(spec.origin).read_text("utf-8")).body
    return next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == function)


def stop(code: int, fault: str, hint: str = "") -> NoReturn:
    """Print an error and exit."""
    print(f"error: {fault}{f'; {hint}' if hint else ''}", file=sys.stderr)
    raise SystemExit(code)
