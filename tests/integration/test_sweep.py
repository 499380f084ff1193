"""A sweep on Ray and MLflow as they are: one trial ends well, one is stopped, one diverges, one fails and is mended."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs._process import Service
from pipeline.config import parse
from pipeline.data import shards
from pipeline.errors import ConfigError, ModelError
from pipeline.training import experiment, sweep, trials
from pipeline.training.outcomes import Place, best_of

pytestmark = pytest.mark.long

EXPERIMENT = "sweep-test"
TRAINING: dict[str, Any] = {
    "shards": "stripes",
    "recipe": {
        "model": {"name": "lenet5"},
        "loading": {"batch_size": 8, "num_tasks": 0},
        "augment": {"crop": "none", "flip": False},
        "optim": {"lr": 0.02},
        "watch": {"metric": "val/loss"},
        "epochs": 40,
    },
    "tracking": {"experiment": EXPERIMENT},
    "register_as": {"model": "swept", "alias": "challenger"},
}
# One after the other, so that the second is held against the first: it learns nothing and is stopped.
SWEEP: dict[str, Any] = {
    "cases": {
        "good": {},
        "idle": {"training.recipe.optim.lr": 1e-9},
        "wild": {"training.recipe.optim.lr": 1e30},
        "lost": {"training.shards": "later", "training.recipe.epochs": 1},
    },
    "early_stopping": {"grace_epochs": 1, "reduction_factor": 2},
}


@pytest.fixture
def store(stripes: shards.Shards, tmp_path: Path) -> Path:
    shutil.copytree(stripes.path, tmp_path / "stripes")
    return tmp_path


def runs_by_name(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    return {run.info.run_name: run for run in found}


def test_a_sweep_stops_what_looks_bad_goes_on_after_a_failure_and_registers_the_best(
    cluster: None, ray_head: Service, mlflow_server: Service, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, config = parse(experiment.Config, TRAINING, "test"), parse(trials.Config, SWEEP, "test")
    place = Place("stripes", store, mlflow_server.address)
    planned = trials.expand("stripes", base, config)

    with caplog.at_level("INFO"), pytest.raises(ModelError, match=r"1 of 4 trials failed: stripes-lost: .*later"):
        sweep.run(place, planned, base, config)

    good = planned[0]
    outcomes = {trial: place.outcome(trial) for trial in planned}
    assert [outcome and outcome.state for outcome in outcomes.values()] == ["finished", "stopped", "diverged", "failed"]
    epochs = [outcome.epochs for outcome in outcomes.values() if outcome]
    assert epochs == [40, epochs[1], 0, 0]
    assert 1 <= epochs[1] < 40
    assert not [
        process for process in psutil.Process(ray_head.pid).children(recursive=True) if "RayTrain" in words(process)
    ]
    assert "trials 4/4" in caplog.text

    found = runs_by_name(mlflow_server.address)
    parent = found["stripes"]
    assert parent.info.status == "FAILED"
    assert "best/val/loss" not in parent.data.metrics, "not before all have come to an end"
    assert "best_trial" not in parent.data.tags
    assert found.keys() == {"stripes", "stripes-good", "stripes-idle", "stripes-wild"}, "one failed before it had a run"
    children = [found[f"stripes-{case}"] for case in ("good", "idle", "wild")]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert [child.info.status for child in children] == ["FINISHED", "KILLED", "FAILED"]
    assert children[1].data.tags["stopped"].startswith("early by the sweep, after ")
    assert not registered(mlflow_server.address)

    with pytest.raises(ConfigError, match="holds an earlier sweep"):
        sweep.run(place, planned, base, config)
    with pytest.raises(ConfigError, match="was begun with other trials"):
        sweep.run(place, planned[:1], base, config, resume=True)

    shutil.copytree(store / "stripes", store / "later")
    before = (place.run(good) / "bundle" / "model.json").stat().st_mtime_ns
    ended = sweep.run(place, planned, base, config, resume=True)
    assert [outcome.state for outcome in ended.values()] == ["finished", "stopped", "diverged", "finished"]
    assert (place.run(good) / "bundle" / "model.json").stat().st_mtime_ns == before, "what is finished stays"
    assert best_of(ended, base) == good

    found = runs_by_name(mlflow_server.address)
    parent = found["stripes"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_trial"] == "stripes-good"
    assert parent.data.metrics["best/val/loss"] == pytest.approx(ended[good].value)
    assert registered(mlflow_server.address) == [found["stripes-good"].info.run_id]
    client = MlflowClient(mlflow_server.address)
    table = Path(client.download_artifacts(parent.info.run_id, "trials.csv", str(store))).read_text()
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [(row["trial"], row["optim.lr"], row["state"]) for row in rows] == [
        ("stripes-good", "", "finished"),
        ("stripes-idle", "1e-09", "stopped"),
        ("stripes-wild", "1e+30", "diverged"),
        ("stripes-lost", "", "finished"),
    ]


def registered(uri: str) -> list[str]:
    """The runs whose models are called `swept`."""
    return [version.run_id for version in MlflowClient(uri).search_model_versions("name='swept'")]


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
