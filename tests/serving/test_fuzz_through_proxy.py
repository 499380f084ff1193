"""The same damaged requests, and bytes that are no HTTP at all, through sockets, HAProxy and Ray Serve.

What answers without the application is HAProxy or uvicorn, in their own words: `serve/README.md` lists when. Every
status is counted and printed; an answer in JSON is ours and never a 5xx.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import requests

from jobs._deploy import deploy
from jobs._process import Service, _members
from tests import mutations, small_detection
from tests.mutations import Sent
from tests.unit.test_serve_fuzz import ODD, by_kind, fault_in

pytestmark = pytest.mark.long
MIB = 2**20
STORM = DAMAGED = 10_000
SLOW_BODIES = 100  # fewer than `max_inflight`: as many as that are refused with 429, as any other load is
POST = b"POST /predict/tiny HTTP/1.1\r\nHost: t\r\n"
GOOD = POST + b"Content-Length: 3\r\nConnection: close\r\n\r\nabc"  # no picture: 415


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    config = app_config({"max_body_bytes": MIB, "body_s": 3.0})
    boxes = small_detection.untaught(tmp_path_factory.mktemp("bundles") / "boxes", small_detection.CLASSES)
    model = {"name": "boxes", "bundle": str(boxes.path), "num_cpus": 0.5}
    config["applications"][0]["args"]["models"].append(model)
    return deploy(ray_head, config)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def wire(sent: Sent) -> bytes:
    """The request as bytes; a header that it brings stands instead of the usual one."""
    named = {name for name, _ in sent.headers}
    usual = (("host", "t"), ("content-length", str(len(sent.body))))
    headers = (*sent.headers, *(one for one in usual if one[0] not in named), ("connection", "close"))
    target = quote(sent.path) + (f"?{quote(sent.query, safe='=&%')}" if sent.query else "")
    lines = [f"{sent.method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + sent.body


def exchange(url: str, raw: bytes, *, hang_up: bool = False) -> list[tuple[int, str, bytes]]:
    """Send bytes and read every answer until the connection ends: status, content type, body."""
    with socket.create_connection(address(url), timeout=8) as connection:
        received = b""
        try:
            connection.sendall(raw)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(MIB):
                received += piece
        except OSError:
            pass  # it was answered before all was sent, or the connection stays open for more
    return list(answers_in(received))


class _Received(io.BytesIO):
    def makefile(self, *_: Any) -> _Received:
        return self

    def close(self) -> None:
        """Stay open: another answer may follow."""


def answers_in(received: bytes) -> Iterator[tuple[int, str, bytes]]:
    stream = _Received(received)
    while stream.tell() < len(received):
        answer = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
        try:
            answer.begin()
            yield answer.status, answer.headers.get("content-type", ""), answer.read()
        except http.client.HTTPException as error:
            yield 0, type(error).__name__, received[-200:]
            return


def memory_mib(head: Service) -> int:
    """Of the head's processes, replicas and HAProxy among them."""
    sizes = []
    for process in _members(head):
        try:
            sizes.append(process.memory_info().rss)
        except psutil.Error:
            continue  # it has just ended
    return sum(sizes) // MIB


def is_well(url: str, picture: Callable[..., bytes]) -> bool:
    return requests.post(f"{url}/predict/tiny", data=picture(), timeout=30).status_code == 200


def test_damaged_requests_through_the_proxy_are_answered(
    url: str, ray_head: Service, picture: Callable[..., bytes]
) -> None:
    before = memory_mib(ray_head)

    def one(seed: int) -> tuple[int, list[tuple[int, str, bytes]]]:
        return seed, exchange(url, wire(mutations.case(seed)))

    with ThreadPoolExecutor(8) as clients:
        every = list(clients.map(one, range(DAMAGED)))
    counted: Counter[tuple[int, str]] = Counter()
    faults = []
    for seed, answers in every:
        if not answers:
            faults.append((seed, "no answer", 0, b""))
        for status, kind, body in answers:
            counted[status, kind] += 1
            is_head = mutations.case(seed).method == "HEAD"
            if kind == "application/json" and not is_head and (fault := fault_in(status, {"content-type": kind}, body)):
                faults.append((seed, fault, status, body[:200]))
            if status >= 500:
                faults.append((seed, "failed", status, body[:200]))
    after = memory_mib(ray_head)
    print(dict(sorted(counted.items())), f"{before} MiB before, {after} MiB after")  # noqa: T201
    assert faults == []
    assert after - before < 500
    assert is_well(url, picture)


def test_every_odd_file_through_the_proxy_is_answered_as_without_it(
    url: str, odd_files: Sequence[Path], picture: Callable[..., bytes]
) -> None:
    def one(path: Path) -> tuple[str, int | str]:
        answer = requests.post(f"{url}/predict/boxes", data=path.read_bytes(), timeout=60)
        assert fault_in(answer.status_code, dict(answer.headers), answer.content) == "", path
        return path.suffix[1:], 200 if answer.ok else answer.json()["code"]

    with ThreadPoolExecutor(8) as clients:
        assert by_kind(clients.map(one, odd_files)) == ODD
    assert is_well(url, picture)


MALFORMED: dict[str, bytes] = {
    "no host": b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET /healthz HTTP/1.0\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /healthz HTTP/9.9\r\nHost: t\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500),
    "not HTTP": b"\0" * 100 + b"\r\n\r\n",
    "chunk size no number": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "chunk size huge": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
    "chunk without end": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
    "chunks cut short": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "chunked and length": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "unknown transfer": POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "length no number": POST + b"Content-Length: abc\r\n\r\n",
    "length too long": POST + b"Content-Length: 99\r\n\r\nabc",
    "header without colon": POST + b"nonsense\r\n\r\n",
    "header with zero": POST + b"a: b\0c\r\nContent-Length: 0\r\n\r\n",
    "header folded": POST + b"a: b\r\n c\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "header of 100 kB": POST + b"a: " + b"x" * 100_000 + b"\r\n\r\n",
    "a thousand headers": POST + b"a: b\r\n" * 1000 + b"Content-Length: 0\r\nConnection: close\r\n\r\n",
    "address of 100 kB": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "space in address": b"GET /a b HTTP/1.1\r\nHost: t\r\n\r\n",
    "bad escape": b"GET /%zz%ff HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    "whole address": b"GET http://elsewhere/healthz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    "CONNECT": b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
    "TRACE": b"TRACE /healthz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    "websocket": b"GET /healthz HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "expect 100": POST + b"Expect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "expect else": POST + b"Expect: the-worst\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "Ray's timeout nan": POST + b"x-request-timeout-seconds: nan\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "Ray's timeout tiny": POST
    + b"x-request-timeout-seconds: 0.000001\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "Ray's timeout text": POST + b"x-request-timeout-seconds: abc\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "Ray's model id": POST + b"serve_multiplexed_model_id: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    "pipelined": GOOD.replace(b"Connection: close\r\n", b"") * 3 + GOOD,
    "request within a body": GOOD[:-3] + b"GET /healthz HTTP/1.1\r\nHost: t\r\n\r\n",
}


HAPROXYS = (400, "text/html")
HEALTHY = (200, "text/plain; charset=utf-8")
NOT_OURS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("no host", "HTTP/1.0", "HTTP/9.9"), HEALTHY),
    **dict.fromkeys(
        ("HTTP/0.9", "TLS", "not HTTP", "chunk size no number", "chunk size huge", "chunk without end"), HAPROXYS
    ),
    **dict.fromkeys(("unknown transfer", "two lengths", "negative length", "length no number"), HAPROXYS),
    **dict.fromkeys(("header without colon", "header with zero", "header of 100 kB", "a thousand headers"), HAPROXYS),
    **dict.fromkeys(("address of 100 kB", "space in address", "whole address"), HAPROXYS),
    "HTTP/2 preface": (0, "BadStatusLine"),  # it is answered in HTTP/2
    "websocket": (403, "text/plain; charset=utf-8"),
}
"""By whom `serve/README.md` says that it is answered in another way than ours, where the client waits."""


@pytest.mark.parametrize("hang_up", [False, True], ids=["waiting", "hanging up"])
def test_malformed_requests_leave_the_endpoint_well(
    url: str, ray_head: Service, picture: Callable[..., bytes], hang_up: bool
) -> None:
    before = memory_mib(ray_head)
    for name, raw in MALFORMED.items():
        began = time.monotonic()
        answers = exchange(url, raw, hang_up=hang_up)
        told = [(status, kind, body[:60]) for status, kind, body in answers]
        print(f"{name:24s} {time.monotonic() - began:5.1f} s  {told}")  # noqa: T201
        for status, kind, body in answers:
            assert status < 500, name
            if kind == "application/json":
                assert fault_in(status, {"content-type": kind}, body) == "", name
        if not hang_up:
            assert answers, name
            status, kind, _ = answers[0]
            assert NOT_OURS.get(name, (status, "application/json")) == (status, kind), name
    after = memory_mib(ray_head)
    print(f"{before} MiB before, {after} MiB after")  # noqa: T201
    assert after - before < 500
    assert is_well(url, picture)


def test_good_requests_are_answered_among_thousands_of_half_open_connections(
    url: str, ray_head: Service, picture: Callable[..., bytes]
) -> None:
    before, held, told = memory_mib(ray_head), list[socket.socket](), Counter[Any]()
    beginnings = (b"", POST, b"POST /pre")
    try:
        for index in range(STORM):
            held.append(socket.create_connection(address(url), timeout=30))
            held[-1].send(POST + b"Content-Length: 50\r\n\r\na" if index < SLOW_BODIES else beginnings[index % 3])
            if index % 500 == 0:
                answer = requests.post(f"{url}/predict/tiny", data=picture(index), timeout=60)
                told[answer.status_code] += 1
        during = memory_mib(ray_head)
        readable = 0
        for start in range(0, STORM, 500):
            poll = select.poll()
            for one in held[start : start + 500]:
                poll.register(one, select.POLLIN)
            readable += len(poll.poll(0))
        print(f"{len(held)} connections, {readable} of them answered or closed; good requests: {dict(told)}")  # noqa: T201
    finally:
        for one in held:
            one.close()
    assert is_well(url, picture)
    after = memory_mib(ray_head)
    print(f"{before} MiB before, {during} MiB with them, {after} MiB after")  # noqa: T201
    assert told[200] == sum(told.values())
    assert after - before < 500
