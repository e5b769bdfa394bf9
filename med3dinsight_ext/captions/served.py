"""Captions from an OpenAI-compatible chat-completions server: vLLM, Ollama, a hosted one.

A request holds the prompt and the pixels, nothing else.
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

from med3dinsight_ext.captions import chat
from med3dinsight_ext.captions.multimodal import MllmCaptions, SliceRequest, check_least

PATH = "/chat/completions"
GRACE = 2.0  # seconds that open requests get once the run has failed


class ServedCaptions(MllmCaptions):
    """A multimodal model behind a chat-completions server; several requests run at once.

    The fingerprint leaves out the server, so that several servers of one model can share the work;
    what changes the model without changing its name (weights, quantisation) belongs in
    ``revision``. Requests need the extra ``served`` (the openai package).

    Args:
        url: what precedes ``/chat/completions``, for example ``http://localhost:8000/v1``.
        model: its name on the server.
        revision: of the model, if the name leaves it open; part of the fingerprint, not sent.
        key_variable: environment variable with the API key; "" sends none.
        concurrency: number of requests that run at once, >= 1.
        retries: tries after the first, >= 0, for transient failures: status 408, 409, 425, 429 or
            5xx, malformed answers, broken connections, timeouts.
        timeout: seconds until a response begins, and as many until it is complete.
        max_requests: upper bound of requests by this object, retries included; None is no limit.
        allow_upload: accept a url that is not loopback, so that pixels leave this machine.
        **options: arguments of ``MllmCaptions``.

    Raises:
        ValueError: the url is not loopback and uploads are not allowed, or a key would be sent
            without https.
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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(concurrency=(concurrency, 1), retries=(retries, 0), timeout=(timeout, 0.001))
        check_least(max_requests=(max_requests, 1))
        base = chat.base_url(url)
        self.url, self.loopback = base.url, chat.is_loopback(str(base.host))
        if not isinstance(allow_upload, bool):
            raise ValueError(f"allow_upload must be True or False, got {allow_upload!r}")
        if not self.loopback and not allow_upload:
            raise ValueError(
                f"url must be on this machine (localhost), got the host {base.host}, to which "
                "pixel data would go; set allow_upload to True if your data may leave"
            )
        self.model, self.revision, self.key_variable = model, revision, key_variable
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self.max_requests = max_requests
        self.requests = 0  # made so far
        self._lock = threading.Lock()
        self._key()

    @property
    def model_fingerprint(self) -> str:
        """Model and revision; not the url."""
        return json.dumps(["served", self.model, self.revision])

    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Each request with its raw answer, in order of arrival.

        At most twice ``concurrency`` requests are taken ahead, so that one is ready for each
        thread. After an error of ``requests`` itself or ``max_requests``, all open requests are
        completed first, since they are paid for; after any other error, those that complete within
        ``GRACE`` seconds.

        Raises:
            ValueError: the server rejects a request, or ``max_requests`` is reached.
            ConnectionError: no answer after all retries.
        """
        source, held, more, until = iter(requests), 0, True, None
        failure: Exception | None = None
        run = _Run(self._connect(self.timeout), SimpleQueue(), SimpleQueue(), threading.Event())
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
                        more, failure = False, error
                    if not run.arrived.empty():  # a slow source delays no answer
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
                    more, failure = False, failure or result
                    if run.stopped.is_set():
                        until = until or time.monotonic() + GRACE
        finally:
            run.stopped.set()
            for _ in range(self.concurrency):
                run.todo.put(None)
            if not held:  # else threads still use it
                run.client.close()
        if isinstance(failure, chat.RequestFailed):
            failure = self._explained(failure)
        if failure is not None:
            raise failure

    def _work(self, run: _Run) -> None:
        for request, body in iter(run.todo.get, None):
            result: str | Exception | None
            try:
                result = self._answer(body, run)
            except Exception as error:
                result = error
                if not isinstance(error, _Spent):  # before another request begins
                    run.stopped.set()
            run.arrived.put((request, result))

    def _answer(self, body: dict[str, Any], run: _Run) -> str | None:
        """The answer to one request; None if the run was stopped before it."""
        last, wait = "", 0.0
        for attempt in range(1, self.retries + 2):
            if run.stopped.wait(wait):
                return None
            self._count()
            try:
                text, tokens = chat.complete(run.client, body)
            except chat.RequestFailed as error:
                if not error.transient:
                    raise
                last = f"{error.kind} ({self._excerpt(error.message)})"
                wait = chat.backoff(attempt, error.retry_after)
            else:
                with self._lock:
                    self.tokens += tokens
                return text
        raise ConnectionError(
            f"{self.url} must answer, got {last} at the last of {self.retries + 1} tries; finished "
            "slices are kept: check the server, then run the same command to resume"
        )

    def _explained(self, failure: chat.RequestFailed) -> ValueError:
        """The error that names the setting to change; lists the server's models where it helps."""
        status, message = failure.status, self._excerpt(failure.message)
        got = f"status {status} ({message})"
        models = []
        if status == 404 or "model" in message.lower():
            models = chat.models(self._connect(10.0))
        if status in (401, 403):
            name, had = self.key_variable or "key_variable", "another" if self._key() else "none"
            text = (
                f"{name} must hold a key that {self.url} takes, got {had}, hence {got}; set the "
                f"environment variable {name}"
            )
        elif "max_completion_tokens" in message:
            text = (
                f"model must take max_tokens, got {self.model!r}, which requires "
                f"max_completion_tokens instead, hence {got}; use another model"
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
                f"requests must be valid for {self.url}, got {got}; check that {self.model} "
                "takes images, and change prompt, max_tokens or size"
            )
        return ValueError(text)

    def request_body(self, request: SliceRequest) -> dict[str, Any]:
        """The JSON that is sent for one slice."""
        png = io.BytesIO()
        if self.loopback:  # bytes cost less than compression; a palette avoids PIL's filter search
            image = request.image.convert("P") if request.image.mode == "L" else request.image
            image.save(png, "PNG", compress_level=0)
        else:
            request.image.save(png, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": request.prompt},
        ]
        return {
            "messages": [{"role": "user", "content": content}],
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def _connect(self, timeout: float) -> Any:
        return chat.connect(chat.base_url(self.url), self._key(), self.concurrency, timeout)

    def _key(self) -> str:
        """Read from the environment each time: an attribute could be printed."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not re.fullmatch("[!-~]*", key):
            raise ValueError(
                f"{self.key_variable} must be printable ASCII without spaces, got something else; "
                "correct the environment variable"
            )
        if key and not self.loopback and not self.url.startswith("https:"):
            raise ValueError(
                f"url must start with https where a key is sent, got {self.url}; correct it, or "
                f"set key_variable to '' so that {self.key_variable} is not sent"
            )
        return key

    def _excerpt(self, message: str) -> str:
        """The first 200 characters of a server's message, without the key if it repeats it."""
        key = self._key()
        return " ".join((message.replace(key, "***") if key else message).split())[:200]

    def _count(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise _Spent(
                    f"max_requests must exceed the {self.requests} requests made, got "
                    f"{self.max_requests}; finished slices are kept: a larger number resumes"
                )
            self.requests += 1


class _Run(NamedTuple):
    """Shared by the threads of one run and the caller's."""

    client: Any
    todo: SimpleQueue[tuple[SliceRequest, dict[str, Any]] | None]
    arrived: SimpleQueue[tuple[SliceRequest, str | Exception | None]]
    stopped: threading.Event  # no request begins after it; open ones continue


class _Spent(ValueError):
    """No further request is allowed; open ones continue."""
