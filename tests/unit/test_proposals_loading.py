"""Region proposals on their way to a detector: each image has its own, moved with it, by every reader and predictor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import boxes, imaging, models
from pipeline.batch import Batch, to_batch
from pipeline.config import parse
from pipeline.data import loading, proposals, regions, shards
from pipeline.data.loading import Loader
from pipeline.data.proposals import Figures, Made, Part
from pipeline.data.transforms import detect, scenes
from pipeline.data.transforms.scenes import Scene
from pipeline.errors import ConfigError, DataError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.models import fast_rcnn
from pipeline.training import tasks
from pipeline.training.recipe import Recipe
from pipeline.types import (
    Detections,
    DetectorSpec,
    Fit,
    Float32Array,
    Frame,
    InputSpec,
    Objects,
    Sample,
    Split,
    no_objects,
)

NAME, ONLY_VAL = "by-hand", "only-val"
THREAD = loading.Config(batch_size=4, num_tasks=0, batches_per_read=2, proposals=NAME)
PROCESSES = THREAD.model_copy(update={"reader": "local", "num_tasks": 2})
LETTERBOX = DetectorSpec(Fit(size_hw=(64, 48)))
RAGGED = DetectorSpec(Fit(way="resize", short_side=40, long_side=60))
TINY: dict[str, Any] = {
    "name": "fast_rcnn",
    "backbone": "squeezenet1_1",
    "num_classes": 2,
    "fc_features": 16,
    "pool_size": 3,
    "input": {"fit": {"way": "resize", "short_side": 48, "long_side": 96}},
}

every_fit = pytest.mark.parametrize("spec", [LETTERBOX, RAGGED], ids=["letterbox", "resize"])
every_local_reader = pytest.mark.parametrize("config", [THREAD, PROCESSES], ids=["thread", "processes"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(boxed_stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """Pictures with boxes and, made by hand, proposals: of all, and of those for validation only."""
    path = tmp_path_factory.mktemp("proposals") / "shards"
    made = shards.load(Path(shutil.copytree(boxed_stripes.path, path)))
    write(made, NAME, ["train", "val"])
    write(made, ONLY_VAL, ["val"])
    return made


def regions_of(row: dict[str, Any]) -> Float32Array:
    """The whole picture; a region that tells pictures apart; each object moved by 1.5 pixels, cut off at the edge."""
    height, width = row["original_height"], row["original_width"]
    number = int(row["image_id"].rsplit("/", 1)[-1].split(".")[0])
    fixed = np.array([[0, 0, width, height], [number / 2, 3, 30, 20]], np.float32)
    return np.concatenate([fixed, boxes.clip(objects_of(row) + np.float32(1.5), (height, width))])


def objects_of(row: dict[str, Any]) -> Float32Array:
    return np.array(row["boxes"], np.float32).reshape(-1, 4)


def groups_of(source: shards.Shards, split: Split) -> Iterator[tuple[Part, list[dict[str, Any]]]]:
    """The parts that proposals of a split come in, and their rows."""
    for shard in source.manifest.of(split):
        for group, num in enumerate(shard.row_groups):
            yield Part(shard.name, group, num), shards.read(source.path / shard.name, [group]).to_pylist()


def rows_of(source: shards.Shards, split: Split) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for _, rows in groups_of(source, split) for row in rows}


def write(source: shards.Shards, name: str, splits: Sequence[Split]) -> None:
    """Proposals as `proposals.make` leaves them."""
    folder = source.path / proposals.FOLDER / name
    folder.mkdir(parents=True)
    figures: dict[Split, Figures] = {}
    for split in splits:
        tables = []
        for part, rows in groups_of(source, split):
            found = [{"image_id": row["image_id"], "boxes": regions_of(row).tolist()} for row in rows]
            told = [{"num_regions": len(one["boxes"]), "best_overlaps": None, "seconds": 1.0} for one in found]
            both = [one | more for one, more in zip(found, told, strict=True)]
            tables.append(pa.Table.from_pylist(both, schema=proposals.SCHEMA))
            pq.write_table(tables[-1], folder / part.file)
        figures[split] = Figures.of(pa.concat_tables(tables))
    manifest = source.manifest
    made = Made(
        dataset=manifest.dataset, digest=manifest.digest, search=regions.Config(), splits=figures, tool_versions={}
    )
    (folder / proposals.INDEX).write_text(made.model_dump_json())


def as_fitted(found: Float32Array, frame: Frame) -> Float32Array:
    """Scaled, shifted, and clipped to the picture within its padding."""
    (left, top), (height, width) = frame.offset_xy, frame.original_hw
    right, bottom = left + round(width * frame.scale_xy[0]), top + round(height * frame.scale_xy[1])
    moved = found * np.array(frame.scale_xy * 2) + np.array(frame.offset_xy * 2)
    clipped: Float32Array = np.clip(moved, [left, top] * 2, [right, bottom] * 2).astype(np.float32)
    return clipped


@every_fit
@every_local_reader
def test_evaluation_gives_each_picture_its_proposals_in_input_pixels(
    source: shards.Shards, spec: DetectorSpec, config: loading.Config
) -> None:
    rows, counts = rows_of(source, "val"), list[int]()
    for batch in Loader(source, spec, config).evaluate("val"):
        assert len(batch.proposals) == len(batch)
        for name, frame, given in zip(batch.ids, batch.frames, batch.proposals, strict=True):
            np.testing.assert_allclose(given.numpy(), as_fitted(regions_of(rows[name]), frame), atol=1e-4)
            assert given.dtype == torch.float32
            counts.append(len(given))
    assert len(counts) == 13
    assert len(set(counts)) > 2


def test_whole_picture_as_a_proposal_leaves_out_the_padding(source: shards.Shards) -> None:
    batches = Loader(source, LETTERBOX, THREAD).evaluate("val")
    wholes = {
        frame.original_hw: given[0].tolist()
        for batch in batches
        for frame, given in zip(batch.frames, batch.proposals, strict=True)
    }
    # 40 x 36 (height x width) into 64 x 48: times 4 / 3 it is 53 x 48, with 5 of the 11 rows that are left above it.
    assert wholes[40, 36] == [0, 5, 48, 58]


@every_fit
def test_processes_give_the_varied_proposals_of_the_thread(source: shards.Shards, spec: DetectorSpec) -> None:
    augment = detect.Augment(iou_crop=0.5, scale=0.2, translate=0.2)
    one, other = (Loader(source, spec, config, augment=augment, seed=3) for config in (THREAD, PROCESSES))
    pairs = list(zip(one.train(1), other.train(1), strict=True))
    assert len(pairs) == 10
    for mine, theirs in pairs:
        assert mine.ids == theirs.ids
        assert len(mine.proposals) == 4
        for given, same, (height, width) in zip(mine.proposals, theirs.proposals, mine.sizes_hw, strict=True):
            assert given.equal(same)
            assert (given >= 0).all()
            assert (given <= torch.tensor([width, height, width, height])).all()
            assert (given[:, 2:] - given[:, :2] >= 1).all()


def test_flips_move_proposals_with_their_objects(source: shards.Shards) -> None:
    rows, kept = rows_of(source, "train"), []
    for batch in Loader(source, LETTERBOX, THREAD, augment=detect.Augment(flip=True)).train(0):
        for name, marked, given in zip(batch.ids, batch.objects, batch.proposals, strict=True):
            before, still = regions_of(rows[name]), LETTERBOX.fit.frame(hw_of(rows[name]))
            assert len(marked) == len(rows[name]["boxes"])
            overlaps = boxes.iou(given.numpy(), marked.boxes_xyxy)
            np.testing.assert_allclose(overlaps, boxes.iou(before, objects_of(rows[name])), atol=1e-4)
            kept.append(bool(np.allclose(given.numpy(), as_fitted(before, still), atol=1e-3)))
    assert 5 < sum(kept) < 35  # of 40


def hw_of(row: dict[str, Any]) -> tuple[int, int]:
    return row["original_height"], row["original_width"]


def scene_of(found: list[list[float]], size_hw: tuple[int, int] = (40, 60)) -> Scene:
    return Scene(np.zeros((*size_hw, 3), np.uint8), no_objects(), proposals=np.array(found, np.float32))


def test_flip_mirrors_proposals() -> None:
    flipped = scenes.flip(scene_of([[0, 5, 20, 10], [30, 1, 60, 40]]))
    assert flipped.proposals.tolist() == [[40, 5, 60, 10], [0, 1, 30, 40]]


def test_crop_cuts_proposals_off_however_little_is_left_and_drops_those_outside() -> None:
    given = scene_of([[10, 10, 30, 30], [0, 0, 8, 5], [47, 10, 60, 20]])
    cropped = scenes.crop(given, (8, 8, 48, 28), min_visible=0.9)
    assert cropped.proposals.tolist() == [[2, 2, 22, 20], [39, 2, 40, 12]]


def test_training_drops_proposals_under_a_pixel_and_evaluation_keeps_them() -> None:
    given, fit = scene_of([[0, 0, 5, 50], [10, 20, 60, 30]], (100, 100)), Fit("stretch", (10, 10))
    wide = [1, 2, 6, 3]
    view = detect.training([given], fit, detect.Augment(flip=False), np.random.default_rng(0))
    assert view.proposals.tolist() == [wide]
    data = imaging.encode_png(given.image)
    shown = detect.evaluation(data, fit, proposals=given.proposals)
    assert shown.proposals.tolist() == [[0, 0, 0.5, 5], wide]


def test_objects_that_are_proposed_stay_proposed_however_the_picture_is_varied() -> None:
    augment = detect.Augment(iou_crop=0.7, scale=0.3, translate=0.3, min_visible=0)
    num = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        corners = rng.uniform(0, 30, (3, 2))
        marked = np.concatenate([corners, corners + rng.uniform(3, 20, (3, 2))], axis=1).astype(np.float32)
        none = np.zeros(3, np.bool_)
        scene = Scene(
            np.zeros((50, 60, 3), np.uint8), Objects(marked, np.arange(3), none, none, none), proposals=marked
        )
        view = detect.training([scene], LETTERBOX.fit, augment, rng)
        proposed = view.proposals.tolist()
        assert all(box in proposed for box in view.objects.boxes_xyxy.tolist())
        num += len(view.objects)
    assert num > 100


def test_detector_without_proposals_is_given_none(source: shards.Shards) -> None:
    plain = THREAD.model_copy(update={"proposals": None})
    assert next(Loader(source, LETTERBOX, plain).evaluate("val")).proposals == ()
    assert next(Loader(source, LETTERBOX, plain).train(0)).proposals == ()


def test_loader_refuses_proposals_where_they_do_not_belong(source: shards.Shards) -> None:
    with pytest.raises(ConfigError, match=r"loading\.proposals are for a detector"):
        Loader(source, InputSpec((32, 32)), THREAD)
    with pytest.raises(ConfigError, match=r"augment\.mosaic cannot be used with loading\.proposals"):
        Loader(source, LETTERBOX, THREAD, augment=detect.Augment(mosaic=0.5))
    with pytest.raises(ConfigError, match="pattern"):
        parse(loading.Config, {"proposals": "../elsewhere"}, "here")


def test_proposals_that_were_not_made_are_named(source: shards.Shards) -> None:
    with pytest.raises(DataError, match=r"other: no such proposals were made \(known: by-hand, only-val\)"):
        Loader(source, LETTERBOX, THREAD.model_copy(update={"proposals": "other"}))
    loader = Loader(source, LETTERBOX, THREAD.model_copy(update={"proposals": ONLY_VAL}))
    assert len(list(loader.evaluate("val"))) == 4
    with pytest.raises(DataError, match="only-val: has no proposals of the split 'train', only of val; run"):
        loader.train(0)


def recipe(**given: Any) -> Recipe:
    read = {"batch_size": 4, "reader": "local", "num_tasks": 0} | given
    return parse(Recipe, {"model": TINY, "loading": read, "epochs": 1}, "here")


def test_fast_rcnn_learns_from_the_proposals_that_the_recipe_names(source: shards.Shards) -> None:
    given = recipe(proposals=NAME)
    torch.manual_seed(0)
    model = models.build(given.model)
    loader = Loader(source, model.spec, given.loading, augment=given.augment)
    task = tasks.of(model, given, loader, "cpu")
    batch = next(loader.train(0))
    losses = task.losses(model(batch), batch)
    assert losses["classifier"].item() > 0
    assert losses["box_reg"].item() > 0
    with pytest.raises(ConfigError, match=r"proposals: fast_rcnn judges regions .* loading\.proposals"):
        tasks.of(model, recipe(), loader, "cpu")


def test_samples_bring_their_proposals_into_a_batch_only_if_all_have_some() -> None:
    image, frame = np.zeros((3, 4, 6), np.uint8), Frame((4, 6), (4, 6))
    found = [np.array([[0, 1, 2, 3]] * num, np.float32).reshape(-1, 4) for num in (2, 0)]
    samples = [Sample(image, frame, proposals=one) for one in found]
    batch = to_batch(samples)
    assert [one.tolist() for one in batch.proposals] == [[[0, 1, 2, 3], [0, 1, 2, 3]], []]
    assert to_batch([*samples, Sample(image, frame)]).proposals == ()
    assert batch.part(0, 1).proposals[0].equal(batch.proposals[0])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    torch.manual_seed(0)
    config = parse(fast_rcnn.Config, TINY, "here")
    path = tmp_path_factory.mktemp("bundles") / "fast"
    return Predictor(bundle.save(path, models.build(config), config, classes=("round", "square")))


def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A light and a dark rectangle, 60 x 90."""
    pixels = np.full((60, 90, 3), 128, np.uint8)
    pixels[10:40, 12:36] = (230, 200, 40)
    pixels[24:52, 50:80] = (20, 40, 90)
    return pixels


def test_predictor_finds_the_regions_of_a_picture_itself(predictor: Predictor) -> None:
    data = imaging.encode_png(picture())
    (answer,) = predictor.predict([data])
    assert isinstance(answer, Detections)

    found = regions.selective_search(picture(), regions.Config())
    assert len(found) > 4
    # The short side of 60 to 48: 48 x 72, so that both axes are scaled by 0.8.
    frame = Frame((60, 90), (48, 72), (0.8, 0.8))
    view = detect.evaluation(data, predictor.model.spec.fit)  # type: ignore[union-attr]
    batch = Batch(
        torch.from_numpy(view.image)[None], frames=(frame,), proposals=(torch.from_numpy(found * np.float32(0.8)),)
    )
    with torch.inference_mode():
        (alone,) = predictor.model.postprocess(predictor.model(batch), batch.frames)
    assert isinstance(alone, Detections)
    assert len(answer) > 0
    np.testing.assert_array_equal(answer.labels, alone.labels)
    np.testing.assert_allclose(answer.scores, alone.scores, atol=1e-5)
    np.testing.assert_allclose(answer.boxes_xyxy, alone.boxes_xyxy, atol=1e-2)


def test_predictor_with_proposals_warms_up_and_answers_beside_a_bad_image(predictor: Predictor) -> None:
    assert predictor.card.model.needs_proposals
    predictor.warm_up(2)
    bad, good = predictor.predict([b"text", imaging.encode_png(picture())])
    assert isinstance(good, Detections)
    assert not isinstance(bad, Detections)
