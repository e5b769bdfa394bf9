"""Commands at sizes at which they take a second, and what must be equal after they were disturbed.

Imports are inside the functions, so that tests list the commands without cost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
SMALL = {"device": "$torch.device('cpu')", "max_epochs": 2, "num_workers": 0}


class Scenario(NamedTuple):
    """A command and its results.

    Attributes:
        prepare: writes the inputs, once.
        run: the command.
        results: what must be equal, by name.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    results: Callable[[Path], dict[str, Any]]


def volumes(count: int) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        import fakes

        fakes.write_volumes(folder / "in", count)

    return prepare


def tensors(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    found = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    parts = [
        f"{k} {v.dtype} {tuple(v.shape)} {v.double().numpy().tobytes().hex()}"
        for k, v in sorted(found.items())
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def files(name: str) -> Callable[[Path], dict[str, Any]]:
    """Hashes of the files in a folder; weights by their values, without what depends on time."""

    def results(folder: Path) -> dict[str, Any]:
        import nibabel as nib
        import yaml

        from med3dinsight_ext.training.record import read_record

        found: dict[str, Any] = {}
        for path in sorted((folder / name).rglob("[!.]*")):
            relative = path.relative_to(folder).as_posix()
            if path.suffix == ".pt":
                found[relative] = tensors(path)
                if path.name == "model.pt":
                    read_record(path)  # ValueError if it is that of other weights
            elif path.suffix == ".yaml":
                found[relative] = yaml.safe_load(path.read_text())  # comments hold seconds
            elif path.suffix in (".gz", ".b2", ".json") and path.name != "run.json":
                content = path.read_bytes()
                if path.suffix == ".gz":
                    content = nib.load(path).get_fdata().tobytes()  # type: ignore[attr-defined]
                found[relative] = hashlib.sha256(content).hexdigest()
            elif path.name == "history.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                found[relative] = [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
        return found

    return results


def fill(folder: Path) -> None:
    import fakes

    from med3dinsight_ext.captions.sources import TemplateCaptions
    from med3dinsight_ext.data.datalists import datalist
    from med3dinsight_ext.embeddings.store import Store

    store = Store(folder / "store", fakes.teacher(), TemplateCaptions(), per_plane=2)
    store.fill(datalist(folder / "in", modality="MR"))
    store.embedding_dims  # noqa: B018


def entries(folder: Path) -> dict[str, Any]:
    store = folder / "store"
    found: dict[str, Any] = {
        str(p.relative_to(store)): tensors(p) for p in store.glob("??/[!.]*.safetensors")
    }
    return found | {str(p.relative_to(store)): p.read_text() for p in store.glob("??/[!.]*.json")}


def ask(folder: Path) -> None:
    import fakes

    from med3dinsight_ext.data.datalists import datalist
    from med3dinsight_ext.embeddings.store import Store

    store = Store(folder / "store", fakes.teacher(), fakes.FakeMllm(), per_plane=2)
    store.fill(datalist(folder / "in", modality="MR"))


def answers(folder: Path) -> dict[str, Any]:
    logs = (folder / "store" / "answers").glob("*/[!.]*.jsonl")
    return entries(folder) | {p.name: sorted(filter(None, p.read_text().split("\n"))) for p in logs}


def settings(bundle: str, folder: Path) -> dict[str, Any]:
    import running

    backbone = running.NETWORKS[bundle]["backbone"]
    return running.settings(bundle, folder / "out", folder / "in", max_epochs=2, backbone=backbone)


def training(bundle: str, **more: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        import running

        running.run(bundle, ["train.json"], **(settings(bundle, folder) | more))

    return run


def train_once(folder: Path) -> None:
    """The weights of a training and its overlay."""
    volumes(3)(folder)
    training("seg-finetune")(folder)
    shutil.copy(folder / "out" / "models" / "model.pt", folder / "in" / "model.pt")
    shutil.rmtree(folder / "out")
    content = {
        key: settings("seg-finetune", folder)[key] for key in ("backbone", "spacing", "patch_size")
    }
    (folder / "in" / "overlay.json").write_text(json.dumps(content))


def publish_it(folder: Path) -> None:
    from med3dinsight_ext.publishing.publish import publish

    given = folder / "in"
    publish(
        str(ROOT / "bundles" / "seg-finetune"),
        str(given / "model.pt"),
        "ball_ct_segmentation",
        str(folder / "out"),
        overlays=str(given / "overlay.json"),
    )


def hashes(name: str) -> Callable[[Path], dict[str, Any]]:
    """Hashes of all files in a folder but drafts."""

    def results(folder: Path) -> dict[str, Any]:
        paths = (path for path in (folder / name).rglob("*") if path.is_file())
        kept = (path for path in paths if ".publish-" not in str(path))  # drafts of a killed run
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in kept
        }

    return results


def add_runs(folder: Path) -> None:
    from evidence import results

    for name in "ab":
        results.add("cpu", {"name": name, "seconds": 1.5}, folder / "out")


def written_runs(folder: Path) -> dict[str, Any]:
    from evidence import results

    return results.read("cpu", folder / "out")


def front_door(name: str, *words: str, **more: Any) -> Callable[[Path], Any]:
    """A command of the package, in the folder."""

    def run(folder: Path) -> None:
        import running

        from med3dinsight_ext import workflows
        from med3dinsight_ext.planning import plan

        os.chdir(folder)
        plan.CPU = running.SMALL_MACHINE
        getattr(workflows, name)(*words, quiet=True, **more)

    return run


def quickstart(folder: Path) -> None:
    """With a teacher and a network that load at once, and blank figures."""
    import running
    from matplotlib.figure import Figure

    from med3dinsight_ext import quickstart as module
    from med3dinsight_ext.training.launch import bundle_run

    given = running.settings("pretrain", folder, folder)
    kept = {key: given[key] for key in ("teacher", "patch_size", "device")}
    small = kept | {"backbone": running.NETWORKS["pretrain"]["backbone"]}

    def run(bundle: str, names: list[str], **more: Any) -> Any:
        if names[0] == "train.json":
            own: dict[str, Any] = {"per_plane": 8, "slices": 4}
        else:
            own = {"grid_per_plane": 4}
        if names == ["train.json", "quickstart.yaml"]:
            own |= PLAIN
        return bundle_run(bundle, names, **small, **own, **more)

    os.chdir(folder)
    blank = mock.patch.object(Figure, "draw", lambda *_: None)
    with blank, mock.patch.object(module, "bundle_run", run):
        module.quickstart("in", out="out", max_epochs=1)


def scans(folder: Path) -> None:
    volumes(3)(folder)
    (folder / "in" / "classification.json").unlink()
    (folder / "in" / "segmentation.json").unlink()


def trained_scans(folder: Path) -> None:
    """Scans and the folder of a training."""
    scans(folder)
    front_door("finetune", "in", out="given", **SMALL)(folder)


def prepare(folder: Path) -> None:
    import running

    given = settings("seg-finetune", folder) | {"prepared": str(folder / "out" / "copy")}
    shared = ROOT / "bundles" / "shared" / "prepare.json"
    running.run("seg-finetune", ["train.json", shared], **given)


def split(folder: Path) -> None:
    from med3dinsight_ext.data import manifests

    manifests.split(str(folder / "in" / "classification.json"), str(folder / "out"), 0.5)


def lists(folder: Path) -> dict[str, Any]:
    names = ("development.jsonl", "test.jsonl", "split_report.json")
    return {name: (folder / "out" / name).read_text() for name in names}


def init(folder: Path) -> None:
    from med3dinsight_ext.io import bundles

    bundles.init(str(folder / "out"), "cls-finetune")


def published_bundle(folder: Path) -> None:
    """A published bundle."""
    train_once(folder)
    publish_it(folder)


def export(folder: Path) -> None:
    from med3dinsight_ext.publishing.export import export as run

    run(str(folder / "out" / "ball_ct_segmentation"))


def exported(folder: Path) -> dict[str, Any]:
    models = folder / "out" / "ball_ct_segmentation" / "models"
    report = json.loads((models / "exports.json").read_text())
    graphs = [models / name for name in ("model.ts", "model.onnx")]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in graphs}
    return hashes | {name: report[name]["way"] for name in hashes}


# hundreds of writes to one more file each; "segmentation" has the events of the validation
PLAIN = {
    f"{key}::_disabled_": True for key in ("train_handlers::pictures", "validate::handlers::0")
}
LINEAR = {"mode": "linear", "class_names": ["even", "odd"], "val_fraction": 0}
CPU = {"device": SMALL["device"]}
SCENARIOS = {
    "evidence": Scenario(lambda folder: (folder / "in").mkdir(), add_runs, written_runs),
    "split": Scenario(volumes(4), split, lists),
    "init": Scenario(lambda folder: (folder / "in").mkdir(), init, hashes("out")),
    "store": Scenario(volumes(2), fill, entries),
    "answers": Scenario(volumes(1), ask, answers),
    "probe": Scenario(volumes(3), training("cls-finetune", **LINEAR), files("out")),
    "segmentation": Scenario(volumes(3), training("seg-finetune"), files("out")),
    "pretrain": Scenario(volumes(3), training("pretrain", **PLAIN), files("out")),
    "publish": Scenario(train_once, publish_it, hashes("out")),
    "export": Scenario(published_bundle, export, exported),
    "prepare": Scenario(volumes(3), prepare, files("out/copy")),
    "plan": Scenario(scans, front_door("plan", "in"), files("runs")),
    "finetune": Scenario(scans, front_door("finetune", "in", **SMALL), files("runs")),
    "predict": Scenario(
        trained_scans,
        front_door("predict", "given", "in/v0.nii.gz", **CPU),
        files("given/predictions"),
    ),
    "evaluate": Scenario(
        trained_scans, front_door("evaluate", "given", "in", **CPU), files("given/evaluation-in")
    ),
    "quickstart": Scenario(scans, quickstart, files("out")),
}
