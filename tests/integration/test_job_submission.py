"""Jobs through `ray job submit`, on a real head that asks for a token: followed, refused, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image

from jobs._process import Service
from pipeline.data import shards

ROOT = Path(__file__).parents[2]
DIGITS = ("python", "-m", "jobs.preprocess", "jobs/configs/preprocess/digits.yaml")
TRAIN = ("python", "-m", "jobs.train", "jobs/configs/train/lenet5_digits.yaml")
FOLDER = ("python", "-m", "jobs.preprocess", "jobs/configs/preprocess/folder.yaml")
PATIENCE_S = 240.0
MAX_PACKAGE_BYTES = 5 * 2**20

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Followed:
    """A job that was followed to its end: what the terminal showed, and the storage that it wrote to."""

    exit_code: int
    output: str
    storage: Path


def ray_job(head: Service, verb: str, *arguments: str, client: Mapping[str, str]) -> tuple[int, str]:
    """Run Ray's own command line from the top of this project; the exit code, and all that it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", head.dashboard, *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**env, **client},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout


def submit(head: Service, name: str, *options: str, job: tuple[str, ...]) -> None:
    """Start a job and do not wait for it."""
    options = ("--submission-id", name, "--no-wait", "--working-dir", ".", *options, "--", *job)
    code, output = ray_job(head, "submit", *options, client=head.env)
    assert code == 0, output


def ask(head: Service, path: str) -> dict[str, Any]:
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = requests.get(f"{head.dashboard}/api/jobs/{path}", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def wait_while_running(head: Service, name: str, reached: Callable[[], bool]) -> None:
    """Wait until a job has come so far; one that ended before fails here, with its log."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        log = ask(head, f"{name}/logs")["logs"]
        assert ask(head, name)["status"] in {"PENDING", "RUNNING"}, log
        assert time.monotonic() < deadline, log
        time.sleep(0.5)


def stop(head: Service, name: str) -> None:
    """Stop a running job through the command line, which waits for its end."""
    code, output = ray_job(head, "stop", name, client=head.env)
    assert code == 0, output
    assert ask(head, name)["status"] == "STOPPED"


@pytest.fixture(scope="module")
def followed(ray_head: Service, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """The digits preprocessed by a submitted job."""
    storage = tmp_path_factory.mktemp("submitted")
    command = (*DIGITS, f"storage={storage}")
    code, output = ray_job(ray_head, "submit", "--working-dir", ".", "--", *command, client=ray_head.env)
    return Followed(code, output, storage)


def test_submitted_job_is_followed_to_its_result(followed: Followed) -> None:
    assert followed.exit_code == 0, followed.output
    made = shards.load(followed.storage / "shards" / "digits")
    assert f"digest   {made.manifest.digest[:16]}" in followed.output
    assert "succeeded" in followed.output
    assert made.manifest.num_rows("train") + made.manifest.num_rows("val") == 1797


def test_package_of_a_submitted_job_holds_the_code_alone(ray_head: Service, followed: Followed) -> None:
    assert followed.exit_code == 0, followed.output
    assert ray_head.scratch is not None
    packages = list(ray_head.scratch.glob("r/session_2*/runtime_resources/working_dir_files/*/pyproject.toml"))
    assert packages
    for package in (path.parent for path in packages):
        assert {path.name for path in package.iterdir()} >= {"pipeline", "jobs", "serve"}
        assert not {path.name for path in package.iterdir()} & {"tests", "storage", ".git", ".venv"}
        written = [path for path in package.rglob("*") if "__pycache__" not in path.parts]
        assert sum(path.stat().st_size for path in written) < MAX_PACKAGE_BYTES


def test_submission_without_the_token_is_refused(ray_head: Service, tmp_path: Path) -> None:
    nobody = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    command = (*DIGITS, f"storage={tmp_path / 'storage'}")
    code, output = ray_job(ray_head, "submit", "--working-dir", ".", "--", *command, client=nobody)
    assert code != 0
    assert "401" in output or "Unauthorized" in output, output
    assert not (tmp_path / "storage").exists()


def test_preprocessing_that_is_stopped_leaves_nothing_half_written(ray_head: Service, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "one.png")
    for split in ("train", "val"):
        for class_name in ("cat", "dog"):
            folder = tmp_path / "images" / split / class_name
            folder.mkdir(parents=True)
            for number in range(1000):
                (folder / f"{number}.png").hardlink_to(tmp_path / "one.png")
    storage = tmp_path / "storage"
    images = (f"dataset.root={tmp_path / 'images'}", f"storage={storage}", "ingest.rows_per_shard=4")
    submit(ray_head, "stopped-preprocess", job=(*FOLDER, *images, "shards=shards/large"))
    try:
        wait_while_running(ray_head, "stopped-preprocess", lambda: any(storage.rglob("*.parquet")))
    finally:
        stop(ray_head, "stopped-preprocess")
    left = {path.name.rpartition("-")[0] for path in (storage / "shards").iterdir()}
    assert left <= {".large.work", ""}  # hidden, for the same command to go on with; "" is the name of its lock


def test_training_that_is_stopped_ends_its_run_as_killed(
    ray_head: Service, mlflow_server: Service, followed: Followed
) -> None:
    client = MlflowClient(mlflow_server.address, mlflow_server.address)
    client.create_experiment("stopped-training")

    def run() -> Any:
        experiment = client.get_experiment_by_name("stopped-training")
        return next(iter(client.search_runs([experiment.experiment_id])), None)

    def trains() -> bool:
        return (found := run()) is not None and bool(found.data.metrics)

    environment = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": mlflow_server.address}})
    changes = ("training.recipe.epochs=100000", "training.cluster.num_workers=1", "name=stopped")
    names = ("training.tracking.experiment=stopped-training", "training.register_as.model=stopped")
    command = (*TRAIN, *changes, *names, f"storage={followed.storage}")
    submit(ray_head, "stopped-train", "--runtime-env-json", environment, job=command)
    try:
        wait_while_running(ray_head, "stopped-train", trains)
        assert run().info.status == "RUNNING"
    finally:
        stop(ray_head, "stopped-train")
    assert run().info.status == "KILLED"
    assert not (followed.storage / "runs" / "stopped" / "bundle").exists()
    assert client.search_registered_models("name = 'stopped'") == []
