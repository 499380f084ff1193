"""Replicas follow the load: one, two while many ask, one again, and nobody is turned away meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import requests

from jobs._deploy import deploy, replicas
from jobs._process import Service
from tests.serving.load import Load, until

CLIENTS = 8
UP_S, DOWN_S = 60.0, 60.0


def wait_for(head: Service, count: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if replicas(head, "tiny") == count:
            return True
        time.sleep(0.25)
    return False


@pytest.mark.slow
def test_replicas_under_load_go_from_one_to_two_and_back_without_a_failure(
    ray_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes]
) -> None:
    scaling = {
        "max_replicas": 2,
        "target_ongoing_requests": 1.5,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 1.0,
        "look_back_s": 2.0,
    }
    # Waiting for a batch that never fills keeps requests in hand without keeping the processor busy.
    url = deploy(ray_head, app_config(autoscaling=scaling, batch={"max_size": 64, "wait_ms": 150.0}))
    assert wait_for(ray_head, 1, UP_S)  # those of another deployment are let go
    with Load(f"{url}/predict/tiny", picture(), num_clients=1) as one:  # who asks all the time, also one that is let go
        with Load(f"{url}/predict/tiny", picture(), CLIENTS) as many:
            assert wait_for(ray_head, 2, UP_S)
            seen = len(many.statuses)
            until(lambda: len(many.statuses) > seen)
        assert wait_for(ray_head, 1, DOWN_S)
        seen = len(one.statuses)
        until(lambda: len(one.statuses) > seen)
    many.expect_no_failure()
    one.expect_no_failure()


@pytest.mark.slow
def test_a_model_that_sleeps_is_woken_by_its_next_request_and_sleeps_again(
    ray_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes]
) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1.0, "look_back_s": 2.0}
    url = deploy(ray_head, app_config(autoscaling=scaling))
    for _ in range(2):
        assert wait_for(ray_head, 0, DOWN_S)
        assert requests.get(f"{url}/readyz", timeout=10).status_code == 200  # it would answer
        with Load(f"{url}/predict/tiny", picture(), num_clients=2) as load:
            assert wait_for(ray_head, 1, UP_S)
            until(lambda: len(load.statuses) >= 2)
        load.expect_no_failure()
