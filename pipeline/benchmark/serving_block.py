"""One block of the serving benchmark: one server pressed by 1, 16, 64 clients one after the other, from a new process.

The server runs already and lives through all blocks; what it costs is the CPU time of its processes, of all requests.
Without torch, so that the process starts in a moment. `servers.null` is pressed in the same way:
it shows the generator's own limit.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.benchmark import load
from pipeline.benchmark.machine import OthersShare, cpu_s
from pipeline.config import Strict
from pipeline.errors import DataError

Wire = Literal["jpeg", "multipart", "base64"]
"""How a JPEG is sent: as the body, as a file of multipart/form-data, as base64 in MLflow's JSON."""
_BOUNDARY = "7e1b0f6a9d"


class Address(Strict):
    """A server that runs.

    Attributes:
        wire: what it takes.
        roots: its processes, which count with all their children.
    """

    host: str
    port: int
    path: str
    wire: Wire
    roots: tuple[int, ...]


class Task(Strict):
    """What one block does.

    Attributes:
        pictures: folder of JPEGs.
        clients: at once; one level after the other.
        seconds: that each level is timed, after `warm_up_s`.
    """

    name: str
    address: Address
    pictures: Path
    clients: tuple[int, ...]
    seconds: float
    warm_up_s: float


class Level(Strict):
    """What so many clients met.

    Attributes:
        requests_per_s, p50_ms, p99_ms: of the timed seconds; 0 where a request failed.
        cpu_ms: of the server's processes, for a request.
        client_cpu_ms: of the load generator, for a request.
        num_errors: requests that failed; then there are no figures.
        error: the first of them.
        others_share: of the machine's CPU time, that went to processes other than the server and the generator.
    """

    requests_per_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    cpu_ms: float = 0.0
    client_cpu_ms: float = 0.0
    num_errors: int = 0
    error: str = ""
    others_share: float = 0.0


class Block(Strict):
    """One server in one round.

    Attributes:
        levels: by the number of clients.
        top1: the best class of each picture, by its place; None where it was not asked.
    """

    levels: dict[int, Level]
    top1: tuple[str | None, ...]


def main(asked: Path, answer: Path) -> None:
    """Do the task in this process."""
    task = Task.model_validate_json(asked.read_bytes())
    answer.write_text(measure(task).model_dump_json())


def measure(task: Task) -> Block:
    """Press the server with every number of clients.

    Raises:
        DataError: there are no pictures, or an answer names no class.
    """
    requests = requests_for(task.address, read(task.pictures))
    levels = dict[int, Level]()
    top1: list[str | None] = [None] * len(requests)
    for clients in task.clients:
        levels[clients], answers = _level(task, requests, clients)
        top1 = [known or (None if body is None else best(body)) for known, body in zip(top1, answers, strict=True)]
    return Block(levels=levels, top1=tuple(top1))


def read(folder: Path) -> list[bytes]:
    """The pictures, in the order of their names.

    Raises:
        DataError: there are none.
    """
    found = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    if not found:
        raise DataError(f"{folder}: no pictures")
    return found


def requests_for(address: Address, pictures: Sequence[bytes]) -> list[bytes]:
    """A request for each picture, as this server takes it."""
    bodies = [_body(address.wire, data) for data in pictures]
    return [load.request(address.host, address.port, address.path, kind, body) for kind, body in bodies]


def best(body: bytes) -> str | None:
    """The best class that an answer names, in any of the forms that servers give; None for an answer without classes.

    Raises:
        DataError: it is none of them.
    """
    try:
        return _best(json.loads(body))
    except (ValueError, KeyError, TypeError, IndexError):
        raise DataError(f"expected classes in the answer, got {body[:120].decode(errors='replace')}") from None


def _best(said: Any) -> str | None:
    if isinstance(said, list):
        return _best(said[0]) if said else None
    if "labels" in said:
        return str(said["labels"][0])
    return str(said["class_name"]) if "class_name" in said else _best(said["predictions"])


def _level(task: Task, requests: Sequence[bytes], clients: int) -> tuple[Level, tuple[bytes | None, ...]]:
    at, roots = task.address, list(task.address.roots)
    others, server_s, own_s = OthersShare(lambda: roots), cpu_s(roots), time.process_time()
    found = load.press(at.host, at.port, requests, clients, task.seconds, task.warm_up_s)
    own_s = time.process_time() - own_s
    server_s, share = cpu_s(roots) - server_s, others.read()
    if found.errors:
        return Level(num_errors=len(found.errors), error=found.errors[0], others_share=share), found.answers
    level = Level(
        requests_per_s=found.requests_per_s,
        p50_ms=1000 * load.percentile(found.latencies_s, 0.5),
        p99_ms=1000 * load.percentile(found.latencies_s, 0.99),
        cpu_ms=1000 * server_s / found.num_sent,
        client_cpu_ms=1000 * own_s / found.num_sent,
        others_share=share,
    )
    return level, found.answers


def _body(wire: Wire, data: bytes) -> tuple[str, bytes]:
    if wire == "jpeg":
        return "image/jpeg", data
    if wire == "base64":
        rows = {"dataframe_records": [{"image": base64.b64encode(data).decode()}]}
        return "application/json", json.dumps(rows).encode()
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="image.jpg"\r\n'
    whole = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return f"multipart/form-data; boundary={_BOUNDARY}", whole
