"""Server processes that a job starts and stops: a free port, a session of their own, a bounded wait, a clean end.

A server is started in its own session, so that the terminal's Ctrl-C reaches the job alone, which then stops its
servers in order, and so that a server that is kept outlives the job. Only what was started here is ever signalled: a
process is known by its id and its time of creation. What the servers are is said in `jobs._stack`.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from pipeline.errors import ClusterError, VentralError

LOOPBACK = "127.0.0.1"
PORTS = range(20000, 32000)  # below the systems' ephemeral ports, which outgoing connections take at random
POLL_S = 0.1
KILL_WAIT_S = 5.0
_ERROR = re.compile(r"(error|exception)\S*:", re.IGNORECASE)


@dataclass(frozen=True)
class Service:
    """A server that runs.

    Attributes:
        name: for people: "MLflow", "Ray".
        pid: leader of the session that all its processes belong to.
        created_s: when the leader was created, seconds since 1970: tells it from a later process with the same id.
        address: what a client connects to; a URL, or `host:port` for `ray.init`.
        log: what it writes.
        dashboard: URL of the page for people; empty if `address` is that already.
        scratch: temporary folder that goes with it.
        env: what a client process needs in its environment to talk to it.
    """

    name: str
    pid: int
    created_s: float
    address: str
    log: Path
    dashboard: str = ""
    scratch: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def free_ports(count: int) -> list[int]:
    """`count` distinct ports that nothing listens on, on loopback."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no {count} free ports between {PORTS.start} and {PORTS.stop - 1} on {LOOPBACK}")


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on `port` of `host` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def claim(port: int | None, name: str, host: str = LOOPBACK) -> int:
    """The given port if it is free, or any free one for None.

    Raises:
        ClusterError: the given port is taken.
    """
    if port is None:
        return free_ports(1)[0]
    if not is_free(port, host):
        raise ClusterError(
            f"port {port} on {host}, asked for by {name}, is taken; "
            "stop what listens there, or leave the port out for a free one"
        )
    return port


def launch(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_ready(
    process: subprocess.Popen[bytes],
    ready: Callable[[], bool],
    timeout_s: float,
    failed: Callable[[str], VentralError],
    log: Path,
) -> None:
    """Wait until `ready()`; `failed` makes the error when the server ends or the time is up."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise failed(f"it ended with exit code {process.returncode}: {last_line(log)}")
        if time.monotonic() > deadline:
            raise failed(f"it did not answer within {timeout_s:.0f} s: {last_line(log)}")
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Whether a GET on `url` is answered with 200 at once."""
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def last_line(log: Path) -> str:
    """The last line of a log that names an error; else the last that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    errors = [line for line in lines if _ERROR.search(line)]
    return next((line for line in reversed(errors or lines) if line), "it wrote nothing")


def stop(service: Service, timeout_s: float = 10.0) -> None:
    """End every process of a service and remove its temporary folder; nothing happens if it has ended already.

    The leader is asked first and given `timeout_s` to end its children in order; what is left is asked, then killed.
    """
    leader = _leader(service)
    if leader is not None:
        members = _members(service)
        _signal([leader], signal.SIGTERM)
        psutil.wait_procs([leader], timeout=timeout_s)
        _end([*members, *_members(service)])
    elif not psutil.pid_exists(service.pid):  # it ended by itself: what it left behind is still in its session
        _end(_members(service))
    if service.scratch is not None:
        shutil.rmtree(service.scratch, ignore_errors=True)


def is_running(service: Service) -> bool:
    """Whether the very process that was started still runs."""
    return _leader(service) is not None


def _end(members: Sequence[psutil.Process]) -> None:
    left = [process for process in set(members) if process.is_running()]
    _signal(left, signal.SIGTERM)
    _, left = psutil.wait_procs(left, timeout=1.0)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=KILL_WAIT_S)


def _leader(service: Service) -> psutil.Process | None:
    try:
        process = psutil.Process(service.pid)
        # The system's boot time, which creation times are counted from, is known to a second only.
        same = abs(process.create_time() - service.created_s) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def _members(service: Service) -> list[psutil.Process]:
    """Every process of the service's session, and the leader's descendants that opened a session of their own."""
    members = [process for process in psutil.process_iter() if _session(process.pid) == service.pid]
    leader = _leader(service)
    if leader is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            members += leader.children(recursive=True)
    return members


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
