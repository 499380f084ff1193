"""Journals against a real MLflow server that is killed and started again, and against others that do not answer."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import _stack, replay
from jobs._process import Service, stop
from pipeline.benchmark import tracking as cost
from pipeline.errors import TrackingError
from pipeline.tracking import connection, journal, runs, shipping, system
from pipeline.tracking.delivery import Destination

CONFIG = runs.Config(experiment="journals")
DATASET = ("digits/val", "d" * 64)
BOUND_S = 120.0


class Server:
    """One MLflow server that dies and comes back at the same address with the same store."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.service: Service = _stack.mlflow_server(storage, timeout_s=300)
        self.uri = self.service.address
        self.client = MlflowClient(self.uri, self.uri)

    def kill(self) -> None:
        os.killpg(self.service.pid, signal.SIGKILL)
        stop(self.service)

    def revive(self) -> None:
        port = int(self.uri.rpartition(":")[2])
        self.service = _stack.mlflow_server(self.storage, port, timeout_s=300)

    def points(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that MLflow holds of a metric."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, key))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("mlflow"))
    yield started
    stop(started.service)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production, only sooner."""
    monkeypatch.setattr(shipping, "POLL_S", 0.1)
    monkeypatch.setattr(shipping, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr(runs, "DRAIN_STOPPED_S", 1.0)


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not true():
        assert time.monotonic() < deadline, f"not within {BOUND_S:.0f} s: {what}"
        time.sleep(0.05)


def all_shipped(folder: Path) -> bool:
    return journal.num_unshipped(folder / journal.FOLDER) == 0


def worker(folder: Path, name: str = "rank0") -> journal.Writer:
    return journal.Writer(folder / journal.FOLDER, name)


TRAIN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking.journal import Writer
writer = Writer(Path(sys.argv[1]) / "journal", "rank0")
for step in range(int(sys.argv[2]), int(sys.argv[3])):
    writer.metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def train_and_die(folder: Path, first: int, end: int) -> None:
    command = [sys.executable, "-c", TRAIN_AND_DIE, str(folder), str(first), str(end)]
    assert subprocess.run(command, check=False, timeout=BOUND_S).returncode == -signal.SIGKILL


def fail_in_outage(server: Server, folder: Path, meanwhile: Callable[[], None]) -> str:
    """A job during which the server is killed, and which then fails itself."""
    opened = runs.start(server.uri, CONFIG, params={"lr": "0.1", "resume": "false"}, tags={}, folder=folder)
    with suppress(ZeroDivisionError), opened as run:
        server.kill()
        meanwhile()
        began = time.monotonic()
        for step in range(1000):
            run.log_metrics({"loss": float(step)}, step)
            run.set_tags({"at": str(step)})
        assert time.monotonic() - began < 2  # one call to a dead server takes longer
        run.log_text("notes.txt", "kept\n")
        run.log_metrics({"never": 1 / 0}, 0)
    return run.id


@pytest.mark.slow
def test_outage_in_mid_run_costs_no_time_and_no_figure(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker killed before the outage, one in it; a run that ends, one that is resumed and one that dies in it."""
    long, ended, died = (tmp_path / "runs" / name for name in ("long", "ended", "died"))
    caplog.set_level(logging.WARNING, logger="ventral.tracking")
    with runs.start(server.uri, CONFIG, params={"lr": "0.1", "epochs": "9"}, tags={}, folder=long) as run:
        train_and_die(long, 0, 40)
        wait_until(lambda: all_shipped(long), "shipped while the server was there")
        assert server.points(run.id, "loss") == [(step, 1 / (step + 1)) for step in range(40)]
        with runs.start(server.uri, CONFIG, params={}, tags={}, folder=ended) as second:
            third_id = fail_in_outage(server, died, meanwhile=lambda: train_and_die(long, 30, 70))  # ten steps again
            second.log_metrics({"final/val/top1": 0.9}, step=9)
            monkeypatch.setattr(runs, "DRAIN_S", 1.0)
        lines = [record.getMessage() for record in caplog.records]
        assert sum(line.startswith(f"{died}: ") and "jobs.replay run=died" in line for line in lines) == 1
        assert journal.num_unshipped(died / journal.FOLDER) >= 2003
        resumed = runs.start(
            server.uri, CONFIG, params={"lr": "0.1", "resume": "true"}, tags={}, folder=died, resume_id=runs.known(died)
        )
        with resumed as again:  # while the server is still away
            assert again.id == third_id
            for step in range(990, 1100):
                again.log_metrics({"loss": float(step)}, step)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(connection.wait, server.uri, BOUND_S)
            server.revive()
            waiting.result()
        monkeypatch.setattr(runs, "DRAIN_S", BOUND_S)
        wait_until(lambda: all_shipped(long), "shipped by its own job after the outage")
        train_and_die(long, 70, 80)
    for run_id, key, num in ((run.id, "loss", 80), (run.id, "lr", 80)):
        assert [step for step, _ in server.points(run_id, key)] == list(range(num))
    assert server.client.get_run(run.id).info.status == "FINISHED"
    assert (
        sum("tracking waits" in record.getMessage() and str(long) in record.getMessage() for record in caplog.records)
        == 1
    )

    ended_ms = next(
        entry.ms
        for segment in journal.segments(ended / journal.FOLDER)
        for entry in journal.entries(segment)
        if isinstance(entry, journal.Status)
    )
    assert server.client.get_run(second.id).info.status == "RUNNING"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for _ in range(2):  # a second time changes nothing
        assert replay.main([f"storage={tmp_path}", "run=ended"]) == 0
    kept = server.client.get_run(second.id)
    assert (kept.info.status, kept.info.end_time) == ("FINISHED", ended_ms)
    assert server.points(second.id, "final/val/top1") == [(9, 0.9)]

    assert shipping.replay(died, server.uri, BOUND_S) == 0
    kept = server.client.get_run(third_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["at"] == "999"
    assert (kept.data.tags["error"], kept.data.tags["resumed.resume"], kept.data.params["resume"]) == (
        "",
        "true",
        "false",
    )
    assert server.points(third_id, "loss") == [(step, float(step)) for step in range(1100)]
    assert Path(server.client.download_artifacts(third_id, "notes.txt", str(tmp_path))).read_text() == "kept\n"


def test_shipping_everything_again_stores_nothing_twice(server: Server, tmp_path: Path) -> None:
    """Also checkpoints: MLflow shows the figures of each on each dataset, and finds the best on one."""
    folder = tmp_path / "run"
    with runs.start(server.uri, CONFIG, params={"a": "1"}, tags={"b": "2"}, folder=folder) as run:
        rank0 = worker(folder)
        run.log_dataset("digits", DATASET[1], "/shards", "val")
        for epoch in (1, 2, 3):
            name = f"epoch.{epoch}"  # MLflow allows no dot there
            rank0.checkpoint(name, epoch, {"path": f"{folder}/checkpoints/{name}.pt", "kept": "true"})
            rank0.metrics({"val/top1": epoch / 10}, epoch, checkpoint=name, dataset=DATASET)
            rank0.metrics({"train/loss": 1 / epoch}, epoch)
        rank0.checkpoint("epoch.1", 1, {"kept": "false"})
        with run.artifact("predictions/val.parquet") as file:
            file.write_bytes(b"PAR1")
    (folder / "journal" / "shipped.json").unlink()
    assert shipping.replay(folder, server.uri, BOUND_S) == 0

    for key in ("val/top1", "train/loss"):
        assert [step for step, _ in server.points(run.id, key)] == [1, 2, 3]
    found = server.client.search_logged_models(
        [run.experiment_id],
        filter_string=f"source_run_id = '{run.id}' AND metrics.`val/top1` > 0.05",
        datasets=[{"dataset_name": DATASET[0], "dataset_digest": DATASET[1][:36]}],
        order_by=[{"field_name": "metrics.val/top1", "ascending": False}],
    )
    assert [(model.name, str(model.status), model.tags["kept"]) for model in found] == [
        ("epoch-3", "READY", "true"),
        ("epoch-2", "READY", "true"),
        ("epoch-1", "READY", "false"),
    ]
    for model, value in zip(found, (0.3, 0.2, 0.1), strict=True):
        assert [(metric.key, metric.value, metric.dataset_name) for metric in model.metrics] == [
            ("val/top1", value, DATASET[0])
        ]
    outputs = server.client.get_run(run.id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [1, 2, 3]
    (only,) = server.client.get_run(run.id).inputs.dataset_inputs
    assert (only.dataset.name, only.dataset.digest) == (DATASET[0], DATASET[1][:36])
    assert [file.path for file in server.client.list_artifacts(run.id, "predictions")] == ["predictions/val.parquet"]


def test_refused_entries_are_left_out_alone_and_named(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="ventral.tracking")
    with runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path) as run:
        many = {f"m{number}": float(number) for number in range(1500)}  # more than the server takes in one call
        run.log_metrics({**many, "bad\nkey": 1.0, "infinite": float("inf")}, 0)
        run.log_params({f"p{number}": str(number) for number in range(250)} | {"k" * 300: "too long a key"})
        run.log_file(tmp_path / "never-made.json")
        run.set_tags({"last": "arrives"})
    kept = server.client.get_run(run.id)
    assert kept.data.metrics == many
    assert len(kept.data.params) == 250
    assert (kept.data.tags["last"], kept.data.tags["nonfinite.infinite"]) == ("arrives", "inf at step 0")
    assert kept.info.status == "FINISHED"
    left_out = [record.getMessage() for record in caplog.records if "left out of MLflow" in record.getMessage()]
    names = [line.partition(" (")[0].removeprefix("left out of MLflow: ") for line in left_out]
    assert sorted(names) == ["file never-made.json", "metric bad\nkey at step 0", f"parameter {'k' * 300}"]


def test_deleted_run_is_waited_for_and_nothing_is_left_out(server: Server, tmp_path: Path) -> None:
    with runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path) as run:
        server.client.delete_run(run.id)
        run.log_metrics({"loss": 1.0}, 0)
        with pytest.raises(AssertionError, match="it arrived"):
            impatiently(lambda: all_shipped(tmp_path), "it arrived")
        server.client.restore_run(run.id)
        wait_until(lambda: all_shipped(tmp_path), "shipped after the run was restored")
    assert server.points(run.id, "loss") == [(0, 1.0)]


def impatiently(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 3.0
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_replay_of_a_killed_job_closes_its_run_as_killed(server: Server, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pipeline.tracking import runs\n"
        "config = runs.Config(experiment='journals')\n"
        "with runs.start(sys.argv[1], config, params={}, tags={}, folder=Path(sys.argv[2])) as run:\n"
        "    run.log_metrics({'loss': 0.5}, 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, server.uri, str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=BOUND_S).returncode == -signal.SIGKILL
    run_id = runs.known(tmp_path)
    assert run_id is not None
    assert server.client.get_run(run_id).info.status == "RUNNING"
    assert shipping.replay(tmp_path, server.uri, BOUND_S) == 0
    assert server.client.get_run(run_id).info.status == "KILLED"
    assert server.points(run_id, "loss") == [(1, 0.5)]


def test_start_in_a_folder_of_another_run_or_job_is_refused(server: Server, tmp_path: Path) -> None:
    with runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path) as run:
        for resume_id, sentence in (
            (None, f"holds the journal of run {run.id}; resume that run"),
            ("f" * 32, f"expected the journal of run {'f' * 32}, found that of run {run.id}"),
            (run.id, "another process ships this journal"),
        ):
            with (
                pytest.raises(TrackingError, match=sentence),
                runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path, resume_id=resume_id),
            ):
                pass
    assert server.client.get_run(run.id).info.status == "FINISHED"
    journal.remember(tmp_path / "journal", journal.Origin(server.uri, "e" * 32, run.experiment_id, 0))
    with (
        pytest.raises(TrackingError, match="not found"),
        runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path, resume_id="e" * 32),
    ):
        pass
    with pytest.raises(TrackingError, match="not found"):
        shipping.replay(tmp_path, server.uri, BOUND_S)


def test_shipper_of_a_hanging_server_closes_in_time_and_keeps_all(tmp_path: Path) -> None:
    worker(tmp_path).metrics({"loss": 1.0}, 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        shipper = shipping.Shipper(Destination(uri, "0" * 32, "1", tmp_path))
        began = time.monotonic()
        assert shipper.close(timeout_s=0.5) == 1
        assert time.monotonic() - began < 5
    with pytest.raises(TrackingError, match="holds no journal"):
        shipping.replay(tmp_path, uri, 1.0)


def test_system_metrics_of_a_node_reach_its_run(server: Server, tmp_path: Path) -> None:
    opened = runs.start(server.uri, CONFIG, params={}, tags={}, folder=tmp_path)
    with opened as run, system.watched(tmp_path, "node-1", every_s=1.1):
        path = next(path for path in journal.segments(tmp_path / "journal") if "system-node-1" in path.name)
        wait_until(lambda: len(list(journal.entries(path))) >= 2, "two samples")
    found = server.client.get_run(run.id).data.metrics
    assert 0 <= found["system/node-1/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/node-1/disk_usage_percentage"] <= 100
    assert found["system/node-1/system_memory_usage_megabytes"] > 100
    assert found["system/node-1/network_receive_megabytes_per_s"] >= 0
    steps = [step for step, _ in server.points(run.id, "system/node-1/disk_usage_percentage")]
    assert len(steps) >= 2
    assert steps[0] < 60  # seconds since the run began


def test_wait_for_a_server_that_does_not_come_gives_up_in_time() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(TrackingError, match="no MLflow server answers there"):
            connection.wait(f"http://127.0.0.1:{closed.getsockname()[1]}", timeout_s=2)
    assert 0.5 < time.monotonic() - began < 10


def test_cost_of_tracking_is_measured_for_every_way_that_is_asked_for() -> None:
    figures = cost.measure(rounds=1, steps=5, ways=(cost.ALONE, cost.HANGING))
    assert set(figures.ratios) == {"journal", "driver, hanging"}
    assert 0 < figures.append_us < 1000
    assert f"takes {figures.append_us:.1f} us" in cost.table(figures)
