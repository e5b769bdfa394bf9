"""Requests a second of served captions against a plain load generator.

python benchmarks/bench_served.py [--repeats 3]

The server is tests/chat_server.py in its own process; an answer takes 0.2 s ± 20 %. The load
generator sends prepared bodies through plain threads and the same HTTP library and reads the
answers; ours also encodes each picture as PNG, checks and counts the answers, and retries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import fire
import numpy as np
from PIL import Image
from urllib3 import PoolManager

sys.path.insert(0, str(Path(__file__).parent))
from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.captions.multimodal import SliceRequest  # noqa: E402
from med3dinsight_ext.captions.served import ServedCaptions  # noqa: E402

SERVER = Path(__file__).parents[1] / "tests" / "chat_server.py"
DELAY, JITTER = 0.2, 0.2


@contextmanager
def server() -> Iterator[int]:
    """Port of a server that is stopped at the end of the block."""
    command = [sys.executable, str(SERVER), f"--delay={DELAY}", f"--jitter={JITTER}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def pictures(count: int = 16, size: int = 448) -> list[Image.Image]:
    """Smooth noise that compresses about as well as slices resized to this size."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, size // 8, size // 8), dtype=np.uint8)
    return [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in coarse]


def plain(port: int, bodies: list[bytes], concurrency: int) -> None:
    """Send every body once."""
    pool = PoolManager(maxsize=concurrency, block=True)
    todo: SimpleQueue[bytes] = SimpleQueue()
    for body in bodies:
        todo.put(body)
    done: list[bytes] = []

    def work() -> None:
        url = f"http://localhost:{port}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        while True:
            try:
                body = todo.get_nowait()
            except Empty:
                return
            response = pool.request("POST", url, body=body, headers=headers, retries=False)
            assert response.status == 200, response.data
            done.append(response.data)

    threads = [Thread(target=work) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(bodies)


def compare(port: int, concurrency: int, rounds: int, repeats: int) -> dict[str, Any]:
    captioner = ServedCaptions(f"http://localhost:{port}/v1", "tiny", concurrency=concurrency)
    images, count = pictures(), concurrency * rounds
    requests = [SliceRequest(0, i, f"Slice {i}?", images[i % len(images)]) for i in range(count)]
    bodies = [json.dumps(captioner.request_body(request)).encode() for request in requests]
    seconds = []
    for repeat in range(repeats + 1):
        ours = lambda: len(list(captioner.answers(requests)))  # noqa: E731
        theirs = lambda: plain(port, bodies, concurrency)  # noqa: E731
        pair = (timed(ours), timed(theirs)) if repeat % 2 else (timed(theirs), timed(ours))[::-1]
        if repeat:  # the first includes imports and caches
            seconds.append(pair)
    return {
        "concurrency": concurrency,
        "requests": count,
        "ours_per_second": spread([count / a for a, _ in seconds]),
        "plain_per_second": spread([count / b for _, b in seconds]),
        "bound_per_second": concurrency / DELAY,
        "ratio": spread([b / a for a, b in seconds]),
    }


def main(repeats: int = 3) -> None:
    with server() as port:
        rows = [compare(port, 8, 15, repeats), compare(port, 32, 15, repeats)]
    write(
        "served",
        {"seed": 0, "delay_seconds": DELAY, "jitter": JITTER, "pixels": 448, "rows": rows},
    )


if __name__ == "__main__":
    fire.Fire(main)
