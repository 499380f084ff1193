"""The client against a server of a few lines: answers, refusals, failures and silence."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import ClusterError, DataError
from pipeline.inference.client import AsyncClient, Client, Ranked

ROWS = [{"label": 2, "class_name": "cat", "score": 0.75}, {"label": 0, "class_name": "ant", "score": 0.25}]
TIMES = {"decode": 1.0, "queue": 0.5, "infer": 2.0}
MODEL = {"name": "pets", "version": "3", "alias": "champion"}
GOOD = {"model": MODEL, "predictions": ROWS, "timing_ms": TIMES, "request_id": "r1"}


class Endpoint(ThreadingHTTPServer):
    """Says `status` and `body` to everything, and remembers what it was asked."""

    daemon_threads = True
    status = 200
    body = json.dumps(GOOD).encode()
    asked: tuple[str, bytes] = ("", b"")
    key: str | None = None
    retry_after: str | None = None
    losses: list[bytes | None]
    num_asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        self.server.asked = (self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.server.num_asked += 1
        if self.server.losses:
            self.lose(self.server.losses.pop())
            return
        self.server.key = self.headers["Authorization"]
        self.send_response(self.server.status)
        if self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def do_GET(self) -> None:
        self.server.asked = (self.path, b"")
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def lose(self, body: bytes | None) -> None:
        """As when the process that has the question dies: the connection ends, or the proxy says so."""
        self.close_connection = True
        if body is not None:
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as server:
        server.losses = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CAT = Ranked("pets", "3", (2, 0), ("cat", "ant"), (0.75, 0.25), "r1", "champion", TIMES)
BOX = [{"label": 2, "class_name": "cat", "score": 0.75, "box": [1, 2, 3.5, 4]}]


def test_an_answer_is_read_and_the_question_is_the_bytes(endpoint: Endpoint) -> None:
    with Client(endpoint.url + "/") as client:
        assert client.predict("pets", b"\x00image", top_k=2) == CAT
    assert endpoint.asked == ("/predict/pets?top_k=2", b"\x00image")


def test_asyncio_gets_the_same_answers_to_many_questions_at_once(endpoint: Endpoint) -> None:
    async def ask() -> list[Ranked]:
        async with AsyncClient(endpoint.url) as client:
            return await asyncio.gather(*(client.predict("pets", b"image", top_k=2) for _ in range(8)))

    assert asyncio.run(ask()) == [CAT] * 8


def test_several_images_go_together_and_come_back_in_their_order(endpoint: Endpoint) -> None:
    head = {key: GOOD[key] for key in ("model", "request_id", "timing_ms")}
    endpoint.body = json.dumps(
        head | {"results": [{"predictions": ROWS, "timing_ms": TIMES}, {"predictions": ROWS[1:], "timing_ms": TIMES}]}
    ).encode()
    with Client(endpoint.url) as client:
        first, second = client.predict_many("pets@champion", [b"\x00one\r\n", b"two"])
    assert (first, second.labels, second.version) == (CAT, (0,), "3")
    path, body = endpoint.asked
    assert path == "/predict/pets@champion?top_k=5"
    assert 0 < body.index(b"\x00one\r\n") < body.index(b"two")
    with Client(endpoint.url) as client, pytest.raises(DataError, match="at least one image"):
        client.predict_many("pets", [])


def test_boxes_are_read_and_thresholds_asked_for(endpoint: Endpoint) -> None:
    head = {key: GOOD[key] for key in ("model", "request_id", "timing_ms")}
    endpoint.body = json.dumps(head | {"predictions": BOX}).encode()
    with Client(endpoint.url) as client:
        found = client.detect("pets", b"image", score_threshold=0.5, max_detections=3, iou_threshold=0.4)
    assert endpoint.asked[0] == "/predict/pets?score_threshold=0.5&max_detections=3&iou_threshold=0.4"
    assert (found.alias, found.timing_ms) == ("champion", TIMES)
    assert (found.class_names, found.detections.boxes_xyxy.tolist()) == (("cat",), [[1, 2, 3.5, 4]])
    endpoint.body = json.dumps(
        head | {"results": [{"predictions": BOX, "timing_ms": TIMES}, {"predictions": [], "timing_ms": TIMES}]}
    ).encode()

    async def ask() -> list[int]:
        async with AsyncClient(endpoint.url) as client:
            return [len(one.detections) for one in await client.detect_many("pets", [b"a", b"b"])]

    assert asyncio.run(ask()) == [1, 0]


def test_task_is_that_of_the_models_metadata(endpoint: Endpoint) -> None:
    endpoint.body = json.dumps({"name": "pets", "properties": {"task": "detection"}}).encode()
    with Client(endpoint.url) as client:
        assert client.task("pets@champion") == "detection"
    assert endpoint.asked[0] == "/v2/models/pets@champion"


@pytest.mark.parametrize("url", ["127.0.0.1:80", "http://127.0.0.1:99999", "http://[::1", "ftp://here"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises((ClusterError, DataError), match=r"does not answer|is no address"):
        Client(url).predict("pets", b"image")


@pytest.mark.parametrize(
    ("status", "kind"), [(404, DataError), (415, DataError), (500, ClusterError), (503, ClusterError)]
)
@pytest.mark.parametrize("body", [b'{"error": "no such thing", "code": "x"}', b"no such thing", b'["no such thing"]'])
def test_a_refusal_carries_the_status_and_the_endpoints_own_words(
    endpoint: Endpoint, status: int, kind: type[Exception], body: bytes
) -> None:
    endpoint.status, endpoint.body = status, body
    with pytest.raises(kind, match=f"{endpoint.url}: {status}: .*no such thing"):
        Client(endpoint.url).predict("pets", b"image")


def test_the_key_of_the_argument_or_else_of_the_environment_is_sent(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(key: str | None) -> None:
        async with AsyncClient(endpoint.url, key=key) as client:
            await client.predict("pets", b"image")

    for environment, key, sent in (
        (None, None, None),
        ("b", None, "Bearer b"),
        ("b", "a", "Bearer a"),
        ("", None, None),
    ):
        monkeypatch.delenv("VENTRAL_KEY", raising=False)
        if environment is not None:
            monkeypatch.setenv("VENTRAL_KEY", environment)
        Client(endpoint.url, key=key).predict("pets", b"image")
        assert endpoint.key == sent
        asyncio.run(ask(key))
        assert endpoint.key == sent


@pytest.mark.parametrize("key", ["vk_a\n", "vk a", "schl\u00fcssel", "a\r\nX-Other: 1"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(DataError, match="expected vk_") as caught:
        Client("http://127.0.0.1:1", key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "key", "retry_after", "words"),
    [
        (401, "", None, r"401: no\. \(a key goes into the argument 'key' or the environment's VENTRAL_KEY\)$"),
        (401, "vk_a", None, r"401: no\. \(another key goes into"),
        (403, "vk_a", None, r"403: no\.$"),
        (429, "vk_a", "7", r"429: no\. \(again after 7 s\)$"),
        (429, "vk_a", None, r"429: no\.$"),
    ],
)
def test_a_refusal_for_the_keys_sake_says_what_helps(
    endpoint: Endpoint, status: int, key: str, retry_after: str | None, words: str
) -> None:
    endpoint.status, endpoint.body, endpoint.retry_after = status, b'{"error": "no."}', retry_after
    with pytest.raises(DataError, match=words):
        Client(endpoint.url, key=key).predict("pets", b"image")


@pytest.mark.parametrize("body", [b"hello", b"{}", b'{"predictions": 3}', b'{"predictions": [], "model": "pets"}'])
def test_a_success_that_is_no_answer_is_a_cluster_error(endpoint: Endpoint, body: bytes) -> None:
    endpoint.body = body
    with pytest.raises(ClusterError, match="is not one of Ventral's; check the address"):
        Client(endpoint.url).predict("pets", b"image")


def test_nobody_there_is_a_cluster_error_with_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{url}: the endpoint does not answer"):
            Client(url).predict("pets", b"image")


OF_PROXY = b"Internal Server Error"


@pytest.mark.parametrize("loss", [None, OF_PROXY])
def test_a_question_that_got_lost_is_asked_once_more(endpoint: Endpoint, loss: bytes | None) -> None:
    async def ask() -> Ranked:
        async with AsyncClient(endpoint.url) as client:
            return await client.predict("pets", b"image")

    endpoint.losses = [loss]
    with Client(endpoint.url) as client:
        assert client.predict("pets", b"image") == CAT
    endpoint.losses = [loss]
    assert asyncio.run(ask()) == CAT
    assert endpoint.num_asked == 4
    endpoint.losses = [loss] * 3
    with Client(endpoint.url) as client, pytest.raises(ClusterError, match=r"does not answer|500: Internal"):
        client.predict("pets", b"image")
    assert endpoint.losses == [loss]  # twice, and no more


def test_what_the_endpoint_itself_answers_is_not_asked_again(endpoint: Endpoint) -> None:
    for status in (429, 500, 503, 504):
        endpoint.status, endpoint.body, endpoint.num_asked = status, b'{"error": "no.", "code": "x"}', 0
        with Client(endpoint.url) as client, pytest.raises((ClusterError, DataError), match="no"):
            client.predict("pets", b"image")
        assert endpoint.num_asked == 1


def test_silence_ends_after_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match=r"does not answer \(ReadTimeout\)"):
            Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1).predict("pets", b"image")
