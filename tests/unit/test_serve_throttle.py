"""A process that is let run for a share of the time: processes of their own, for they are stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve import throttle

ROOT = Path(__file__).parents[2]
BUSY = """
import contextlib, json, os, psutil, sys, threading, time
from serve.throttle import throttled

def busy(cpu_s):  # of all threads
    ends_s = time.process_time() + cpu_s
    while time.process_time() < ends_s:
        pass
"""
THREADS = """
def work(share):
    with throttled(share):
        busy(0.02)
threads = [threading.Thread(target=work, args=(share,)) for share in (0.3, 0.9, 0.5, 1.0) * 2]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"children": len(psutil.Process().children())}))
"""
FOR_EVER = """
with throttled(0.1):
    print("begun", flush=True)
    busy(1e9)
"""
HANGS_S = 60


def run(code: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", BUSY + code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, check=True
    )
    return dict(json.loads(done.stdout))


def is_seen_stopped(process: psutil.Process, within_s: float) -> bool:
    """Whether it stands at one of many looks."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.001)
    return False


@contextmanager
def talking(code: str, python: Sequence[str] = (sys.executable,)) -> Iterator[tuple[psutil.Process, Callable[[], str]]]:
    """A process, what it says next, and at the end nothing more for it to read."""
    command = [*python, "-c", BUSY + code]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as started:

        def said() -> str:
            assert started.stdout
            return started.stdout.readline().strip()

        yield psutil.Process(started.pid), said
        assert started.stdin
        started.stdin.close()
    assert started.returncode == 0


WITHIN = """
with contextlib.suppress(ValueError), throttled(0.1):
    print("within", flush=True)
    busy(0.1)
    raise ValueError
print("behind", flush=True)
sys.stdin.read()
"""
STARTED = """
from serve import throttle
print("within", flush=True)
busy(0.1)
throttle.release()
print("behind", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["throttled", "started", "started late"])
def test_a_process_stands_at_times_within_and_never_behind(how: str) -> None:
    begun = throttle.python(0.1, time.time() + (-1 if how == "started late" else HANGS_S))
    python = (sys.executable,) if how == "throttled" else tuple(begun.split())
    with talking(WITHIN if how == "throttled" else STARTED, python) as (process, said):
        assert said() == "within"
        assert is_seen_stopped(process, 0.2 if how == "started late" else HANGS_S) == (how != "started late")
        assert said() == "behind"
        assert process.children() == []
        assert not is_seen_stopped(process, 0.2)


def test_threads_that_ask_at_once_all_end_and_leave_no_child() -> None:
    assert run(THREADS)["children"] == 0


def test_a_process_that_dies_leaves_no_child() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY + FOR_EVER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdout
        assert busy.stdout.readline() == "begun\n"
        (child,) = psutil.Process(busy.pid).children()
        busy.send_signal(signal.SIGKILL)
    child.wait(HANGS_S)
    assert not child.is_running()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_only_a_share_below_one_takes_a_child(share: float) -> None:
    code = f"""
with throttled({share}):
    print(json.dumps({{"children": len(psutil.Process().children())}}))
"""
    assert run(code)["children"] == (share < 1)


KILLED = """
with throttled(0.5):
    (child,) = psutil.Process().children()
    child.kill()
    print("killed", flush=True)
    sys.stdin.readline()
print("behind", flush=True)
"""


def test_a_child_that_is_killed_is_no_error() -> None:
    command = [sys.executable, "-c", BUSY + KILLED]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        assert killed.stdout.readline() == "killed\n"
        killed.send_signal(signal.SIGCONT)  # it may have been left standing
        assert killed.communicate("\n", HANGS_S)[0] == "behind\n"
    assert killed.returncode == 0


def test_where_no_child_can_be_started_nothing_is_restrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fails)
    with throttle.throttled(0.1):
        pass
