"""A version swap under an open-loop load of half the capacity: nothing fails, and what it does to the slowest 1 %.

It prints its figures (pytest -s); only failures are asserted, for latencies are the machine's.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jobs._deploy import deploy
from jobs._process import Service
from pipeline import models
from pipeline.inference import bundle, golden
from pipeline.tracking import registry, runs

pytestmark = pytest.mark.long

BLOCK_S, SWAPS = 20.0, 2
BATCH = {"max_size": 16, "wait_ms": 1.0}
CLASSES = tuple(f"class {label}" for label in range(1000))


def alexnet(path: Path, seed: int, image: bytes) -> bundle.Bundle:
    torch.manual_seed(seed)
    config = models.config_of("alexnet")(name="alexnet", num_classes=1000)
    made = bundle.save(path, models.build(config), config, classes=CLASSES)
    golden.keep(made, [image])
    return made


async def capacity(url: str, image: bytes) -> float:
    """Requests a second that 16 clients get answered."""
    async with httpx.AsyncClient(timeout=60) as client:
        ends_s, count = time.monotonic() + BLOCK_S / 2, 0

        async def ask() -> None:
            nonlocal count
            while time.monotonic() < ends_s:
                (await client.post(url, content=image)).raise_for_status()
                count += 1

        await asyncio.gather(*(ask() for _ in range(16)))
    return count / (BLOCK_S / 2)


async def open_loop(url: str, image: bytes, per_s: float, until: Callable[[], bool]) -> tuple[list[float], list[int]]:
    """Seconds and statuses of requests that are sent by the clock, whether earlier ones are answered or not."""
    seconds, statuses = list[float](), list[int]()
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:

        async def ask(due_s: float) -> None:
            response = await client.post(url, content=image)
            seconds.append(time.monotonic() - due_s)
            statuses.append(response.status_code)

        due_s = time.monotonic()
        while not until():
            due_s += 1 / per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            group.create_task(ask(due_s))
    return seconds, statuses


def p99_ms(seconds: list[float]) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[98]


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_swaps_under_half_the_capacity_fail_no_request(
    share: float,
    ray_head: Service,
    mlflow_server: Service,
    app_config: Callable[..., dict[str, Any]],
    picture: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    uri, image, name = mlflow_server.address, picture(1, hw=(375, 500)), f"swapped-{100 * share:.0f}"
    with runs.start(uri, runs.Config(experiment=name), params={}, tags={}) as run:
        for seed in range(1, SWAPS + 2):
            registry.publish(run, alexnet(tmp_path / str(seed), seed, image), name)
    registry.promote(uri, name, "1")
    config = app_config(name=name, bundle=None, num_cpus=1, keep_s=0.0, load_share=share, batch=BATCH)
    config["applications"][0]["args"] |= {"registry": uri, "poll_s": 0.5, "cache": str(tmp_path / "cache")}
    endpoint = deploy(ray_head, config)
    url = f"{endpoint}/predict/{name}"

    def served() -> str:
        return str(httpx.get(f"{endpoint}/models", timeout=60).json()["models"][0]["version"])

    async def scenario() -> None:
        most = await capacity(url, image)
        ends_s = time.monotonic() + BLOCK_S
        calm, statuses = await open_loop(url, image, most / 2, lambda: time.monotonic() > ends_s)
        at_half = f"at half of it p99 {p99_ms(calm):.1f} ms of {len(calm)}"
        print(f"load_share {share:g}: capacity {most:.1f} requests/s; {at_half}")  # noqa: T201
        for number in range(2, SWAPS + 2):
            await asyncio.to_thread(registry.promote, uri, name, str(number))
            looked_s = began_s = time.monotonic()
            swapped_s = 0.0

            def is_over() -> bool:
                nonlocal looked_s, swapped_s
                now_s = time.monotonic()
                if not swapped_s and now_s - looked_s > 1:
                    looked_s = now_s
                    swapped_s = now_s if served() == str(number) else 0.0  # noqa: B023
                return bool(swapped_s) and now_s > swapped_s + 5

            seconds, found = await open_loop(url, image, most / 2, is_over)
            statuses += found
            ratio = p99_ms(seconds) / p99_ms(calm)
            print(  # noqa: T201
                f"swap {number}: {swapped_s - began_s:.1f} s, p99 {p99_ms(seconds):.1f} ms of {len(seconds)}, "
                f"{ratio:.2f} times"
            )
        assert set(statuses) == {200}

    asyncio.run(scenario())
