"""Runs calls in a worker process with limits on memory and time, and records what they touch.

The worker is forked from this process, so what is imported here costs it nothing. An audit hook of
the interpreter sees files opened for writing, removed or renamed, programs, sockets, and globals
that a pickle looks up.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from med3dinsight_ext.io.claims import ClaimError

REFUSALS = (ValueError, TypeError, ClaimError)  # and none of their other subclasses


MEMORY = 2 << 30  # bytes above what the worker has mapped at its start
SECONDS = 10.0  # of the processor
PATIENCE = 6  # times as many seconds in which it waits
TEXT = 40_000  # characters of a message that are kept
PROGRAMS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
)
LINKS = ("os.link", "os.symlink")
PATHS = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", *LINKS)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Outcome(NamedTuple):
    """What a call did.

    Attributes:
        kind: "value", "refused" (ValueError or TypeError), "error" (another exception), "crash",
            "time" or "effect" (a file outside the folder, a program, a socket).
        text: repr of the value, message of the error, or the effect.
    """

    kind: str
    text: str

    @property
    def allowed(self) -> bool:
        return self.kind in ("value", "refused")


class Watch:
    """An audit hook that records forbidden effects while it is on.

    Args:
        folder: where files may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.on = False
        self.effects: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in PROGRAMS or event.startswith("socket.connect"):
            self.effects.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = arguments
            if (isinstance(flags, int) and flags & WRITES) or set(str(mode)) & set("wax+"):
                self._path(event, path)
        elif event in PATHS:
            for path in arguments[1:2] if event in LINKS else arguments[:2]:
                self._path(event, path)

    def _path(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes)) and os.path.basename(path):
            real = os.path.realpath(os.fsdecode(path))
            if real not in (os.devnull, self.folder) and not real.startswith(self.folder + os.sep):
                self.effects.append(f"{event} {real}"[:200])


def outcome(call: Callable[[], Any], watch: Watch) -> Outcome:
    """Run a call under the watch."""
    watch.effects.clear()
    watch.on = True
    try:
        found = Outcome("value", repr(call())[:TEXT])
    except (ValueError, TypeError) as error:
        kind = "refused" if type(error) in REFUSALS else "error"
        found = Outcome(kind, _message(error))
    except BaseException as error:
        found = Outcome("error", _message(error))
    watch.on = False
    return Outcome("effect", "; ".join(watch.effects)) if watch.effects else found


def _message(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}"
    if type(error) in REFUSALS:
        return text[:TEXT]
    return f"{text[:TEXT]} (at {Path(where.filename).name}:{where.lineno})"


def _serve(pipe: Any, call: Callable[[str], Any], folder: Path, memory: int) -> None:
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    with open(os.devnull, "w") as null:  # loggers hold the streams themselves
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    watch = Watch(folder)
    sys.addaudithook(watch)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 30, 8 << 30))
    while True:
        argument = pipe.recv_bytes().decode("utf-8", "surrogateescape")
        found = outcome(lambda: call(argument), watch)  # noqa: B023
        pipe.send_bytes(json.dumps(found).encode())


class Worker:
    """A process that makes one call after another; started anew once it died or hung.

    Args:
        call: from a text to anything.
        folder: working folder, and the only one where files may be written.
        seconds: limit of one call.
        memory: limit, in bytes above the memory that is mapped at the start.
    """

    def __init__(
        self,
        call: Callable[[str], Any],
        folder: Path,
        seconds: float = SECONDS,
        memory: int = MEMORY,
    ) -> None:
        self.arguments, self.seconds = (call, folder, memory), seconds
        self.process: Any = None
        self._before = 0.0

    def __call__(self, argument: str = "") -> Outcome:
        if self.process is None:
            context = get_context("fork")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, *self.arguments))
            self.process.start()
            theirs.close()
        self.pipe.send_bytes(argument.encode("utf-8", "surrogateescape"))
        idle, used = 0, self.cpu_seconds()
        try:
            while self.cpu_seconds() - used < self.seconds:
                if self.pipe.poll(1):
                    return Outcome(*json.loads(self.pipe.recv_bytes()))
                idle += self._stat()[0] != "R"  # a busy machine leaves it runnable
                if idle > PATIENCE * self.seconds:  # it waits for something
                    break
            found = Outcome("time", f"no result after {self.seconds:g} s")
        except (EOFError, OSError):
            self.process.join(5)
            found = Outcome("crash", f"exit code {self.process.exitcode}")
        self.close()
        return found

    def cpu_seconds(self) -> float:
        """Of its processes so far: those of a busy machine's other programs do not count."""
        if self.process is None:
            return self._before
        fields = self._stat()
        return self._before + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _stat(self) -> list[str]:
        """Fields of the process in /proc, from its state on."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):  # it died
                self._before = self.cpu_seconds()
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


@contextlib.contextmanager
def worker(call: Callable[[str], Any], folder: Path, **limits: Any) -> Any:
    """A ``Worker`` that ends with the block."""
    made = Worker(call, folder, **limits)
    try:
        yield made
    finally:
        made.close()
