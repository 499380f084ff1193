"""How Ray Serve is asked where versions are loaded; that they are is seen in tests/serving."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.serve
from ray.serve.config import RequestRouterConfig

from serve.schemas import ModelArgs, Served
from serve.stage import RayStage, bound


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that take turns far more often than is usual, so that one interrupts another at its worst moment."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_a_restrained_version_has_the_applications_environment_and_the_same_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {"env_vars": {"OMP_NUM_THREADS": "1"}, "pip": ["a"]}
    context = SimpleNamespace(runtime_env=env, get_runtime_env_string=lambda: str(env))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    served, models = Served("digits", "1", "champion", Path("bundle"), 10), [ModelArgs(name="digits")]
    models.append(ModelArgs(name="digits", load_share=0.25))
    plain, restrained = (
        bound(served, model, 30.0)._bound_deployment.ray_actor_options.get("runtime_env", {}) for model in models
    )
    assert plain == {}  # Serve gives it the application's
    assert env.items() <= restrained.items()
    assert " -m serve.throttle 0.25 " in restrained["py_executable"]
    assert len({RayStage("ventral", 30.0).place(served, model) for model in models}) == 1


@pytest.mark.usefixtures("hasty_threads")
def test_many_models_are_looked_for_at_once_without_disturbing_rays_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def status() -> SimpleNamespace:
        RequestRouterConfig()  # as Ray's does for each deployment; from two threads it raises that a module is unknown
        return SimpleNamespace(applications={})

    monkeypatch.setattr(ray.serve, "status", status)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_runtime_env_string=lambda: ""))
    stage = RayStage("ventral", 30.0)

    async def find(name: str) -> list[Served | None]:
        served = Served(name, "1", "champion", Path("bundle"), 10)
        return [await stage.find(served, ModelArgs(name=name)) for _ in range(10)]

    async def find_all() -> list[list[Served | None]]:
        return await asyncio.gather(*(find(f"model-{number}") for number in range(4)))

    assert asyncio.run(find_all()) == [[None] * 10] * 4
