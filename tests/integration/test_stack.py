"""Local servers: they start, answer, listen where they should, and leave nothing behind, however their job ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from jobs._process import LOOPBACK, Service, _members, free_ports, is_free, is_running, launch, stop
from jobs._stack import KEPT, Stack, mlflow_server, ray_head
from pipeline.errors import ClusterError, TrackingError

CHILD = "import time; time.sleep(600)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{CHILD}']); time.sleep(600)"
SLEEPER = [sys.executable, "-c", PARENT]
HOLDER = """
import sys, time
from functools import partial
from pathlib import Path
from jobs._stack import Stack
from test_stack import sleeper

storage = Path(sys.argv[1])
with Stack(storage) as stack:
    services = [stack.add(partial(sleeper, storage)) for _ in range(2)]
    print(*(service.pid for service in services), flush=True)
    time.sleep(600)
"""


def sleeper(storage: Path) -> Service:
    """A server that only waits, with a child of its own."""
    process = launch(SLEEPER, storage / "sleeper.log", os.environ)
    service = Service("Sleeper", process.pid, psutil.Process(process.pid).create_time(), "", storage / "sleeper.log")
    deadline = time.monotonic() + 30
    while len(_members(service)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return service


def nothing_left(service: Service) -> bool:
    return not [process for process in _members(service) if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_mlflow_server_starts_answers_and_stops_without_a_trace(tmp_path: Path) -> None:
    server = mlflow_server(tmp_path)
    port = int(server.address.rpartition(":")[2])
    try:
        assert requests.get(f"{server.address}/health", timeout=10).text == "OK"
        assert (tmp_path / "mlflow" / "mlflow.db").exists()
        connections = [found for process in _members(server) for found in process.net_connections()]
        assert {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN} == {LOOPBACK}
    finally:
        stop(server)
    assert nothing_left(server)
    assert is_free(port)


def test_mlflow_server_on_a_taken_port_says_so(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(ClusterError, match=f"port {taken_port} on {LOOPBACK}, asked for by MLflow, is taken; stop"):
        mlflow_server(tmp_path, taken_port)


def test_mlflow_server_on_a_damaged_database_fails_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"this is no database" * 100)
    before = set(psutil.pids())
    with pytest.raises(
        TrackingError, match=r"MLflow did not start: it ended with exit code 1: .*(?i:database).*mlflow\.log"
    ):
        mlflow_server(tmp_path)
    mine = [process for process in psutil.process_iter() if process.pid not in before and process.ppid() == os.getpid()]
    assert not [process for process in mine if process.status() != psutil.STATUS_ZOMBIE]


def test_ray_head_starts_on_loopback_and_stops_without_a_trace(tmp_path: Path) -> None:
    head = ray_head(tmp_path, num_cpus=1)
    try:
        assert head.scratch is not None
        token = head.scratch / "token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert head.scratch.stat().st_mode & 0o777 == 0o700
        jobs = f"{head.dashboard}/api/jobs/"
        assert requests.get(jobs, timeout=30).status_code == 401
        answer = requests.get(jobs, headers={"Authorization": f"Bearer {token.read_text()}"}, timeout=30)
        assert answer.json() == []
        connections = [found for process in _members(head) for found in process.net_connections()]
        listening = {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}
        assert listening <= {LOOPBACK, f"::ffff:{LOOPBACK}", "::1"}
    finally:
        stop(head)
    assert nothing_left(head)
    assert not head.scratch.exists()
    assert is_free(int(head.address.rpartition(":")[2]))


def test_stop_of_a_service_ends_its_children_and_is_harmless_twice(tmp_path: Path) -> None:
    service = sleeper(tmp_path)
    stop(service)
    assert nothing_left(service)
    stop(service)


def test_stop_of_a_leader_that_died_ends_the_children_it_left(tmp_path: Path) -> None:
    service = sleeper(tmp_path)
    leader = psutil.Process(service.pid)
    leader.kill()
    leader.wait()
    stop(service)
    assert nothing_left(service)


def test_stop_of_a_service_whose_id_belongs_to_another_process_leaves_it_alone(tmp_path: Path) -> None:
    service = sleeper(tmp_path)
    earlier = Service("Sleeper", service.pid, service.created_s - 3600, "", service.log)
    try:
        assert not is_running(earlier)
        stop(earlier)
        assert is_running(service)
    finally:
        stop(service)


def test_stack_that_fails_stops_what_it_started(tmp_path: Path) -> None:
    services = []

    def fail() -> None:
        with Stack(tmp_path) as stack:
            services.append(stack.add(lambda: sleeper(tmp_path)))
            stack.keep()
            raise ValueError("in the block")

    with pytest.raises(ValueError, match="in the block"):
        fail()
    assert nothing_left(services[0])
    assert not (tmp_path / KEPT).exists()


def test_stack_that_is_kept_goes_on_until_down_stops_exactly_it(tmp_path: Path) -> None:
    other = sleeper(tmp_path)
    try:
        with Stack(tmp_path) as stack:
            kept = [stack.add(lambda: sleeper(tmp_path)) for _ in range(2)]
            stack.keep()
        assert Stack.kept(tmp_path) == kept
        stop(kept[0])
        assert Stack.down(tmp_path) == kept[1:]
        assert all(map(nothing_left, kept))
        assert is_running(other)
        assert Stack.down(tmp_path) == []
    finally:
        stop(other)


def test_stack_down_with_ids_that_now_belong_to_others_leaves_them_alone(tmp_path: Path) -> None:
    with Stack(tmp_path) as stack:
        service = stack.add(lambda: sleeper(tmp_path))
        path = stack.keep()
    rows = json.loads(path.read_text())
    rows[0]["created_s"] -= 3600
    path.write_text(json.dumps(rows))
    assert Stack.down(tmp_path) == []
    assert is_running(service)
    stop(service)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stack_of_a_job_that_is_interrupted_stops_what_it_started(tmp_path: Path, number: signal.Signals) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    job = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert job.stdout is not None
    with job:
        leaders = [int(pid) for pid in job.stdout.readline().split()]
        services = [Service("", pid, psutil.Process(pid).create_time(), "", tmp_path / "log") for pid in leaders]
        assert len(services) == 2
        job.send_signal(number)
        job.wait(30)
    assert job.returncode not in (0, None)
    assert all(map(nothing_left, services))


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(map(is_free, ports))
