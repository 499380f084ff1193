"""Every committed run is one that its job accepts, and its model can be built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from jobs._run import Job
from jobs.sweep import Sweep
from pipeline import config, models
from pipeline.models._contract import ModelConfig
from pipeline.training import trials

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
PATHS_OF_SWEEPS = [path for path in PATHS if path.parent.name == "sweep"]


def job_of(path: Path) -> type[Job]:
    """The `Job` of the door that the file's folder names."""
    module = importlib.import_module(f"jobs.{path.relative_to(CONFIGS).parts[0]}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Job) and value.__module__ == module.__name__
    )
    return found


def models_in(part: BaseModel) -> Iterator[ModelConfig]:
    """Every model's configuration inside, at any depth."""
    if isinstance(part, ModelConfig):
        yield part
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from models_in(value)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_committed_run_is_accepted_and_its_models_build(path: Path) -> None:
    job = config.load(job_of(path), path)
    assert "Run: " in path.read_text(), "a YAML opens with its command"
    for model in models_in(job):
        with torch.device("meta"):  # no weights: an AlexNet would take a quarter of a gigabyte
            assert models.build(model).network is not None


@pytest.mark.parametrize("path", PATHS_OF_SWEEPS, ids=lambda path: path.name)
def test_every_trial_of_a_committed_sweep_has_a_model_that_builds(path: Path) -> None:
    job = config.load(Sweep, path)
    found = trials.expand(job.name, job.training, job.sweep)
    assert len({trial.name for trial in found}) == len(found) > 1
    for trial in found:
        with torch.device("meta"):
            assert models.build_classifier(trial.training.recipe.model).network is not None


def test_there_are_runs_of_the_jobs_that_need_them() -> None:
    assert {"preprocess", "train", "quickstart"} <= {path.relative_to(CONFIGS).parts[0] for path in PATHS}
