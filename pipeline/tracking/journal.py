"""The journal of a run: what there is to say to MLflow, first written to a file beside the checkpoints.

A training must neither wait for a tracking server nor lose a figure when there is none. So nobody who trains talks to
one: they append entries here, which costs microseconds, and the process that drives the job ships them
(`pipeline.tracking.shipping`). Standard library only: workers and samplers import this and nothing of MLflow.

`<run>/journal/` holds

    00001-driver.jsonl      one file for each writer and attempt, so that no two processes ever write to the same
    00002-rank0.jsonl       one; the number gives the order, also after a restart on another node
    origin.json             which run of which server this is
    shipped.json            how far each file has been shipped
    artifacts/              texts and figures that wait for their upload

It needs a file system that workers and driver share and that can append, so not a bucket, wherever checkpoints go.
Each line is the CRC-32 of an entry and the entry as JSON. Appending is one `write`: once it has returned, SIGKILL of
the writer does no harm. A torn last line is no line; a damaged one is left out. The disk is waited for only in `sync`,
which belongs before a checkpoint is committed: what lies before it will not be said again, what comes after it will.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import TrackingError

log = logging.getLogger("ventral.tracking")

FOLDER = "journal"
ARTIFACTS = "artifacts"
CHUNK_BYTES = 1 << 18
_SEGMENT = re.compile(r"(\d{5,})-([A-Za-z0-9._-]+)\.jsonl")
_ORIGIN, _SHIPPED = "origin.json", "shipped.json"


@dataclass(frozen=True, slots=True)
class Metrics:
    """Values at a step, at a time (`ms`, since 1970), perhaps of one checkpoint on one dataset.

    That is `input_name` and digest.
    """

    kind: ClassVar[str] = "metrics"
    ms: int
    step: int
    values: Mapping[str, float]
    checkpoint: str | None = None
    dataset: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of the run."""

    kind: ClassVar[str] = "params"
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Tags:
    """Tags of the run; the last value of each stays."""

    kind: ClassVar[str] = "tags"
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class File:
    """A file to store in `folder` of the run's artifacts; `path` is absolute, or relative to the run's folder."""

    kind: ClassVar[str] = "file"
    path: str
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that the run used, and for what (`train`, `val`, `test`)."""

    kind: ClassVar[str] = "dataset"
    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint under a name of its own, and its tags, such as where it lies; a second entry changes tags."""

    kind: ClassVar[str] = "checkpoint"
    name: str
    step: int
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Status:
    """What the run is from now on: RUNNING, FINISHED, FAILED or KILLED."""

    kind: ClassVar[str] = "status"
    ms: int
    status: str


Entry = Metrics | Params | Tags | File | Dataset | Checkpoint | Status
_KINDS: dict[str, type[Entry]] = {
    kind.kind: kind for kind in (Metrics, Params, Tags, File, Dataset, Checkpoint, Status)
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Which run a journal belongs to, and when the run began, in ms since 1970."""

    uri: str
    run_id: str
    experiment_id: str
    began_ms: int


class Writer:
    """Appends entries to a file of its own in a run's journal; for one process, any thread.

    Nothing here raises once it is made. What the disk does not take is kept in memory, warned of once, and written
    before the next entry. Pickled, it becomes a writer of the same name with another file.

    Args:
        folder: `<run>/journal`; it is made.
        name: who writes, such as `rank0`: letters, digits, `.`, `_`, `-`.

    Raises:
        TrackingError: the file cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._lock = threading.Lock()
        self._unwritten = b""
        self._warned = False
        try:
            self.path, self._file = _new_segment(folder, name)
        except OSError as error:
            raise TrackingError(f"{folder}: the run's journal cannot be written: {error.strerror}") from None

    def __reduce__(self) -> tuple[type[Writer], tuple[Path, str]]:
        return Writer, (self.folder, self.name)

    def append(self, *entries: Entry) -> None:
        """Write entries; they are safe from the end of this process, not from that of the machine (`sync`)."""
        lines = b"".join(map(encode, entries))
        with self._lock:
            self._write(lines)

    def metrics(
        self,
        values: Mapping[str, float],
        step: int,
        *,
        checkpoint: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Write values down with the time that it is now.

        The first value of a key at a step stays. After a resumption the same steps come again, and the curve gets no
        second point; a figure that may change takes another step.

        Args:
            checkpoint: whose figures these are; MLflow shows them with it.
            dataset: `input_name` and digest of what they were measured on; MLflow compares checkpoints on one dataset.
        """
        plain = {key: float(value) for key, value in values.items()}
        self.append(Metrics(time.time_ns() // 1_000_000, step, plain, checkpoint, dataset))

    def checkpoint(self, name: str, step: int, tags: Mapping[str, str]) -> None:
        """Name a checkpoint, or change its tags."""
        self.append(Checkpoint(name, step, tags))

    def sync(self) -> None:
        """Wait until the disk holds what was appended; before a checkpoint is committed."""
        with self._lock:
            self._write(b"")
            try:
                os.fsync(self._file)
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Release the file; what is appended later is lost."""
        self.sync()
        with self._lock:
            os.close(self._file)
            self._file = -1  # its number will soon be another file's

    def _write(self, lines: bytes) -> None:
        self._unwritten += lines
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("%s: not written for now (%s); entries are kept in memory", self.path, error.strerror)
        self._warned = True


class Seen:
    """What a journal has said so far, so that nothing is said twice.

    Keeps every (key, step), about 60 bytes each.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[str, tuple[str, str] | None], set[int]] = {}
        self._params: dict[str, str] = {}

    def fresh(self, entry: Entry) -> list[Entry]:
        """What of an entry is new.

        Of metrics the first value of a key at a step counts. MLflow's parameters never change: what a resumption
        changed becomes a tag `resumed.<key>`.
        """
        if isinstance(entry, Metrics):
            values = {key: value for key, value in entry.values.items() if self._is_new(key, entry)}
            return [replace(entry, values=values)] if values else []
        if isinstance(entry, Params):
            new = {key: value for key, value in entry.values.items() if key not in self._params}
            self._params |= new
            changed = {f"resumed.{key}": value for key, value in entry.values.items() if self._params[key] != value}
            return [*([Params(new)] if new else []), *([Tags(changed)] if changed else [])]
        return [entry]

    def _is_new(self, key: str, entry: Metrics) -> bool:
        steps = self._steps.setdefault((key, entry.dataset), set())
        if entry.step in steps:
            return False
        steps.add(entry.step)
        return True


def input_name(dataset: str, context: str) -> str:
    """What MLflow calls a dataset that was used for something, as an input and beside figures: `mnist/val`."""
    return f"{dataset}/{context}"


def encode(entry: Entry) -> bytes:
    """One line."""
    row = {"kind": entry.kind} | {name: getattr(entry, name) for name in entry.__slots__}
    text = json.dumps(row, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> Entry | None:
    """The entry of a line, or None if it is damaged or of a kind that is not known here."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        row: dict[str, Any] = json.loads(text)
        made = _KINDS[row.pop("kind")](**row)
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(made, Metrics) and made.dataset is not None:
        return replace(made, dataset=(made.dataset[0], made.dataset[1]))
    return made


def segments(folder: Path) -> list[Path]:
    """The journal's files, in the order in which they were begun."""
    found = [(int(match[1]), path) for path in folder.glob("*.jsonl") if (match := _SEGMENT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read(segment: Path, offset: int = 0, most_bytes: int = CHUNK_BYTES) -> tuple[list[Entry], int]:
    """Entries from a byte on, at least one if there is any, and the byte after them; another may be writing.

    Raises:
        OSError: the file cannot be read.
    """
    found, at = list[Entry](), offset
    with segment.open("rb") as file:  # opened anew each time: so a shared folder shows what other nodes wrote
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or at - offset >= most_bytes:
                break
            at += len(line)
            entry = decode(line)
            if entry is None:
                log.warning("%s: the line before byte %d is damaged or not known here; it is left out", segment, at)
            else:
                found.append(entry)
    return found, at


def entries(segment: Path, end: int | None = None) -> Iterator[Entry]:
    """Every whole entry of a file, up to a byte.

    Raises:
        OSError: the file cannot be read.
    """
    at, before = 0, -1
    end = segment.stat().st_size if end is None else end
    while before < at < end:
        before = at
        found, at = read(segment, at, min(CHUNK_BYTES, end - at))
        yield from found


def shipped(folder: Path) -> dict[str, int]:
    """How many bytes of each file have been shipped; what cannot be read counts as nothing."""
    try:
        found: dict[str, int] = json.loads((folder / _SHIPPED).read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def mark_shipped(folder: Path, offsets: Mapping[str, int]) -> None:
    """Remember how far each file has been shipped."""
    _replace(folder / _SHIPPED, offsets)


def num_unshipped(folder: Path) -> int:
    """How many entries wait."""
    done, count = shipped(folder), 0
    for segment in segments(folder):
        with segment.open("rb") as file:
            file.seek(done.get(segment.name, 0))
            count += sum(line.endswith(b"\n") for line in file)
    return count


def origin(folder: Path) -> Origin | None:
    """The run that a journal belongs to, or None where there is no journal.

    Raises:
        TrackingError: the file that says so is damaged.
    """
    path = folder / _ORIGIN
    if not path.exists():
        return None
    try:
        return Origin(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise TrackingError(f"{path}: expected the run that this journal belongs to; delete it to begin anew") from None


def remember(folder: Path, found: Origin) -> None:
    """Write down which run a journal belongs to; the folder is made.

    Raises:
        TrackingError: the disk does not take it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / _ORIGIN, asdict(found))
    except OSError as error:
        raise TrackingError(f"{folder}: the run's journal cannot be written: {error.strerror}") from None


def has_ended(folder: Path) -> bool:
    """Whether the last word on the run is that it ended."""
    said = [entry.status for segment in segments(folder) for entry in entries(segment) if isinstance(entry, Status)]
    return bool(said) and said[-1] != "RUNNING"


def curve(folder: Path, key: str) -> dict[int, float]:
    """The values of a metric by step, in the order in which they came; of each step the first."""
    found: dict[int, float] = {}
    for segment in segments(folder):
        for entry in entries(segment):
            if isinstance(entry, Metrics) and key in entry.values:
                found.setdefault(entry.step, entry.values[key])
    return found


def _new_segment(folder: Path, name: str) -> tuple[Path, int]:
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name.partition("-")[0]) for path in segments(folder)), default=0)
    path = folder / f"{number:05d}-{name}.jsonl"
    if not _SEGMENT.fullmatch(path.name):
        raise TrackingError(f"name of a writer '{name}': expected letters, digits, '.', '_' or '-'")
    try:
        return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except FileExistsError:  # another process of this name was faster
        return _new_segment(folder, name)


def _replace(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
