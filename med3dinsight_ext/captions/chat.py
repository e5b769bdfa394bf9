"""Requests to an OpenAI-compatible chat-completions server, through the openai client.

The client's retries, redirects and telemetry headers are off. Reading a response is ours, because
the client bounds neither its total time nor its size.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import ssl
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.request import getproxies, proxy_bypass

from urllib3 import Retry
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Url, parse_url

from med3dinsight_ext.captions.cleaning import CUT

FIRST_WAIT = 1.0  # seconds: upper bound before the second try; doubles with each further one
LONGEST_WAIT = 60.0  # seconds: upper bound before any try, also for what a server requests
LONGEST_RESPONSE = 1_000_000  # bytes
TRANSIENT = {408, 409, 425, 429}  # and 500 to 599
ERROR_KEYS = ("error", "message", "detail")
HEADERS = {"host", "accept-encoding", "content-length", "content-type", "user-agent"}


@dataclass(eq=False)
class RequestFailed(Exception):
    """A request without an answer."""

    kind: str  # "status 429", "malformed answer", or the class of the connection error
    message: str  # of the server or the connection
    status: int = 0  # of HTTP, if there is one
    retry_after: float = 0.0  # seconds that the server requests

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        return not self.status or self.status in TRANSIENT or 500 <= self.status < 600


def base_url(url: str) -> Url:
    """A server's base URL, parsed and normalised; ``/chat/completions`` at its end is dropped.

    Raises:
        ValueError: not http or https, or with user, query or fragment.
    """
    try:
        base = parse_url(url.rstrip("/").removesuffix("/chat/completions"))
    except LocationParseError:
        base = Url()
    plain = not (base.auth or base.query or base.fragment)
    if base.scheme not in ("http", "https") or not base.host or not plain:
        raise ValueError(
            "url must be http:// or https:// with a host, without user, query or fragment, got "
            f"{base.scheme}://{base.host}; write it like http://localhost:8000/v1, and put a key "
            "into the variable that key_variable names"
        )
    return base


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address alone (no name is resolved)."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def openai() -> Any:
    """The openai package, imported here; ValueError if it is not installed."""
    try:
        return import_module("openai")
    except ImportError as error:
        raise ValueError(
            "a served captioner must have the openai package, got none; "
            "pip install 'med3dinsight-ext[served]'"
        ) from error


def connect(base: Url, key: str, connections: int, timeout: float) -> Any:
    """An ``openai.OpenAI`` client that sends no more than a request needs, to ``base`` alone.

    Args:
        base: from ``base_url``. Proxies of the environment are used unless it is loopback.
        key: sent as a bearer token; "" sends none.
        connections: upper bound of open connections.
        timeout: seconds until a response begins, and as many until it is complete.
    """
    library, http = openai(), import_module("httpx2")  # the openai client's own HTTP library
    logging.getLogger(http.__name__).setLevel(logging.WARNING)  # else a line for each request
    allowed = HEADERS | ({"authorization"} if key else set())

    def strip_headers(request: Any) -> None:
        for name in request.headers.keys() - allowed:
            del request.headers[name]

    def read_response(response: Any) -> None:
        deadline, body = time.monotonic() + timeout, bytearray()
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RequestFailed("malformed answer", "compressed against the request")
        for piece in response.stream:
            body += piece
            if len(body) > LONGEST_RESPONSE:
                raise RequestFailed("malformed answer", f"longer than {LONGEST_RESPONSE} bytes")
            if time.monotonic() > deadline:
                raise RequestFailed("malformed answer", f"not complete within {timeout:g} s")
        response.stream.close()
        response.stream = http.ByteStream(bytes(body))

    session = http.Client(
        event_hooks={"request": [strip_headers], "response": [read_response]},
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        limits=http.Limits(max_connections=connections),
        proxy=_proxy(base),
        timeout=http.Timeout(timeout, connect=min(10, timeout)),
        trust_env=False,  # would demand packages for proxies that are not used
        verify=ssl.create_default_context(),
    )
    client = library.OpenAI(
        api_key=key or "none", base_url=base.url, max_retries=0, http_client=session
    )
    if client.base_url.raw_host.decode() != str(base.host).strip("[]"):
        raise ValueError(  # the host that was checked must be the host that is contacted
            f"url must have an unambiguous host, got {base.url}; correct it"
        )
    return client


def _proxy(base: Url) -> str | None:
    host, proxy = str(base.host), getproxies().get(str(base.scheme))
    if not proxy or is_loopback(host) or proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def complete(client: Any, body: dict[str, Any]) -> tuple[str, int]:
    """Text of one completion, and its number of tokens (0 where the server reports none).

    A text that was cut at the limit of tokens ends with ``CUT``.

    Raises:
        RequestFailed: no connection, an error status, or a response without a message.
    """
    library = openai()
    try:
        answer = client.chat.completions.create(**body)
    except library.APIStatusError as error:
        status, wait = error.status_code, retry_after(error.response.headers.get("retry-after"))
        message = error_message(error.body)
        raise RequestFailed(f"status {status}", message, status, wait) from None
    except library.APIConnectionError as error:
        cause = error.__cause__ or error
        raise RequestFailed(type(cause).__name__, str(cause)) from None
    except (ValueError, RecursionError) as error:  # no JSON
        raise RequestFailed("malformed answer", str(getattr(error, "doc", error))) from None
    try:
        choice = answer.choices[0]
        message = choice.message
        content = message.content
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        text = str(content or getattr(message, "refusal", None) or "")
        if text and getattr(choice, "finish_reason", None) == "length":
            text += CUT
        tokens = getattr(answer.usage, "total_tokens", 0)
    except (LookupError, TypeError, AttributeError):
        raise RequestFailed("malformed answer", error_message(answer)) from None
    text = text.encode("utf-8", "replace").decode()  # a file cannot hold half a surrogate pair
    return text, tokens if isinstance(tokens, int) else 0


def models(client: Any) -> list[str]:
    """Names of the server's models; none if it does not list them."""
    try:
        return [str(model.id) for model in client.models.list().data]
    except (openai().OpenAIError, RequestFailed, ValueError, TypeError, AttributeError):
        return []


def error_message(body: Any) -> str:
    """The error in a response's body, in whichever of the usual places."""
    try:
        body = body.to_dict(warnings=False) if hasattr(body, "to_dict") else body
    except ValueError:  # half a surrogate pair
        body = repr(body)
    while isinstance(body, dict) and (keys := [k for k in ERROR_KEYS if k in body]):
        body = body[keys[0]]
    return str(body)


def backoff(attempt: int, requested: float) -> float:
    """Seconds before retry 1, 2, …: what the server requests, and jitter below a doubling limit."""
    return requested + random.uniform(0, min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))


def retry_after(header: str | None) -> float:
    """Seconds from a Retry-After header, a whole number or a date; 0 if it is neither."""
    try:
        return min(max(Retry().parse_retry_after(header or ""), 0.0), LONGEST_WAIT)
    except (HTTPError, ValueError, OverflowError):
        return 0.0
