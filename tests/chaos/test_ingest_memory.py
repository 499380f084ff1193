"""Memory of ingest on 5,000 and on 50,000 real photos: it must not grow with their number. Run by `make chaos` only."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs._process import Service
from pipeline.data import shards

ROOT = Path(__file__).parents[2]
FEW, MANY = 5_000, 50_000
MOST = 1.1
PATIENCE_S = 900.0


def write(real_data: Path, root: Path, number: int) -> None:
    """So many photos of clothing10, over and over; repeated ones are links."""
    root.mkdir(parents=True)
    for split in ("train", "val"):
        kept = [
            shutil.copy(path, root.parent / f"{split}-{index}{path.suffix}")
            for index, path in enumerate(sorted((real_data / "clothing10" / split).rglob("*.jpg")))
        ]
        for index, photo in zip(range(number if split == "train" else 100), itertools.cycle(kept), strict=False):
            folder = root / split / ("even", "odd")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            os.link(photo, folder / f"{index}.jpg")


def memory(job: psutil.Process, head: psutil.Process) -> int:
    """Of the job and of Ray's workers: proportional set size, in bytes."""
    workers = [found for found in head.children(recursive=True) if "".join(found.cmdline()[:1]).startswith("ray::")]
    total = 0
    for process in (job, *workers):
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def peak_of_ingest(photos: Path, storage: Path, head: Service) -> int:
    words = ["dataset.name=image_folder", f"dataset.root={photos}", "shards=shards", f"storage={storage}"]
    environment = {**os.environ, **head.env, "RAY_ADDRESS": head.address}
    peak, until = 0, time.monotonic() + PATIENCE_S
    with subprocess.Popen([sys.executable, "-m", "jobs.preprocess", *words], cwd=ROOT, env=environment) as job:
        while job.poll() is None:
            assert time.monotonic() < until
            with suppress(psutil.Error):
                peak = max(peak, memory(psutil.Process(job.pid), psutil.Process(head.pid)))
            time.sleep(0.2)
    assert job.returncode == 0
    return peak


def test_memory_of_ingest_does_not_grow_with_the_number_of_files(
    ray_head: Service, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {}
    for number in (FEW, MANY):
        root = tmp_path / str(number)
        write(real_data, root / "photos", number)
        peaks[number] = peak_of_ingest(root / "photos", root, ray_head)
        assert shards.load(root / "shards").manifest.num_rows("train") == number
    with capsys.disabled():
        sys.stdout.write("".join(f"{number} files: {peak / 2**20:.0f} MiB\n" for number, peak in peaks.items()))
    assert peaks[MANY] <= MOST * peaks[FEW]
