"""MONAI Label in its own environment: small bundles, servers, and requests to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from running import ROOT, environment, free_port
from torch import Tensor, nn

from med3dinsight_ext.publishing.bundle import merged_configs

PYTHON = os.environ.get("MED3D_LABEL_PYTHON", "")


class BrightNet(nn.Module):
    """Segments what is brighter than half the range, and has features and weights to train."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Conv3d(1, 4, 4, 4)
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold + 0 * self.neck(x).mean()
        return 8 * torch.cat([threshold - x, x - threshold], 1)


class ClickNet(nn.Module):
    """Segments where the guidance channel of the foreground is above a half; can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Conv3d(1, 4, 4, 4)
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold + 0 * self.neck(x[:, :1]).mean()
        return 8 * torch.cat([threshold - x[:, 2:3], x[:, 2:3] - threshold], 1)


def small_bundle(folder: Path, network: str = "BrightNet", overlays: bool = False) -> Path:
    """A copy of seg-finetune with a network of this file.

    Args:
        folder: to make.
        network: name of its class.
        overlays: merge those of clicks into its configs.
    """
    shutil.copytree(ROOT / "bundles" / "seg-finetune", folder)
    small = {
        "spacing": [2.0] * 3,
        "patch_size": [32] * 3,
        "backbone": {"_target_": f"label_running.{network}"},
    }
    more = {"inference": {}, "train": {"num_workers": 0, "batch_size": 1}}
    merged = merged_configs(ROOT / "bundles" / "seg-finetune", "", overlays)
    for name, config in merged.items():
        path = folder / "configs" / f"{name}.json"
        path.write_text(json.dumps(config | small | more[name]))
    weights = globals()[network]().state_dict()
    torch.save(weights, folder / "models" / "model.pt")
    return folder


class Answer(NamedTuple):
    """Status, and the body: JSON as an object, anything else as bytes."""

    status: int
    body: Any


def wait_for(
    process: subprocess.Popen, log: Path, ready: Callable[[], Any], seconds: float = 120
) -> Any:
    """What ``ready`` returns, once it is true; the log's end if the process ends before."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if found := ready():
            return found
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"waited in vain:\n{log.read_text()[-6000:]}")


class Server:
    """A MONAI Label server as a process of its own; it logs into ``folder / "log"``.

    Args:
        arguments: of python.
        folder: where it may write.
        port: that it listens on.
    """

    def __init__(self, arguments: list[str], folder: Path, port: int) -> None:
        self.log = folder / "log"
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        own = {"HOME": str(folder), "TMPDIR": str(folder / "tmp"), "no_proxy": "*"}
        (folder / "tmp").mkdir(exist_ok=True)
        begin = time.monotonic()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [PYTHON, *arguments],
                cwd=folder,
                env={**environment(), **own},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait(lambda: self.ask("GET", "/info/").status == 200, 120)
        self.seconds = time.monotonic() - begin

    def wait(self, ready: Callable[[], Any], seconds: float = 120) -> Any:
        """What ``ready`` returns, once it is true."""
        return wait_for(self.process, self.log, ready, seconds)

    def ask(self, method: str, path: str, body: object = None, **form: str | Path) -> Answer:
        """Send JSON, or a form whose values are texts and files."""
        data, kind = (json.dumps(body).encode() if body is not None else None), "application/json"
        if form:
            mark = uuid4().hex
            data = b"".join(_field(mark, *field) for field in form.items()) + f"--{mark}--".encode()
            kind = f"multipart/form-data; boundary={mark}"
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Content-Type", kind)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                content, status, found = reply.read(), reply.status, reply.headers
        except urllib.error.HTTPError as error:
            content, status, found = error.read(), error.code, error.headers
        except OSError:  # not listening yet
            return Answer(0, b"")
        is_json = found.get("Content-Type", "").startswith("application/json")
        return Answer(status, json.loads(content) if is_json else content)

    def start_training(self, model: str, **settings: Any) -> Answer:
        given = {"max_epochs": 1, "val_split": 0, "device": "cpu", "multi_gpu": False}
        return self.ask("POST", f"/train/{model}", given | settings)

    def trained(self) -> dict[str, Any]:
        """The last training's task as the server tells of it, once it has ended."""
        running = ("SUBMITTED", "RUNNING")
        self.wait(lambda: self.ask("GET", "/train/").body["status"] not in running, 400)
        return self.ask("GET", "/train/").body

    def save_label(self, image: str, label: Path) -> Answer:
        return self.ask("PUT", f"/datastore/label?image={image}&tag=final", label=label)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it, and wait until it has gone."""
        self.process.send_signal(how)
        try:
            self.process.wait(30)
            begin = time.monotonic()
            while self.left and time.monotonic() - begin < 30:  # a training sees it within seconds
                time.sleep(0.1)
            assert not self.left
        finally:
            for pid in self.left:
                os.kill(pid, signal.SIGKILL)

    @property
    def left(self) -> list[int]:
        """Processes of the server's session that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(path.parent.name))
        return found


def _field(mark: str, name: str, value: str | Path) -> bytes:
    """One part of a multipart form."""
    file = f'; filename="{value.name}"' if isinstance(value, Path) else ""
    head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    content = value.read_bytes() if isinstance(value, Path) else value.encode()
    return head.encode() + content + b"\r\n"


def is_free(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def stock_app(folder: Path, bundles: Sequence[Path]) -> Path:
    """A copy of MONAI Label's monaibundle app with bundles linked into its model folder."""
    script = "import sys; print(sys.prefix)"
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    source = Path(done.stdout.strip()) / "monailabel" / "sample-apps" / "monaibundle"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model").mkdir(exist_ok=True)
    for bundle in bundles:
        (folder / "model" / bundle.name).symlink_to(bundle)
    return folder


def start_stock(root: Path, bundles: Sequence[Path], studies: Path) -> Server:
    port = free_port()
    words = ["-m", "monailabel.main", "start_server", "--studies", str(studies)]
    words += ["--app", str(stock_app(root / "app", bundles)), "--host", "127.0.0.1"]
    names = ",".join(bundle.name for bundle in bundles)
    for key, value in {"models": names, "zoo_source": "local", "sam2": "false"}.items():
        words += ["--conf", key, value]
    return Server([*words, "--port", str(port)], root, port)


def start_own(root: Path, bundles: Sequence[Path], studies: Path) -> Server:
    port = free_port()
    words = ["-m", "med3dinsight_ext", "label", "--studies", str(studies), "--port", str(port)]
    return Server([*words, "--bundles", ",".join(map(str, bundles))], root, port)
