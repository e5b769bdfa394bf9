"""A chat-completions server that checks pixels, counts requests and fails on demand.

    python tests/chat_server.py [--port 0] [--delay 0.2] [--jitter 0.1] [--key K] [--models a,b]

prints its port and ends when its standard input does. POST /set takes any of ``SETTINGS`` as JSON
and starts the log anew; GET /log returns the requests.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import random
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

SETTINGS: dict[str, Any] = {
    "delay": 0.0,  # seconds an answer takes
    "jitter": 0.0,  # share of the delay, up or down, drawn by the number of the request
    "key": "",  # that has to be sent
    "models": ["tiny"],
    "fault": "",  # a status, or a method of Handler without its "send_"
    "first": -1,  # so many requests meet the fault; -1 is all
    "numbers": None,  # or these alone, counted from 0
    "headers": {},  # sent beside a status
    "finish": "stop",  # the reason that is given with an answer
    "message": "as was asked",  # of a status, or the whole body of the fault "body"
}
LOCK = threading.Lock()


class State:
    """Settings and log since the last /set."""

    def __init__(self, **changes: Any) -> None:
        if not changes.keys() <= SETTINGS.keys():
            raise ValueError(f"settings must be of {list(SETTINGS)}, got {list(changes)}")
        self.set = argparse.Namespace(**(SETTINGS | changes))
        self.count = self.now = self.most = 0
        self.seen: deque[dict[str, Any]] = deque(maxlen=100)

    def broken(self, number: int) -> bool:
        if self.set.numbers is not None:
            return number in self.set.numbers
        return self.set.first < 0 or number < self.set.first


def answer(body: dict[str, Any]) -> str:
    """The fixed answer to a prompt and picture."""
    picture, prompt = body["messages"][0]["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    if head != "data:image/png;base64":
        raise ValueError(f"picture must be a PNG, got {head}")
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        digest = hashlib.sha256(image.tobytes() + prompt["text"].encode()).hexdigest()[:12]
        return f"A picture of {image.width} x {image.height}, {image.mode}, mark {digest}."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    state = State()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = Handler.state
        if self.path == "/log":
            seen = list(state.seen)
            self.reply({"count": state.count, "now": state.now, "most": state.most, "seen": seen})
        elif self.path == "/v1/models":
            self.reply({"data": [{"id": name} for name in state.set.models]})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/set":
            Handler.state = State(**json.loads(body))
            return self.reply({})
        state = Handler.state
        with LOCK:
            number = state.count
            state.count += 1
            state.now += 1
            state.most = max(state.most, state.now)
            seen = {"path": self.path, "headers": dict(self.headers), "body": body.decode()}
            state.seen.append(seen | {"time": time.monotonic()})
        try:
            self.chat(state, number, body)
        finally:
            with LOCK:
                state.now -= 1

    def chat(self, state: State, number: int, raw: bytes) -> None:
        begin = time.monotonic()
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if state.set.key and key != state.set.key:  # repeated, as careless servers do
            return self.fail(401, f"Incorrect API key provided: {key}")
        if state.set.fault and state.broken(number):
            if not state.set.fault.isdigit():
                return getattr(self, f"send_{state.set.fault}")()
            return self.fail(int(state.set.fault), state.set.message, state.set.headers)
        if self.path != "/v1/chat/completions":
            return self.reply({"detail": "Not Found"}, 404)
        body = json.loads(raw)
        if body["model"] not in state.set.models:
            return self.fail(404, f"The model `{body['model']}` does not exist.")
        text = answer(body)
        wait = state.set.delay * (1 + state.set.jitter * random.Random(number).uniform(-1, 1))
        time.sleep(max(0.0, begin + wait - time.monotonic()))
        self.complete({"role": "assistant", "content": text}, state.set.finish)

    def reply(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(answer).encode(), status, headers)

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.head(len(body), status, headers)
        self.wfile.write(body)
        self.wfile.flush()

    def head(self, length: int, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def fail(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.reply({"error": {"message": message, "code": status}}, status, headers)

    def complete(self, message: dict[str, Any], finish: str = "stop") -> None:
        choice = {"message": message, "finish_reason": finish}
        self.reply({"choices": [choice], "usage": {"total_tokens": 100}})

    def send_html(self) -> None:
        self.send(b"<html>Welcome to the ward's network</html>")

    def send_body(self) -> None:
        self.send(Handler.state.set.message.encode("latin-1"))

    def send_zipped(self) -> None:
        self.send(gzip.compress(b" " * 10**6), 200, {"Content-Encoding": "gzip"})

    def send_half(self) -> None:
        self.head(1000)
        self.wfile.write(b'{"choices": [')
        self.wfile.flush()
        self.close_connection = True

    def send_nothing(self) -> None:
        self.close_connection = True

    def send_empty_choices(self) -> None:
        self.reply({"choices": []})

    def send_no_choices(self) -> None:
        self.reply({"error": {"message": "upstream fell over"}})

    def send_huge(self) -> None:
        self.complete({"content": "x" * 3_000_000})

    def send_refusal(self) -> None:
        self.complete({"content": None, "refusal": "I cannot help with that."})

    def send_no_content(self) -> None:
        self.complete({"content": None})

    def send_parts(self) -> None:
        self.complete({"content": [{"type": "text", "text": "The liver"}, {"text": " is seen."}]})

    def send_reasoning(self) -> None:
        self.complete({"content": "The spleen.", "reasoning_content": "Dark, so perhaps air."})

    def send_words(self) -> None:
        self.complete({"content": "liver " * 10_000})

    def send_surrogate(self) -> None:
        self.send(b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}')

    def send_redirect(self) -> None:
        self.reply(
            {}, 307, {"Location": f"http://localhost:{self.connection.getsockname()[1]}/else"}
        )

    def send_hang(self) -> None:
        time.sleep(60)

    def send_drip(self) -> None:
        self.head(1000)
        for _ in range(1000):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that left is normal
            super().handle_error(*_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--models", default="tiny")
    given = vars(parser.parse_args())
    port, models = given.pop("port"), given.pop("models").split(",")
    Handler.state = State(**given, models=models)
    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
