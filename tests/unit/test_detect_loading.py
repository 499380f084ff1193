"""What a detector is fed: boxes that move with their pictures, ragged sizes, the same batches by every reader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batch import PADDING, Batch, BoxTargets, to_batch
from pipeline.data import loading, order, shards
from pipeline.data.loading import Loader
from pipeline.data.transforms import classify, detect
from pipeline.errors import ConfigError, DataError
from pipeline.types import DetectorSpec, Fit, Frame, InputSpec, Objects, Sample

LOCAL = loading.Config(batch_size=4, num_tasks=0, batches_per_read=2)
PROCESSES = LOCAL.model_copy(update={"reader": "local", "num_tasks": 2})
LETTERBOX = DetectorSpec(Fit(size_hw=(64, 48)))
RAGGED = DetectorSpec(Fit(way="resize", short_side=40, long_side=60))
VARIED = detect.Augment(mosaic=0.5, iou_crop=0.5, scale=0.2, translate=0.2)

every_fit = pytest.mark.parametrize("spec", [LETTERBOX, RAGGED], ids=["letterbox", "resize"])


def boxes_of(batch: Batch) -> BoxTargets:
    assert isinstance(batch.targets, BoxTargets)
    return batch.targets


def equal(one: Batch, other: Batch) -> bool:
    mine, theirs = boxes_of(one), boxes_of(other)
    same = (getattr(mine, name).equal(getattr(theirs, name)) for name in ("boxes_xyxy", "labels", "of_image"))
    return (
        (one.ids, one.frames, one.objects) == (other.ids, other.frames, other.objects)
        and one.images.equal(other.images)
        and all(same)
    )


def rows_of(source: shards.Shards) -> dict[str, dict[str, Any]]:
    files = source.manifest.of("val")
    tables = (shards.read(source.path / file.name, list(range(len(file.row_groups)))) for file in files)
    return {row["image_id"]: row for table in tables for row in table.to_pylist()}


@every_fit
def test_evaluation_keeps_every_object_where_the_shards_have_it(
    boxed_stripes: shards.Shards, spec: DetectorSpec
) -> None:
    rows, seen = rows_of(boxed_stripes), list[str]()
    for batch in Loader(boxed_stripes, spec, LOCAL).evaluate("val"):
        seen += batch.ids
        for name, marked, frame, (boxes, labels) in zip(
            batch.ids, batch.objects, batch.frames, boxes_of(batch).per_image(), strict=True
        ):
            row = rows[name]
            assert marked.boxes_xyxy.tolist() == row["boxes"]
            for flag in ("difficult", "truncated", "crowd"):
                assert getattr(marked, flag).tolist() == row[flag]
            assert frame.original_hw == (row["original_height"], row["original_width"])
            alone = ~marked.crowd
            assert labels.tolist() == marked.labels[alone].tolist()
            np.testing.assert_allclose(frame.to_original(boxes.numpy()), marked.boxes_xyxy[alone], atol=1e-3)
    assert sorted(seen) == sorted(rows)


@every_fit
def test_processes_give_the_batches_of_the_thread(boxed_stripes: shards.Shards, spec: DetectorSpec) -> None:
    one = Loader(boxed_stripes, spec, LOCAL, augment=VARIED, seed=3)
    other = Loader(boxed_stripes, spec, PROCESSES, augment=VARIED, seed=3)
    for epoch in (0, 1):
        pairs = list(zip(one.train(epoch), other.train(epoch), strict=True))
        assert len(pairs) == 10
        assert all(equal(*pair) for pair in pairs)
    assert not equal(next(one.train(0)), next(one.train(1)))


def test_mosaic_is_made_of_different_pictures_of_the_batch(boxed_stripes: shards.Shards) -> None:
    loader = Loader(boxed_stripes, LETTERBOX, LOCAL, augment=detect.Augment(mosaic=1.0, flip=False))
    plain = Loader(boxed_stripes, LETTERBOX, LOCAL, augment=detect.Augment(flip=False))
    mixed, alone = (next(one.train(0)) for one in (loader, plain))
    assert mixed.ids == alone.ids
    assert not mixed.images.equal(alone.images)
    with pytest.raises(ConfigError, match="takes 4 pictures of a batch"):
        Loader(boxed_stripes, LETTERBOX, loading.Config(batch_size=3), augment=VARIED)


def test_picture_that_does_not_decode_is_named_also_as_a_part_of_a_mosaic(
    boxed_stripes: shards.Shards, tmp_path: Path
) -> None:
    table = shards.read(boxed_stripes.path / boxed_stripes.manifest.of("train")[0].name, [0], None).slice(0, 4)
    images = [b"junk" if at == 2 else value.as_py() for at, value in enumerate(table.column("image"))]
    source = written(boxed_stripes, table.set_column(1, "image", [pa.array(images, pa.binary())]), tmp_path)
    name = table.column("image_id")[2].as_py()
    with pytest.raises(DataError, match=f"image '{name}' does not decode"):
        list(Loader(source, LETTERBOX, LOCAL, augment=detect.Augment(mosaic=1.0)).train(0))


def test_picture_that_was_not_annotated_is_refused(stripes: shards.Shards) -> None:
    with pytest.raises(DataError, match="has no annotation of objects"):
        list(Loader(stripes, LETTERBOX, LOCAL).evaluate("val"))


def written(like: shards.Shards, table: pa.Table, folder: Path) -> shards.Shards:
    """Shards of one file for training that holds `table`."""
    name = "train-00000.parquet"
    pq.write_table(table, folder / name)
    (one, *_) = like.manifest.of("train")
    shard = one.model_copy(update={"name": name, "row_groups": (len(table),)})
    return shards.Shards(folder, like.manifest.model_copy(update={"shards": (shard,)}))


@every_fit
def test_training_boxes_lie_within_their_pictures(boxed_stripes: shards.Shards, spec: DetectorSpec) -> None:
    num = 0
    for batch in Loader(boxed_stripes, spec, LOCAL, augment=VARIED).train(0):
        assert batch.images.shape[2:] == tuple(map(max, zip(*batch.sizes_hw, strict=True)))
        for (height, width), (boxes, _) in zip(batch.sizes_hw, boxes_of(batch).per_image(), strict=True):
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([width, height, width, height])).all()
            num += len(boxes)
    assert num > 20


def test_pictures_of_several_sizes_are_padded_at_the_right_and_the_bottom(boxed_stripes: shards.Shards) -> None:
    batches = list(Loader(boxed_stripes, RAGGED, LOCAL).evaluate("val"))
    assert len({size for batch in batches for size in batch.sizes_hw}) > 2
    for batch in batches:
        for image, (height, width) in zip(batch.images, batch.sizes_hw, strict=True):
            assert (image[:, height:] == PADDING).all()
            assert (image[:, :, width:] == PADDING).all()


def test_ranks_share_the_rows(boxed_stripes: shards.Shards) -> None:
    ranks = [Loader(boxed_stripes, LETTERBOX, LOCAL, rank=rank, world_size=3) for rank in range(3)]
    ids = [name for loader in ranks for batch in loader.evaluate("val") for name in batch.ids]
    assert sorted(ids) == sorted(rows_of(boxed_stripes))
    trained = [name for loader in ranks for batch in loader.train(0) for name in batch.ids]
    assert len(set(trained)) == len(trained) == 36


@pytest.mark.parametrize(
    ("config", "augment", "message"),
    [
        ({"decode": "gpu", "reader": "local"}, None, "knows no boxes"),
        ({"sampling": order.Sampling(balance=True)}, None, "one class for each image"),
        ({}, classify.Augment(), "of the model's task"),
    ],
)
def test_what_needs_a_class_for_each_image_is_refused(
    boxed_stripes: shards.Shards, config: dict[str, Any], augment: loading.Augment | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Loader(boxed_stripes, LETTERBOX, loading.Config(batch_size=4, **config), augment=augment)
    with pytest.raises(ConfigError, match="of the model's task"):
        Loader(boxed_stripes, InputSpec((28, 28)), LOCAL, augment=detect.Augment())


def test_colours_are_not_varied_where_there_are_none(boxed_stripes: shards.Shards) -> None:
    manifest = boxed_stripes.manifest
    decoding = manifest.decoding.model_copy(update={"num_channels": 5})
    source = shards.Shards(boxed_stripes.path, manifest.model_copy(update={"decoding": decoding}))
    spec = DetectorSpec(mean=(0.5,) * 5, std=(0.2,) * 5, num_channels=5)
    with pytest.raises(ConfigError, match="hue needs RGB"):
        Loader(source, spec, LOCAL, augment=detect.Augment(hue=0.1))


def objects(boxes: list[list[float]], crowd: list[bool]) -> Objects:
    num = len(boxes)
    no = np.zeros(num, bool)
    return Objects(np.array(boxes, np.float32).reshape(num, 4), np.arange(num), no, no, np.array(crowd, bool))


def test_targets_are_the_boxes_in_input_pixels_without_crowds() -> None:
    marked = objects([[0, 0, 10, 20], [5, 5, 9, 9]], [False, True])
    frame = Frame((40, 40), (20, 80), (2.0, 0.5), (3.0, 0.0))
    targets = BoxTargets.of([objects([], []), marked], [frame, frame])
    assert targets.boxes_xyxy.tolist() == [[3, 0, 23, 10]]
    assert (targets.labels.tolist(), targets.of_image.tolist(), len(targets)) == ([0], [1], 2)
    assert [len(labels) for _, labels in targets.per_image()] == [0, 1]


def test_part_of_a_batch_has_its_own_objects_and_frames() -> None:
    pixels, frame = np.zeros((3, 4, 4), np.uint8), Frame((4, 4), (4, 4))
    samples = [
        Sample(pixels, frame, image_id=str(num), objects=objects([[0, 0, 1, num + 1]] * num, [False] * num))
        for num in range(4)
    ]
    whole = to_batch(samples)
    part = whole.part(2, 4)
    assert (part.ids, len(part), len(part.frames), len(part.objects)) == (("2", "3"), 2, 2, 2)
    assert boxes_of(part).of_image.tolist() == [0, 0, 1, 1, 1]
    assert boxes_of(part).boxes_xyxy[:, 3].tolist() == [3, 3, 4, 4, 4]
    assert boxes_of(whole.part(0, 1)).boxes_xyxy.shape == (0, 4)


def test_samples_of_several_sizes_are_stacked_with_padding() -> None:
    samples = [
        Sample(np.full((3, *size), 7, np.uint8), Frame(size, size), image_id=str(size)) for size in ((4, 6), (5, 3))
    ]
    batch = to_batch(samples)
    assert batch.images.shape == (2, 3, 5, 6)
    assert batch.sizes_hw == [(4, 6), (5, 3)]
    assert (batch.images[0, :, 4:] == PADDING).all()
    assert (batch.images[1, :, :, 3:] == PADDING).all()
    assert batch.targets is None


def test_samples_of_different_channels_are_refused() -> None:
    samples = [Sample(np.zeros((num, 4, 4), np.uint8), Frame((4, 4), (4, 4))) for num in (3, 1)]
    with pytest.raises(ValueError, match="same channels"):
        to_batch(samples)


def test_spec_and_fit_refuse_what_no_picture_can_be() -> None:
    with pytest.raises(ValueError, match="smaller than short_side"):
        Fit(way="resize", short_side=600, long_side=400)
    with pytest.raises(ValueError, match="positive"):
        Fit(size_hw=(0, 4))
    with pytest.raises(ValueError, match="every std positive"):
        dataclasses.replace(LETTERBOX, std=(1.0, 1.0, 0.0))
