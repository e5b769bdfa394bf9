import base64
import hashlib
import json
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from med3dinsight_ext.captions import chat
from med3dinsight_ext.captions import served as served_captions
from med3dinsight_ext.captions.cleaning import CUT
from med3dinsight_ext.captions.multimodal import SliceRequest
from med3dinsight_ext.captions.served import ServedCaptions

SERVER = Path(__file__).parents[1] / "chat_server.py"
KEY = "sk-secret-of-the-ward"


class Served:
    """The server's process and its control requests."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://localhost:{self.port}/v1"

    def control(self, method: str, path: str, body: Any = None) -> Any:
        connection = HTTPConnection("localhost", self.port, timeout=5)
        connection.request(method, path, json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def set(self, **settings: Any) -> None:
        self.control("POST", "/set", settings)

    def log(self) -> Any:
        return self.control("GET", "/log")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def one_server() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


@pytest.fixture
def server(one_server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one_server.set()
    return one_server


def captioner(server: Served, **how: Any) -> ServedCaptions:
    return ServedCaptions(server.url, **{"model": "tiny", "timeout": 5.0, **how})


def picture(seed: int = 0, mode: str = "L") -> Image.Image:
    shape = (9, 7) if mode == "L" else (9, 7, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def requests(count: int, mode: str = "L") -> list[SliceRequest]:
    return [SliceRequest(0, i, f"What is in {i}?", picture(i, mode)) for i in range(count)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_each_request_gets_the_answer_to_its_own_pixels_and_prompt(
    server: Served, mode: str
) -> None:
    answers = dict(
        (request.row, text) for request, text in captioner(server).answers(requests(20, mode))
    )
    for request in requests(20, mode):
        mark = hashlib.sha256(np.asarray(request.image).tobytes() + request.prompt.encode())
        assert f"mark {mark.hexdigest()[:12]}" in answers[request.row]


def chunks(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        found.append(kind)
        at += 12 + length
    return found


def test_a_request_holds_prompt_and_pixels_alone(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "ward")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://evil.invalid")
    request = requests(1)[0]
    request.image.info = {"Patient": "Doe^Jane", "dpi": (72, 72)}
    request.image.filename = "Doe^Jane.nii.gz"  # type: ignore[attr-defined]
    list(captioner(server, max_tokens=33, seed=4, temperature=0.5).answers([request]))
    seen = server.log()["seen"][0]
    assert {name.title() for name in seen["headers"]} == {
        "Host",
        "Accept-Encoding",
        "Content-Length",
        "Content-Type",
        "User-Agent",
    }
    body = json.loads(seen["body"])
    picture = body["messages"][0]["content"][0]["image_url"].pop("url")
    content = [{"type": "image_url", "image_url": {}}, {"type": "text", "text": request.prompt}]
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 33,
        "temperature": 0.5,
        "seed": 4,
    }
    held = chunks(base64.b64decode(picture.partition(",")[2]))
    assert held == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]


FAULTS = {
    "408": "status 408", "429": "status 429", "500": "status 500 .as was asked",
    "html": "malformed answer .*Welcome", "half": "RemoteProtocolError .peer closed connection",
    "nothing": "RemoteProtocolError .Server disconnected",
    "empty_choices": "malformed answer", "no_choices": "upstream fell over",
    "huge": "malformed answer .longer than 1000000 bytes", "hang": "ReadTimeout",
    "drip": "malformed answer .not complete within 0.3 s", "zipped": "malformed answer .compressed",
}  # fmt: skip


@pytest.mark.parametrize(("finish", "end"), [("stop", ""), ("length", CUT)])
def test_an_answer_that_reached_the_limit_is_marked(server: Served, finish: str, end: str) -> None:
    server.set(finish=finish)
    ((_, text),) = captioner(server).answers(requests(1))
    assert text.endswith(CUT) == bool(end)


@pytest.mark.parametrize("fault", ["429", "html", "half", "nothing", "huge", "hang", "drip"])
def test_transient_failures_are_retried(server: Served, fault: str) -> None:
    server.set(fault=fault, first=1)
    served = captioner(server, timeout=0.3, concurrency=1)
    rows = [request.row for request, text in served.answers(requests(2)) if "mark" in text]
    assert rows == [0, 1]
    assert server.log()["count"] == served.requests == 3


@pytest.mark.parametrize(("fault", "last"), FAULTS.items())
def test_the_last_failure_is_named_with_the_url_and_the_remedy(
    server: Served, fault: str, last: str
) -> None:
    server.set(fault=fault)
    served = captioner(server, timeout=0.3, retries=0)
    with pytest.raises(
        ConnectionError, match=f"{server.url} must answer, got .*{last}.*run the same"
    ):
        list(served.answers(requests(1)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("refusal", "I cannot help with that."),
        ("no_content", ""),
        ("parts", "The liver is seen."),
        ("reasoning", "The spleen."),
        ("words", "liver " * 10_000),
        ("surrogate", "a ? b"),
    ],
)
def test_unusual_answers_arrive_as_text(server: Served, kind: str, text: str) -> None:
    server.set(fault=kind)
    assert [found for _, found in captioner(server).answers(requests(1))] == [text]


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[1]",
        '"text"',
        "{}",
        '{"choices": null}',
        '{"choices": [null]}',
        '{"choices": "a"}',
        '{"choices": {"0": 1}}',
        '{"choices": [{"message": "a"}]}',
        "\xff",
        "[" * 99_999,
        '{"choices": [{"message": {"content": [1]}}]}',
        '{"error": ' * 400 + "1" + "}" * 400,
    ],
    ids=range(13),
)
def test_a_body_without_a_message_is_malformed(server: Served, body: str) -> None:
    server.set(fault="body", message=body)
    with pytest.raises(ConnectionError, match="got malformed answer"):
        list(captioner(server, retries=0).answers(requests(1)))


def test_odd_fields_beside_the_message_do_no_harm(server: Served) -> None:
    message = (
        '{"choices": [{"message": {"content": "Liver.", "x": []}, "index": {}}], "usage": [1]}'
    )
    server.set(fault="body", message=message)
    assert [text for _, text in captioner(server).answers(requests(1))] == ["Liver."]


def test_requests_are_not_logged_one_by_one(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        list(captioner(server).answers(requests(2)))
    assert not caplog.records


def test_a_missing_openai_package_names_the_extra(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    served = captioner(server)  # a filled store needs no more than its fingerprint
    with pytest.raises(
        ValueError, match=r"openai package.*pip install 'med3dinsight-ext\[served\]'"
    ):
        list(served.answers(requests(1)))


def test_a_rejected_request_is_not_retried(server: Served) -> None:
    server.set(fault="422", message="no " * 500)
    with pytest.raises(ValueError, match=r"got status 422 \((no ){66}no\); check"):
        list(captioner(server, concurrency=1).answers(requests(9)))
    assert server.log()["count"] == 1


def test_a_model_that_requires_another_parameter_is_named(server: Served) -> None:
    server.set(fault="400", message="Unsupported 'max_tokens': use 'max_completion_tokens'.")
    with pytest.raises(
        ValueError, match="model must take max_tokens, got 'tiny', which requires max"
    ):
        list(captioner(server).answers(requests(1)))


def test_a_wrong_model_lists_the_servers_models(server: Served) -> None:
    server.set(models=["medgemma", "qwen"])
    with pytest.raises(ValueError, match="got 'tiny' and status 404 .*; it has medgemma, qwen"):
        list(captioner(server).answers(requests(9)))


def test_a_wrong_path_names_the_usual_one(server: Served) -> None:
    served = ServedCaptions(server.url.removesuffix("/v1"), "tiny")
    with pytest.raises(ValueError, match="url must be what precedes .* often ends in /v1"):
        list(served.answers(requests(1)))


def test_a_redirection_is_not_followed(server: Served) -> None:
    server.set(fault="redirect")
    with pytest.raises(ValueError, match="got .*status 307 .* a redirection is not followed"):
        list(captioner(server).answers(requests(1)))
    assert [seen["path"] for seen in server.log()["seen"]] == ["/v1/chat/completions"]


def test_the_key_comes_from_the_variable(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.set(key=KEY)
    monkeypatch.setenv("WARD_KEY", KEY)
    served = captioner(server, key_variable="WARD_KEY")
    assert len(list(served.answers(requests(2)))) == 2
    assert KEY not in repr(vars(served)) + served.model_fingerprint
    assert served.fingerprint({}) == captioner(server).fingerprint({})


def test_a_missing_key_names_its_variable(server: Served) -> None:
    server.set(key=KEY)
    with pytest.raises(ValueError, match="got none.*set the environment variable OPENAI_API_KEY"):
        list(captioner(server).answers(requests(1)))


@pytest.mark.parametrize("fault", ["401", "500"])
def test_no_error_shows_the_key(
    server: Served, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    server.set(fault=fault, message=f"your key is {KEY}, said the server")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises((ValueError, ConnectionError), match=r"\*\*\*") as caught:
        list(captioner(server, retries=0).answers(requests(1)))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["ключ", "a\nb"])
def test_an_invalid_key_is_rejected_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY must be printable ASCII") as caught:
        ServedCaptions("http://localhost:1/v1", "tiny")
    assert key not in str(caught.value)


def test_a_key_is_not_sent_without_https(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="must start with https where a key is sent"):
        ServedCaptions("http://gpu7:8000/v1", "tiny", allow_upload=True)
    ServedCaptions("http://gpu7:8000/v1", "tiny", allow_upload=True, key_variable="")
    ServedCaptions("https://gpu7:8000/v1", "tiny", allow_upload=True)


@pytest.mark.parametrize("word", ["false", "no", 1])
def test_allow_upload_must_be_a_boolean(word: Any) -> None:
    with pytest.raises(ValueError, match="allow_upload must be True or False, got"):
        ServedCaptions("https://gpu7/v1", "tiny", allow_upload=word)


@pytest.mark.parametrize("host", ["LOCALHOST", "127.3.2.1", "[::1]"])
def test_loopback_needs_no_allow_upload(host: str) -> None:
    assert ServedCaptions(f"http://{host}:8000/v1", "tiny", key_variable="").loopback


@pytest.mark.parametrize(
    "host",
    [
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "10.0.0.1",
        "[2001:db8::1]",
        "127.1",
        "0.0.0.0",
        "localhost.",
    ],
)
def test_pixels_do_not_leave_without_allow_upload(host: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(host)}, .* set allow_upload to True"):
        ServedCaptions(f"https://{host}/v1", "tiny")
    assert not ServedCaptions(f"https://{host}/v1", "tiny", allow_upload=True).loopback


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1@evil.com/v1",
        "http://user:word@localhost/v1",
        "http://localhost#@evil.com/v1",
        "http://localhost/v1?key=word",
        "localhost:8000/v1",
        "ftp://localhost",
        "http://",
        "http://localhost:port",
        "https://ⓛocalhost/v1",
    ],
)
def test_an_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="url must be http:// or https:// with a host") as caught:
        ServedCaptions(url, "tiny", allow_upload=True)
    assert "word" not in str(caught.value)


def test_the_checked_host_is_the_contacted_host(server: Served) -> None:
    served = ServedCaptions(f"http://localhost:{server.port}\\@evil.invalid/v1", "tiny", retries=0)
    with pytest.raises(ValueError, match="status 404"):
        list(served.answers(requests(1)))
    assert server.log()["count"] == 1


def test_an_endpoint_is_reduced_to_its_base_url() -> None:
    whole = ServedCaptions("http://localhost:1/v1/chat/completions/", "tiny")
    assert whole.url == "http://localhost:1/v1"


def test_no_proxy_is_used_for_loopback(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert len(list(captioner(server).answers(requests(1)))) == 1


def test_a_proxy_is_used_for_other_machines(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"us%40er:word@127.0.0.1:{server.port}")
    monkeypatch.setenv("no_proxy", "")
    served = ServedCaptions("http://gpu7.invalid/v1", "tiny", allow_upload=True, retries=0)
    with pytest.raises(ValueError, match="status 404"):
        list(served.answers(requests(1)))
    seen = server.log()["seen"][0]
    assert seen["path"] == "http://gpu7.invalid/v1/chat/completions"
    assert base64.b64decode(seen["headers"]["Proxy-Authorization"][6:]) == b"us@er:word"


def test_concurrency_is_used_and_never_exceeded(server: Served) -> None:
    server.set(delay=0.05)
    list(captioner(server, concurrency=5).answers(requests(30)))
    assert server.log()["most"] == 5


def test_requests_are_taken_as_they_are_needed_by_the_callers_thread_alone(server: Served) -> None:
    taken: list[int] = []

    def source() -> Iterator[SliceRequest]:
        for request in requests(50):
            assert threading.current_thread() is threading.main_thread()
            taken.append(request.row)
            yield request

    answers = captioner(server, concurrency=3).answers(source())
    assert not taken
    for yielded, _ in enumerate(answers, 1):
        assert len(taken) <= yielded - 1 + 2 * 3
    assert len(taken) == yielded == 50


def test_requests_run_while_the_caller_works(server: Served) -> None:
    server.set(delay=0.05)
    answers: Any = captioner(server, concurrency=4).answers(requests(40))
    next(answers)
    time.sleep(0.4)
    assert server.log()["count"] == 8  # all that were taken
    begin = time.monotonic()
    assert len([next(answers) for _ in range(7)]) == 7
    assert time.monotonic() - begin < 0.05 * 4
    answers.close()


def test_a_slow_source_delays_no_answer(server: Served) -> None:
    taken = []

    def source() -> Iterator[SliceRequest]:
        for request in requests(20):
            taken.append(request.row)
            yield request
            time.sleep(0.05)

    answers: Any = captioner(server).answers(source())
    next(answers)
    assert len(taken) < 8
    answers.close()


def test_closing_the_generator_does_not_wait(server: Served) -> None:
    server.set(fault="hang", numbers=list(range(1, 99)))
    answers: Any = captioner(server, timeout=1.5).answers(requests(50))
    next(answers)
    begin = time.monotonic()
    answers.close()
    assert time.monotonic() - begin < 0.5
    left = [thread for thread in threading.enumerate() if thread.name == "captions"]
    assert all(thread.daemon for thread in left)  # so the interpreter can end
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)
    assert server.log()["count"] <= 9


def test_after_an_error_no_request_begins_and_earlier_answers_come_first(server: Served) -> None:
    server.set(fault="400", numbers=[4])
    answers, rows = captioner(server, concurrency=1).answers(requests(30)), []
    with pytest.raises(ValueError, match="as was asked"):
        for request, _ in answers:
            rows.append(request.row)
            time.sleep(0.02)
    assert rows == [0, 1, 2, 3] and server.log()["count"] == 5


def test_an_error_does_not_wait_for_a_silent_request(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_captions, "GRACE", 0.3)
    server.set(fault="hang", first=1)
    silent, refused = requests(2)

    def source() -> Iterator[SliceRequest]:
        yield silent
        while not server.log()["count"]:
            time.sleep(0.01)
        yield refused

    served, begin = captioner(server, model="none", timeout=60), time.monotonic()
    with pytest.raises(ValueError, match="got 'none' and status 404"):
        list(served.answers(source()))
    assert 0.3 <= time.monotonic() - begin < 5


def test_an_error_of_the_source_comes_after_open_requests(server: Served) -> None:
    server.set(delay=0.1)

    def source() -> Iterator[SliceRequest]:
        yield from requests(5)
        raise OSError("a volume is gone")

    rows = []
    with pytest.raises(OSError, match="a volume is gone"):
        for request, _ in captioner(server).answers(source()):
            rows.append(request.row)
    assert sorted(rows) == [0, 1, 2, 3, 4]


def test_max_requests_counts_every_try_and_keeps_answers(server: Served) -> None:
    server.set(fault="500", first=3, delay=0.02)
    served, rows = captioner(server, max_requests=10), []
    with pytest.raises(
        ValueError, match="max_requests must exceed the 10 .*a larger number resumes"
    ):
        for request, _ in served.answers(requests(30)):
            rows.append(request.row)
    assert server.log()["count"] == 10 and len(rows) == 7
    with pytest.raises(ValueError, match="max_requests must exceed the 10"):
        list(served.answers(requests(1)))
    assert server.log()["count"] == 10


def test_retry_after_is_obeyed(server: Served) -> None:
    server.set(fault="429", first=1, headers={"Retry-After": "1"})
    list(captioner(server).answers(requests(1)))
    first, second = (seen["time"] for seen in server.log()["seen"])
    assert 1 <= second - first < 2


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("9" * 5000, 0, 60),
        ("soon", 0, 0),
        ("", 0, 0),
        (formatdate(0, usegmt=True), 0, 0),
    ],
)
def test_retry_after_is_a_number_or_a_date_within_bounds(
    value: str, low: float, high: float
) -> None:
    assert low <= chat.retry_after(value) <= high


def test_retry_after_may_be_a_future_date() -> None:
    assert 20 < chat.retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30


def test_waits_double_and_are_drawn_below_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 1.0)
    for attempt, limit in ((1, 1), (3, 4), (20, 60)):
        drawn = [chat.backoff(attempt, 2.0) for _ in range(300)]
        assert 2 <= min(drawn) < 2 + 0.1 * limit and 2 + 0.9 * limit < max(drawn) <= 2 + limit


def test_a_server_that_dies_ends_the_run_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served = Served()
    served.set(delay=0.05)
    rows, begin = [], time.monotonic()
    with pytest.raises(ConnectionError, match=f"{served.url} must answer, got .*resume"):
        for request, _ in captioner(served, concurrency=4).answers(requests(60)):
            rows.append(request.row)
            if len(rows) == 10:
                served.close()
    assert 10 <= len(rows) <= 18 and time.monotonic() - begin < 5


def test_reported_tokens_are_summed(server: Served) -> None:
    served = captioner(server)
    list(served.answers(requests(7)))
    assert served.tokens == 700


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"url": "http://127.0.0.1:9/v1"}, True),
        ({"concurrency": 3, "timeout": 1.0}, True),
        ({"revision": "awq"}, False),
        ({"model": "other"}, False),
        ({"max_tokens": 7}, False),
    ],
)
def test_the_fingerprint_names_the_model_not_the_server(change: dict, same: bool) -> None:
    base: dict[str, Any] = {"url": "http://localhost:1/v1", "model": "tiny", "key_variable": ""}
    prints = [ServedCaptions(**how).fingerprint({}) for how in (base, base | change)]
    assert (prints[0] == prints[1]) is same


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": float("nan")}, "timeout must be at least 0.001"),
        ({"max_requests": 0}, "max_requests must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(how: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ServedCaptions("http://localhost:1/v1", "tiny", **how)
