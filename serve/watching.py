"""Around the application: counts every request, logs a line about it, and gives every answer its headers.

The headers are `x-request-id`, `x-model-version` where a model answered, and the trace's (see `serve.tracing`). A line
is one JSON object; no body, no query and no header but the request's id is in it. Where Ray Serve runs the application
the line goes to the replica's log, through Ray's own handlers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from serve import problems
from serve.metrics import IMAGES, NOBODY, REJECTS, REQUESTS, SILENT, SPENT, STAGE, Meter
from serve.problems import MAX_ECHO
from serve.schemas import Refused, Told
from serve.seen import CURRENT, Seen
from serve.tracing import trace_of

LOGGER = "ray.serve.requests"
"""A child of Ray Serve's logger: same file, same format, and a level of its own."""
ID = b"x-request-id"
_GONE = 499  # the client, before it had its answer; nobody sees this status but those who read logs
_log = logging.getLogger(LOGGER)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Watch:
    """How an application is watched.

    Attributes:
        meter: who counts.
        log: whether a line about every request is logged.
        under_ray: whether Ray Serve stands around it, which sends a request's id back by itself, whatever it is.
    """

    meter: Meter = SILENT
    log: bool = False
    under_ray: bool = False


UNWATCHED = Watch()


class Watched:
    """ASGI middleware."""

    def __init__(self, app: App, watch: Watch) -> None:
        self.app = app
        self.watch = watch

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self.watch.under_ray)
        token = CURRENT.set(exchange.seen)
        try:
            await self._answer(exchange)
        except asyncio.CancelledError:
            exchange.status, exchange.seen.code = _GONE, "disconnected"
            raise
        finally:
            CURRENT.reset(token)
            exchange.total_s = time.perf_counter() - exchange.began_s
            _count(self.watch.meter, exchange)
            if self.watch.log and _log.isEnabledFor(logging.INFO):
                _log.info(_line(exchange))

    async def _answer(self, exchange: _Exchange) -> None:
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status:  # it has begun to answer
                exchange.seen.code = "internal"
                raise
            response = problems.respond(Request(exchange.scope), problems.of_exception(error))
            await response(exchange.scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer on their way through."""

    def __init__(self, scope: Message, receive: Receive, send: Send, under_ray: bool) -> None:
        self.began_s = time.perf_counter()
        self.total_s = 0.0
        self.seen = Seen()
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.trace = trace_of(scope["headers"])
        given = dict(scope["headers"]).get(ID, b"").decode("latin-1")
        self.request_id = problems.valid_id(given) or uuid.uuid4().hex
        self._is_told = under_ray and given == self.request_id
        # Whoever asks for the id further inside finds this one.
        others = [(name, value) for name, value in scope["headers"] if name != ID]
        self.scope = {**scope, "headers": [*others, (ID, self.request_id.encode())]}
        self._receive = receive
        self._send = send

    @property
    def route(self) -> str | None:
        """The template of the path; None where there is nothing at it."""
        path: str | None = getattr(self.scope.get("route"), "path", None)
        return path

    @property
    def code(self) -> str:
        """The problem's; `ok` where there was none."""
        return self.seen.code or ("ok" if self.status < 400 else "http")

    async def receive(self) -> Message:
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers()]}
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = self.trace.headers()
        if not self._is_told:
            headers.append((ID, self.request_id.encode()))
        if self.seen.model and self.seen.answers is not None:
            headers.append((b"x-model-version", self.seen.model.version.encode("latin-1", "replace")))
        return headers


def _count(meter: Meter, exchange: _Exchange) -> None:
    seen = exchange.seen
    model = (seen.model.name, seen.model.version) if seen.model else (NOBODY, NOBODY)
    meter.note(REQUESTS, 1, exchange.route or NOBODY, *model, f"{exchange.status // 100}xx", exchange.code)
    if seen.answers is None:
        return
    told = [answer for answer in seen.answers if isinstance(answer, Told)]
    for answer in seen.answers:
        if isinstance(answer, Refused):
            meter.note(REJECTS, 1, *model, answer.reason)
    meter.note(IMAGES, len(told), *model)
    for stage in ("decode", "queue", "infer"):
        spent_s = [getattr(answer, f"{stage}_ms") / 1000 for answer in told]
        for one_s in spent_s:
            meter.note(STAGE, one_s, *model, stage)
        meter.note(SPENT, sum(spent_s), *model, stage)
    if exchange.status < 400:
        meter.note(STAGE, exchange.total_s, *model, "total")
        meter.note(SPENT, exchange.total_s, *model, "total")


def _line(exchange: _Exchange) -> str:
    """One line of ASCII: what a client writes is escaped, and short."""
    seen, scope = exchange.seen, exchange.scope
    told = [answer for answer in seen.answers or () if isinstance(answer, Told)]
    slowest = {
        stage: max(getattr(answer, f"{stage}_ms") for answer in told) for stage in ("decode", "queue", "infer") if told
    }
    said = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": exchange.request_id,
        "trace_id": exchange.trace.trace_id,
        "method": scope["method"][:MAX_ECHO],
        "path": exchange.route or scope["path"][:MAX_ECHO],
        "model": seen.model.name if seen.model else None,
        "version": seen.model.version if seen.model else None,
        "status": exchange.status,
        "code": exchange.code,
        "images": len(seen.answers or ()),
        "ms": {"total": round(1000 * exchange.total_s, 3), **slowest},
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
    }
    return json.dumps(said)
