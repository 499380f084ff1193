"""The client against a server of a few lines: answers, refusals, failures and silence."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import ClusterError, DataError
from pipeline.inference.client import Client, Ranked

ROWS = [{"label": 2, "class_name": "cat", "score": 0.75}, {"label": 0, "class_name": "ant", "score": 0.25}]
GOOD = {"model": {"name": "pets", "version": "3"}, "predictions": ROWS, "request_id": "r1"}


class Endpoint(ThreadingHTTPServer):
    """Says `status` and `body` to everything, and remembers what it was asked."""

    daemon_threads = True
    status = 200
    body = json.dumps(GOOD).encode()
    asked: tuple[str, bytes] = ("", b"")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        self.server.asked = (self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_answer_is_read_and_the_question_is_the_bytes(endpoint: Endpoint) -> None:
    ranked = Client(endpoint.url + "/").predict("pets", b"\x00image", top_k=2)
    assert ranked == Ranked("pets", "3", (2, 0), ("cat", "ant"), (0.75, 0.25), "r1")
    assert endpoint.asked == ("/predict/pets?top_k=2", b"\x00image")


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


def test_silence_ends_after_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match=r"does not answer \(ReadTimeout\)"):
            Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1).predict("pets", b"image")
