"""A Ray cluster of several nodes on this machine, for tests in which a node comes, or goes.

`ray.cluster_utils.Cluster` leaves its mark on the process that makes it, and Ray signals whole groups of processes:
such a test runs in a process of its own (`alone`), where the cluster knows nothing of any other Ray (`cluster`).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

ITS_OWN = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@contextmanager
def cluster(num_cpus: int) -> Iterator[Any]:
    """A `Cluster` with a head of so many logical CPUs, this process connected to it; only inside `alone`.

    More nodes come by its `add_node` and go by `remove_node`.
    """
    home = tempfile.mkdtemp(prefix="ventral-", dir="/tmp")  # short, for sockets
    os.environ["RAY_TMPDIR"] = home  # where Cluster notes its address, in a folder that must be there
    Path(home, "ray").mkdir()
    import ray  # noqa: PLC0415
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "temp_dir": home})
    try:
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(home, ignore_errors=True)


def alone(what: Callable[..., None], *args: Any, timeout_s: float, env: Mapping[str, str] | None = None) -> None:
    """Call `what` in a process of its own; it must return in time, and nothing of it is left.

    Args:
        what: a function of a module; the process imports that, and perhaps Ray with it, before it calls.
        env: further variables that Ray shall know.
    """
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(what, args))
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with patch.dict(os.environ, {**others, **ITS_OWN, **(env or {})}, clear=True):
        process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.join()
    assert process.exitcode == 0


def _call(what: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.setsid()  # Ray signals whole groups of processes
    what(*args)
