"""Ten minutes without MLflow, while workers and the driver of a training are killed. Run by `make chaos` only.

The moments come from a fixed seed, but a machine is never twice equally fast. Shorter outages, without the driver's
death, are in tests/integration/test_journal_shipping.py and, under a real training, in test_training_faults.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import _stack
from jobs._process import stop
from pipeline.tracking import journal, runs

OUTAGE_S = 600.0
PATIENCE_S = 300.0

WORKER = """
import sys, time
from pathlib import Path
from pipeline.tracking.journal import Writer
folder = Path(sys.argv[1])
mark, writer = folder / "step", Writer(folder / "journal", "rank0")
step = int(mark.read_text()) if mark.exists() else 0
while not (folder / "stop").exists():
    writer.metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    step += 1
    if step % 25 == 0:
        writer.sync()
        mark.with_suffix(".partial").write_text(str(step))
        mark.with_suffix(".partial").replace(mark)
    time.sleep(0.02)
"""
DRIVER = """
import sys
from pathlib import Path
from pipeline.tracking import runs
folder = Path(sys.argv[2])
config, known = runs.Config(experiment="outage"), runs.known(folder)
with runs.start(sys.argv[1], config, params={"a": "1"}, tags={}, folder=folder, resume_id=known):
    print("open", flush=True)
    sys.stdin.read()
"""


class Killable:
    """A process that is killed and started again."""

    def __init__(self, code: str, *words: str) -> None:
        self._command = [sys.executable, "-c", code, *words]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def opened(driver: Killable) -> None:
    assert driver.process.stdout
    assert driver.process.stdout.readline() == "open\n"


@pytest.mark.timeout(int(OUTAGE_S + 3 * PATIENCE_S))
def test_ten_minutes_without_a_server_and_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    server, drawn = _stack.mlflow_server(tmp_path / "server", timeout_s=PATIENCE_S), random.Random(0)
    uri, folder = server.address, tmp_path / "run"
    driver = Killable(DRIVER, uri, str(folder))
    opened(driver)
    worker = Killable(WORKER, str(folder))
    run_id = runs.known(folder)
    assert run_id
    os.killpg(server.pid, signal.SIGKILL)
    stop(server)
    ends = time.monotonic() + OUTAGE_S
    while time.monotonic() < ends:
        time.sleep(drawn.uniform(5, 40))
        victim = drawn.choice([worker, worker, driver])
        victim.kill()
        victim.start()
        if victim is driver:
            opened(driver)
    server = _stack.mlflow_server(tmp_path / "server", int(uri.rpartition(":")[2]), timeout_s=PATIENCE_S)
    try:
        (folder / "stop").touch()
        worker.process.wait(PATIENCE_S)
        driver.process.communicate(timeout=PATIENCE_S)  # closes its input: the run ends
        check(MlflowClient(uri, uri), run_id, folder)
    finally:
        stop(server)


def check(client: MlflowClient, run_id: str, folder: Path) -> None:
    assert journal.num_unshipped(folder / journal.FOLDER) == 0
    assert client.get_run(run_id).info.status == "FINISHED"
    last = max(
        entry.step
        for segment in journal.segments(folder / journal.FOLDER)
        for entry in journal.entries(segment)
        if isinstance(entry, journal.Metrics)
    )
    assert last > OUTAGE_S  # it trained on
    for key in ("loss", "lr"):
        points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        expected = [(step, 1 / (step + 1) if key == "loss" else 0.1) for step in range(last + 1)]
        assert points == expected
