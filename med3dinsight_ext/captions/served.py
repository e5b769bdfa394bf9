"""Captions from a server that speaks OpenAI's chat completions: vLLM, Ollama, a hosted one.

A server is sent the prompt and the pixels, nothing else.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from urllib3 import PoolManager
from urllib3.exceptions import HTTPError

from med3dinsight_ext.captions import chat
from med3dinsight_ext.captions.multimodal import MllmCaptions, SliceRequest

PASSING = {408, 409, 425, 429}  # and 500 to 599
PATH = "/chat/completions"
GRACE = 2.0  # seconds that requests under way get once the run has failed


class ServedCaptions(MllmCaptions):
    """Asks an OpenAI-compatible server, several requests at once.

    Which server answers is no part of the fingerprint, so that several of one model can share the
    work; what changes the model without changing its name (weights, quantisation) belongs into
    ``revision``.

    Args:
        url: what precedes ``/chat/completions``, for example ``http://localhost:8000/v1``.
        model: its name on the server.
        revision: of the model, if the name leaves it open; kept, not sent.
        key_variable: environment variable with the key; "" sends none.
        concurrency: requests under way at once.
        retries: tries after the first, for what may pass: 408, 409, 425, 429, 5xx, broken answers
            and connections, silence.
        timeout: seconds until an answer must begin, and as many until it must have ended.
        max_requests: so many answers are asked for by this object, retries included; None is no
            limit.
        allow_upload: let pixels leave this machine, that is, take a url that is not loopback.
        **asking: what ``MllmCaptions`` takes.

    Raises:
        ValueError: the url is no loopback address and uploads are not allowed, or a key would
            travel in the clear.
    """

    def __init__(
        self,
        url: str,
        model: str,
        revision: str = "",
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        max_requests: int | None = None,
        allow_upload: bool = False,
        **asking: Any,
    ) -> None:
        super().__init__(**asking)
        most = 1 if max_requests is None else max_requests
        least = [
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("max_requests", most, 1),
        ]
        for name, value, low in [*least, ("timeout", timeout, 0.001)]:
            if not value >= low:
                raise ValueError(f"{name} must be at least {low}, got {value}; correct captioner")
        place = chat.place_of(url)
        self.url, self.loopback = place.url, chat.is_loopback(str(place.host))
        if not isinstance(allow_upload, bool):
            raise ValueError(f"allow_upload must be True or False, got {allow_upload!r}")
        if not self.loopback and not allow_upload:
            raise ValueError(
                f"url must be on this machine (localhost), got the host {place.host}, to which "
                "pixel data would go; set allow_upload to True if your data may leave"
            )
        self.model, self.revision, self.key_variable = model, revision, key_variable
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self.max_requests, self.requests = max_requests, 0  # allowed, made so far
        self._lock = threading.Lock()
        self._key()

    @property
    def model_print(self) -> str:
        """Model and revision; not the url."""
        return json.dumps(["served", self.model, self.revision])

    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Each request with its raw answer, as they come.

        At most twice ``concurrency`` requests are held, so that one is ready when a thread is.
        Answers under way are handed out before an error is raised: all of them where it is the
        source's own or ``max_requests``, since they are paid for, else those that come within two
        seconds.

        Raises:
            ValueError: the server refuses, or ``max_requests`` is reached.
            ConnectionError: it stays away after all retries.
        """
        source, held, more, until = iter(requests), 0, True, None
        ending: Exception | None = None
        run = _Run(self._pool(), SimpleQueue(), SimpleQueue(), threading.Event())
        for _ in range(self.concurrency):
            threading.Thread(target=self._work, args=(run,), name="captions", daemon=True).start()
        try:
            while True:
                while more and held < 2 * self.concurrency:
                    try:
                        request = next(source)
                        run.todo.put((request, self.request_body(request)))
                        held += 1
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more, ending = False, error
                    if not run.arrived.empty():  # a slow source keeps no answer waiting
                        break
                if not held:
                    break
                try:
                    left = None if until is None else max(0.0, until - time.monotonic())
                    request, result = run.arrived.get(timeout=left)
                except Empty:
                    break
                held -= 1
                if isinstance(result, str):
                    yield request, result
                elif result is not None:
                    more, ending = False, ending or result
                    if run.stopped.is_set():
                        until = until or time.monotonic() + GRACE
        finally:
            run.stopped.set()
            for _ in range(self.concurrency):
                run.todo.put(None)
        if isinstance(ending, _Refused):
            ending = self._explained(ending)
        if ending is not None:
            raise ending

    def _work(self, run: _Run) -> None:
        for request, body in iter(run.todo.get, None):
            result: str | Exception | None
            try:
                result = self._answer(body, run)
            except Exception as error:
                result = error
                if not isinstance(error, _Spent):  # before another request is begun
                    run.stopped.set()
            run.arrived.put((request, result))

    def _answer(self, body: bytes, run: _Run) -> str | None:
        """The answer to one request; None if nobody waits for it any more."""
        last, asked = "", 0.0
        for attempt in range(self.retries + 1):
            if run.stopped.wait(chat.pause(attempt, asked) if attempt else 0):
                return None
            asked = 0.0
            self._count()
            try:
                head, answer = chat.exchange(run.pool, "POST", self.url + PATH, body, self.timeout)
                if 200 <= head.status < 300:
                    text, tokens = chat.read_text(answer)
                    with self._lock:
                        self.tokens += tokens
                    return text
            except chat.Malformed as error:
                last = f"a malformed answer ({self._shown(str(error))})"
            except HTTPError as error:
                last = self._shown(f"{type(error).__name__}: {error}")
            else:
                message = self._shown(chat.error_message(answer))
                last = f"status {head.status} ({message})"
                if head.status not in PASSING and not 500 <= head.status < 600:
                    raise _Refused(head.status, message)
                asked = chat.retry_after(head)
        raise ConnectionError(
            f"{self.url} must answer, got {last} at the last of {self.retries + 1} tries; finished "
            "slices are kept: see to the server, then give the same command to go on"
        )

    def _explained(self, refused: _Refused) -> ValueError:
        """The error that says what to change; asks the server for its models where that helps."""
        status, message = refused.args
        got = f"status {status} ({message})"
        models = self._models() if status == 404 or "model" in message.lower() else []
        if status in (401, 403):
            name, had = self.key_variable or "key_variable", "another" if self._key() else "none"
            text = (
                f"{name} must hold a key that {self.url} takes, got {had}, hence {got}; set the "
                f"environment variable {name}"
            )
        elif "max_completion_tokens" in message:
            text = (
                f"model must take max_tokens, got {self.model!r}, which wants "
                f"max_completion_tokens instead, hence {got}; take another, that name is never sent"
            )
        elif models and self.model not in models:
            text = (
                f"model must be one that {self.url} has, got {self.model!r} and {got}; it has "
                + ", ".join(models[:20])
            )
        elif status == 404 or 300 <= status < 400:
            text = (
                f"url must be what precedes {PATH}, got {self.url} and {got}; it often ends in "
                "/v1, and a redirection is not followed"
            )
        else:
            text = (
                f"requests must be such as {self.url} takes, got {got}; see that {self.model} "
                "takes pictures, and change prompt, max_tokens or size"
            )
        return ValueError(text)

    def _models(self) -> list[str]:
        """Names of the server's models; none if it does not tell."""
        try:
            _, body = chat.exchange(self._pool(), "GET", f"{self.url}/models", None, 10.0)
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (HTTPError, ValueError, LookupError, TypeError):
            return []

    def request_body(self, request: SliceRequest) -> bytes:
        """What is posted for one slice."""
        png = io.BytesIO()
        if self.loopback:  # bytes cost less than pressing them; a palette spares PIL a search
            image = request.image.convert("P") if request.image.mode == "L" else request.image
            image.save(png, "PNG", compress_level=0)
        else:
            request.image.save(png, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": request.prompt},
        ]
        asked = {
            "messages": [{"role": "user", "content": content}], "model": self.model,
            "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
        }  # fmt: skip
        return json.dumps(asked).encode()

    def _pool(self) -> PoolManager:
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers["Content-Type"] = "application/json"
        return chat.connections(chat.place_of(self.url), headers, self.concurrency, self.timeout)

    def _key(self) -> str:
        """Read anew each time: a key that is kept may be printed."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not re.fullmatch("[!-~]*", key):
            raise ValueError(
                f"{self.key_variable} must be printable ASCII without spaces, got something else; "
                "set the environment variable anew"
            )
        if key and not self.loopback and not self.url.startswith("https:"):
            raise ValueError(
                f"url must start with https where a key is sent, got {self.url}; correct it, or "
                f"set key_variable to '' so that {self.key_variable} is not sent"
            )
        return key

    def _shown(self, message: str) -> str:
        """The beginning of what the server says, without the key should it repeat it."""
        key = self._key()
        return " ".join((message.replace(key, "***") if key else message).split())[:200]

    def _count(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise _Spent(
                    f"max_requests must exceed the {self.requests} requests made, got "
                    f"{self.max_requests}; finished slices are kept: a larger number goes on where "
                    "this run stopped"
                )
            self.requests += 1


class _Run(NamedTuple):
    """What the threads of one run share with the caller's."""

    pool: PoolManager
    todo: SimpleQueue[tuple[SliceRequest, bytes] | None]
    arrived: SimpleQueue[tuple[SliceRequest, str | Exception | None]]
    stopped: threading.Event  # nothing more is begun; what is under way is left to itself


class _Refused(Exception):
    """Status and message of an answer that trying again would not change."""


class _Spent(ValueError):
    """No further request may be made; those under way may end."""
