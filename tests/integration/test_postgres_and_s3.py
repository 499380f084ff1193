"""The one configuration of a team that is tested: MLflow on PostgreSQL, artifacts in S3, all on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import psutil
import pytest
import torch
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from jobs import _stack
from jobs._process import LOOPBACK, Service, answers, free_ports, launch, stop, wait_ready
from pipeline import models
from pipeline.errors import TrackingError
from pipeline.inference import bundle
from pipeline.tracking import journal, registry, runs, shipping

pytestmark = pytest.mark.slow

BUCKET = "mlflow"
PASSWORD = "only-for-this-test"
BOUND_S = 120.0
CONFIG = runs.Config(experiment="team")
DATASET = ("digits/val", "d" * 64)


def binary(name: str) -> str:
    """A program of PostgreSQL; Debian keeps them out of PATH."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian's package postgresql has it")
    return found


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a new PostgreSQL server, which ends with the tests. It does not run as root."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    initdb, server = binary("initdb"), binary("postgres")
    owner = "postgres" if os.getuid() == 0 else None
    folder, port = Path(tempfile.mkdtemp(prefix="ventral-postgres-", dir="/tmp")), free_ports(1)[0]
    (folder / "password").write_text(PASSWORD)
    if owner:
        for path in (folder, folder / "password"):
            shutil.chown(path, owner)
    make = [initdb, f"--pgdata={folder / 'data'}", "--username=ventral", "--auth=scram-sha-256"]
    subprocess.run([*make, f"--pwfile={folder / 'password'}"], user=owner, cwd=folder, check=True, capture_output=True)
    settings = ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off")
    words = [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, "-D", str(folder / "data"), *words], user=owner, cwd=folder, stderr=log)
    try:
        wait_for(port, folder / "log")
        yield f"postgresql+psycopg2://ventral:{PASSWORD}@{LOOPBACK}:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(BOUND_S)
        shutil.rmtree(folder)


def wait_for(port: int, log: Path) -> None:
    command, deadline = [binary("pg_isready"), "-h", LOOPBACK, "-p", str(port)], time.monotonic() + BOUND_S
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    started = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    uri = f"http://{host}:{port}"
    boto3.client(
        "s3", endpoint_url=uri, region_name="us-east-1", aws_access_key_id="nobody", aws_secret_access_key="nothing"
    ).create_bucket(Bucket=BUCKET)
    yield uri
    started.stop()


@pytest.fixture(scope="module")
def server(database: str, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """MLflow on both. Only it knows their passwords: its clients speak HTTP to it alone."""
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("mlflow-team") / "mlflow.log"
    uri = f"http://{LOOPBACK}:{port}"
    options = (f"--backend-store-uri={database}", f"--artifacts-destination=s3://{BUCKET}/artifacts", "--workers=1")
    command = [sys.executable, "-m", "mlflow", "server", f"--host={LOOPBACK}", f"--port={port}", *options]
    secrets = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    env = {**os.environ, **_stack.MLFLOW_ENV, **secrets, "MLFLOW_S3_ENDPOINT_URL": bucket}
    process = launch(command, log, env)
    service = Service("MLflow", process.pid, psutil.Process(process.pid).create_time(), uri, log)
    try:
        wait_ready(process, lambda: answers(f"{uri}/health"), 300, TrackingError, log)
        yield service
    finally:
        stop(service)


def test_a_training_and_its_model_are_kept_by_postgres_and_s3(server: Service, bucket: str, tmp_path: Path) -> None:
    """Runs of four jobs at once, their checkpoints, a registered model; and all of it shipped a second time."""
    uri, client = server.address, MlflowClient(server.address, server.address)

    def train(number: int) -> runs.Run:
        folder = tmp_path / f"run{number}"
        with runs.start(uri, CONFIG, params={"number": str(number)}, tags={}, folder=folder) as run:
            for step in range(300):
                run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
            run.log_metrics({"val/top1": number / 10}, 300, checkpoint="epoch-0001", dataset=DATASET)
            run.log_text("config.yaml", "a: 1\n")
        (folder / "journal" / "shipped.json").unlink()
        assert shipping.replay(folder, uri, BOUND_S) == 0
        assert journal.num_unshipped(folder / "journal") == 0
        return run

    with ThreadPoolExecutor(4) as pool:
        trained = list(pool.map(train, range(4)))
    for number, run in enumerate(trained):
        kept = client.get_run(run.id)
        assert (kept.info.status, kept.data.params) == ("FINISHED", {"number": str(number)})
        points = sorted((point.step, point.value) for point in client.get_metric_history(run.id, "loss"))
        assert points == [(step, 1 / (step + 1)) for step in range(300)]
    ranked = client.search_logged_models(
        [trained[0].experiment_id],
        datasets=[{"dataset_name": DATASET[0], "dataset_digest": DATASET[1][:36]}],
        order_by=[{"field_name": "metrics.val/top1", "ascending": False}],
    )
    assert [model.source_run_id for model in ranked] == [run.id for run in reversed(trained)]

    torch.manual_seed(0)
    config = models.config_of("lenet5").model_validate({"name": "lenet5"})
    classes = tuple(f"digit {number}" for number in range(10))
    made = bundle.save(tmp_path / "bundle", models.build(config), config, classes=classes, metrics={}, provenance={})
    version = registry.publish(trained[3], made, "team-digits")
    registry.promote(uri, "team-digits", version.version)
    fetched = registry.fetch(uri, registry.resolve(uri, "team-digits@champion"), tmp_path / "fetched")
    assert bundle.digest(fetched.path) == bundle.digest(made.path)

    s3 = boto3.client(
        "s3", endpoint_url=bucket, region_name="us-east-1", aws_access_key_id="nobody", aws_secret_access_key="nothing"
    )
    keys = [
        found["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        for found in page["Contents"]
    ]
    assert sum(key.endswith("/artifacts/config.yaml") for key in keys) == 4
    assert sum(key.endswith(f"bundle/{bundle.WEIGHTS}") for key in keys) == 1
