"""What the machine does while something is measured: memory of a tree of processes, and CPU time of all others.

Servers that wait for their turn can be halted, for an idle one of many processes takes part of a small machine too.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

Roots = Callable[[], list[int]]
"""Says which processes count besides this one; each with its children."""


@dataclass
class Peak:
    """The most memory that was seen."""

    num_bytes: int = 0


@contextmanager
def peak_memory(roots: Roots, every_s: float = 0.25) -> Iterator[Peak]:
    """Watch the memory of this process, of `roots` and all their children in a thread.

    It is the proportional set size: pages that n processes share count 1/n in each, so shared memory counts once.
    Reading it costs milliseconds per process: measure no time meanwhile.
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.num_bytes = max(peak.num_bytes, sum(map(_memory, _tree(roots()))))
            done.wait(every_s)

    thread = threading.Thread(target=watch, name="peak-memory")
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


class OthersShare:
    """The share of the machine's CPU time that went to processes outside the tree since this was made.

    Args:
        roots: as in `peak_memory`.
    """

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._started = time.monotonic()
        self._busy, self._own = _busy_s(), self._own_s()

    def read(self) -> float:
        """Between 0 and 1; read it while the workers live or after they were waited for."""
        capacity = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        others = (_busy_s() - self._busy) - (self._own_s() - self._own)
        return min(max(others / max(capacity, 1e-9), 0.0), 1.0)

    def _own_s(self) -> float:
        return sum(map(_cpu_s, _tree(self._roots())))


def cpu_s(roots: list[int]) -> float:
    """CPU seconds so far of these processes and their children, this process left out."""
    here = psutil.Process()
    return sum(_cpu_s(process) for process in _tree(roots) if process != here)


class Halted:
    """Servers of which one runs at a time: the processes of all others are stopped, and go on where they were.

    A server is halted for as long as it is not measured, not between any two blocks: what its processes expect of each
    other in time is late once, not again and again.

    Args:
        roots: the processes of each server, by its name; each with its children. Servers may have some in common.
        settle_s: for a server that has been woken, to make up for what it has missed.
    """

    def __init__(self, roots: Mapping[str, Iterable[int]], settle_s: float = 5.0) -> None:
        self._roots = {name: frozenset(pids) for name, pids in roots.items()}
        self._settle_s = settle_s
        self._halted = frozenset[int]()

    def __enter__(self) -> Self:
        """Nothing is halted yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let all go on."""
        self._resume(self._halted)

    def all_but(self, name: str) -> None:
        """Halt all servers but this one, if it is one; returns as soon as it is at rest again."""
        wanted = self._roots.get(name, frozenset())
        for pid in frozenset[int]().union(*self._roots.values()) - self._halted - wanted:
            _each(pid, psutil.Process.suspend)
            self._halted |= {pid}
        if woken := wanted & self._halted:
            self._resume(woken)
            time.sleep(self._settle_s)

    def _resume(self, pids: frozenset[int]) -> None:
        for pid in pids:
            _each(pid, psutil.Process.resume)
        self._halted -= pids


def described() -> dict[str, str]:
    """Processor, number of CPUs, operating system."""
    return {"processor": _processor(), "cpus": str(os.cpu_count()), "system": platform.platform()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _tree(roots: list[int]) -> set[psutil.Process]:
    return {process for pid in {os.getpid(), *roots} for process in _family(pid)}


def _family(pid: int) -> Iterator[psutil.Process]:
    """A process and its children, looked for only when it has been dealt with; nothing of one that is gone."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        yield root
        yield from root.children(recursive=True)


def _each(pid: int, do: Callable[[psutil.Process], None]) -> None:
    """Do something to a process and its children, it first; those that have ended are left out."""
    for process in _family(pid):
        with suppress(psutil.Error):
            do(process)


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _cpu_s(process: psutil.Process) -> float:
    """Of the process and of its children that have ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
