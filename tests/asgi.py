"""The ingress on no server at all: models that answer as they are told, and an ASGI client of ten lines."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from serve.gate import Gate
from serve.ingress import application
from serve.keys import Ring
from serve.roster import Roster, Standing
from serve.schemas import Limits, Refused, Served, Told, Wanted
from serve.watching import UNWATCHED, Watch

START_S = 30.0
SERVED = (
    Served("digits", "3", "champion", Path("/nowhere"), 10, run_url="http://mlflow/#/experiments/1/runs/a"),
    Served("flowers", "1", None, Path("/nowhere"), 3),
    Served("boxes", "1", None, Path("/nowhere"), 3, "detection"),
)


class Answering:
    """Answers as told; remembers what it was asked."""

    def __init__(self, answer: Told | Refused | Exception | float) -> None:
        self.answer = answer
        self.by_image: dict[bytes, Told | Refused] = {b"bad": Refused("truncated", "ends early")}
        self.asked: list[tuple[str, tuple[bytes, ...], Wanted]] = []
        self.versions: list[str] = []

    async def predict(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        self.asked.append((served.name, images, wanted))
        self.versions.append(served.version)
        if isinstance(self.answer, float):
            await asyncio.sleep(self.answer)
            return [ranked(wanted.top_k)] * len(images)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.by_image.get(data, self.answer) for data in images]

    async def ready(self, served: Served) -> bool:
        if isinstance(self.answer, Exception) and served.name == "flowers":
            raise self.answer
        return True


@contextmanager
def on_socket(app: Any) -> Iterator[str]:
    """The address of an ASGI application that a thread serves."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started and time.monotonic() < deadline:
        thread.join(0.01)
    assert server.started
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(START_S)


def ranked(count: int) -> Told:
    return Told(tuple(range(count)), tuple(map(str, range(count))), (0.1,) * count, None, 1.0, 2.0, 3.0)


class Client:
    """Speaks ASGI to the application."""

    def __init__(
        self,
        answer: Told | Refused | Exception | float,
        served: tuple[Served, ...] = SERVED,
        standings: tuple[Standing, ...] = (),
        watch: Watch = UNWATCHED,
        ring: Ring | None = None,
        **limits: Any,
    ) -> None:
        self.models = Answering(answer)
        found = standings or tuple(Standing(one.name, one) for one in served)
        self.gate = Gate(Roster.of(found), Limits(**limits), self.models)
        self.app = application(self.gate, watch, ring)

    async def post(
        self, path: str, chunks: list[bytes], pause_s: float = 0.0, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        return await self.send("POST", path, self._body(chunks, pause_s), headers or {})

    async def send(
        self,
        method: str,
        path: str,
        body: AsyncIterator[dict[str, Any]],
        headers: dict[str, str] | list[tuple[bytes, bytes]],
    ) -> tuple[int, Any, dict[str, str]]:
        route, _, query = path.partition("?")
        raw = (
            [(key.lower().encode(), value.encode()) for key, value in headers.items()]
            if isinstance(headers, dict)
            else headers
        )
        scope = {"type": "http", "method": method, "path": route, "query_string": query.encode(), "headers": raw}
        sent: list[Any] = []

        async def collect(message: Any) -> None:
            sent.append(message)

        await self.app(scope, body.__anext__, collect)
        text = b"".join(message.get("body", b"") for message in sent[1:])
        out = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        return sent[0]["status"], json.loads(text) if out.get("content-type") == "application/json" else text, out

    @staticmethod
    async def _body(chunks: list[bytes], pause_s: float) -> AsyncIterator[dict[str, Any]]:
        for index, chunk in enumerate(chunks):
            await asyncio.sleep(pause_s)
            yield {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
        while True:  # a client that waits for its answer
            await asyncio.sleep(60)
            yield {"type": "http.disconnect"}
