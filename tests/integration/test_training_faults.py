"""Trainings in which something dies: worker, driver, disk. Each goes on inside its epoch and ends with the same bits.

`make chaos` adds lost nodes and random moments; tests/distributed/test_resume.py has the same without Ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient

from jobs import _stack
from jobs._process import Service, stop
from pipeline import models
from pipeline.config import parse, validate
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import DataError
from pipeline.evaluation.live import evaluate_detector
from pipeline.inference.bundle import Bundle, load
from pipeline.models._detector import Detector
from pipeline.training import experiment, launch
from pipeline.training.checkpoint import Config, Store
from pipeline.training.loop import fit
from pipeline.training.recipe import Recipe
from tests.small_detection import SMALL, Annotated, objects, photo, shards_of
from tests.small_disk import enlarge, needs_mounting, small_disk

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0
RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5"},
    "loading": {"batch_size": 4, "num_tasks": 0},
    "augment": {"crop": "none", "flip": True},
    "optim": {"lr": 0.02, "warmup_epochs": 1},
    "epochs": 24,
}
"""5 steps an epoch on two workers; with a checkpoint after each there is time to kill somebody."""
EVERY_STEP = Config(every_steps=1)
BY_CLOCK = {"images_per_s", "data_wait_share"}


def wait_for(what: Callable[[], object], alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert alive(), "it ended before"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(0.02)


def is_inside_an_epoch(folder: Path, epoch: int) -> bool:
    """Whether a checkpoint lies inside an epoch from this one on."""
    return any(at.epoch >= epoch and at.offset > 0 for at in launch.store_of(folder).positions())


def exact(made: Bundle) -> tuple[str, dict[str, float]]:
    """All that does not depend on the clock."""
    metrics = {name: value for name, value in made.card.metrics.items() if name not in BY_CLOCK}
    return made.card.weights_sha256, metrics


def history(folder: Path) -> list[dict[str, float]]:
    newest = launch.store_of(folder).newest("cpu")
    assert newest is not None
    return [{key: value for key, value in old.items() if key not in BY_CLOCK} for old in newest.progress["history"]]


@pytest.fixture(scope="module")
def undisturbed(cluster: None, stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to, on two workers."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    launch.train(folder, stripes, validate(Recipe, RECIPE), launch.Cluster(num_workers=2))
    return folder


def training_workers(head: Service) -> list[psutil.Process]:
    below = psutil.Process(head.pid).children(recursive=True)
    return [process for process in below if "RayTrainWorker" in words(process)]


def words(process: psutil.Process) -> str:
    """The command line; nothing of a process that is gone or about to be."""
    try:
        return "".join(process.cmdline())
    except psutil.Error:
        return ""


def trained_despite_a_kill(folder: Path, source: shards.Shards, recipe: dict[str, Any], head: Service) -> Bundle:
    """On two workers, of which one is killed inside an epoch."""
    with ThreadPoolExecutor(1) as pool:
        cluster = launch.Cluster(num_workers=2, max_failures=1)
        result = pool.submit(launch.train, folder, source, validate(Recipe, recipe), cluster, checkpoints=EVERY_STEP)
        wait_for(lambda: is_inside_an_epoch(folder, 1), lambda: not result.done())
        training_workers(head)[-1].kill()
        reached = launch.store_of(folder).positions()[-1]
        made = result.result(PATIENCE_S)
    assert reached.epoch < recipe["epochs"] - 1
    return made


def test_worker_that_is_killed_inside_an_epoch_changes_no_bit(
    undisturbed: Path, ray_head: Service, stripes: shards.Shards, tmp_path: Path
) -> None:
    made = trained_despite_a_kill(tmp_path / "run", stripes, RECIPE, ray_head)
    assert exact(made) == exact(load(undisturbed / "bundle"))
    assert history(tmp_path / "run") == history(undisturbed)


def ragged(folder: Path) -> shards.Shards:
    """Pictures with 0, 1 or 24 objects, 40 for training and 13 for validation: each rank has its own numbers."""
    rng = np.random.default_rng(0)

    def annotated(seed: int) -> Annotated:
        corners = rng.uniform(0, 40, ((0, 1, 24)[seed % 3], 2))
        marked = np.concatenate([corners, corners + rng.uniform(6, 20, corners.shape)], axis=1)
        return photo(seed, 60, 80), objects(*((box.tolist(), at % 3) for at, box in enumerate(marked)))

    return shards_of(folder, {"train": [*map(annotated, range(40))], "val": [*map(annotated, range(40, 53))]})


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_worker_of_a_detector_that_is_killed_inside_an_epoch_changes_no_bit(ray_head: Service, tmp_path: Path) -> None:
    source = ragged(tmp_path / "shards")
    recipe = RECIPE | {
        "model": SMALL | {"name": "yolo_multiscale"},
        "augment": {"flip": True, "scale": 0.2},
        "optim": {"optimizer": "adamw", "lr": 1e-3},
        "epochs": 6,
    }
    launch.train(tmp_path / "whole", source, validate(Recipe, recipe), launch.Cluster(num_workers=2))
    made, whole = (
        trained_despite_a_kill(tmp_path / "run", source, recipe, ray_head),
        load(tmp_path / "whole" / "bundle"),
    )
    assert exact(made) == exact(whole)
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert len(history(tmp_path / "run")) == recipe["epochs"]
    model = made.build()
    assert isinstance(model, Detector)
    batches = Loader(source, model.spec, Loading(batch_size=4, num_tasks=0)).evaluate("val")
    judged = evaluate_detector(model, batches, 3).judged  # by one process: the two had looked at every picture
    assert len(judged.ids) == 13
    assert judged.metrics()["coco_map50"] == pytest.approx(made.card.metrics["val/coco_map50"], abs=1e-6)


def start_job(
    storage: Path, source: shards.Shards, head: Service, server: Service, *more: str
) -> subprocess.Popen[str]:
    """The job in a process of its own, on a Ray head and an MLflow server that outlive it."""
    keys = {
        "name": "run",
        "storage": storage,
        "training.shards": source.path,
        "training.checkpoints.every_steps": 1,
        "training.cluster.num_workers": 2,
        "training.tracking.experiment": "faults",
        "training.recipe.model.name": "lenet5",
        "training.recipe.loading": RECIPE["loading"],
        "training.recipe.augment": {"crop": "none", "flip": "true"},
        "training.recipe.optim": RECIPE["optim"],
        "training.recipe.epochs": RECIPE["epochs"],
    }
    words = [f"{key}={str(value).replace(chr(39), '')}" for key, value in keys.items()]
    environment = {**os.environ, **head.env, "RAY_ADDRESS": head.address, "MLFLOW_TRACKING_URI": server.address}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *words, *more],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_job_that_is_stopped_and_then_killed_goes_on_when_it_is_resumed(
    undisturbed: Path, ray_head: Service, mlflow_server: Service, stripes: shards.Shards, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "run"
    begun_at, resume = 0, list[str]()
    for how, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):  # `ray job stop` sends SIGTERM
        with start_job(tmp_path, stripes, ray_head, mlflow_server, *resume) as job:
            wait_for(lambda: is_inside_an_epoch(folder, begun_at + 1), lambda: job.poll() is None)  # noqa: B023
            job.send_signal(how)
            said, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == code, said
        begun_at, resume = launch.store_of(folder).positions()[-1].epoch, ["training.resume=true"]
        wait_for(lambda: not training_workers(ray_head))
        assert not (folder / "bundle").exists()

    with start_job(tmp_path, stripes, ray_head, mlflow_server) as job:
        said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    assert "holds an earlier run; choose another name, delete it, or set resume=true" in said

    with start_job(tmp_path, stripes, ray_head, mlflow_server, *resume) as job:
        said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, said
    assert exact(load(folder / "bundle"))[0] == exact(load(undisturbed / "bundle"))[0]
    assert history(folder) == history(undisturbed)
    client = MlflowClient(mlflow_server.address)
    experiment = client.get_experiment_by_name("faults")
    shown = {model.name: model.tags["kept"] for model in client.search_logged_models([experiment.experiment_id])}
    assert len(shown) == RECIPE["epochs"]
    kept = {position.name for position in launch.store_of(folder).positions() if position.offset == 0}
    assert {name for name, is_kept in shown.items() if is_kept == "true"} == kept
    (run,) = client.search_runs([experiment.experiment_id])
    (best,) = client.search_logged_models(  # by the dataset as it is called among the run's inputs
        [experiment.experiment_id],
        datasets=[
            {"dataset_name": item.dataset.name, "dataset_digest": item.dataset.digest}
            for item in run.inputs.dataset_inputs
            if item.dataset.name.endswith("/val")
        ],
        order_by=[{"field_name": "metrics.val/loss", "ascending": True}],
        max_results=1,
    )
    assert "val/loss" in {metric.key for metric in best.metrics}
    told_s = [point.value for point in client.get_metric_history(run.info.run_id, "epoch_s")]
    assert len(told_s) == RECIPE["epochs"]
    assert all(seconds > 0 for seconds in told_s)

    nowhere = {"address": "http://127.0.0.1:9"}
    gone = Service(**{**vars(ray_head), **nowhere})
    with start_job(tmp_path, stripes, gone, mlflow_server, *resume) as job:  # nothing is left to do: no Ray is asked
        again, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, again
    assert [line for line in again.splitlines() if line.startswith(("val ", "bundle ", "run "))] == [
        line for line in said.splitlines() if line.startswith(("val ", "bundle ", "run "))
    ]


def test_server_that_dies_in_mid_training_misses_nothing(cluster: None, stripes: shards.Shards, tmp_path: Path) -> None:
    server = _stack.mlflow_server(tmp_path / "server", timeout_s=PATIENCE_S)
    uri, folder = server.address, tmp_path / "runs" / "run"
    raw: dict[str, Any] = {
        "shards": str(stripes.path),
        "recipe": RECIPE,
        "cluster": {"num_workers": 2},
        "checkpoints": {"every_steps": 1},
        "tracking": {"experiment": "outage", "system_metrics": True},
        "register_as": {"model": "striped"},
    }
    try:
        with ThreadPoolExecutor(1) as pool:
            given = parse(experiment.Config, raw, "here")
            result = pool.submit(experiment.conduct, "run", given, storage=tmp_path, uri=uri)
            wait_for(lambda: is_inside_an_epoch(folder, 1), lambda: not result.done())
            os.killpg(server.pid, signal.SIGKILL)
            stop(server)
            reached = launch.store_of(folder).positions()[-1].epoch
            wait_for(lambda: is_inside_an_epoch(folder, reached + 5), lambda: not result.done())  # it trains on
            server = _stack.mlflow_server(tmp_path / "server", int(uri.rpartition(":")[2]), timeout_s=PATIENCE_S)
            made = result.result(PATIENCE_S)
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("outage").experiment_id])
        assert run.info.status == "FINISHED"
        for key in ("train/loss", "val/loss", "lr"):
            told = [point.step for point in client.get_metric_history(run.info.run_id, key)]
            assert sorted(told) == list(range(1, RECIPE["epochs"] + 1))
        assert any(key.startswith("system/") for key in run.data.metrics)
        assert client.get_model_version_by_alias("striped", "champion").run_id == run.info.run_id

        # And another training can start from what was registered.
        recipe = RECIPE | {"start": {"weights": "models:/striped@champion", "head": "keep"}, "epochs": 1}
        unmoved = raw | {"recipe": recipe | {"optim": {"lr": 1e-12}}, "register_as": None}
        again = experiment.conduct("again", parse(experiment.Config, unmoved, "here"), storage=tmp_path, uri=uri)
        assert again.reports["val"].metrics["top1"] == made.reports["val"].metrics["top1"]
        assert again.reports["val"].metrics["loss"] == pytest.approx(made.reports["val"].metrics["loss"], rel=1e-4)
    finally:
        stop(server)


def alone(source: shards.Shards, store: Store | None) -> dict[str, torch.Tensor]:
    """The weights after three epochs on one process."""
    recipe = validate(Recipe, RECIPE | {"model": {"name": "lenet5", "num_classes": 2}, "epochs": 3})
    torch.manual_seed(0)
    model = models.build_classifier(recipe.model)
    fit(model, Loader(source, model.spec, recipe.loading, augment=recipe.augment), recipe, checkpoints=store)
    return model.state_dict()


@needs_mounting
def test_full_disk_is_one_sentence_and_enlarged_the_run_goes_on(stripes: shards.Shards, tmp_path: Path) -> None:
    expected, disk = alone(stripes, None), tmp_path / "disk"
    with small_disk(disk, "1300k"):  # two checkpoints of 490 kB, and half of a third
        store = Store(str(disk / "checkpoints"), Config(every_steps=4))
        with pytest.raises(DataError, match=r"offset-\d+: cannot be written: No space left on device; free") as error:
            alone(stripes, store)
        assert len(str(error.value).splitlines()) == 1
        assert store.positions() == [(0, 16), (0, 32)]
        assert sorted(path.name for path in Path(store.folder).iterdir()) == [at.name for at in store.positions()]
        for at in store.positions():
            store.load(at, "cpu")
        enlarge(disk, "16m")
        resumed = alone(stripes, store)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
