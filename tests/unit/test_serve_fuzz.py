"""Whatever is sent is answered with 2xx or 4xx, in the documented shape: real models, no server, thousands of requests.

`tests.mutations` makes them; a failure names its seed. What only a socket can send is in tests/serving.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests import mutations
from tests.mutations import Sent
from tests.real_models import real_application

ROOT = Path(__file__).parents[2]
SECRETS = ("Traceback", "site-packages", str(ROOT), "/tmp", 'File "', ".py")
HANGS_S = 60


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with real_application(tmp_path_factory.mktemp("bundles"), max_body_bytes=2**20) as made:
        yield made


async def answer_of(app: FastAPI, sent: Sent) -> tuple[int, dict[str, str], bytes]:
    """What the application says, through ASGI."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.headers]
    scope = {
        "type": "http",
        "method": sent.method,
        "path": sent.path,
        "headers": raw,
        "query_string": sent.query.encode(),
    }
    told, left = list[Any](), [sent.body[: len(sent.body) // 2], sent.body[len(sent.body) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def collect(message: Any) -> None:
        told.append(message)

    async with asyncio.timeout(HANGS_S):
        await app(scope, receive, collect)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in told[0]["headers"]}
    return told[0]["status"], headers, b"".join(message.get("body", b"") for message in told[1:])


def fault_in(status: int, headers: dict[str, str], body: bytes) -> str:
    """What is wrong with an answer, if anything is."""
    if 200 <= status < 300:
        return ""
    if not 400 <= status < 500:
        return "status"
    if headers["content-type"] != "application/json":
        return "content type"
    said = json.loads(body)
    if set(said) != {"error", "code", "request_id"} or not all(isinstance(one, str) for one in said.values()):
        return "shape"
    if not 0 < len(said["error"]) <= 500:
        return "length"
    return next((f"tells {word}" for word in SECRETS if word in said["error"]), "")


async def faults(app: FastAPI, seeds: Sequence[int]) -> tuple[list[str], Counter[int]]:
    """Send the requests of these numbers, eight at once."""
    found, statuses, turn = list[str](), Counter[int](), asyncio.Semaphore(8)

    async def one(seed: int) -> None:
        async with turn:
            sent = mutations.case(seed)
            try:
                answer = await answer_of(app, sent)
            except Exception as error:  # a server would make it a 500, or a closed connection
                found.append(f"seed {seed}: {type(error).__name__} {error}: {sent.method} {sent.path[:60]}")
                return
            statuses[answer[0]] += 1
            fault = fault_in(*answer)
            if fault:
                found.append(f"seed {seed}: {fault}: {answer[0]} {answer[2][:200]!r} to {sent.method} {sent.path[:60]}")

    await asyncio.gather(*map(one, seeds))
    return found, statuses


def test_every_damaged_request_is_answered_as_documented(app: FastAPI) -> None:
    found, statuses = asyncio.run(faults(app, range(500)))
    assert found == []
    assert statuses[200] > 50
    assert {400, 404, 415, 422} <= set(statuses)


@pytest.mark.long
def test_ten_thousand_damaged_requests_are_answered_and_take_no_memory(app: FastAPI) -> None:
    asyncio.run(faults(app, range(500)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, statuses = asyncio.run(faults(app, range(1_000, 11_000)))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert found == []
    print(dict(sorted(statuses.items())), f"{grown_mib} MiB more")  # noqa: T201
    assert grown_mib < 300


# Of each kind of the odd files: how many are answered, and what is said to the others.
ODD = {
    "jpg": {200: 60, "image_truncated": 2},
    "mpo": {200: 2},
    "png": {200: 559, "image_corrupt": 11, "image_truncated": 1, "image_format": 6},  # six spoil the first bytes
    "webp": {200: 13},
    "": {"image_format": 3},  # licences
} | {
    kind: {"image_format": count}
    for kind, count in {
        **{"avif": 15, "bin": 10, "bmp": 68, "dds": 24, "fits": 1, "fli": 41, "gif": 37, "ico": 7, "jp2": 7, "pgm": 3},
        **{"ppm": 1, "psd": 9, "tga": 32, "tif": 62, "tiff": 23},
    }.items()
}
STATUSES = {"image_format": 415, "image_truncated": 422, "image_corrupt": 422}


def by_kind(answers: Iterable[tuple[str, int | str]]) -> dict[str, Counter[int | str]]:
    """How often files of each kind, by their names' ends, were answered in each way."""
    found: dict[str, Counter[int | str]] = {}
    for kind, answer in answers:
        found.setdefault(kind, Counter())[answer] += 1
    return found


@pytest.mark.parametrize("model", ["tiny", "boxes"])
def test_every_odd_file_is_answered_or_refused_for_its_reason(
    app: FastAPI, odd_files: Sequence[Path], model: str
) -> None:
    async def answers() -> list[tuple[str, int | str]]:
        found = list[tuple[str, int | str]]()
        for path in odd_files:
            status, headers, body = await answer_of(app, Sent("POST", f"/predict/{model}", body=path.read_bytes()))
            assert fault_in(status, headers, body) == "", path
            code: str | int = 200 if status == 200 else json.loads(body)["code"]
            assert (STATUSES[code] if isinstance(code, str) else code) == status, path
            found.append((path.suffix[1:], code))
        return found

    assert by_kind(asyncio.run(answers())) == ODD
