"""50,000 files, and SIGKILL at random moments: of the job, of a worker, of a node. Run by `make chaos` only.

The moments come from a fixed seed, but a machine is never twice equally fast: a failure names the attempt, not a way to
repeat it. States that can be named have their tests in tests/integration/test_ingest_faults.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from jobs._process import Service
from pipeline import imaging
from pipeline.data import shards
from pipeline.data.rows import DIGEST_MODULUS
from pipeline.errors import DataError
from tests import local_nodes

ROOT = Path(__file__).parents[2]
NUM_FILES = 50_000
NUM_KILLS = 8
CLASSES = ("even", "odd")
LONGEST_S = 60.0  # a busy machine needs half of that to import what a job needs
LONGEST_OF_NODE_S = 20.0
PATIENCE_S = 900.0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 8 x 8 pixels, each another one; every 1,000th file is none."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
    for number in range(NUM_FILES):
        data = imaging.encode_png(rng.integers(0, 256, (8, 8, 3), np.uint8)) if number % 1000 else b"none"
        (root / "train" / CLASSES[number % 2] / f"{number}.png").write_bytes(data)
    return root


def start(photos: Path, storage: Path, address: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    words = [
        "dataset.name=image_folder",
        f"dataset.root={photos}",
        "dataset.splits=[train]",
        "ingest.rows_per_shard=250",
    ]
    command = [sys.executable, "-m", "jobs.preprocess", *words, "shards=shards", f"storage={storage}"]
    environment = {**os.environ, **env, "RAY_ADDRESS": address}
    environment["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"  # for which Ray keeps the CPUs of a dead driver
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def receipts(storage: Path) -> dict[str, int]:
    found = storage.glob(".shards.work-*/receipts/*.json")
    return {path.name: path.stat().st_mtime_ns for path in found}


def kill_a_worker(head: Service, draw: random.Random) -> None:
    """One that works on the shards, if there is one."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(head.pid).children(recursive=True)
        workers = [process for process in below if "".join(process.cmdline()).startswith("ray::Map")]
        if workers:
            draw.choice(workers).kill()


def expected_digest(photos: Path) -> str:
    """Summed as rows.Made says, from the files."""
    total = 0
    for path in photos.rglob("*.png"):
        data = path.read_bytes()
        if data != b"none":
            image_id, label = path.relative_to(photos).as_posix(), CLASSES.index(path.parent.name)
            meaning = json.dumps([image_id, label, None, None, hashlib.sha256(data).hexdigest()])
            total += int.from_bytes(hashlib.sha256(meaning.encode()).digest(), "big")
    return f"{total % DIGEST_MODULUS:064x}"


def check_whole(photos: Path, storage: Path) -> None:
    """Every file once, as a row or as a reject, and nothing else is left."""
    made = shards.load(storage / "shards")
    files = [shard.name for shard in made.manifest.shards] + list(made.manifest.rejects)
    found = [name for file in files for name in pq.read_table(made.path / file)["image_id"].to_pylist()]
    assert sorted(found) == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert made.manifest.num_rejects == NUM_FILES // 1000
    assert made.manifest.digest == expected_digest(photos)
    shards.check(made, "train")
    assert list(storage.glob(".shards*")) == []


def test_ingest_killed_at_random_moments_ends_with_every_file_once(
    ray_head: Service, photos: Path, tmp_path: Path
) -> None:
    draw, progressed = random.Random(0), 0
    for attempt in range(NUM_KILLS):
        before = receipts(tmp_path)
        with start(photos, tmp_path, ray_head.address, ray_head.env) as job:
            until = time.monotonic() + draw.uniform(0, LONGEST_S)
            while time.monotonic() < until and job.poll() is None:
                time.sleep(0.1)
                if draw.random() < 0.01:
                    kill_a_worker(ray_head, draw)
            job.kill()
        if job.returncode == 0:
            break  # it was faster
        after = receipts(tmp_path)
        assert before == {name: after.get(name) for name in before}, f"attempt {attempt} did finished work again"
        progressed += len(after) > len(before)
        with pytest.raises(DataError, match=r"expected a dataset with manifest\.json"):
            shards.load(tmp_path / "shards")
    assert progressed, "nothing was ever under way when it was killed: raise LONGEST_S"

    with start(photos, tmp_path, ray_head.address, ray_head.env) as job:
        said, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, said[-2000:]
    check_whole(photos, tmp_path)


def lose_nodes(photos: Path, storage: Path) -> None:
    """Run the job, again if it fails, while nodes with two of the three CPUs come and die."""
    draw, num_lost = random.Random(1), 0
    with local_nodes.cluster(num_cpus=1) as cluster:
        for attempt in range(NUM_KILLS):
            before = receipts(storage)
            with start(photos, storage, cluster.address, {}) as job:
                while job.poll() is None and num_lost < NUM_KILLS:
                    node = cluster.add_node(num_cpus=2)
                    done, until = len(receipts(storage)), time.monotonic() + draw.uniform(0, LONGEST_OF_NODE_S)
                    while time.monotonic() < until and job.poll() is None:
                        time.sleep(0.1)
                    cluster.remove_node(node, allow_graceful=False)
                    num_lost += job.poll() is None and len(receipts(storage)) > done
                said, _ = job.communicate(timeout=PATIENCE_S)
            sys.stdout.write(f"attempt {attempt}: exit code {job.returncode}, {num_lost} nodes were lost at work\n")
            if job.returncode == 0:
                break
            after = receipts(storage)
            assert before == {name: after.get(name) for name in before}, f"attempt {attempt} did finished work again"
        assert job.returncode == 0, said[-2000:]
    assert num_lost >= 3, "it was over too soon: lower LONGEST_OF_NODE_S"


def test_ingest_whose_nodes_die_at_random_moments_ends_with_every_file_once(photos: Path, tmp_path: Path) -> None:
    local_nodes.alone(lose_nodes, photos, tmp_path, timeout_s=PATIENCE_S)
    check_whole(photos, tmp_path)
