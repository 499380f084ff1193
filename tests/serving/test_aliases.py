"""An alias that moves in a real registry, under load: no request fails, whatever comes of the new version."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from jobs._deploy import deploy
from jobs._process import Service
from pipeline import models
from pipeline.inference import bundle, golden
from pipeline.tracking import registry, runs
from tests.serving.load import Load, process

NAME = "moving"
SOON_S = 90.0


def make(path: Path, seed: int, picture: Callable[..., bytes]) -> bundle.Bundle:
    torch.manual_seed(seed)
    config = models.config_of("lenet5")(name="lenet5", num_classes=3)
    made = bundle.save(path, models.build(config), config, classes=("a", "b", "c"))
    golden.keep(made, [picture(seed) for seed in range(2)])
    return made


def lie(made: bundle.Bundle) -> None:
    """Change what a bundle's golden images are said to be answered with."""
    path = made.path / golden.FOLDER / golden.ANSWERS
    rows = json.loads(path.read_text())
    rows[0]["scores"][0] = 1.0
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def published(mlflow_server: Service, tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., bytes]) -> str:
    """The registry's address: versions 1, 2, and 3, which answers its golden images wrongly; 1 is the champion."""
    uri, root = mlflow_server.address, tmp_path_factory.mktemp("moving")
    with runs.start(uri, runs.Config(experiment="moving"), params={}, tags={}) as run:
        for seed in (1, 2, 3):
            made = make(root / str(seed), seed, picture)
            if seed == 3:
                lie(made)
            registry.publish(run, made, NAME)
    registry.promote(uri, NAME, "1")
    return uri


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]], published: str, tmp_path_factory: Any) -> str:
    config = app_config(name=NAME, bundle=None, challenger={"shadow": 1.0}, keep_s=600.0, load_share=0.5)
    config["applications"][0]["args"] |= {
        "registry": published,
        "poll_s": 0.5,
        "cache": str(tmp_path_factory.mktemp("cache")),
    }
    return deploy(ray_head, config)


def model(url: str) -> dict[str, Any]:
    (found,) = requests.get(f"{url}/models", timeout=30).json()["models"]
    return dict(found)


def wait_for(url: str, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + SOON_S
    while not what(found := model(url)):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def numbers(found: dict[str, Any]) -> list[str]:
    return [one["version"] for one in found["versions"]]


def test_an_alias_that_moves_is_followed_without_a_failed_request_and_back_again_at_once(
    url: str, ray_head: Service, published: str, picture: Callable[..., bytes]
) -> None:
    with Load(f"{url}/predict/{NAME}", picture(9), num_clients=2) as load:
        registry.promote(published, NAME, "2")
        wait_for(url, lambda found: found["version"] == "2")
        registry.promote(published, NAME, "3")  # which answers its golden images wrongly
        found = wait_for(url, lambda found: "champion" in found["troubles"])
        assert "golden image 0.image: class" in found["troubles"]["champion"]
        assert (found["version"], numbers(found)) == ("2", ["2", "1"])
        registry.promote(published, NAME, "1")
        found = wait_for(url, lambda found: found["version"] == "1")
        assert (found["troubles"], numbers(found)) == ({}, ["1", "2"])
    load.expect_no_failure()
    assert set(load.versions) == {"1", "2"}
    for version, was_restrained in (("1", False), ("2", True)):
        replica = process(ray_head, f"ventral+{NAME}+{version}")
        assert ("VENTRAL_THROTTLE_PID" in replica.environ()) == was_restrained  # as it was started
        assert not [child for child in replica.children() if "SIGSTOP" in " ".join(child.cmdline())]
    for version in ("1", "2"):
        answer = requests.post(f"{url}/predict/{NAME}/versions/{version}", data=picture(9), timeout=30)
        assert answer.json()["model"]["version"] == version


def test_a_challenger_is_loaded_beside_and_shadows(url: str, published: str, picture: Callable[..., bytes]) -> None:
    registry.promote(published, NAME, "2", "challenger")
    found = wait_for(url, lambda found: found["challenger"] is not None)
    assert (found["version"], found["challenger"]["version"]) == ("1", "2")
    for seed in range(5):
        assert requests.post(f"{url}/predict/{NAME}", data=picture(seed), timeout=30).json()["model"]["version"] == "1"
    wait_for(url, lambda found: found["challenger"]["compared"] == 5)
    answer = requests.post(f"{url}/predict/{NAME}@challenger", data=picture(9), timeout=30).json()
    assert answer["model"] == {"name": NAME, "version": "2", "alias": "challenger"}
