"""Large answers on a real server: whole for who reads, and counted, then given up, for who does not."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from serve.pacing import PIECE
from tests.asgi import Client, ranked

PICTURE = bytes(range(256)) * 4 * 2**16  # 64 MiB: more than the kernel takes for a client that reads nothing


@asynccontextmanager
async def served(body_s: float) -> AsyncIterator[tuple[Client, int]]:
    """The application on uvicorn, and its port."""
    client = Client(dataclasses.replace(ranked(0), boxes=(), picture=PICTURE), body_s=body_s)
    server = uvicorn.Server(uvicorn.Config(client.app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as at:
        task = asyncio.create_task(server.serve([at]))
        yield client, at.getsockname()[1]
        server.should_exit = True
        await task


def test_a_large_answer_arrives_whole_and_is_then_out_of_hand() -> None:
    async def scenario() -> None:
        async with served(body_s=30) as (client, port), httpx.AsyncClient() as http:
            url = f"http://127.0.0.1:{port}/predict/boxes"
            answer = await http.post(url, content=b"x", headers={"Accept": "image/png"}, timeout=30)
            assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(PICTURE)))
            assert answer.content == PICTURE
            assert client.gate._inflight == 0

    asyncio.run(scenario())


def test_an_answer_that_is_not_taken_is_in_hand_until_the_connection_ends() -> None:
    async def scenario() -> None:
        async with served(body_s=0.5) as (client, port), asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=PIECE)
            writer.write(b"POST /predict/boxes HTTP/1.1\r\nHost: x\r\nAccept: image/png\r\nContent-Length: 1\r\n\r\nx")
            while not (client.gate._inflight and client.models.asked):
                await asyncio.sleep(0.01)
            assert client.gate._inflight == 1
            while client.gate._inflight:
                await asyncio.sleep(0.01)
            with pytest.raises(asyncio.IncompleteReadError) as caught:
                await reader.readexactly(len(PICTURE))
            assert len(caught.value.partial) < len(PICTURE)
            writer.close()

    asyncio.run(scenario())
