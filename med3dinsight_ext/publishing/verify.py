"""Asks of a published folder what the Model Zoo's premerge asks of it, one line a check.

What needs only files is checked here. What needs the network runs in one other process, which sees
the folder's own ``med3dinsight_ext`` and no installed one; it starts with this file, which
therefore imports nothing of the package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_net_in_out
from monai.bundle.scripts import _get_fake_input_shape
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

PACKAGE = "med3dinsight_ext"
FILES = (
    "configs/metadata.json", "LICENSE", "models/model.pt", "README.md", "docs/README.md",
    "docs/data_license.txt", "configs/logging.conf",
)  # fmt: skip
SUFFIXES = ("json", "yaml", "yml")  # of configs and of large_files, as MONAI looks for them
TASKS = (
    "segmentation", "classification", "detection", "registration", "reconstruction", "regression",
    "generation", "annotation", "deepedit", "deepgrow", "pretrain", "encoder",
)  # fmt: skip
SECTIONS = (
    "Model Overview", "Data", "Training configuration", "Input", "Output", "Performance",
    "MONAI Bundle Commands", "References", "License",
)  # fmt: skip
LARGE = 25_000_000  # bytes
HASHES = ("md5", "sha1", "sha256", "sha512")  # that MONAI takes
PINS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
PACKAGES = ("required_packages_version", "optional_packages_version")
NAMED_OTHERWISE = {  # import name to distribution, for what need not be installed here
    "ignite": "pytorch-ignite", "PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn",
    "skimage": "scikit-image", "open_clip": "open-clip-torch", "cv2": "opencv-python",
}  # fmt: skip
IGNORED = {".git", "__pycache__", "eval"}  # folders; the last two, push ignores
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
UNWANTED = (".pkl", ".pickle", ".joblib", ".dill", ".pyc", ".so", ".dll", ".exe")
MODELS = (".pt", ".ts", ".onnx", ".json", ".safetensors")  # all that models/ may hold
ABSOLUTE = re.compile(  # how a config names a place; "~5 mm" is none
    r"""(?:%|\$['"])?(?:/|~(?![\d\s])|\\\\|[a-z]:[\\/]|file://)""", re.IGNORECASE
)
PERSONAL = re.compile(
    r"""(?<![\w.}>)\]*%~/-])  # inside a longer path, a placeholder's or a URL
        (?:/(?:home|Users|root|mnt|media|scratch|Volumes)/\w
          |[A-Za-z]:(?:\\{1,2}|/)[\w.-]+(?:\\{1,2}|/)\w
          |file:/{2,3}\w|~/\w)[^\s'"`,)]*
    """,
    re.VERBOSE,
)
FORMAT: dict[str, tuple[str, ...]] = {  # the zoo's settings
    "isort": ("--check-only", "--profile", "black", "--line-length", "120", "--settings-path", "."),
    "black": (
        "--check", "--skip-magic-trailing-comma", "--line-length", "120", "--config", "none.toml"
    ),
    "flake8": (
        "--isolated", "--max-line-length", "120", "--select", "B,C,E,F,N,P,T4,W,B9",
        "--ignore", "E203,E741,W503,W504,C408,N812,B023",
        "--per-file-ignores", "__init__.py:F401,__main__.py:F401",
    ),
}  # fmt: skip
CHILD = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='inside')"


class Check(NamedTuple):
    """One line of the report; ``state`` is "ok", "FAIL" or "skip"."""

    name: str
    state: str
    text: str


class Skipped(Exception):
    """A check that could not be made; says what it would take."""


def verify(folder: str, schema: str | None = None) -> None:
    """Print what the Model Zoo's premerge would say of a published folder.

    Args:
        folder: of the bundle, as ``publish`` writes it. Nothing in it is changed.
        schema: file of the metadata's JSON schema; without it that check is skipped.

    Raises:
        ValueError: there is no such folder.
        SystemExit: a check failed.
    """
    count = {"ok": 0, "skip": 0, "FAIL": 0}
    for name, state, text in checks(folder, schema):
        count[state] += 1
        print(f"{state:<4}  {name + ':':<21}{text}", flush=True)
    print(f"{count['ok']} ok, {count['skip']} skipped, {count['FAIL']} failed")
    if count["FAIL"]:
        raise SystemExit(1)


def checks(folder: str, schema: str | None = None) -> Iterator[Check]:
    """Every check of a published folder, in the order of the report.

    Args:
        folder: of the bundle.
        schema: file of the metadata's JSON schema.

    Raises:
        ValueError: there is no such folder.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ValueError(
            f"folder must be a published bundle, got {folder}; make it with "
            "python -m med3dinsight_ext publish"
        )
    yield from outside(root, schema)
    yield from _in_another_process(root)


def outside(root: Path, schema: str | None = None) -> Iterator[Check]:
    """The checks that need only the files.

    Args:
        root: of the bundle.
        schema: file of the metadata's JSON schema.
    """
    for name, check in OUTSIDE.items():
        yield _outcome(name, check, root)
    yield _outcome("schema", _schema, root, schema)


def inside(root: str, report: str) -> None:
    """The checks that build the network, in a process of their own.

    Args:
        root: of the bundle.
        report: JSONL file, a line a check.
    """
    sys.meta_path.insert(0, _VendoredOnly(root))
    sys.path.insert(0, root)
    bundle = _Bundle(Path(root), Path(report).parent)
    for name, check in INSIDE.items():
        result = _outcome(name, check, bundle)
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _in_another_process(root: Path) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.jsonl"
        report.touch()
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        ended = subprocess.run(
            [sys.executable, "-c", CHILD, __file__], cwd=scratch, text=True, capture_output=True,
            input=json.dumps([str(root), str(report)]),
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        found = [Check(*json.loads(line)) for line in report.read_text("utf-8").splitlines()]
    yield from found
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    for name in list(INSIDE)[len(found) :]:
        yield Check(name, "FAIL", f"the process ended with {ended.returncode}: {last}")


def _outcome(name: str, check: Callable[..., str], *given: Any) -> Check:
    try:
        state, text = "ok", check(*given)
    except Skipped as reason:
        state, text = "skip", str(reason)
    except (Exception, SystemExit) as error:
        state, text = "FAIL", _cause(error)
    return Check(name, state, " ".join(text.split()))


def _cause(error: BaseException) -> str:
    """What an error says at its root; MONAI wraps it in "Failed to evaluate"."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = next((line for line in str(error).splitlines() if line.strip()), "")  # no drawings
    return said if type(error) is ValueError else f"{type(error).__name__}: {said}"


def _settle(faults: Sequence[str], good: str) -> str:
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError("; ".join(faults[:3]) + more)
    return good


def _paths(root: Path) -> list[str]:
    """Files of the bundle, relative."""
    found = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not IGNORED & set(path.parts)]


def _load(root: Path, name: str) -> dict[str, Any]:
    """A JSON or YAML file of the bundle; errors name it."""
    try:
        return dict(ConfigParser.load_config_file(root / name))
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {_cause(error)}") from None


def _metadata(root: Path) -> dict[str, Any]:
    name = "configs/metadata.json"
    if not (root / name).is_file():
        raise ValueError(f"{name} is missing")
    metadata = _load(root, name)
    for key in ("changelog", *PACKAGES, "network_data_format"):
        if not isinstance(metadata.get(key, {}), dict):
            raise ValueError(f"{name} has {key} {metadata[key]}, which is no mapping")
    return metadata


def _config(root: Path, name: str) -> str | None:
    """The first of NAME.json, NAME.yaml, NAME.yml that is there."""
    found = (f"{name}.{suffix}" for suffix in SUFFIXES)
    return next((path for path in found if (root / path).is_file()), None)


def _configs(root: Path) -> dict[str, Any]:
    names = [f"configs/{path.name}" for path in sorted((root / "configs").glob("*"))
             if path.suffix[1:] in SUFFIXES and path.name != "metadata.json"]  # fmt: skip
    return {name: _load(root, name) for name in names}


def _texts(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(id, text) of every string of a config."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, (Mapping, list)):
        for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _texts(child, f"{place}::{key}" if place else str(key))


def _imports(source: str) -> set[str]:
    """Modules that Python code imports, in full; none if it is no Python, which is told apart."""
    found: set[str] = set()
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return found


def _needed(root: Path) -> dict[str, str]:
    """Modules that the configs name, in full, and where."""
    needed = {}
    for file, config in _configs(root).items():
        for place, text in _texts(config):
            names = set()
            if place.endswith("_target_") and "." in text and not text.startswith("$"):
                names = {text}
            elif text.startswith(("$import ", "$from ")):
                names = _imports(text[1:])
            needed.update({name: f"{file} {place}" for name in names})
    return needed


def _listed(root: Path) -> dict[str, dict[str, Any]]:
    """Entries of large_files by their path."""
    name = _config(root, "large_files")
    if name is None:
        return {}
    entries = _load(root, name).get("large_files")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries
    ):
        raise ValueError(f"{name} holds no list large_files of entries with a path")
    return {entry["path"]: entry for entry in entries}


def _files(root: Path) -> str:
    listed, faults = _listed(root), []
    due = [*FILES, _config(root, "configs/inference") or "configs/inference.json"]
    for name in dict.fromkeys([*due, *_paths(root)]):
        path = root / name
        if not path.is_file():
            faults += [f"{name} is missing"] if name not in listed else []
        elif not path.resolve().is_relative_to(root):
            faults.append(f"{name} lies outside of the bundle; put the file in the link's place")
        elif name in due and not _filled(path):
            faults.append(f"{name} is empty")
    return _settle(faults, f"all {len(due)} are there")


def _filled(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(file.read(80).strip())


def _name(root: Path) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", root.name):
        raise ValueError(f"{root.name} is not lower-case words joined by underscores; rename it")
    if not any(task in root.name for task in TASKS):
        raise ValueError(f"{root.name} names no task; add one of {', '.join(TASKS)}")
    return root.name


def _readme(root: Path) -> str:
    path = root / "docs" / "README.md"
    if not path.is_file():
        raise ValueError("docs/README.md is missing")
    text = path.read_text("utf-8")
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = [title.strip() for title in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)]
    faults = [f"docs/README.md lacks the section {name}" for name in SECTIONS if name not in titles]
    order = [title for title in dict.fromkeys(titles) if title in SECTIONS]
    if not faults and order != list(SECTIONS):
        late = next(got for got, due in zip(order, SECTIONS, strict=True) if got != due)
        faults = [f"docs/README.md has {late} out of the order {', '.join(SECTIONS)}"]
    card = root / "README.md"
    if card.is_file() and not card.read_text("utf-8").rstrip().endswith(text.strip()):
        faults.append("README.md does not end with the text of docs/README.md")
    return _settle(faults, f"{len(SECTIONS)} sections in the zoo's order")


def _version(root: Path) -> str:
    metadata = _metadata(root)
    now, log = str(metadata.get("version")), metadata.get("changelog", {})
    faults = []
    if not re.fullmatch(r"\d+\.\d+\.\d+", now):
        faults.append(f"configs/metadata.json has version {now}, which is not x.y.z")
    if now not in log:
        known = ", ".join(log) or "no version"
        faults.append(f"configs/metadata.json has version {now}, its changelog has {known}")
    elif not str(log[now] or "").strip():
        faults.append(f"configs/metadata.json has a changelog that says nothing of {now}")
    return _settle(faults, f"{now}: {log.get(now)}")


def _schema(root: Path, schema: str | None) -> str:
    metadata = _metadata(root)
    url = metadata.get("schema")
    if not url or not isinstance(url, str):
        raise ValueError("configs/metadata.json names no schema, which the zoo would download")
    if schema is None:
        raise Skipped(f"offline; download {url} and give it as --schema FILE")
    if importlib.util.find_spec("jsonschema") is None:
        raise Skipped("needs jsonschema; pip install jsonschema")
    if not Path(schema).is_file():
        raise ValueError(f"schema must be a file, got {schema}; download {url}")
    from jsonschema.validators import validator_for

    rules = json.loads(Path(schema).read_text("utf-8"))
    found = validator_for(rules)(rules).iter_errors(metadata)
    faults = [f"configs/metadata.json {error.json_path}: {error.message}" for error in found]
    return _settle(faults, f"metadata.json fits {Path(schema).name}")


def _packages(root: Path) -> str:
    metadata = _metadata(root)
    pins = {name: metadata.get(key) for name, key in PINS.items()}
    for key in PACKAGES:
        pins |= {canonicalize_name(name): pin for name, pin in metadata.get(key, {}).items()}
    faults = [f"configs/metadata.json pins {name} to {pin}, which is not an exact version"
              for name, pin in pins.items() if not _exact(pin)]  # fmt: skip
    sources = [(file, (root / file).read_text("utf-8"))
               for file in _paths(root) if file.endswith(".py")]  # fmt: skip
    wanted = {name: file for file, source in sources for name in _imports(source)}
    tops = {name.split(".")[0]: where for name, where in {**_needed(root), **wanted}.items()}
    here = (Path(file).parts[0].removesuffix(".py") for file, _ in sources)
    own = {PACKAGE, *sys.stdlib_module_names, *here}
    third = {top: where for top, where in tops.items() if top not in own}
    loose = {top: where for top, where in sorted(third.items())
             if canonicalize_name(NAMED_OTHERWISE.get(top, top)) not in pins}  # fmt: skip
    installed = packages_distributions() if loose else {}
    for top, where in loose.items():
        if not any(canonicalize_name(name) in pins for name in installed.get(top, [])):
            faults.append(f"{where} needs {top}, which no pin of configs/metadata.json covers")
    other = [name for name, pin in pins.items() if _installed(name) not in (None, pin)]
    note = f"; these checks ran with other versions of {', '.join(other)}" if other else ""
    return _settle(faults, f"{len(pins)} exact pins cover {len(third)} imports{note}")


def _exact(pin: Any) -> bool:
    try:
        return Version(str(pin)).local is None  # 2.13.0+cpu is on no index that all can reach
    except InvalidVersion:
        return False


def _installed(name: str) -> str | None:
    try:
        return str(Version(version(name)).public)
    except PackageNotFoundError:
        return None


def _large(root: Path) -> str:
    listed, faults = _listed(root), []
    absent = [name for name in listed if not (root / name).is_file()]
    for name, entry in listed.items():
        kind, due = str(entry.get("hash_type") or "md5"), entry.get("hash_val")
        if not (root / name).resolve().is_relative_to(root):
            faults.append(f"large_files lists {name}, which is outside of the bundle")
        elif not entry.get("url") or not due:
            faults.append(f"large_files lists {name} without url or hash_val")
        elif (root / name).is_dir():
            faults.append(f"large_files lists {name}, which is a folder")
        elif kind not in HASHES:
            faults.append(f"large_files lists {name} with hash_type {kind}, which is unknown")
        elif name not in absent:
            with (root / name).open("rb") as file:
                digest = hashlib.new(kind)
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != str(due):
                faults.append(f"{name} has {kind} {digest.hexdigest()}, large_files says {due}")
    for name in _paths(root):
        size = (root / name).stat().st_size
        if size > LARGE and name not in listed:
            faults.append(f"{name} has {size / 1e6:.0f} MB and is not in large_files")
    if absent and not faults:
        raise Skipped(
            f"{', '.join(absent)} not here; "
            f"python -m monai.bundle download_large_files --bundle_path {root.name}"
        )
    return _settle(faults, f"{len(listed)} listed with their hashes, no other over 25 MB")


def _personal(root: Path) -> str:
    configs = _configs(root) | {"configs/metadata.json": _metadata(root)}
    faults = [f"{name} has {place} {text}" for name, config in configs.items()
              for place, text in _texts(config) if ABSOLUTE.match(text)]  # fmt: skip
    read = 0
    for name in _paths(root):
        content = (root / name).read_bytes()
        if b"\0" in content[:8192]:
            continue
        read += 1
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            faults += [f"{name}:{number} has {found[0]}" for found in PERSONAL.finditer(line)]
    return _settle(faults, f"none of a person's machine in {read} text files")


def _syntax(root: Path) -> str:
    files = [name for name in _paths(root) if name.endswith(".py")]
    faults = []
    for name in files:
        try:
            ast.parse((root / name).read_text("utf-8"), feature_version=(3, 10))
        except SyntaxError as error:
            faults.append(f"{name}:{error.lineno} {error.msg}")
    return _settle(faults, f"{len(files)} files")


def _format(root: Path) -> str:
    files = [name for name in _paths(root) if name.endswith(".py")]
    missing = [tool for tool in FORMAT if importlib.util.find_spec(tool) is None]
    faults = []
    with tempfile.TemporaryDirectory() as scratch:  # away from the settings of a folder above
        copy = Path(scratch).resolve()
        (copy / "none.toml").touch()
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)
        for tool in [tool for tool in FORMAT if tool not in missing] if files else []:
            ended = subprocess.run(
                [sys.executable, "-m", tool, *FORMAT[tool], *files], cwd=copy, text=True,
                capture_output=True, env={**os.environ, "BLACK_CACHE_DIR": scratch},
            )  # fmt: skip
            if ended.returncode:
                said = (ended.stdout + ended.stderr).replace(f"{copy}{os.sep}", "").splitlines()
                about = [line for line in said if ".py" in line] or said or ["it said nothing"]
                faults += [f"{tool}: {line}" for line in about]
    if missing and not faults:
        raise Skipped(f"needs {', '.join(missing)}; pip install {' '.join(missing)}")
    return _settle(faults, f"{', '.join(FORMAT)} have nothing against {len(files)} files")


def _not_finite(content: Any) -> list[str]:
    """As ``training.weights.not_finite``, of whatever a file holds."""
    named = content.items() if isinstance(content, Mapping) else ()
    return [str(name) for name, value in named
            if isinstance(value, Tensor) and not value.isfinite().all()]  # fmt: skip


def _tensors_only(root: Path) -> str:
    names, faults = _paths(root), []
    weights = [name for name in names if name.lower().endswith(CHECKPOINTS)]
    for name in weights:
        try:
            content = torch.load(root / name, map_location="cpu", weights_only=True)
            if name != "models/model.pt":  # which has a check of its own
                faults += [f"{name} has {key} with values that are not finite"
                           for key in _not_finite(content)]  # fmt: skip
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))
            faults.append(
                f"{name} holds {what[1] if what else 'objects'}, which may run code when loaded; "
                "save network.state_dict() alone"
            )
        except Exception as error:
            faults.append(f"{name} is broken: {_cause(error)}")
    faults += [f"{name} does not belong here; delete it" for name in names
               if name.lower().endswith(UNWANTED)
               or (name.startswith("models/") and not name.lower().endswith(MODELS))]  # fmt: skip
    return _settle(faults, f"{len(weights)} files of tensors, no pickles")


OUTSIDE: dict[str, Callable[[Path], str]] = {
    "files": _files, "name": _name, "README sections": _readme, "version": _version,
    "packages": _packages, "large files": _large, "paths": _personal, "Python 3.10": _syntax,
    "format": _format, "checkpoints": _tensors_only,
}  # fmt: skip


class _VendoredOnly:
    """Finds the package in the bundle or nowhere; an editable install would step in otherwise."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path or [self.root])
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name} is not vendored", name=name)
        return spec


class _Bundle:
    """A bundle whose network is built.

    Args:
        root: its folder.
        scratch: folder for what is written.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self.scratch = scratch

    @cached_property
    def meta(self) -> str:
        _metadata(self.root)
        return str(self.root / "configs" / "metadata.json")

    @cached_property
    def config(self) -> str:
        name = _config(self.root, "configs/inference")
        if name is None:
            raise ValueError("configs/inference.json is missing")
        _load(self.root, name)
        return str(self.root / name)

    @cached_property
    def state(self) -> Any:
        path = self.root / "models" / "model.pt"
        if not path.is_file():
            raise Skipped("models/model.pt is not here, see files and large files")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Skipped("models/model.pt cannot be read, see checkpoints") from error

    def parser(self) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(self.config)
        parser.read_meta(self.meta)
        parser["bundle_root"] = str(self.root)
        return parser

    def misfits(self, network: nn.Module) -> list[str]:
        """How the weights differ from what a network can take."""
        state, due = self.state, network.state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            return ["models/model.pt is not a flat dict of tensors; save network.state_dict()"]
        return [
            *(f"models/model.pt lacks {name}" for name in due if name not in state),
            *(f"models/model.pt has {name}, network_def has not" for name in state
              if name not in due),
            *(f"models/model.pt has {name} {tuple(state[name].shape)}, network_def "
              f"{tuple(value.shape)}" for name, value in due.items()
              if name in state and state[name].shape != value.shape),
            *(f"models/model.pt has {name} with values that are not finite"
              for name in _not_finite(state)),
        ]  # fmt: skip


def _weights(bundle: _Bundle) -> str:
    network = bundle.parser().get_parsed_content("network_def")
    faults = bundle.misfits(network)
    size = sum(value.numel() for value in network.state_dict().values())
    return _settle(faults, f"models/model.pt fits {type(network).__name__}, {size:,} values")


def _in_out(bundle: _Bundle) -> str:
    data, faults = _metadata(bundle.root).get("network_data_format", {}), []
    try:
        for side in ("inputs", "outputs"):
            for name, part in data[side].items():
                names, count = part.get("channel_def", {}), part["num_channels"]
                if set(names) != {str(i) for i in range(count)}:
                    faults.append(f"configs/metadata.json {side} {name} has {count} num_channels, "
                                  f"channel_def names {', '.join(names) or 'none'}")  # fmt: skip
        image, pred = data["inputs"]["image"], data["outputs"]["pred"]
        shape = " x ".join(map(str, image["spatial_shape"]))
        good = f"{image['num_channels']} x {shape} to {pred['num_channels']} channels"
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"configs/metadata.json network_data_format: {_cause(error)}") from None
    parser = bundle.parser()
    if "patch_size" in parser:
        patch = parser.get_parsed_content("patch_size")
        if list(image["spatial_shape"]) != list(patch):
            faults.append(f"configs/metadata.json inputs image has spatial_shape {shape}, "
                          f"{Path(bundle.config).name} has patch_size {patch}")  # fmt: skip
    try:
        verify_net_in_out(
            "network_def", bundle.meta, bundle.config, bundle_root=str(bundle.root)
        )  # fmt: skip
    except Exception as error:
        faults.append(f"configs/metadata.json: {_cause(error)}")
    return _settle(faults, good)


def _torchscript(bundle: _Bundle) -> str:
    readme = bundle.root / "docs" / "README.md"
    lines = readme.read_text("utf-8").splitlines() if readme.is_file() else []
    if any(line.startswith("TorchScript: not supported") for line in lines):
        return "excluded as docs/README.md says"
    parser = bundle.parser()
    network = parser.get_parsed_content("network_def")
    if bundle.misfits(network):
        raise Skipped("models/model.pt does not fit network_def, see weights")
    try:
        shape = _get_fake_input_shape(parser)
    except Exception as error:
        raise Skipped("network_data_format is broken, see network in and out") from error
    path = str(bundle.scratch / "model.ts")
    ckpt_export(
        "network_def", path, str(bundle.root / "models" / "model.pt"), bundle.meta, bundle.config,
        bundle_root=str(bundle.root),
    )  # fmt: skip
    network.load_state_dict(bundle.state)
    image = torch.rand(shape)
    with torch.no_grad():
        due, got = network.eval()(image), torch.jit.load(path, map_location="cpu").eval()(image)
    due, got = (value if isinstance(value, Tensor) else value[0] for value in (due, got))
    apart = (due - got).abs().max().item()
    if not apart <= 1e-4 * max(1.0, due.abs().max().item()):
        raise ValueError(f"model.ts and network_def differ by {apart:.1e} on {tuple(image.shape)}")
    return f"max abs difference {apart:.1e} on {tuple(image.shape)}"


class _Names(ConfigWorkflow):
    """Looks properties up and leaves them unevaluated: data are not in a published folder."""

    def _get_property(self, name: str, property: dict) -> Any:
        try:
            return self._get_prop_id(name, property)
        except KeyError as error:
            raise AttributeError(name) from error


def _properties(bundle: _Bundle) -> str:
    logs = bundle.root / "configs" / "logging.conf"
    jobs = {"infer": bundle.config}
    if (train := _config(bundle.root, "configs/train")) is not None:
        _load(bundle.root, train)
        jobs["train"] = str(bundle.root / train)
    faults = []
    for kind, path in jobs.items():
        names = _Names(
            path, bundle.meta, str(logs) if logs.is_file() else False, workflow_type=kind,
            bundle_root=str(bundle.root),
        )  # fmt: skip
        faults += [f"configs/{Path(path).name} lacks {name}" for name in names.check_properties()]
    return _settle(faults, f"all in {', '.join(Path(path).name for path in jobs.values())}")


def _targets(bundle: _Bundle) -> str:
    ours = {name: where for name, where in _needed(bundle.root).items()
            if name.split(".")[0] == PACKAGE}  # fmt: skip
    files = sorted((bundle.root / PACKAGE).rglob("*.py"))
    modules = {}
    for path in files:
        name = path.relative_to(bundle.root).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if path.stem != "__main__":
            modules[module] = name
    faults = []
    for name, where in {**ours, **modules}.items():
        try:
            _resolve(name)
        except Exception as error:
            faults.append(f"{where} needs {name}, which does not import: {_cause(error)}")
    return _settle(faults, f"{len(ours)} names in the configs, {len(modules)} modules import")


def _resolve(name: str) -> None:
    """Import what a dotted name says; ``pkgutil.resolve_name`` hides why a module failed."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:depth]))
        found = getattr(found, part)


INSIDE: dict[str, Callable[[_Bundle], str]] = {
    "weights": _weights, "network in and out": _in_out, "TorchScript": _torchscript,
    "properties": _properties, "config targets": _targets,
}  # fmt: skip

if __name__ == "inside":
    inside(*json.load(sys.stdin))
