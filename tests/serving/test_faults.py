"""Processes that die under load: every request gets an answer, and what is served comes back by itself."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

from jobs import _stack
from jobs._deploy import deploy, replicas
from jobs._process import Service, _members, stop
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client
from pipeline.tracking import registry, runs
from serve.versions import MEMORY
from tests.serving.load import Load, process, processes, until
from tests.serving.test_aliases import make, wait_for
from tests.small_disk import needs_mounting, small_disk

pytestmark = pytest.mark.slow

SOON_S = 120.0
LATEST_S = 40.0
"""No answer may take longer: the limit of the application is 30 s."""


@pytest.fixture
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]]) -> str:
    scaling = {"min_replicas": 2, "max_replicas": 2}
    return deploy(ray_head, app_config(autoscaling=scaling, num_cpus=0.25))


def test_a_replica_that_is_killed_costs_no_request(url: str, ray_head: Service, picture: Callable[..., bytes]) -> None:
    until(lambda: replicas(ray_head, "tiny") == 2)
    with Load(f"{url}/predict/tiny", picture(), num_clients=4) as load:
        until(lambda: len(load.statuses) > 20)
        process(ray_head, "ventral+tiny").kill()
        seen = len(load.statuses)
        until(lambda: len(load.statuses) > seen + 50)
        until(lambda: replicas(ray_head, "tiny") == 2)
    load.expect_no_failure()
    assert max(load.seconds) < LATEST_S


def test_an_ingress_that_is_killed_comes_back_and_nobody_hangs(
    url: str, ray_head: Service, picture: Callable[..., bytes]
) -> None:
    with Load(f"{url}/predict/tiny", picture(), num_clients=4) as load:
        until(lambda: len(load.statuses) > 20)
        process(ray_head, "ventral:ingress").kill()
        until(lambda: any(status != 200 for status in load.statuses) or bool(load.errors), 60)
        until(lambda: load.statuses[-20:] == [200] * 20)
    assert set(load.statuses) <= {200, 500, 502, 503, 504}
    assert not [error for error in load.errors if "imeout" in error]  # each was told, at least by its connection
    assert max(load.seconds) < LATEST_S


def test_one_of_two_ingresses_that_is_killed_costs_our_client_no_request(
    ray_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes]
) -> None:
    config = app_config(num_cpus=0.25)
    config["applications"][0]["args"]["ingress_replicas"] = 2
    url, data = deploy(ray_head, config), picture()

    done = threading.Event()

    def ask() -> int:
        num_asked = 0
        with Client(url, timeout_s=LATEST_S) as client:
            while not done.is_set():
                assert client.predict("tiny", data).model == "tiny"
                num_asked += 1
        return num_asked

    def kill_one() -> None:
        killed = process(ray_head, "ventral:ingress")
        killed.kill()
        until(lambda: killed.pid not in [one.pid for one in processes(ray_head, "ventral:ingress")])

    until(lambda: replicas(ray_head, "ingress") == 2)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        try:
            for _ in range(3):
                time.sleep(2)  # of questions on their way
                kill_one()
                until(lambda: replicas(ray_head, "ingress") == 2)
            time.sleep(2)
        finally:
            done.set()
        assert all(one.result() > 20 for one in asking)


def test_a_reconciler_that_is_killed_costs_nothing(url: str, ray_head: Service, picture: Callable[..., bytes]) -> None:
    before = {one.pid for one in _members(ray_head) if "ServeReplica:ventral+tiny" in " ".join(one.cmdline())}
    old = process(ray_head, "ventral:reconciler")
    with Load(f"{url}/predict/tiny", picture(), num_clients=2) as load:
        old.kill()
        until(lambda: not old.is_running())
        until(lambda: process(ray_head, "ventral:reconciler").pid != old.pid)
        seen = len(load.statuses)
        until(lambda: len(load.statuses) > seen + 50)
    load.expect_no_failure()
    after = {one.pid for one in _members(ray_head) if "ServeReplica:ventral+tiny" in " ".join(one.cmdline())}
    assert after == before  # what was loaded has been found again


@pytest.fixture
def own_mlflow(tmp_path: Path) -> Iterator[Service]:
    server = _stack.mlflow_server(tmp_path / "mlflow", timeout_s=300)
    yield server
    stop(server)


def publish(uri: str, name: str, made: Sequence[Bundle]) -> None:
    """Register versions from 1 on; the first is the champion."""
    with runs.start(uri, runs.Config(experiment=name), params={}, tags={}) as run:
        for one in made:
            registry.publish(run, one, name)
    registry.promote(uri, name, "1")


def following(config: dict[str, Any], mlflow: Service, folder: Path) -> dict[str, Any]:
    """The configuration of an application that asks a registry twice a second."""
    asked = {"registry": mlflow.address, "poll_s": 0.5, "cache": str(folder / "cache")}
    config["applications"][0]["args"] |= asked
    return config


def test_without_the_registry_what_was_served_last_is_served(
    ray_head: Service,
    app_config: Callable[..., dict[str, Any]],
    own_mlflow: Service,
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> None:
    publish(own_mlflow.address, "away", [make(tmp_path / "made", 1, picture)])
    config = following(app_config(name="away", bundle=None), own_mlflow, tmp_path)
    url = deploy(ray_head, config)
    stop(own_mlflow)
    found = wait_for(url, lambda found: "champion" in found["troubles"])
    assert "no MLflow server answers" in found["troubles"]["champion"]
    process(ray_head, "ventral:reconciler").kill()
    again = deploy(ray_head, config)  # which builds the application anew, from what was written down
    answer = requests.post(f"{again}/predict/away", data=picture(), timeout=60)
    assert answer.json()["model"] == {"name": "away", "version": "1", "alias": "champion"}


@pytest.fixture
def deploy_two(
    ray_head: Service,
    app_config: Callable[..., dict[str, Any]],
    own_mlflow: Service,
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> Callable[..., str]:
    """Registers two versions of a model, deploys it and gives the address; keywords go to the model's arguments."""

    def deployed(name: str, folder: Path = tmp_path, **model: Any) -> str:
        publish(own_mlflow.address, name, [make(tmp_path / f"made-{seed}", seed, picture) for seed in (1, 2)])
        config = app_config(name=name, bundle=None, num_cpus=0.25, **model)
        return deploy(ray_head, following(config, own_mlflow, folder))

    return deployed


def test_an_alias_that_flaps_and_a_registry_that_goes_and_comes_cost_no_request(
    deploy_two: Callable[..., str], own_mlflow: Service, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    uri, name = own_mlflow.address, "flapping"
    url = deploy_two(name)
    with Load(f"{url}/predict/{name}", picture(), num_clients=2) as load:
        for turn in range(20):
            registry.promote(uri, name, str(1 + turn % 2))
            time.sleep(0.3)
        until(lambda: load.versions[-1:] == ["2"])
        stop(own_mlflow)
        wait_for(url, lambda found: "champion" in found["troubles"])
        seen = len(load.statuses)
        until(lambda: len(load.statuses) > seen + 20)
        again = _stack.mlflow_server(tmp_path / "mlflow", urlsplit(uri).port, timeout_s=300)
        try:
            registry.promote(uri, name, "1")
            until(lambda: load.versions[-1:] == ["1"])
        finally:
            stop(again)
    load.expect_no_failure()


def test_a_challenger_that_is_killed_costs_no_request_and_is_asked_again(
    deploy_two: Callable[..., str], ray_head: Service, own_mlflow: Service, picture: Callable[..., bytes]
) -> None:
    name = "rivals"
    url = deploy_two(name, challenger={"share": 0.5, "shadow": 1.0})
    registry.promote(own_mlflow.address, name, "2", "challenger")
    wait_for(url, lambda found: found["challenger"] is not None)
    with Load(f"{url}/predict/{name}", picture(), num_clients=4) as load:
        until(lambda: {"1", "2"} <= set(load.versions))
        process(ray_head, f"ventral+{name}+2").kill()
        seen = len(load.versions)
        until(lambda: len(load.versions) > seen + 50 and "2" in load.versions[seen + 20 :])
    load.expect_no_failure()
    assert max(load.seconds) < LATEST_S


@needs_mounting
def test_a_full_disk_costs_no_request_and_with_room_the_alias_is_followed(
    deploy_two: Callable[..., str], own_mlflow: Service, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    uri, name, disk = own_mlflow.address, "full", tmp_path / "disk"
    with small_disk(disk, "2m"):
        url = deploy_two(name, disk)
        filling, memory = disk / "filling", disk / "cache" / MEMORY
        until(memory.exists)
        was_written = memory.read_text()
        with Load(f"{url}/predict/{name}", picture(), num_clients=2) as load:
            fill(filling)
            registry.promote(uri, name, "2")
            found = wait_for(url, lambda found: "champion" in found["troubles"])
            assert "No space left on device; make room there" in found["troubles"]["champion"]
            assert (found["version"], memory.read_text()) == ("1", was_written)
            filling.unlink()
            until(lambda: load.versions[-1:] == ["2"])
            assert wait_for(url, lambda found: not found["troubles"])["version"] == "2"
        load.expect_no_failure()


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_client_that_goes_away_is_not_computed_for(
    ray_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes]
) -> None:
    """One request of large images keeps the only decoder busy; who leaves meanwhile has nothing computed."""
    url = deploy(ray_head, app_config(decoders=1))
    at, data = urlsplit(url), picture()
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2500)).save(buffer, "PNG")
    large = [("images", ("large.png", buffer.getvalue(), "image/png"))] * 12
    head = f"POST /predict/tiny HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(requests.post, f"{url}/predict/tiny", files=large, timeout=60)
        time.sleep(0.3)  # it has arrived
        leaving = [socket.create_connection((str(at.hostname), int(at.port or 0)), 10) for _ in range(5)]
        for client in leaving:
            client.sendall(head + data)
        time.sleep(0.3)  # they too
        for client in leaving:
            client.close()
        time.sleep(0.1)
        assert not busy.done()  # or what they wanted may have been computed
        assert busy.result().status_code == 200
    assert requests.post(f"{url}/predict/tiny", data=data, timeout=30).status_code == 200
    (stats,) = requests.get(f"{url}/v2/models/tiny/stats", timeout=30).json()["model_stats"]
    assert stats["inference_count"] == len(large) + 1
