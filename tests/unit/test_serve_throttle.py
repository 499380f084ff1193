"""A process that is let run for a share of the time: processes of their own, for they are stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from serve import throttle

ROOT = Path(__file__).parents[2]
BUSY = """
import contextlib, json, os, sys, threading, time
from serve.throttle import throttled

def busy(cpu_s):  # of all threads
    began_s, ends_s = time.monotonic(), time.process_time() + cpu_s
    while time.process_time() < ends_s:
        pass
    return cpu_s / (time.monotonic() - began_s)
"""
SHARES = """
share = {}
with throttled(0.1):
    share["within"] = busy(0.1)
share["behind"] = busy(0.3)
with contextlib.suppress(ValueError), throttled(0.1):
    raise ValueError
share["behind an error"] = busy(0.3)
print(json.dumps(share))
"""
THREADS = """
def work():
    with throttled(0.2):
        busy(0.02)
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"behind": busy(0.3)}))
"""
FOR_EVER = """
with throttled(0.1):
    print("begun", flush=True)
    busy(1e9)
"""
HANGS_S = 60


def run(code: str, python: Sequence[str] = (sys.executable,)) -> dict[str, float]:
    done = subprocess.run(
        [*python, "-c", BUSY + code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, check=True
    )
    return dict(json.loads(done.stdout))


def test_a_process_runs_for_its_share_within_and_freely_behind() -> None:
    shares = run(SHARES)
    assert shares["within"] < 0.3
    assert min(shares["behind"], shares["behind an error"]) > 2 * shares["within"]


def test_threads_that_are_restrained_at_once_all_end() -> None:
    assert run(THREADS)["behind"] > 0


STARTED = """
from serve import throttle
share = {"begun": busy(0.1)}
throttle.release()
share["released"] = busy(0.3)
print(json.dumps(share))
"""


@pytest.mark.parametrize("is_late", [False, True])
def test_a_python_is_restrained_from_its_start_until_it_is_released_unless_it_starts_late(is_late: bool) -> None:
    begun = throttle.python(0.1, time.time() + (-1 if is_late else HANGS_S))
    shares = run(STARTED, begun.split())
    assert (shares["begun"] < 0.3) != is_late
    assert is_late or shares["released"] > 2 * shares["begun"]


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
import psutil
with throttled({share}):
    print(json.dumps({{"children": len(psutil.Process().children())}}))
"""
    assert run(code)["children"] == (share < 1)


def test_a_child_that_is_killed_is_no_error_and_a_process_that_it_left_standing_can_go_on() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY + FOR_EVER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdout
        busy.stdout.readline()
        (child,) = psutil.Process(busy.pid).children()
        child.kill()
        deadline = time.monotonic() + HANGS_S
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
        busy.send_signal(signal.SIGCONT)
        busy.terminate()
        assert busy.wait(HANGS_S) == -signal.SIGTERM
