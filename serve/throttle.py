"""Lets a process compute for a share of the time only, where what it does must not slow others on the same CPUs.

A priority does not do that: what runs at the lowest still takes caches, memory and the other half of a core from who
runs at the highest. So a child of the process stops it and lets it go on, twenty times a second, all its threads alike,
but not what it starts itself, such as compilers. Where that child is killed, the process may stay stopped.

    python -m serve.throttle SHARE UNTIL arguments...

is `python arguments...`, restrained from its first moment on if that is before UNTIL, in seconds since 1970, and until
it calls `release`.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PERIOD_S = 0.05
_turn = threading.Lock()
_log = logging.getLogger("ray.serve")
_CHILD_PID = "VENTRAL_THROTTLE_PID"
_CHILD = """
import os, signal, sys, time
process, runs_s, stands_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    while os.getppid() == process:  # another when it has died
        os.kill(process, signal.SIGSTOP)
        time.sleep(stands_s)
        os.kill(process, signal.SIGCONT)
        time.sleep(runs_s)
finally:
    os.kill(process, signal.SIGCONT)
"""


@contextmanager
def throttled(share: float) -> Iterator[None]:
    """Within it this process, with all its threads, runs for `share` of the time, above 0; at 1 nothing is done.

    Threads that ask for it wait for each other.
    """
    if share >= 1:
        yield
        return
    with _turn:
        child = _restrain(share)
        try:
            yield
        finally:
            if child is not None:
                child.terminate()
                child.wait()


def python(share: float, until_s: float) -> str:
    """How a shell calls a Python that is restrained if it starts before `until_s`; arguments follow."""
    return f"{shlex.quote(sys.executable)} -m serve.throttle {share:g} {until_s:.0f}"


def release() -> None:
    """Let this process run freely from now on, if it was started restrained."""
    child = os.environ.pop(_CHILD_PID, None)
    if child is not None:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(int(child), signal.SIGTERM)
            os.waitpid(int(child), 0)


def _restrain(share: float) -> subprocess.Popen[bytes] | None:
    """Start the child; None where there can be none, for work that is not restrained is better than none."""
    times_s = (PERIOD_S * share, PERIOD_S * (1 - share))
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(os.getpid()), *map(str, times_s)]
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        _log.warning("this process runs without restraint: %s", error)
        return None


if __name__ == "__main__":
    if time.time() < float(sys.argv[2]) and (child := _restrain(float(sys.argv[1]))):
        os.environ[_CHILD_PID] = str(child.pid)
    os.execv(sys.executable, [sys.executable, *sys.argv[3:]])  # noqa: S606  (the same process goes on)
