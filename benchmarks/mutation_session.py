"""The tests of a mutated module, collected once and run in children of the process."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "mutation",
    derandomize=True,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
ANEW = ("two_ranks", "uneven_ranks", "all_ranks", "ranks_join", "two_processes")  # import it anew


class Session:
    """A pytest plugin that hands the collected tests to ``work`` instead of running them.

    Args:
        work: is called with the session after the collection.
        seconds: of each test, by its id; the fastest come first.
    """

    def __init__(self, work: Callable[[Session], Any], seconds: dict[str, float]) -> None:
        self.work, self.seconds = work, seconds
        self.items: list[pytest.Item] = []
        self.failed = False
        self.lines: set[int] = set()
        self.shared: dict[str, set[int]] = defaultdict(set)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = sorted(session.items, key=lambda item: self.seconds.get(item.nodeid, 1e9))
        self.failed = bool(session.testsfailed)  # at the collection
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before = set(self.lines)
        self.lines.clear()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":  # counts for every test that uses it
                self.shared[fixturedef.argname] |= self.lines
            self.lines |= before

    def run(self, ids: set[str] | None = None) -> bool:
        """Whether the tests pass, all or those named; stops at the first that fails."""
        items = [item for item in self.items if ids is None or item.nodeid in ids]
        for item, after in zip(items, [*items[1:], None], strict=True):
            if self.failed:
                break
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return not self.failed

    def trace(self, file: str) -> dict[str, tuple[float, list[int]]]:
        """CPU seconds of every test, and the lines of ``file`` that it reaches."""

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            self.lines.add(frame.f_lineno)
            return on_line

        def on_call(frame: FrameType, event: str, _: Any) -> Any:
            return on_line(frame, event, _) if frame.f_code.co_filename == file else None

        seconds, lines = {}, {}
        for item in self.items:
            self.lines.clear()
            begin = time.process_time()
            threading.settrace(on_call)
            sys.settrace(on_call)
            passed = self.run({item.nodeid})
            sys.settrace(None)
            if not passed:
                raise ValueError(f"tests must pass on the unchanged module, got {item.nodeid}")
            seconds[item.nodeid] = time.process_time() - begin
            lines[item] = set(self.lines)
        return {
            item.nodeid: (
                seconds[item.nodeid],
                sorted(own.union(*(self.shared[f] for f in getattr(item, "fixturenames", ())))),
            )
            for item, own in lines.items()
        }


def collect(tests: str, work: Callable[[Session], Any], seconds: dict[str, float]) -> None:
    """Collect tests and do the work on them."""
    options = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    options += ["-k", f"not ({' or '.join(ANEW)})"]
    options += ["--hypothesis-profile=mutation", *tests.split()]
    pytest.main(options, plugins=[Session(work, seconds)])
