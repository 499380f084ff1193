"""Ingest when something dies in the middle: driver, worker, node, disk. Every input once, and no work done again.

A named pipe stands in for some of the pictures (`Gate`): whoever reads it waits, so that "in the middle" is a state and
not a moment. Random moments are tried by tests/chaos.
"""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from jobs._process import Service
from pipeline import imaging
from pipeline.data import ingest, shards
from pipeline.data.datasets import image_folder, uri_list
from pipeline.errors import DataError
from pipeline.types import Split
from tests import local_nodes
from tests.small_disk import enlarge, needs_mounting, small_disk

ROOT = Path(__file__).parents[2]
COUNTS: dict[Split, int] = {"train": 96, "val": 24}
CONFIG = ingest.Config(train_short_side=16, rows_per_shard=8, rows_per_group=4)
NUM_PARTS = 15
GATES = (5, 50, 77)  # training pictures that lie in three different parts
PATIENCE_S = 90.0


def wait_for(what: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.05)


def jpeg(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), np.uint8)
    return imaging.encode_jpeg(pixels, quality=95)


class Gate:
    """A named pipe in place of a picture: who reads it waits until it is opened."""

    def __init__(self, path: Path, data: bytes) -> None:
        os.mkfifo(path)
        self.path, self._data, self._pipe, self.reader_pid, self.is_open = path, data, -1, 0, False

    def wait_for_reader(self) -> int:
        """The process that waits for the picture; it has none of its bytes yet."""

        def is_read() -> bool:
            with suppress(OSError):  # ENXIO: nobody reads
                self._pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            return self._pipe >= 0

        wait_for(is_read)
        wait_for(self._find_reader)
        return self.reader_pid

    def open(self) -> None:
        """Give the picture to the process that waits for it, if it still lives, else to the next one that comes."""
        self.is_open = True
        if self._pipe >= 0 and psutil.pid_exists(self.reader_pid):
            os.write(self._pipe, self._data)
        else:
            Thread(target=self.path.write_bytes, args=(self._data,), daemon=True).start()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _find_reader(self) -> bool:
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                pid = int(link.parts[2])
                if pid != os.getpid() and link.readlink() == self.path:
                    self.reader_pid = pid
        return self.reader_pid > 0


def collection(root: Path, gates: Sequence[int] = (), side: int = 24) -> tuple[uri_list.Config, list[Gate]]:
    """Pictures of two classes and a table of them; some of the training pictures are gates."""
    root.mkdir(parents=True)
    made: list[Gate] = []
    with (root / "images.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["uri", "class_name", "split"])
        for split, count in COUNTS.items():
            for number in range(count):
                path, data = root / f"{split}-{number}.jpg", jpeg(number + 1000 * (split == "val"), side)
                if split == "train" and number in gates:
                    made.append(Gate(path, data))
                else:
                    path.write_bytes(data)
                table.writerow([path.name, ("even", "odd")[number % 2], split])
    return uri_list.Config(root=str(root)), made


@contextmanager
def making(
    dataset: uri_list.Config, destination: Path, gates: Sequence[Gate], progress: ingest.Progress = lambda *_: None
) -> Iterator[Future[shards.Shards]]:
    """Ingest in a thread; no gate stays closed, whatever happens."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(ingest.ingest, dataset, CONFIG, destination, progress)
        finally:
            for gate in gates:
                if not gate.is_open:
                    gate.open()


def preprocess(
    dataset: uri_list.Config, config: ingest.Config, destination: Path, head: Service
) -> subprocess.Popen[str]:
    """The job in a process of its own, on a Ray head that outlives it."""
    words: dict[str, object] = {"storage": destination.parent, "shards": destination.name}
    words |= {"dataset.name": "uri_list", "dataset.root": dataset.root}
    words |= {f"ingest.{name}": getattr(config, name) for name in config.model_fields_set}
    command = [sys.executable, "-m", "jobs.preprocess", *(f"{key}={value}" for key, value in words.items())]
    environment = {**os.environ, **head.env, "RAY_ADDRESS": head.address}
    environment["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"  # for which Ray keeps the CPUs of a dead driver
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def receipts(destination: Path) -> dict[str, int]:
    """When each part was noted as done."""
    found = destination.parent.glob(f".{destination.name}.work-*/receipts/*.json")
    return {path.stem: path.stat().st_mtime_ns for path in found}


class Watch:
    """A progress callback that looks at the receipts: those of the beginning must not be written anew."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.first: dict[str, int] | None = None
        self.last: dict[str, int] = {}
        self.done: list[int] = []

    def __call__(self, done: int, total: int, more: str) -> None:
        self.last = receipts(self._destination)
        self.first = self.last if self.first is None else self.first
        self.done.append(done)
        assert total == sum(COUNTS.values())

    def kept(self) -> dict[str, int]:
        return {name: self.last[name] for name in self.first or {}}


def ids(made: shards.Shards) -> list[str]:
    """Every image that is stored or turned away, sorted."""
    names = [shard.name for shard in made.manifest.shards] + list(made.manifest.rejects)
    return sorted(name for file in names for name in pq.read_table(made.path / file)["image_id"].to_pylist())


def check_whole(made: shards.Shards, expected: shards.Shards) -> None:
    """Everything once, the same bytes as without any fault, nothing left beside it."""
    assert ids(made) == sorted(
        f"{split}/{split}-{number}.jpg" for split, count in COUNTS.items() for number in range(count)
    )
    assert made.manifest.digest == expected.manifest.digest
    assert made.manifest.shards == expected.manifest.shards
    for split in COUNTS:
        shards.check(made, split)
    assert shards.load(made.path) == made
    assert list(made.path.parent.glob(".*")) == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> uri_list.Config:
    """The collection without gates."""
    return collection(tmp_path_factory.mktemp("plain") / "images")[0]


@pytest.fixture(scope="module")
def expected(cluster: None, plain: uri_list.Config, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """What an undisturbed run makes of the collection."""
    made = ingest.ingest(plain, CONFIG, tmp_path_factory.mktemp("expected") / "shards")
    assert len(made.manifest.shards) == NUM_PARTS
    return made


def test_shards_are_the_same_bytes_on_one_and_on_four_workers(
    expected: shards.Shards, plain: uri_list.Config, tmp_path: Path
) -> None:
    import ray.data  # noqa: PLC0415

    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = ray.data.ExecutionResources(cpu=1)
    try:
        made = ingest.ingest(plain, CONFIG, tmp_path / "shards")
    finally:
        options.resource_limits = before
    check_whole(made, expected)
    for shard in made.manifest.shards:
        assert (made.path / shard.name).read_bytes() == (expected.path / shard.name).read_bytes()


def test_worker_process_that_is_killed_is_replaced(expected: shards.Shards, tmp_path: Path) -> None:
    dataset, (gate,) = collection(tmp_path / "images", GATES[:1])
    destination = tmp_path / "made" / "shards"
    watch = Watch(destination)
    with making(dataset, destination, [gate], watch) as result:
        psutil.Process(gate.wait_for_reader()).kill()
        wait_for(lambda: not psutil.pid_exists(gate.reader_pid))
        gate.open()
        made = result.result(PATIENCE_S)
    assert watch.done == sorted(watch.done)
    check_whole(made, expected)


def lose_a_node(images: Path, destination: Path, gates: list[Gate]) -> None:
    """Ingest on a cluster of two nodes; the second node goes while it reads."""
    with local_nodes.cluster(num_cpus=1) as cluster:
        second = cluster.add_node(num_cpus=2)
        with making(uri_list.Config(root=str(images)), destination, gates) as result:
            readers = [gate.wait_for_reader() for gate in gates]
            (raylet,) = second.all_processes["raylet"]
            lost = [pid for pid in readers if psutil.Process(pid).ppid() == raylet.process.pid]
            assert len(lost) == 2
            cluster.remove_node(second, allow_graceful=False)
            wait_for(lambda: not any(map(psutil.pid_exists, lost)))
            for gate in gates:
                gate.open()
            result.result(PATIENCE_S)


@pytest.mark.slow
def test_node_that_is_lost_costs_no_image(expected: shards.Shards, tmp_path: Path) -> None:
    dataset, gates = collection(tmp_path / "images", GATES)
    destination = tmp_path / "made" / "shards"
    assert dataset.root
    local_nodes.alone(lose_a_node, Path(dataset.root), destination, gates, timeout_s=180)
    check_whole(shards.load(destination), expected)


@pytest.mark.slow
@needs_mounting
def test_full_disk_is_one_sentence_and_enlarged_the_job_goes_on(
    ray_head: Service, cluster: None, tmp_path: Path
) -> None:
    dataset, _ = collection(tmp_path / "images", side=100)
    config = CONFIG.model_copy(update={"train_short_side": 64})
    undisturbed = ingest.ingest(dataset, config, tmp_path / "undisturbed")
    disk = tmp_path / "disk"
    with small_disk(disk, "640k"):
        with preprocess(dataset, config, disk / "shards", ray_head) as driver:
            said, _ = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 3, said
        assert "No space left on device; free some" in said
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        before, watch = receipts(disk / "shards"), Watch(disk / "shards")
        assert 0 < len(before) < NUM_PARTS
        enlarge(disk, "16m")
        made = ingest.ingest(dataset, config, disk / "shards", watch)
        assert watch.first == watch.kept() == before
        check_whole(made, undisturbed)


@pytest.mark.slow
def test_driver_that_is_killed_goes_on_where_it_stopped(
    ray_head: Service, expected: shards.Shards, tmp_path: Path
) -> None:
    dataset, gates = collection(tmp_path / "images", GATES)
    destination = tmp_path / "made" / "shards"
    with preprocess(dataset, CONFIG, destination, ray_head) as driver:
        try:
            readers = [gate.wait_for_reader() for gate in gates]
            wait_for(lambda: len(receipts(destination)) == NUM_PARTS - len(gates))
            with pytest.raises(DataError, match="shards: another job is making it; wait until that ends"):
                ingest.ingest(dataset, CONFIG, destination)
        finally:
            driver.kill()
    with pytest.raises(DataError, match=r"expected a dataset with manifest\.json"):
        shards.load(destination)
    wait_for(lambda: not any(map(psutil.pid_exists, readers)))
    before, watch = receipts(destination), Watch(destination)
    for gate in gates:
        gate.open()
    made = ingest.ingest(dataset, CONFIG, destination, watch)
    assert watch.first == watch.kept() == before
    assert (watch.done[0], watch.done[-1]) == (96, 120)
    check_whole(made, expected)


class Photos:
    """A collection of class folders that grows."""

    def __init__(self, root: Path) -> None:
        self.root, self._numbers = root, itertools.count()
        self.dataset = image_folder.Config(root=str(root))

    def add(self, split: Split, class_name: str, count: int) -> list[Path]:
        folder = self.root / split / class_name
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [next(self._numbers) for _ in range(count)]
        for number in numbers:
            (folder / f"{number}.jpg").write_bytes(jpeg(number))
        return [folder / f"{number}.jpg" for number in numbers]

    def ids(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*.jpg"))


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    made = Photos(tmp_path / "photos")
    for class_name in ("cat", "dog"):
        made.add("train", class_name, 10)
        made.add("val", class_name, 4)
    return made


@pytest.fixture
def first(cluster: None, photos: Photos, tmp_path: Path) -> shards.Shards:
    """The first version of a dataset of them."""
    return ingest.ingest(photos.dataset, CONFIG, tmp_path / "shards")


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_append_makes_a_new_version_of_new_shards_and_the_old_one_still_reads(
    first: shards.Shards, photos: Photos
) -> None:
    before = times(first.path)
    photos.add("train", "cat", 9)
    (photos.add("train", "dog", 2)[1]).write_bytes(b"no image")
    lenient = CONFIG.model_copy(update={"max_reject_share": 0.5})  # another limit makes no other dataset
    with pytest.raises(DataError, match=r"1 of 11 images cannot be used \(format: 1\)"):
        ingest.ingest(photos.dataset, CONFIG, first.path, append=True)
    second = ingest.ingest(photos.dataset, lenient, first.path, append=True)
    manifest = second.manifest
    assert (manifest.version, manifest.rejects) == (2, ("rejects-00002.parquet",))
    assert manifest.shards[:4] == first.manifest.shards
    assert [shard.name for shard in manifest.shards[4:]] == ["train-00003.parquet", "train-00004.parquet"]
    assert manifest.class_counts == {"train": (19, 11), "val": (4, 4)}
    assert ids(second) == photos.ids()
    assert shards.load(first.path) == second
    old = shards.load(first.path.with_name("shards@1"))
    assert old == first
    for split in COUNTS:
        shards.check(old, split)
        shards.check(second, split)
    after = times(first.path)
    assert all(after[shard.name] == before[shard.name] for shard in first.manifest.shards)
    assert list(first.path.parent.glob(".*")) == []


def test_append_has_the_statistics_of_a_dataset_made_at_once(
    first: shards.Shards, photos: Photos, tmp_path: Path
) -> None:
    photos.add("train", "cat", 3)
    photos.add("val", "dog", 3)
    second = ingest.ingest(photos.dataset, CONFIG, first.path, append=True).manifest
    at_once = ingest.ingest(photos.dataset, CONFIG, tmp_path / "once").manifest
    for name in ("digest", "pixels", "sizes", "class_counts", "classes"):
        assert getattr(second, name) == getattr(at_once, name), name


def test_append_of_nothing_new_changes_nothing(first: shards.Shards, photos: Photos) -> None:
    before = times(first.path)
    assert ingest.ingest(photos.dataset, CONFIG, first.path, append=True) == first
    next(photos.root.rglob("*.jpg")).unlink()  # what was taken away stays in the shards
    assert ingest.ingest(photos.dataset, CONFIG, first.path, append=True) == first
    assert times(first.path) == before


def test_new_images_without_append_are_refused(first: shards.Shards, photos: Photos) -> None:
    photos.add("train", "cat", 1)
    with pytest.raises(DataError, match=r"holds a dataset made from other files.*give append=true to add what is new"):
        ingest.ingest(photos.dataset, CONFIG, first.path)


def test_append_of_a_new_class_is_refused(first: shards.Shards, photos: Photos) -> None:
    for split in COUNTS:
        photos.add(split, "bird", 2)
    with pytest.raises(
        DataError, match=r"its 2 classes are not those of the collection now \(3; 'bird' is in one only"
    ):
        ingest.ingest(photos.dataset, CONFIG, first.path, append=True)
    assert shards.load(first.path) == first


def test_append_to_a_collection_with_a_changed_file_is_refused(first: shards.Shards, photos: Photos) -> None:
    (changed, *_) = photos.root.rglob("*.jpg")
    changed.write_bytes(changed.read_bytes() + b"\0")
    photos.add("train", "cat", 1)
    with pytest.raises(DataError, match=rf"1 images have changed .*{changed.name}: has \d+ bytes, had \d+"):
        ingest.ingest(photos.dataset, CONFIG, first.path, append=True)
    assert shards.load(first.path) == first


@pytest.mark.parametrize("same_size", [True, False])
def test_append_takes_rejects_that_were_mended_and_lists_the_others_on(
    photos: Photos, cluster: None, tmp_path: Path, same_size: bool
) -> None:
    torn, hopeless = photos.add("train", "cat", 2)
    good = torn.read_bytes()
    torn.write_bytes(bytes(len(good)) if same_size else b"no image")
    hopeless.write_bytes(b"no image")
    lenient = CONFIG.model_copy(update={"max_reject_share": 0.5})
    first = ingest.ingest(photos.dataset, lenient, tmp_path / "shards")
    assert ingest.ingest(photos.dataset, lenient, first.path, append=True) == first
    torn.write_bytes(good)
    second = ingest.ingest(photos.dataset, lenient, first.path, append=True)
    assert (first.manifest.num_rejects, second.manifest.num_rejects) == (2, 1)
    (name,) = second.manifest.rejects
    assert pq.read_table(second.path / name)["image_id"].to_pylist() == [f"train/cat/{hopeless.name}"]
    assert second.manifest.num_rows("train") == first.manifest.num_rows("train") + 1 == 21
    assert ids(second) == photos.ids()
    assert shards.load(first.path.with_name("shards@1")) == shards.load(Path(first.address)) == first


def test_append_that_ends_between_its_shards_and_its_manifest_is_made_whole(
    first: shards.Shards, photos: Photos, tmp_path: Path
) -> None:
    photos.add("train", "cat", 9)
    obstacle = first.path / shards.version_name(2)
    obstacle.mkdir()  # where the manifest of version 2 goes, after the shards
    with pytest.raises(DataError, match=r"manifest-00002\.json: cannot be written: Is a directory"):
        ingest.ingest(photos.dataset, CONFIG, first.path, append=True)
    assert (first.path / "train-00004.parquet").exists()
    assert shards.load(first.path) == first  # nothing of it counts
    obstacle.rmdir()
    moved = times(first.path)
    done: list[int] = []
    second = ingest.ingest(photos.dataset, CONFIG, first.path, lambda now, total, more: done.append(now), append=True)
    assert done == [9]  # no shard was made again
    assert ids(second) == photos.ids()
    shards.check(second, "train")
    assert times(first.path)["train-00003.parquet"] == moved["train-00003.parquet"]
    assert list(tmp_path.glob(".*")) == []


def test_receipts_without_their_shards_do_not_count(first: shards.Shards, photos: Photos, tmp_path: Path) -> None:
    strict = CONFIG.model_copy(update={"max_reject_share": 0.0})
    (photos.root / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="1 of 29 images cannot be used"):
        ingest.ingest(photos.dataset, strict, tmp_path / "other")
    for path in tmp_path.glob(".other.work-*/dataset/train-*.parquet"):
        path.unlink()  # as where a dataset was published, then deleted, and its receipts had stayed
    lenient = CONFIG.model_copy(update={"max_reject_share": 0.5})
    made = ingest.ingest(photos.dataset, lenient, tmp_path / "other")
    shards.check(made, "train")
    assert ids(made) == sorted([*photos.ids(), "train/cat/notes.txt"])
