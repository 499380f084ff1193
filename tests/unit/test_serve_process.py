"""A serving process of its own: what it is told, and whose turn its threads are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, threading
from pathlib import Path
from serve import process

os.nice({nice})
if {user}:
    os.setuid({user})
done, begun = threading.Event(), threading.Event()
threading.Thread(target=lambda: (begun.set(), done.wait())).start()
begun.wait()
process.go_first()
later = threading.Thread(target=lambda: print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
later.start()
later.join()
done.set()
print(*[os.getpriority(os.PRIO_PROCESS, int(one.name)) for one in process.THREADS.iterdir()])
"""
NOBODY = 65534


def priorities(nice: int, user: int = 0) -> set[int]:
    """Of a process's threads: those it had when it went first, and one that began later."""
    command = [sys.executable, "-c", SCRIPT.format(nice=nice, user=user)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    return set(map(int, done.stdout.split()))


def test_a_process_that_answers_goes_first_where_the_system_lets_it() -> None:
    own = os.nice(0)
    higher = subprocess.run(["nice", "-n", "-1", "nice"], capture_output=True, text=True, check=False)
    may = int(higher.stdout) < own
    assert priorities(nice=15 - own) == ({0} if may else {15})


def test_a_process_that_may_not_go_first_stays_where_it_is() -> None:
    user = NOBODY if os.geteuid() == 0 else 0  # 0: as we are
    assert priorities(nice=15 - os.nice(0), user=user) == {15}


def test_mlflow_unpickles_nothing_in_a_process_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION  # noqa: PLC0415

    from serve.process import unpickle_nothing  # noqa: PLC0415

    unpickle_nothing()
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
