"""The ingress on no server at all: its limits and its words, with an ASGI client of ten lines."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from serve.ingress import application
from serve.schemas import Limits, Refused, Served, Told, Wanted

SERVED = (
    Served("digits", "3", "champion", Path("/nowhere"), 10),
    Served("flowers", "1", None, Path("/nowhere"), 3),
    Served("boxes", "1", None, Path("/nowhere"), 3, "detection"),
)


class Answering:
    """Answers as told; remembers what it was asked."""

    def __init__(self, answer: Told | Refused | Exception | float) -> None:
        self.answer = answer
        self.asked: list[tuple[str, bytes, Wanted]] = []

    async def predict(self, name: str, data: bytes, wanted: Wanted) -> Told | Refused:
        self.asked.append((name, data, wanted))
        if isinstance(self.answer, float):
            await asyncio.sleep(self.answer)
            return ranked(wanted.top_k)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def ready(self, name: str) -> bool:
        if isinstance(self.answer, Exception) and name == "flowers":
            raise self.answer
        return True


def ranked(count: int) -> Told:
    return Told(tuple(range(count)), tuple(map(str, range(count))), (0.1,) * count, None, 1.0, 2.0, 3.0)


class Client:
    """Speaks ASGI to the application."""

    def __init__(self, answer: Told | Refused | Exception | float, **limits: Any) -> None:
        self.models = Answering(answer)
        self.app = application(SERVED, Limits(**limits), self.models)

    async def post(
        self, path: str, chunks: list[bytes], pause_s: float = 0.0, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        return await self.send("POST", path, self._body(chunks, pause_s), headers or {})

    async def send(
        self, method: str, path: str, body: AsyncIterator[dict[str, Any]], headers: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        route, _, query = path.partition("?")
        raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        scope = {"type": "http", "method": method, "path": route, "query_string": query.encode(), "headers": raw}
        sent: list[Any] = []

        async def collect(message: Any) -> None:
            sent.append(message)

        await self.app(scope, body.__anext__, collect)
        text = b"".join(message.get("body", b"") for message in sent[1:])
        out = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        return sent[0]["status"], json.loads(text), out

    @staticmethod
    async def _body(chunks: list[bytes], pause_s: float) -> AsyncIterator[dict[str, Any]]:
        for index, chunk in enumerate(chunks):
            await asyncio.sleep(pause_s)
            yield {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
        while True:  # a client that waits for its answer
            await asyncio.sleep(60)
            yield {"type": "http.disconnect"}


def test_predict_joins_the_body_and_names_the_version_that_answered() -> None:
    client = Client(ranked(2))
    status, body, _ = asyncio.run(client.post("/predict/digits?top_k=2", [b"ab", b"", b"c"]))
    assert status == 200
    assert client.models.asked == [("digits", b"abc", Wanted(top_k=2))]
    assert body["model"] == {"name": "digits", "version": "3", "alias": "champion"}
    assert body["predictions"][1] == {"label": 1, "class_name": "1", "score": 0.1}
    assert body["timing_ms"] == {"decode": 1.0, "queue": 2.0, "infer": 3.0}


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_predict_of_any_number_of_objects_answers_with_all_of_them(count: int) -> None:
    found = dataclasses.replace(ranked(count), boxes=tuple((float(at), 0.5, at + 1.5, 9.0) for at in range(count)))
    status, body, _ = asyncio.run(Client(found).post("/predict/boxes", [b"x"]))
    assert (status, len(body["predictions"])) == (200, count)
    assert [row["box"] for row in body["predictions"]] == [[at, 0.5, at + 1.5, 9] for at in range(count)]


@pytest.mark.parametrize("wanted", ["2000", "0"])
def test_predict_of_more_objects_than_a_request_may_ask_for_is_refused(wanted: str) -> None:
    client = Client(ranked(0))
    status, body, _ = asyncio.run(client.post(f"/predict/boxes?max_detections={wanted}", [b"x"]))
    assert (status, body["code"]) == (422, "query")
    assert "max_detections" in body["error"]
    assert not client.models.asked


def test_predict_without_top_k_asks_for_five_or_all_classes() -> None:
    client = Client(ranked(3))
    asyncio.run(client.post("/predict/digits", [b"x"]))
    asyncio.run(client.post("/predict/flowers", [b"x"]))
    assert [wanted.top_k for *_, wanted in client.models.asked] == [5, 3]


@pytest.mark.parametrize(
    ("answer", "status", "code", "retry"),
    [
        (Refused("format", "no"), 415, "image_format", None),
        (Refused("pixels", "no"), 422, "image_pixels", None),
        (BackPressureError(9, 8), 429, "overloaded", "1"),
        (ValueError("secret /srv/path"), 500, "internal", None),
        (TimeoutError(), 504, "timeout", None),
    ],
)
def test_predict_that_a_model_does_not_answer_becomes_a_problem(
    answer: Refused | Exception, status: int, code: str, retry: str | None
) -> None:
    found, body, headers = asyncio.run(Client(answer).post("/predict/digits", [b"x"], headers={"x-request-id": "r1"}))
    assert (found, body["code"], body["request_id"]) == (status, code, "r1")
    assert headers.get("retry-after") == retry
    assert "secret" not in body["error"]


def test_predict_of_a_too_large_body_is_refused_before_the_rest_is_read() -> None:
    client = Client(ranked(1), max_body_bytes=4)
    assert asyncio.run(client.post("/predict/digits", [b"abcd"]))[0] == 200
    endless = [b"abc"] * 10_000
    status, body, _ = asyncio.run(client.post("/predict/digits", endless, pause_s=0.01))  # 100 s, were it read
    assert (status, body["code"]) == (413, "too_large")
    status, *_ = asyncio.run(client.post("/predict/digits", [b"x"] * 100, headers={"content-length": "5"}))
    assert status == 413
    assert len(client.models.asked) == 1


def test_predict_of_a_body_that_does_not_arrive_ends_in_time() -> None:
    client = Client(ranked(1), body_s=0.05)
    status, body, _ = asyncio.run(client.post("/predict/digits", [b"x"] * 100, pause_s=0.02))
    assert (status, body["code"]) == (408, "slow_body")


def test_predict_of_a_model_that_takes_too_long_ends_in_time() -> None:
    status, body, _ = asyncio.run(Client(60.0, answer_s=0.05).post("/predict/digits", [b"x"]))
    assert (status, body["code"]) == (504, "timeout")


def test_predict_beyond_the_requests_in_hand_is_refused_and_room_comes_back() -> None:
    client = Client(0.05, max_inflight=2)

    async def three_then_one() -> list[int]:
        first = await asyncio.gather(*(client.post("/predict/digits", [b"x"]) for _ in range(3)))
        last = await client.post("/predict/digits", [b"x"])
        return [status for status, *_ in (*first, last)]

    assert asyncio.run(three_then_one()) == [200, 200, 429, 200]


@pytest.mark.parametrize(
    ("error", "status", "waiting"), [(TimeoutError(), 503, ["flowers"]), (BackPressureError(9, 8), 200, [])]
)
def test_readyz_names_models_that_are_not_loaded_but_not_those_that_are_busy(
    error: Exception, status: int, waiting: list[str]
) -> None:
    client = Client(error)
    found, body, _ = asyncio.run(client.send("GET", "/readyz", Client._body([b""], 0.0), {}))
    assert (found, body) == (status, {"ready": not waiting, "waiting_for": waiting})
