"""The local reader against the shards: each row once, one seeded order, the same on any number of workers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import imaging
from pipeline.batch import Batch
from pipeline.data import loading, order, readers, shards
from pipeline.data.loading import Loader
from pipeline.data.rows import Config as Rows
from pipeline.data.rows import make_shard
from pipeline.data.transforms import classify
from pipeline.data.transforms.resizing import resize
from pipeline.errors import DataError
from pipeline.types import InputSpec, Record, Split

SPEC = InputSpec(size_hw=(28, 28))
LOCAL = loading.Config(batch_size=4, num_tasks=0, batches_per_read=2)
PROCESSES = LOCAL.model_copy(update={"reader": "local", "num_tasks": 2})


def ids(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.ids for batch in batches]


def test_evaluation_gives_every_row_once_with_its_label_pixels_and_frame(stripes: shards.Shards) -> None:
    batches = list(Loader(stripes, SPEC, LOCAL).evaluate("val"))
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    file = stripes.path / stripes.manifest.of("val")[0].name
    rows = shards.read(file, [0, 1]).to_pylist()
    assert [name for batch in batches for name in batch.ids] == [row["image_id"] for row in rows]
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [row["label"] for row in rows]
    pixels, frame = classify.evaluation(rows[5]["image"], SPEC)
    np.testing.assert_array_equal(batches[1].images[1].numpy(), pixels)
    assert batches[1].frames[1] == frame


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_on_more_workers_covers_the_same_rows(stripes: shards.Shards, world_size: int) -> None:
    parts = [
        list(Loader(stripes, SPEC, LOCAL, rank=rank, world_size=world_size).evaluate("val"))
        for rank in range(world_size)
    ]
    together = sorted(name for part in parts for batch in part for name in batch.ids)
    assert together == sorted(name for batch in Loader(stripes, SPEC, LOCAL).evaluate("val") for name in batch.ids)
    assert len(together) == 13


def test_training_repeats_by_seed_and_epoch_and_differs_otherwise(stripes: shards.Shards) -> None:
    def read(seed: int, epoch: int) -> list[Batch]:
        return list(Loader(stripes, SPEC, LOCAL, seed=seed).train(epoch))

    first, again, later, other = read(3, 1), read(3, 1), read(3, 2), read(4, 1)
    assert len(first) == 10
    assert len({name for batch in first for name in batch.ids}) == 40
    assert ids(first) == ids(again)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert ids(first) != ids(later)
    assert ids(first) != ids(other)


def test_one_picture_is_varied_anew_in_every_epoch(stripes: shards.Shards) -> None:
    views = []
    for epoch in range(2):
        batches = list(Loader(stripes, SPEC, LOCAL).train(epoch))
        views.append({name: batch.images[at] for batch in batches for at, name in enumerate(batch.ids)})
    changed = [not torch.equal(view, views[1][name]) for name, view in views[0].items()]
    assert all(changed)


def test_two_workers_interleave_to_the_batches_of_one(stripes: shards.Shards) -> None:
    one = list(Loader(stripes, SPEC, LOCAL.model_copy(update={"batch_size": 8})).train(0))
    ranks = [list(Loader(stripes, SPEC, LOCAL, rank=rank, world_size=2).train(0)) for rank in range(2)]
    assert [len(part) for part in ranks] == [len(one)] * 2 == [5, 5]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert whole.ids == sum((part.ids for part in parts), ())
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return ids(left) == ids(right) and all(
        torch.equal(mine.images, theirs.images) and mine.frames == theirs.frames
        for mine, theirs in zip(left, right, strict=True)
    )


def test_batches_do_not_depend_on_how_many_are_read_at_once(stripes: shards.Shards) -> None:
    more = LOCAL.model_copy(update={"batches_per_read": 100})
    assert equal(list(Loader(stripes, SPEC, LOCAL).train(0)), list(Loader(stripes, SPEC, more).train(0)))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 50])
def test_processes_give_the_batches_of_the_thread(stripes: shards.Shards, num_tasks: int) -> None:
    processes = PROCESSES.model_copy(update={"num_tasks": num_tasks})
    thread, other = (Loader(stripes, SPEC, config, seed=1) for config in (LOCAL, processes))
    assert equal(list(thread.train(2)), list(other.train(2)))
    assert equal(list(thread.evaluate("val")), list(other.evaluate("val")))


SCRIPT = """
import sys
from pathlib import Path
from pipeline.data import loading, shards
from pipeline.types import InputSpec
print("begun")
config = loading.Config(batch_size=4, reader="local", num_tasks=2)
loader = loading.Loader(shards.load(Path(sys.argv[1])), InputSpec(size_hw=(28, 28)), config)
for epoch in range(2):
    print(sum(map(len, loader.train(epoch))))
print(__file__, __spec__)
"""


def test_processes_import_nothing_of_the_program_that_asks_for_them(stripes: shards.Shards, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without the guard that multiprocessing asks for, as Ray's worker has it elsewhere
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(stripes.path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.splitlines() == ["begun", "40", "40", f"{script} None"], ended.stderr


HUNG = """
import os, sys, time
from pathlib import Path
from pipeline.data import loading, readers, shards
from pipeline.types import InputSpec

hangs = Path(sys.argv[2])

def hang_once():  # in the child, before its fork returns
    if hangs.exists():
        hangs.unlink()
        time.sleep(1000)

os.register_at_fork(after_in_child=hang_once)
readers.HELLO_S = 1.0
config = loading.Config(batch_size=4, reader="local", num_tasks=2)
loader = loading.Loader(shards.load(Path(sys.argv[1])), InputSpec(size_hw=(28, 28)), config)
print(sum(map(len, loader.train(0))))
"""


def test_a_fork_that_hangs_is_done_again(stripes: shards.Shards, tmp_path: Path) -> None:
    script, hangs = tmp_path / "script.py", tmp_path / "hangs"
    script.write_text(HUNG)
    hangs.touch()
    command = [sys.executable, str(script), str(stripes.path), str(hangs)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.splitlines() == ["40"], ended.stderr
    assert not hangs.exists()
    assert "did not begin within 1 s" in ended.stderr


@pytest.mark.parametrize("num_tasks", [0, 1])
def test_a_position_goes_on_without_repeating_or_skipping_a_sample(stripes: shards.Shards, num_tasks: int) -> None:
    whole = Loader(stripes, SPEC, PROCESSES.model_copy(update={"num_tasks": num_tasks}))
    offset = 3 * whole.global_batch_size
    assert equal(list(whole.train(1, offset)), list(whole.train(1))[3:])


def test_batches_of_tasks_come_in_order_and_all_of_them() -> None:
    came = [{"number": np.array([number])} for number in (2, 0, 1, 4)]
    assert [int(columns["number"][0]) for columns in readers._in_order(came[:3], 3)] == [0, 1, 2]
    short = readers._in_order(came, 5)
    assert [int(next(short)["number"][0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"expected 5 batches .* batch 3 \(counted from 0\) never came"):
        next(short)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 5), (5, 2)])
def test_a_position_means_the_same_on_another_number_of_workers(
    stripes: shards.Shards, before: int, after: int
) -> None:
    def step(world_size: int, offset: int, take: int) -> list[str]:
        loaders = [Loader(stripes, SPEC, LOCAL, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [list(loader.train(0, offset))[:take] for loader in loaders]
        return [name for step in zip(*parts, strict=True) for batch in step for name in batch.ids]

    first = step(before, 0, 2)
    rest = step(after, len(first), 99)
    together = [name for batch in Loader(stripes, SPEC, LOCAL).train(0) for name in batch.ids]
    assert len(first) == 2 * before * 4
    assert first + rest == together[: len(first + rest)]
    assert len(together) - len(first + rest) < after * 4


def test_balanced_sampling_draws_a_rare_class_as_often_as_a_frequent_one(stripes: shards.Shards) -> None:
    first = stripes.manifest.of("train")[0]  # 20 pictures of one class and 4 of the other
    manifest = stripes.manifest.model_copy(update={"shards": (first,)})
    config = LOCAL.model_copy(update={"sampling": order.Sampling(balance=True, repeats=2)})
    loader = Loader(shards.Shards(stripes.path, manifest), SPEC, config)
    batches = list(loader.train(0))
    targets = torch.cat([batch.labels for batch in batches])
    assert torch.bincount(targets).tolist() == [12, 12]
    views = {
        name: [b.images[at] for b in batches for at, other in enumerate(b.ids) if other == name]
        for name in batches[0].ids
    }
    assert all(len(found) >= 2 and not torch.equal(found[0], found[1]) for found in views.values())


def test_an_error_in_a_process_is_the_one_sentence(stripes: shards.Shards, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(stripes.path, tmp_path / "copied"))
    source = shards.load(copied)
    (copied / source.manifest.of("val")[0].name).unlink()
    with pytest.raises(DataError, match=r"^\S+val-00000\.parquet: cannot be read as a shard: [^\n]*$"):
        list(Loader(source, SPEC, PROCESSES).evaluate("val"))


def test_steps_per_epoch_counts_whole_global_batches(stripes: shards.Shards) -> None:
    config = loading.Config(batch_size=7, num_tasks=0)
    loaders = [Loader(stripes, SPEC, config, rank=rank, world_size=2) for rank in range(2)]
    assert [loader.steps_per_epoch for loader in loaders] == [2, 2]  # 40 // 14
    assert [len(list(loader.train(0))) for loader in loaders] == [2, 2]


def test_bands_are_loaded_as_stored_and_only_by_a_model_of_as_many(stripes: shards.Shards, tmp_path: Path) -> None:
    """Training pictures become smaller NPY files at ingest, validation keeps the original bytes."""
    rng, decoding = np.random.default_rng(0), imaging.Decoding(formats=("NPY",), num_channels=5)
    bands = rng.integers(0, 256, (40, 60, 5), np.uint8)
    (tmp_path / "x.npy").write_bytes(imaging.encode_npy(bands))
    splits: tuple[Split, ...] = ("train", "val")
    made = [
        make_shard(
            tmp_path / f"{split}.parquet",
            split,
            [Record(f"{split}/x", str(tmp_path / "x.npy"), split, 1)],
            Rows(train_short_side=20, decoding=decoding),
        ).shard
        for split in splits
    ]
    manifest = stripes.manifest.model_copy(update={"shards": tuple(made), "decoding": decoding})
    source, spec = shards.Shards(tmp_path, manifest), InputSpec((16, 16), 20, (0.5,) * 5, (0.2,) * 5, num_channels=5)
    one, plain = LOCAL.model_copy(update={"batch_size": 1}), classify.Augment(crop="none", flip=False)
    loader = Loader(source, spec, one, augment=plain)
    expected = resize(bands, (20, 30))[:, 2:18, 7:23]  # of the stored 20 x 30, which is not scaled again
    for batches in (loader.train(0), loader.evaluate("val")):
        (batch,) = batches
        assert batch.labels.tolist() == [1]
        np.testing.assert_array_equal(batch.images[0].numpy(), expected)
    with pytest.raises(DataError, match=r"holds images of 5 channels, but the model takes 3; choose another model"):
        Loader(source, SPEC, one)


def test_a_split_that_does_not_fill_one_batch_says_what_to_do(stripes: shards.Shards) -> None:
    loader = Loader(stripes, SPEC, loading.Config(batch_size=21, num_tasks=0), world_size=2)
    with pytest.raises(DataError, match="40 training images do not fill one batch of 21 on each of 2 workers; take a"):
        _ = loader.steps_per_epoch


def test_an_image_that_does_not_decode_is_named(stripes: shards.Shards, tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(imaging.encode_png(pixels))
    record = Record("val/a", str(tmp_path / "a.png"), "val", 0)
    shard = make_shard(tmp_path / "val.parquet", "val", [record], Rows()).shard
    jpeg_only = imaging.Decoding(formats=("JPEG",))
    manifest = stripes.manifest.model_copy(update={"shards": (shard,), "decoding": jpeg_only})
    loader = Loader(shards.Shards(tmp_path, manifest), SPEC, LOCAL)
    with pytest.raises(DataError, match=r"image 'val/a' does not decode: .*JPEG.*; run jobs.verify"):
        list(loader.evaluate("val"))


def test_a_shard_that_is_gone_is_named(stripes: shards.Shards, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(stripes.path, tmp_path / "copied"))
    source = shards.load(copied)
    (copied / source.manifest.of("val")[0].name).unlink()
    with pytest.raises(DataError, match=r"val-00000\.parquet: cannot be read as a shard"):
        list(Loader(source, SPEC, LOCAL).evaluate("val"))


def test_a_reader_left_early_ends_its_thread(stripes: shards.Shards) -> None:
    batches = Loader(stripes, SPEC, LOCAL).train(0)
    next(batches)
    assert any(thread.name.startswith("loading") for thread in threading.enumerate())
    del batches
    assert not any(thread.name.startswith("loading") for thread in threading.enumerate())
