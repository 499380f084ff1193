"""A load generator for HTTP/1.1: clients in closed loop on kept connections, little Python for each request.

Requests are bytes that were made before; each client sends one, waits for its whole answer and sends the next. What the
answers say is for the caller to judge: of every request the first answer is kept. Percentiles are by nearest rank.
Left out: TLS, redirects, pipelining, open loops.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from pipeline.errors import DataError

PATIENCE_S = 60.0
"""How long an answer may take; a request without one is an error."""
MOST_ERRORS = 10
"""After so many the clients give up: there is no figure in any case."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Response(NamedTuple):
    """One answer; `closes` where the server will take no further request on this connection."""

    status: int
    body: bytes
    closes: bool


class Load(NamedTuple):
    """What some clients met.

    Attributes:
        latencies_s: of good answers that came in the timed seconds, sorted.
        seconds: that were timed.
        num_sent: requests in all, warm-up and the last of each client included.
        errors: what went wrong, in all of these, in words.
        answers: the first good answer to each request, by its place; None where there was none.
    """

    latencies_s: tuple[float, ...]
    seconds: float
    num_sent: int
    errors: tuple[str, ...]
    answers: tuple[bytes | None, ...]

    @property
    def requests_per_s(self) -> float:
        """Good answers a second."""
        return len(self.latencies_s) / self.seconds


def request(host: str, port: int, path: str, content_type: str, body: bytes) -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def parse(data: bytes, *, has_ended: bool = False) -> Response | None:
    """The answer that these bytes are; None while there is more to come.

    Args:
        data: all bytes since the request was sent.
        has_ended: the server has closed the connection, which ends an answer that does not say how long it is.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    status, closes = int(head[9:12]), has_ended or _CLOSE.search(head) is not None
    length = _LENGTH.search(head)
    if length is not None:
        return Response(status, body, closes) if len(body) >= int(length[1]) else None
    if _CHUNKED.search(head):
        whole = _joined(body)
        return None if whole is None else Response(status, whole, closes)
    return Response(status, body, True) if has_ended else None


def _joined(body: bytes) -> bytes | None:
    """The content of chunks; None before the last one."""
    parts, at = list[bytes](), 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end].partition(b";")[0], 16)
        at = end + 2 + size + 2
        if len(body) < at:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : at - 2])
    return None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of sorted values that at least this share of them does not exceed.

    Raises:
        DataError: there are none.
    """
    if not ordered:
        raise DataError("no request was answered in the timed seconds; take more of them")
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def press(host: str, port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_up_s: float) -> Load:
    """Send requests in turn from so many clients at once, for `warm_up_s` untimed and then `seconds`.

    Every client waits for the answer to its last request, so that the server is idle when this returns.

    Args:
        host: of the server.
        port: of the server.
        requests: sent one after the other, over and over.
        clients: connections.
        seconds: that are timed, and more until there are two answers for each client.
        warm_up_s: before them.
    """
    return asyncio.run(_press(host, port, requests, clients, seconds, warm_up_s))


class _Run:
    """What the clients of one run share."""

    def __init__(self, requests: Sequence[bytes], least: int, begins: float, ends: float) -> None:
        self.requests = requests
        self.turns = itertools.cycle(range(len(requests)))
        self.least, self.begins, self.ends = least, begins, ends
        self.ended: float | None = None
        self.latencies_s: list[float] = []
        self.num_sent = 0
        self.errors: list[str] = []
        self.answers: list[bytes | None] = [None] * len(requests)

    def note(self, turn: int, body: bytes, began: float, now: float) -> None:
        if self.answers[turn] is None:
            self.answers[turn] = body
        if now >= self.begins and self.ended is None:
            self.latencies_s.append(now - began)
            if now >= self.ends and len(self.latencies_s) >= self.least:
                self.ended = now

    def is_over(self) -> bool:
        return self.ended is not None or len(self.errors) >= MOST_ERRORS


class _Client(asyncio.Protocol):
    """One connection; `done` when it will send no more, and whether another one is to go on in its place."""

    def __init__(self, run: _Run, done: asyncio.Future[bool]) -> None:
        self._run, self.done = run, done
        self._received, self._turn, self._began = b"", 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        run = self._run
        self._turn, self._received = next(run.turns), b""
        run.num_sent += 1
        self._began = time.perf_counter()
        self._transport.write(run.requests[self._turn])

    def data_received(self, data: bytes) -> None:
        self._received += data
        found = parse(self._received)
        if found is not None:
            self._take(found)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        found = parse(self._received, has_ended=True)
        if found is None:
            self._end(f"the connection was lost ({error or 'closed by the server'})")
        else:
            self._take(found)

    def _take(self, found: Response) -> None:
        run, now = self._run, time.perf_counter()
        if found.status != 200:
            self._end(f"status {found.status}: {found.body[:120].decode(errors='replace')}")
            return
        run.note(self._turn, found.body, self._began, now)
        if run.is_over() or found.closes:
            self._end()
        else:
            self._send()

    def _end(self, error: str | None = None) -> None:
        if error is not None:
            self._run.errors.append(error)
        self._transport.close()
        if not self.done.done():
            self.done.set_result(not self._run.is_over())


async def _press(
    host: str, port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_up_s: float
) -> Load:
    begins = time.perf_counter() + warm_up_s
    run = _Run(requests, 2 * clients, begins, begins + seconds)
    await asyncio.gather(*(_client(run, host, port) for _ in range(clients)))
    took_s = (run.ended or time.perf_counter()) - begins
    return Load(tuple(sorted(run.latencies_s)), took_s, run.num_sent, tuple(run.errors), tuple(run.answers))


async def _client(run: _Run, host: str, port: int) -> None:
    """One client, on as many connections, one after the other, as the server makes it open."""
    loop = asyncio.get_running_loop()
    goes_on = True
    while goes_on:
        done: asyncio.Future[bool] = loop.create_future()
        try:
            transport, _ = await loop.create_connection(partial(_Client, run, done), host, port)
        except OSError as error:
            run.errors.append(f"no connection ({error.strerror or error})")
            return
        try:
            goes_on = await asyncio.wait_for(done, max(run.ends - time.perf_counter(), 0.0) + PATIENCE_S)
        except TimeoutError:
            run.errors.append(f"no answer within {PATIENCE_S:g} s")
            transport.abort()
            return
