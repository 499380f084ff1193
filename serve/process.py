"""What every process that serves does about itself: it unpickles no model, and goes first once it answers.

Ray starts every worker at nice 15. A process that answers takes the priority of the node's own processes once it is
ready, so that a version that is being loaded beside it, or a job, takes what it leaves. The system lets root do so, or
a user whose limit of niceness (`ulimit -e`) is 20 or more; elsewhere all share alike.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
"""MLflow unpickles what a model holds unless it is told not to."""
NORMAL = 0
"""Of the node's own processes; a smaller number is a higher priority."""
THREADS = Path("/proc/self/task")


def unpickle_nothing() -> None:
    """Tell MLflow, whoever imports it in this process."""
    os.environ.update(NO_PICKLE)


def go_first() -> None:
    """Give every thread of this process, and those that they start, the normal priority, where the system allows it."""
    with contextlib.suppress(OSError):  # not allowed, or not Linux
        for thread in THREADS.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NORMAL)
