"""The journal of a run: what was appended is read again, whatever happened to the writer, the disk and the file."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TrackingError
from pipeline.tracking import journal
from pipeline.tracking.journal import (
    Checkpoint,
    Dataset,
    Entry,
    File,
    Metrics,
    Origin,
    Params,
    Seen,
    Status,
    Tags,
    Writer,
)

BOUND_S = 60.0
ONE_OF_EACH: tuple[Entry, ...] = (
    Metrics(1_700_000_000_123, 7, {"val/top1": 0.5, "loss": 1e-300}, "epoch-0007", ("digits/val", "a" * 64)),
    Metrics(1, 0, {}),
    Params({"model.name": "lenet5", "leer": ""}),
    Tags({"a": "zeile\nzwei", "b": "日本", "c": "\x00"}),
    File("report.json", "reports"),
    Dataset("digits", "b" * 64, "/shards", "val"),
    Checkpoint("epoch-0007", 7, {"path": "/runs/x"}),
    Status(2, "FINISHED"),
)


def everything(folder: Path) -> list[Entry]:
    return [entry for segment in journal.segments(folder) for entry in journal.entries(segment)]


def test_append_every_kind_comes_back_equal_and_in_order(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "rank0")
    for entry in ONE_OF_EACH:
        writer.append(entry)
    writer.append(*ONE_OF_EACH)
    assert everything(tmp_path) == [*ONE_OF_EACH, *ONE_OF_EACH]


def test_lines_are_checksum_and_json_for_other_tools(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "rank0")
    writer.metrics({"loss": 0.25}, 3)
    checksum, text = writer.path.read_text().split(" ", 1)
    row = json.loads(text)
    assert len(checksum) == 8
    assert row | {"ms": 0} == {
        "kind": "metrics", "ms": 0, "step": 3, "values": {"loss": 0.25}, "checkpoint": None, "dataset": None,
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(cut=st.floats(0, 1), garbage=st.binary(max_size=40))
def test_read_any_prefix_and_a_torn_end_gives_the_entries_before_it(cut: float, garbage: bytes) -> None:
    lines = [journal.encode(entry) for entry in ONE_OF_EACH]
    whole = b"".join(lines)
    prefix = whole[: round(cut * len(whole))]
    num_whole = sum(len(b"".join(lines[: number + 1])) <= len(prefix) for number in range(len(lines)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00001-rank0.jsonl"
        path.write_bytes(prefix + garbage.replace(b"\n", b""))
        found, at = journal.read(path)
        assert tuple(found[:num_whole]) == ONE_OF_EACH[:num_whole]
        assert len(found) == num_whole
        assert at == len(b"".join(lines[:num_whole]))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_read_damaged_byte_loses_no_other_entry(at: int, flip: int) -> None:
    lines = [journal.encode(entry) for entry in ONE_OF_EACH]
    whole = bytearray(b"".join(lines))
    at %= len(whole)
    whole[at] ^= flip
    hit = next(number for number in range(len(lines)) if at < len(b"".join(lines[: number + 1])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00001-rank0.jsonl"
        path.write_bytes(bytes(whole))
        found = list(journal.entries(path))
    joined = {hit, hit + 1} if at == len(b"".join(lines[: hit + 1])) - 1 else {hit}  # its newline was hit
    assert found == [entry for number, entry in enumerate(ONE_OF_EACH) if number not in joined]


def test_read_in_chunks_gives_everything_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "rank0")
    for step in range(100):
        writer.metrics({"loss": step}, step)
    steps, at, chunks = [], 0, 0
    while (read := journal.read(writer.path, at, most_bytes=700))[0]:
        steps += [entry.step for entry in read[0] if isinstance(entry, Metrics)]
        at, chunks = read[1], chunks + 1
    assert steps == list(range(100))
    assert chunks > 10


def test_read_entry_longer_than_a_chunk_is_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "rank0")
    writer.append(Tags({"long": "x" * 1000}), Status(1, "FINISHED"))
    assert len(journal.read(writer.path, 0, most_bytes=10)[0]) == 1


def test_reader_beside_a_writer_sees_every_entry_once_in_order(tmp_path: Path) -> None:
    writer, num = Writer(tmp_path, "rank0"), 3000

    def write() -> None:
        for step in range(num):
            writer.metrics({"loss": step}, step)

    thread = threading.Thread(target=write)
    thread.start()
    steps, at, alive = list[int](), 0, True
    while alive or (len(steps) < num and at < writer.path.stat().st_size):
        alive = thread.is_alive()
        entries, at = journal.read(writer.path, at)
        steps += [entry.step for entry in entries if isinstance(entry, Metrics)]
    assert steps == list(range(num))


def test_threads_of_one_writer_tear_no_line(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "rank0")

    def write(name: int) -> None:
        for step in range(300):
            writer.metrics({f"thread{name}": step, "filler" * 50: 0}, step)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert len(everything(tmp_path)) == 1200


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from pipeline.tracking.journal import Writer
writer, step = Writer(Path(sys.argv[1]), "rank0"), int(sys.argv[2])
while True:
    writer.metrics({"loss": step / 7}, step)
    print(step, flush=True)
    step += 1
"""


def write_until_killed(folder: Path, first: int) -> int:
    """The last step that a process is sure to have written before SIGKILL."""
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(folder), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")
    return max([first + 49, *(int(word) for word in said[:-1] if word)])


def test_writer_killed_and_a_second_going_on_lose_nothing_that_was_written(tmp_path: Path) -> None:
    last = write_until_killed(tmp_path, 0)
    resumed = last - 20  # a checkpoint lies before the end
    final = write_until_killed(tmp_path, resumed)
    assert [path.name for path in journal.segments(tmp_path)] == ["00001-rank0.jsonl", "00002-rank0.jsonl"]
    seen = Seen()
    once = [part for entry in everything(tmp_path) for part in seen.fresh(entry)]
    points = [(entry.step, entry.values["loss"]) for entry in once if isinstance(entry, Metrics)]
    assert points[: final + 1] == [(step, step / 7) for step in range(final + 1)]
    assert len(points) <= final + 2  # one more may have been written before it was said


def test_writer_full_disk_keeps_entries_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer(tmp_path, "rank0")
    room, real = [25], os.write

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    with caplog.at_level(logging.WARNING, logger="ventral.tracking"):
        for step in range(5):
            writer.metrics({"loss": step}, step)
        writer.sync()
    assert everything(tmp_path) == []
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    room[0] = 10**6
    writer.metrics({"loss": 5.0}, 5)
    assert [entry.step for entry in everything(tmp_path) if isinstance(entry, Metrics)] == list(range(6))


def test_writer_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="the run's journal cannot be written: Not a directory"):
        Writer(tmp_path / "file" / "journal", "rank0")


@pytest.mark.parametrize("name", ["", "a/b", "..\n", "näme"])
def test_writer_with_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrackingError, match="expected letters"):
        Writer(tmp_path, name)


def test_writer_sent_to_another_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    first = Writer(tmp_path, "driver")
    second = pickle.loads(pickle.dumps(first))
    first.append(Status(1, "RUNNING"))
    second.append(Status(2, "KILLED"))
    assert first.path != second.path
    assert everything(tmp_path) == [Status(1, "RUNNING"), Status(2, "KILLED")]


def test_seen_first_value_of_a_step_stays_and_of_datasets_each() -> None:
    seen = Seen()
    first = Metrics(100, 3, {"a": 1.0, "b": 2.0})
    assert seen.fresh(first) == [first]
    assert seen.fresh(Metrics(200, 3, {"a": 1.5, "c": 3.0})) == [Metrics(200, 3, {"c": 3.0})]
    assert seen.fresh(Metrics(300, 3, {"a": 1.0, "b": 2.0})) == []
    other = Metrics(400, 3, {"a": 9.0}, dataset=("test", "d"))
    assert seen.fresh(other) == [other]


def test_seen_changed_parameter_of_a_resumption_becomes_a_tag() -> None:
    seen = Seen()
    assert seen.fresh(Params({"lr": "0.1", "resume": "false"})) == [Params({"lr": "0.1", "resume": "false"})]
    assert seen.fresh(Params({"lr": "0.1", "resume": "false"})) == []
    assert seen.fresh(Params({"lr": "0.1", "resume": "true", "new": "1"})) == [
        Params({"new": "1"}),
        Tags({"resumed.resume": "true"}),
    ]


def test_num_unshipped_counts_what_comes_after_the_mark(tmp_path: Path) -> None:
    assert journal.num_unshipped(tmp_path) == 0
    writer = Writer(tmp_path, "rank0")
    for step in range(5):
        writer.metrics({"loss": step}, step)
    _, at = journal.read(writer.path, 0, most_bytes=1)
    journal.mark_shipped(tmp_path, {writer.path.name: at})
    assert journal.num_unshipped(tmp_path) == 4
    (tmp_path / "shipped.json").write_text("{")  # a torn one: everything is sent again, which MLflow does not mind
    assert journal.num_unshipped(tmp_path) == 5


def test_curve_is_a_metric_by_step_and_a_resumption_adds_no_second_value(tmp_path: Path) -> None:
    first = Writer(tmp_path, "rank0")
    first.metrics({"val/top1": 0.5, "lr": 1.0}, 1)
    first.metrics({"val/top1": 0.6}, 2)
    first.close()
    second = Writer(tmp_path, "rank0")
    second.metrics({"val/top1": 0.61}, 2)
    second.metrics({"val/top1": 0.7}, 3)
    second.close()
    assert journal.curve(tmp_path, "val/top1") == {1: 0.5, 2: 0.6, 3: 0.7}
    assert journal.curve(tmp_path, "val/loss") == {}
    assert journal.curve(tmp_path / "none", "val/top1") == {}


def test_has_ended_takes_the_last_word(tmp_path: Path) -> None:
    assert not journal.has_ended(tmp_path)
    first = Writer(tmp_path, "driver")
    first.append(Status(1, "FAILED"))
    assert journal.has_ended(tmp_path)
    Writer(tmp_path, "driver").append(Status(2, "RUNNING"))
    assert not journal.has_ended(tmp_path)


def test_origin_is_remembered_and_a_damaged_one_named(tmp_path: Path) -> None:
    assert journal.origin(tmp_path / "journal") is None
    journal.remember(tmp_path / "journal", Origin("http://x", "run", "1", 5))
    assert journal.origin(tmp_path / "journal") == Origin("http://x", "run", "1", 5)
    (tmp_path / "journal" / "origin.json").write_text('{"uri": ')
    with pytest.raises(TrackingError, match="expected the run that this journal belongs to"):
        journal.origin(tmp_path / "journal")


def test_import_brings_only_the_standard_library() -> None:
    code = (
        "import sys, pipeline.tracking.journal\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == {"pipeline", "__main__"}
