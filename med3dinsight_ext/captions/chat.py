"""How one speaks with a chat-completions server: connections, answers, errors, waits."""

from __future__ import annotations

import ipaddress
import json
import random
import time
from typing import Any
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Url, make_headers, parse_url

FIRST_WAIT = 1.0  # seconds before the second try, at most; doubled each time
LONGEST_WAIT = 60.0  # seconds before any try, be it asked for by the server
LONGEST_ANSWER = 1_000_000  # bytes


class Malformed(HTTPError):
    """An answer that holds no message."""


def place_of(url: str) -> Url:
    """The url as urllib3 reads it, who connects to it as well."""
    try:
        place = parse_url(url.rstrip("/").removesuffix("/chat/completions"))
    except LocationParseError:
        place = Url()
    plain = not (place.auth or place.query or place.fragment)
    if place.scheme not in ("http", "https") or not place.host or not plain:
        raise ValueError(
            "url must be http:// or https:// with a host, without user, query or fragment, got "
            f"{place.scheme}://{place.host}; write it like http://localhost:8000/v1, and put a key "
            "into the variable that key_variable names"
        )
    return place


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def connections(place: Url, headers: dict[str, str], count: int, timeout: float) -> PoolManager:
    """At most ``count`` to the place, by the environment's proxy unless it is this machine."""
    host, proxy = str(place.host), getproxies().get(str(place.scheme))
    how: dict[str, Any] = {
        "headers": headers, "maxsize": count, "block": True,
        "timeout": Timeout(connect=min(10, timeout), read=timeout),
    }  # fmt: skip
    if not proxy or is_loopback(host) or proxy_bypass(host):
        return PoolManager(**how)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    login = unquote(parse_url(proxy).auth or "")
    headers_of_proxy = make_headers(proxy_basic_auth=login or None)
    return ProxyManager(proxy, proxy_headers=headers_of_proxy, **how)


def exchange(
    pool: PoolManager, method: str, url: str, body: bytes | None, timeout: float
) -> tuple[BaseHTTPResponse, bytes]:
    """Send one request, never redirected; head of the answer, and body.

    The timeout holds for each: seconds until the body begins, and until it has ended.

    Raises:
        HTTPError: the connection failed, or the answer is cut, too long or too slow.
    """
    response = pool.request(
        method, url, body=body, redirect=False, retries=False, preload_content=False
    )
    until, held = time.monotonic() + timeout, bytearray()
    try:
        while piece := response.read1(1 << 16):
            held += piece
            if len(held) > LONGEST_ANSWER:
                raise Malformed(f"longer than {LONGEST_ANSWER} bytes")
            if time.monotonic() > until:
                raise HTTPError(f"no whole answer within {timeout:g} s")
    finally:
        response.close()  # does nothing to a connection that was read to its answer's end
        response.release_conn()
    return response, bytes(held)


def pause(attempt: int, asked: float) -> float:
    """Seconds before the next try: anything up to a doubling limit, beyond what was asked for."""
    return asked + random.uniform(0, min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))


def retry_after(response: BaseHTTPResponse) -> float:
    """Seconds from a Retry-After header, a whole number or a date; 0 if it is neither."""
    try:
        return min(Retry().get_retry_after(response) or 0.0, LONGEST_WAIT)
    except (HTTPError, ValueError, OverflowError):
        return 0.0


def read_text(body: bytes) -> tuple[str, int]:
    """Text of a whole answer, and how many tokens it took, if told."""
    try:
        answer = json.loads(body)
        message = answer["choices"][0]["message"]
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        text = str(content or refusal or "")
        tokens = (answer.get("usage") or {}).get("total_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Malformed(error_message(body)) from None
    clean = text.encode("utf-8", "replace").decode()  # half a surrogate cannot be written to a file
    return clean, tokens if isinstance(tokens, int) else 0


def error_message(body: bytes) -> str:
    """What an answer says of its error, in whichever of the usual places."""
    try:
        answer: Any = json.loads(body)
        while isinstance(answer, dict):
            answer = next(answer[key] for key in ("error", "message", "detail") if key in answer)
    except (ValueError, StopIteration, RecursionError):
        answer = body.decode("utf-8", "replace")
    return str(answer)
