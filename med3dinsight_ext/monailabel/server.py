"""MONAI Label server for local bundles, and the environment that it runs in."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from med3dinsight_ext import __version__
from med3dinsight_ext.data.labels import check_names
from med3dinsight_ext.io.reading import read_json, readable
from med3dinsight_ext.monailabel.app import compatibility

NAME = "med3dinsight-ext"
APP = Path(__file__).parent / "app"
NEEDED = ("configs/metadata.json", "configs/inference.json", "configs/train.json",
          "models/model.pt")  # fmt: skip
ALONE = "# --no-deps"  # line of requirements.txt; those below it are installed without dependencies


def label(
    studies: str, bundles: str | Sequence[str], port: int = 8000, host: str = "127.0.0.1"
) -> None:
    """Start MONAI Label; it serves 3D Slicer, and OHIF at /ohif/ where the studies are DICOM.

    Args:
        studies: folder of NIfTI images, or the URL of a DICOMweb store.
        bundles: folders of trained segmentation bundles, separated by commas.
        port: to listen on.
        host: address to listen on; 0.0.0.0 lets everybody in who can reach this machine.
    """
    if fault := environment_fault():
        sys.exit(fault)
    folders = find_bundles(bundles)
    if not studies.startswith(("http://", "https://")) and not Path(studies).is_dir():
        raise ValueError(f"studies must be a folder or a URL, got {studies!r}; correct it")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port must be free, got {port}: {error}; choose another") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below is removed
    with tempfile.TemporaryDirectory(prefix="med3dinsight-label-") as app:
        shutil.copy(APP / "main.py", app)
        serve(app, studies, folders, port, host)


def serve(app: str, studies: str, folders: list[Path], port: int, host: str) -> None:
    """Run the server in this process until it stops, then end the processes that it started."""
    # The programs that come with this environment's packages, whether it is activated or not
    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", "")])
    from monailabel.main import Main
    from monailabel.utils.async_tasks.task import AsyncTask

    sys.argv = ["monailabel", "start_server", "--app", app, "--studies", studies]
    sys.argv += ["--host", host, "--port", str(port)]
    sys.argv += ["--conf", "bundles", ",".join(map(str, folders))]
    try:
        Main().run()
    finally:
        for method in ("train", "batch_infer", "scoring"):
            AsyncTask.stop(method)


def find_bundles(bundles: str | Sequence[str]) -> list[Path]:
    """Folders of bundles, complete enough to be served.

    Args:
        bundles: paths, or one string with commas between them.
    """
    paths = bundles.split(",") if isinstance(bundles, str) else bundles
    folders = [Path(path).expanduser().absolute() for path in map(str, paths) if path]
    if not folders:
        raise ValueError("bundles must name a folder, got none; name a trained seg-finetune folder")
    for folder in folders:
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            advice = "train it first" if missing == ["models/model.pt"] else "correct the path"
            raise ValueError(
                f"bundles must be folders with {', '.join(NEEDED)}, but {folder} has no "
                f"{', '.join(missing)}; {advice}"
            )
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"bundles must have different folder names, got {names}; rename one")
    classes = {folder.name: class_names(folder) for folder in folders}
    if any(found != classes[names[0]] for found in classes.values()):
        raise ValueError(
            f"bundles of one server must have the same classes, got {classes}; they share the "
            "labels, so start a server for each, with a folder of images of its own"
        )
    for folder in folders:
        check_configs(folder, classes[folder.name])
    return folders


def check_configs(bundle: Path, names: Sequence[str]) -> None:
    """Check that a bundle trains and predicts the classes of its metadata, which labels have."""
    for stem in ("inference", "train"):
        path = bundle / "configs" / f"{stem}.json"
        found = read_json(path, "config").get("label_names")
        if isinstance(found, list) and found != list(names):
            raise ValueError(
                f"label_names of {path} must be the classes of its metadata.json, {list(names)}, "
                f"got {found}; make the bundle again"
            )


def class_names(bundle: Path) -> list[str]:
    """Names of a bundle's classes as its metadata has them; the label value is the index."""
    path = bundle / "configs" / "metadata.json"
    with readable("metadata", path, "take the bundle's own"):
        metadata = read_json(path, "metadata")
        names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        found = [names[str(i)] for i in range(len(names))]
        check_names(found)
        return found


def requirements() -> tuple[list[str], list[str]]:
    """Requirements that pip resolves, and those that it installs without their dependencies."""
    text = (APP / "requirements.txt").read_text("utf-8")
    first, second = (
        [line for line in part.splitlines() if line and not line.startswith("#")]
        for part in text.split(ALONE)
    )
    return first, second


def environment_fault() -> str | None:
    """Fault of this interpreter's environment with its remedy; None if there is none.

    The pinned packages are looked up, not imported: that would take as long as the server's start.
    """
    install = "python -m med3dinsight_ext label-install FOLDER"
    advice = (
        f"make an environment for it by\n  {install}\n"
        "and start with that one:\n  FOLDER/bin/python -m med3dinsight_ext label …"
    )
    for text in requirements()[1]:
        need = Requirement(text)
        if importlib.util.find_spec(need.name.replace("-", "_")) is None:
            return f"label needs {need}, got no {need.name} in {sys.prefix}; {advice}"
        found = version(need.name)
        if not need.specifier.contains(found, prereleases=True):
            return f"label needs {need}, got {found} in {sys.prefix}; {advice}"
    return None


def install(target: str) -> None:
    """Make an environment for MONAI Label, for CPU and GPU alike, and try it.

    Args:
        target: folder of the new environment, or of one that this has made before.
    """
    folder = Path(target).expanduser().absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ValueError(f"target must be new or an environment, got {folder}; choose another")
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    source = Path(__file__).parents[2]
    own = ["-e", str(source)] if (source / "setup.cfg").is_file() else [f"{NAME}=={__version__}"]
    resolved, alone = requirements()
    pip = [python, "-m", "pip", "install", "-q"]
    print("installing MONAI Label and what it needs; this takes minutes", flush=True)
    subprocess.run([*pip, *resolved, *own], check=True)
    subprocess.run([*pip, "--no-deps", *alone], check=True)
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    (Path(done.stdout.strip()) / "med3dinsight_label.pth").write_text(compatibility.HOOK)
    subprocess.run(
        [python, "-c", "import monailabel.app"], check=True, stdout=subprocess.DEVNULL, cwd=folder
    )
    print(f"MONAI Label works in {folder}, made in {time.monotonic() - begin:.0f} s; start it by")
    print(f"  {python} -m med3dinsight_ext label --studies FOLDER --bundles FOLDER")
