"""Answers go out as fast as they are taken, and are in hand until then.

A server takes an answer of any size at once and keeps what the client does not read, for as long as it is connected;
nobody would count that. Here a large answer is sent piece by piece, its request stays counted, and a client has to take
it as fast as the largest body has to come, a smaller one in `body_s` seconds. After that it gets no more: some 128 KiB
stay with the server until the connection ends. It takes a server whose `send` waits for the client, as uvicorn's does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.gate import Gate
from serve.seen import seen

NOT_TAKEN = "not_taken"
"""The code of such a request, for metrics and the log; its status was sent before."""
PIECE = 2**16
"""Bytes: as many as uvicorn keeps before it waits for the client."""


class Paced:
    """The layer, in ASGI: the next one inwards of whatever counts requests."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back."""

        async def paced(message: Any) -> None:
            if len(message.get("body", b"")) <= PIECE:
                await send(message)
                return
            with self.gate.in_hand():
                try:
                    async with asyncio.timeout(self._within_s(len(message["body"]))):
                        for piece in _pieces(message):
                            await send(piece)
                except TimeoutError:
                    seen().code = NOT_TAKEN
                    raise _NotTakenError from None

        try:
            await self.app(scope, receive, paced)
        except _NotTakenError:
            return  # the server ends a connection whose answer is not whole

    def _within_s(self, size: int) -> float:
        limits = self.gate.limits
        return limits.body_s * max(1.0, size / limits.max_body_bytes)


class _NotTakenError(Exception):
    """A client does not take its answer."""


def _pieces(message: Any) -> Iterator[Any]:
    body, more = message["body"], message.get("more_body", False)
    for at in range(0, len(body), PIECE):
        yield message | {"body": body[at : at + PIECE], "more_body": more or at + PIECE < len(body)}
