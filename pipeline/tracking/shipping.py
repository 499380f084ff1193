"""Brings a run's journal to its MLflow server, in a thread of the process that drives the job.

That process has MLflow loaded and trains nothing, so its waiting costs the workers no time. It reads the files that
they append to, wherever they run, on the storage that all nodes share; `pipeline.benchmark.tracking` measures it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.tracking import connection, journal
from pipeline.tracking.delivery import Destination

log = logging.getLogger("ventral.tracking")

POLL_S = 1.0
LONGEST_PAUSE_S = 30.0
LAST_PAUSE_S = 0.5  # while closing
LOCK_WAIT_S, LOCK_PAUSE_S = 10.0, 0.2
_LOCK = "shipping.lock"


class Shipper:
    """Ships what a journal holds and what is appended to it, until it is closed.

    While the server does not answer, it is asked again after 1, 2, 4 ... 30 s, for ever; one line of the log tells of
    the outage and one of its end. What the server refuses by itself is left out with a warning.

    Args:
        to: the run; its journal lies in `to.folder / "journal"`.

    Raises:
        TrackingError: another process ships this journal, or it cannot be read. Later nothing is raised.
    """

    def __init__(self, to: Destination) -> None:
        self._to, self._folder = to, to.folder / journal.FOLDER
        self._pending: list[journal.Entry] = []
        self._failures = 0
        self._closing, self._given_up = threading.Event(), threading.Event()
        try:
            self._lock = _locked(self._folder / _LOCK)
            self._shipped = journal.shipped(self._folder)
            self._next = dict(self._shipped)
            self._seen = _recalled(self._folder, self._shipped)
        except OSError as error:
            raise TrackingError(f"{self._folder}: the run's journal cannot be read: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="journal-shipper", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> int:
        """Ship the rest within `timeout_s`, end, and return how many entries are left for `replay`."""
        self._closing.set()
        self._thread.join(timeout_s)
        self._given_up.set()  # a thread that hangs in a call is left behind; it ends with that or with the process
        try:
            return journal.num_unshipped(self._folder)
        except OSError as error:
            log.warning("%s: the run's journal is gone: %s", self._folder, error.strerror)
            return 0

    def _run(self) -> None:
        while not self._given_up.is_set():
            if self._step():
                continue
            if self._closing.is_set() and not self._failures:
                break
            self._pause()
        os.close(self._lock)

    def _step(self) -> bool:
        """Ship what is new; False if nothing is, or it could not be shipped."""
        try:
            if not self._pending:
                self._collect()
            if self._next == self._shipped:
                self._failures = 0
                return False
            if self._failures:
                connection.check(self._to.uri)  # answered within seconds, where a call would hang for a minute
            self._to.deliver(self._pending, self._refuse)
            journal.mark_shipped(self._folder, self._next)
        except Exception as error:  # whatever MLflow and the disk come up with: the thread must live on
            self._failures += 1
            if self._failures == 1:
                log.warning("tracking waits: %s; nothing is lost, it lies in %s", error, self._folder)
            return False
        if self._failures:
            log.warning("tracking goes on: %s answers again", self._to.uri)
        self._failures, self._pending, self._shipped = 0, [], dict(self._next)
        return True

    def _collect(self) -> None:
        """Read a chunk of every file, in order; no further than one that holds more."""
        for segment in journal.segments(self._folder):
            at = self._next.get(segment.name, 0)
            entries, end = journal.read(segment, at)
            self._pending += [part for entry in entries for part in self._seen.fresh(entry)]
            self._next[segment.name] = end
            if end - at >= journal.CHUNK_BYTES:
                return

    def _pause(self) -> None:
        if self._closing.is_set():
            self._given_up.wait(LAST_PAUSE_S)
        else:
            self._closing.wait(min(POLL_S * 2 ** max(self._failures - 1, 0), LONGEST_PAUSE_S))

    def _refuse(self, what: str, error: TrackingError) -> None:
        log.warning("left out of MLflow: %s (%s)", what, error)


def replay(folder: Path, uri: str, timeout_s: float) -> int:
    """Ship what the job of a run left in its journal, and return how many entries are left after `timeout_s`.

    A run whose job ended without a word, as by SIGKILL, is set to KILLED.

    Args:
        folder: of the run.
        uri: of the server, perhaps at another address than it had.

    Raises:
        TrackingError: there is no journal, its job still runs, or no server answers that has the run.
    """
    found = journal.origin(folder / journal.FOLDER)
    if found is None:
        raise TrackingError(f"{folder}: holds no journal of a run; name the folder of a run that was tracked")
    to = Destination(uri, found.run_id, found.experiment_id, folder)
    connection.check(uri)
    to.check()
    shipper = Shipper(to)
    if not journal.has_ended(folder / journal.FOLDER):
        writer = journal.Writer(folder / journal.FOLDER, "replay")
        writer.append(journal.Status(time.time_ns() // 1_000_000, "KILLED"))
        writer.close()
    return shipper.close(timeout_s)


def _recalled(folder: Path, shipped: dict[str, int]) -> journal.Seen:
    """What has been shipped, read again."""
    seen = journal.Seen()
    for segment in journal.segments(folder):
        for entry in journal.entries(segment, shipped.get(segment.name, 0)):
            seen.fresh(entry)
    return seen


def _locked(path: Path) -> int:
    """Hold the lock of a journal until the file is closed or the process ends.

    A shipper that was closed may still hang in its last call, so some time is given to it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_S
    try:
        while not _locks(file):
            if time.monotonic() > deadline:
                os.close(file)
                raise TrackingError(f"{path.parent}: another process ships this journal; stop that job first")
            time.sleep(LOCK_PAUSE_S)
    except OSError:  # a file system without locks: two shippers are no harm to metrics, only to checkpoints
        log.warning("%s: this storage has no locks; let only one job at a time use the run", path.parent)
    return file


def _locks(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
