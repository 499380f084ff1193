"""The serving benchmark: its load generator against a small server, what it reads of answers, its ratios and doubts."""

from __future__ import annotations

import asyncio
import base64
import email
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from email import policy
from pathlib import Path

import httpx
import psutil
import pytest

from jobs import benchmark as door
from pipeline import imaging
from pipeline.benchmark import load, serving, serving_model
from pipeline.benchmark.machine import Halted
from pipeline.benchmark.servers import classifier, fastapi, null
from pipeline.benchmark.serving_block import Address, Block, Level, Task, Wire, best, measure, requests_for
from pipeline.benchmark.serving_model import Bare
from pipeline.benchmark.serving_report import DOCUMENTED, GIVEN, OURS, Report, Round, table
from pipeline.config import parse
from pipeline.errors import ConfigError, DataError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
Answer = Callable[[bytes], Awaitable[bytes]]


@contextmanager
def listening(start: Callable[[], Awaitable[asyncio.Server]]) -> Iterator[int]:
    """The port of a server that runs in a thread meanwhile."""
    loop, ports = asyncio.new_event_loop(), list[int]()
    up = threading.Event()

    async def serve() -> None:
        server = await start()
        ports.append(server.sockets[0].getsockname()[1])
        up.set()

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    assert up.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@contextmanager
def server(answer: Answer) -> Iterator[int]:
    """One that answers each body with the bytes that `answer` makes of it; none of them ends the connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
                said = await answer(await reader.readexactly(size))
                writer.write(said)
                if not said or b"close" in said:
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    with listening(lambda: asyncio.start_server(connected, "127.0.0.1", 0)) as port:
        yield port


def press(
    port: int, clients: int = 2, bodies: tuple[bytes, ...] = (b"a", b"b", b"c"), seconds: float = 0.05
) -> load.Load:
    requests = [load.request("127.0.0.1", port, "/predict", "image/jpeg", body) for body in bodies]
    return load.press("127.0.0.1", port, requests, clients, seconds, 0.0)


def level(rate: float, p50_ms: float = 10.0, **keys: float | str) -> Level:
    return Level.model_validate({"requests_per_s": rate, "p50_ms": p50_ms, "p99_ms": 2 * p50_ms, "cpu_ms": 5.0} | keys)


def block(at_1: Level, at_16: Level, top1: tuple[str | None, ...] = ("x", "y")) -> Block:
    return Block(levels={1: at_1, 16: at_16}, top1=top1)


def report(*rounds: dict[str, Block], groups: dict[str, str] | None = None) -> Report:
    bare = Bare(forward_per_s={1: 60, 16: 150}, whole_per_s=100, whole_ms=17, top1=("x", "y"), others_share=0.0)
    known = {OURS: "own", "A": "documented", "B": "documented", "C": "given"}
    return Report.model_validate(
        {
            **{"commit": "c", "versions": {}, "machine": {}, "config": {}, "quiet_share": 0.1, "load": (0.0, 1.0)},
            **{
                "weights": "random",
                "pictures": "2 JPEGs",
                "groups": groups or {name: known[name] for name in rounds[0]},
            },
            "rounds": [Round(blocks=blocks, bare={DOCUMENTED: bare, GIVEN: bare}) for blocks in rounds],
        }
    )


def test_answer_is_whole_with_its_length_its_last_chunk_or_the_end_of_the_connection() -> None:
    sized = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody"
    assert load.parse(sized) == load.Response(200, b"body", False)
    chunked = b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2;x=y\r\ndy\r\n0\r\n\r\n"
    assert load.parse(chunked) == load.Response(503, b"body", False)
    open_ended = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nbody"
    assert load.parse(open_ended, has_ended=True) == load.Response(200, b"body", True)
    assert load.parse(open_ended) is None
    for whole in (sized, chunked):
        assert {load.parse(whole[:end]) for end in range(len(whole))} == {None}


def test_percentile_is_the_nearest_rank() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [load.percentile(hundred, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert load.percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert load.percentile([7.0], 0.99) == 7.0
    with pytest.raises(DataError, match="no request was answered"):
        load.percentile([], 0.5)


def test_load_counts_what_the_server_counted_and_keeps_each_requests_own_answer() -> None:
    seen = Counter[bytes]()

    async def echo(body: bytes) -> bytes:
        seen[body] += 1
        return OK % (len(body) + 5, b"echo " + body)

    with server(echo) as port:
        found = press(port, clients=3)
    assert found.errors == ()
    assert found.num_sent == seen.total() >= len(found.latencies_s) >= 6
    assert max(seen.values()) - min(seen.values()) <= 1  # in turn
    assert found.answers == (b"echo a", b"echo b", b"echo c")
    assert list(found.latencies_s) == sorted(found.latencies_s)
    assert found.requests_per_s == pytest.approx(len(found.latencies_s) / found.seconds)


def test_load_never_has_more_requests_in_hand_than_clients() -> None:
    now, most, all_in = 0, 0, asyncio.Event()

    async def slow(body: bytes) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 5:
            all_in.set()
        await asyncio.wait_for(all_in.wait(), 10)  # nobody is answered before all have asked
        now -= 1
        return OK % (1, body)

    with server(slow) as port:
        press(port, clients=5)
    assert (most, now) == (5, 0)  # all at once, and none is left behind


def test_load_waits_for_two_answers_a_client_where_the_seconds_are_too_few() -> None:
    async def echo(body: bytes) -> bytes:
        return OK % (1, body)

    with server(echo) as port:
        found = press(port, clients=4, seconds=0.0)
    assert len(found.latencies_s) == 8
    assert found.seconds > 0


def test_refused_request_is_an_error_with_the_servers_words() -> None:
    async def refuse(body: bytes) -> bytes:
        return b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy" if body == b"b" else OK % (1, body)

    with server(refuse) as port:
        found = press(port)
    assert set(found.errors) == {"status 429: busy"}
    assert found.answers[1] is None


def test_connection_that_breaks_is_an_error_and_one_that_ends_after_its_answer_is_not() -> None:
    async def lose(body: bytes) -> bytes:
        return b""

    async def close(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 1\r\n\r\n" + body

    with server(lose) as port:
        found = press(port)
        assert {error.partition(" (")[0] for error in found.errors} == {"the connection was lost"}
    with server(close) as port:
        found = press(port)
        assert found.errors == ()
        assert found.answers == (b"a", b"b", b"c")
    refused = press(port).errors
    assert len(refused) == 2
    assert all(error.startswith("no connection (") for error in refused)


def test_null_server_answers_large_bodies_that_come_in_pieces() -> None:
    async def start() -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(null.Null, "127.0.0.1", 0)

    with listening(start) as port:
        found = press(port, bodies=(b"x" * 3_000_000, b"y"))
    assert found.errors == ()
    assert found.answers == (b'{"predictions":[]}',) * 2


def address(wire: Wire, port: int = 80) -> Address:
    return Address(host="127.0.0.1", port=port, path="/p", wire=wire, roots=())


def test_picture_is_the_same_in_every_form_that_servers_take() -> None:
    picture = bytes(range(256))
    plain, parts, rows = (requests_for(address(wire), [picture])[0] for wire in ("jpeg", "multipart", "base64"))
    assert plain.partition(b"\r\n\r\n")[2] == picture
    head, _, body = parts.partition(b"\r\n\r\n")
    (part,) = email.message_from_bytes(head.partition(b"\r\n")[2] + b"\r\n\r\n" + body, policy=policy.HTTP).iter_parts()
    assert part.get_payload(decode=True) == picture
    assert part.get_param("name", header="content-disposition") == "images"
    (row,) = json.loads(rows.partition(b"\r\n\r\n")[2])["dataframe_records"]
    assert base64.b64decode(row["image"]) == picture
    for request in (plain, parts, rows):
        head, _, body = request.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head


def test_best_class_is_found_in_every_form_that_servers_give() -> None:
    ours = {"predictions": [{"label": 3, "class_name": "cat", "score": 0.5}, {"class_name": "dog"}], "model": {}}
    logged = {"predictions": [{"labels": ["cat", "dog"], "scores": [0.5, 0.1]}]}
    for said in (ours, [ours], {"predictions": [ours]}, logged):
        assert best(json.dumps(said).encode()) == "cat"
    assert best(b'{"predictions":[]}') is None
    for wrong in (b"", b"no JSON", b'{"error": "x"}', b"3"):
        with pytest.raises(DataError, match="expected classes"):
            best(wrong)


def test_block_has_a_figure_for_each_number_of_clients_and_none_where_a_request_failed(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"first")
    (tmp_path / "1.jpg").write_bytes(b"second")
    count = 0

    async def answer(body: bytes) -> bytes:
        nonlocal count
        count += 1
        said = json.dumps({"predictions": [{"class_name": body.decode()}]}).encode()
        return OK % (len(said), said) if count != broken else b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\noops"

    for broken in (0, 2):
        count = 0
        with server(answer) as port:
            at = address("jpeg", port)
            task = Task(name="n", address=at, pictures=tmp_path, clients=(1, 3), seconds=0.05, warm_up_s=0.0)
            found = measure(task)
        assert found.top1 == ("first", "second")
        assert found.levels[3].num_errors == 0
        assert 0 < found.levels[3].p50_ms <= found.levels[3].p99_ms
        if broken:
            assert found.levels[1] == level(0, 0, cpu_ms=0, num_errors=1, error="status 500: oops").model_copy(
                update={"others_share": found.levels[1].others_share}
            )
        else:
            assert found.levels[1].requests_per_s > 0


def test_cpu_time_is_that_of_other_processes_only() -> None:
    # In a process without children: that of a whole test run has Ray for one.
    alone = "import os; from pipeline.benchmark.machine import cpu_s; print(cpu_s([os.getpid()]))"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 0.0


def test_one_server_runs_at_a_time_with_all_its_children_and_in_the_end_all_run() -> None:
    parent = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with ExitStack() as ends:
        trees = dict[str, list[int]]()
        for name in ("a", "b", "c"):
            process = ends.enter_context(subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE))
            assert process.stdout is not None
            trees[name] = [process.pid, int(process.stdout.readline())]
            for pid in trees[name]:
                ends.callback(psutil.Process(pid).kill)

        def halted(wanted: str) -> bool:
            """Whether these have come to be halted, with their children, and no others: a signal takes its time."""
            stopped = {
                pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED for pids in trees.values() for pid in pids
            }
            return all(stopped[pid] == (name in wanted) for name, pids in trees.items() for pid in pids)

        def wait_halted(wanted: str) -> None:
            ends_s = time.monotonic() + 10
            while not halted(wanted):
                assert time.monotonic() < ends_s
                time.sleep(0.01)

        roots = {"a": trees["a"][:1], "b": trees["b"][:1], "c": trees["c"][:1], "c too": trees["c"][:1]}
        with suppress(KeyboardInterrupt), Halted(roots, settle_s=0.0) as servers:
            assert halted("")
            for name, others in [("a", "bc"), ("c", "ab"), ("c too", "ab"), ("the bare model", "abc"), ("b", "ac")]:
                servers.all_but(name)
                wait_halted(others)
            raise KeyboardInterrupt
        wait_halted("")


def test_a_server_that_has_ended_is_no_hindrance_to_halting_the_others() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with Halted({"a": [ended.pid], "b": []}, settle_s=0.0) as servers:
        servers.all_but("b")
        servers.all_but("a")


def test_ratios_are_of_one_round_to_the_best_peer_of_it() -> None:
    found = report(
        {
            OURS: block(level(50, 8), level(200)),
            "A": block(level(40, 16), level(100)),
            "B": block(level(45, 20), level(50)),
        },
        {
            OURS: block(level(50, 9), level(300)),
            "A": block(level(40, 36), level(100)),
            "B": block(level(45, 18), level(200)),
        },
    )
    rate = found.ratio(["A", "B"], 16, lambda one: one.requests_per_s, max)
    assert rate == (1.75, 1.5, 2.0)
    assert found.ratio(["A", "B"], 1, lambda one: one.p50_ms, min) == (0.5, 0.5, 0.5)
    assert found.ratio([], 16, lambda one: one.requests_per_s, max) is None
    said = table(found)
    assert "(B): 1.75 (1.50..2.00); 2.5 is the goal" in said
    assert "at 1 client: our p50 / the least of all peers': 0.50 (0.50..0.50)" in said
    assert "1.1 is the goal" not in said  # no peer has our model


def test_peer_whose_requests_failed_is_no_rival_and_is_named() -> None:
    failed = level(0, num_errors=2, error="status 500: oops")
    found = report(
        {OURS: block(level(50), level(200)), "A": block(level(40), failed), "B": block(level(45), level(80))},
        {OURS: block(level(50), level(200)), "A": block(level(40), level(900)), "B": block(level(45), level(80))},
    )
    said = table(found)
    assert "(B): 2.50 (2.50..2.50)" in said
    assert "A: 2 requests failed at 16 clients, so no figure: status 500: oops" in said
    ours = report({OURS: block(level(50), failed), "A": block(level(40), level(80))})
    assert "2.5 is the goal" not in table(ours)


def test_answers_that_differ_from_the_models_are_said() -> None:
    same, other = block(level(1), level(1), ("x", None)), block(level(1), level(1), ("x", "z"))
    found = report({OURS: same, "A": other})
    assert (found.agreement(OURS), found.agreement("A")) == (1.0, 0.5)
    assert "A: only 50% of its answers" in table(found)
    assert "ventral: only" not in table(found)


def test_machine_that_was_not_quiet_is_said() -> None:
    assert "not quiet" in table(report({OURS: block(level(1), level(1, others_share=0.2))}))
    assert "not quiet" not in table(report({OURS: block(level(1), level(1, others_share=0.05))}))


def test_servers_that_cannot_run_are_refused_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(names: object, model: object) -> dict[str, Address]:
        raise AssertionError("nothing may start")

    with pytest.raises(ConfigError, match=r"unknown server 'fastapi'.*FastAPI, as documented"):
        serving.run(parse(serving.Config, {"only": ["fastapi"]}, "x"), tmp_path, never)
    with pytest.raises(ConfigError, match=r"peers_python.bentoml: there is no interpreter"):
        serving.run(parse(serving.Config, {"peers_python": {"bentoml": str(tmp_path / "none")}}, "x"), tmp_path, never)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    started = list[str]()

    def stop(names: Sequence[str], model: Path) -> dict[str, Address]:
        started.extend(names)
        raise DataError("enough")

    for slow in ("draw", "prepare"):
        monkeypatch.setattr(serving_model, slow, lambda *args: "")
    with pytest.raises(DataError, match="enough"):
        serving.run(serving.Config(num_pictures=1), tmp_path, stop)
    assert len(started) == len(serving.SERVERS) - 4  # without LitServe and BentoML, in both forms
    assert list(tmp_path.iterdir()) == []


def test_door_names_the_key_it_expects(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "x.yaml"
    empty.write_text("")
    assert door.main(["serve", str(empty)]) == 2
    assert "(ingest, train, serve)" in capsys.readouterr().err


def test_pictures_are_different_jpegs_of_the_wanted_size_without_any_data_set(tmp_path: Path) -> None:
    said = serving_model.draw(tmp_path / "p", [], 6, 46_000)
    found = [path.read_bytes() for path in sorted((tmp_path / "p").iterdir())]
    assert len(set(found)) == 6
    assert {imaging.probe(data) for data in found} == {(375, 500)}
    assert all(0.7 * 46_000 < len(data) < 1.3 * 46_000 for data in found)
    assert "scikit-learn" in said


def test_fastapi_peer_gives_the_model_the_bytes_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo(classifier.Documented):
        def __init__(self) -> None: ...

        def answer(self, data: bytes) -> classifier.Answer:
            return {"predictions": [{"class_name": data.hex(), "score": 1.0}]}

    monkeypatch.setattr(classifier, "build", lambda form, folder: Echo())
    transport = httpx.ASGITransport(fastapi.application("documented", tmp_path))

    async def ask() -> bytes:
        async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
            sent = await client.post("/predict", content=b"\xff\xd8\x00", headers={"content-type": "image/jpeg"})
            return sent.content

    assert best(asyncio.run(ask())) == "ffd800"
