"""Ingest, loading, evaluation and batch prediction on a real Ray: nothing lost, nothing half done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import imaging, models
from pipeline.batch import Batch
from pipeline.config import validate
from pipeline.data import ingest, shards
from pipeline.data.datasets import image_folder, uri_list
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.data.rows import make_shard
from pipeline.data.transforms import detect
from pipeline.data.transforms.classify import Augment, evaluation
from pipeline.errors import DataError
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.live import evaluate as count
from pipeline.evaluation.run import evaluate_classifier as evaluate
from pipeline.inference import bulk, bundle
from pipeline.inference.bundle import Bundle
from pipeline.models._contract import Classifier
from pipeline.types import DetectorSpec, Fit, InputSpec, Record

pytestmark = pytest.mark.usefixtures("cluster")

NUM_TRAIN, NUM_VAL = 90, 103
CONFIG = ingest.Config(train_short_side=24, rows_per_shard=32, rows_per_group=8, max_reject_share=0.05)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, bright and dark, JPEG and PNG, of several sizes; one file in train is no image."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, total in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(total):
            name = ("bright", "dark")[number % 2]
            base = 170 if name == "bright" else 40
            pixels = rng.integers(base, base + 60, (30 + number % 7, 33, 3), np.uint8)
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            encoded = imaging.encode_jpeg(pixels) if number % 3 else imaging.encode_png(pixels)
            (folder / f"{number:03d}").write_bytes(encoded)
    (root / "train" / "dark" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def dataset(photos: Path) -> image_folder.Config:
    return image_folder.Config(root=photos)


@pytest.fixture
def made(dataset: image_folder.Config, tmp_path: Path) -> shards.Shards:
    return ingest.ingest(dataset, CONFIG, tmp_path / "shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    config = validate(models.config_of("lenet5"), {"name": "lenet5", "num_classes": 2})
    return bundle.save(tmp_path_factory.mktemp("model") / "b", models.build(config), config, classes=("bright", "dark"))


def test_ingest_keeps_every_image_or_its_reason(made: shards.Shards) -> None:
    manifest = made.manifest
    assert (manifest.num_rows("train"), manifest.num_rows("val")) == (NUM_TRAIN, NUM_VAL)
    assert manifest.class_counts == {"train": (45, 45), "val": (52, 51)}
    (reject,) = pq.read_table(made.path / shards.REJECTS).to_pylist()
    assert (reject["image_id"], reject["class_name"], reject["reason"]) == ("train/dark/notes.txt", "dark", "format")
    sheets = {path.name: imaging.probe(path.read_bytes()) for path in made.path.glob("sheet-*.png")}
    assert sheets.keys() == {"sheet-train.png", "sheet-val.png", "sheet-rejects.png"}
    assert sheets["sheet-train.png"][1] == 8 * (128 + 6) + 6  # four of each class
    rows = [row for shard in manifest.shards for row in pq.read_table(made.path / shard.name).to_pylist()]
    assert len({row["image_id"] for row in rows}) == NUM_TRAIN + NUM_VAL
    for row in rows:
        assert imaging.probe(row["image"]) == (row["height"], row["width"])
        original = min(row["original_height"], row["original_width"])
        stored = min(row["height"], row["width"])
        assert stored == (24 if row["image_id"].startswith("train") else original)


def test_ingest_lets_other_splits_lack_a_class_but_not_training(photos: Path, tmp_path: Path) -> None:
    lines = ["uri,class_name,split", "train/dark/notes.txt,none,train"]
    lines += [f"train/{name}/{number:03d},{name},train" for number, name in enumerate(("bright", "dark"))]
    table = tmp_path / "images.csv"
    table.write_text("\n".join([*lines, "val/dark/001,dark,val"]))
    dataset = uri_list.Config(root=photos, tables=str(table))
    lenient = CONFIG.model_copy(update={"max_reject_share": 1.0})
    with pytest.raises(DataError, match="split 'train': the class 'none' has no usable image, all of its own were"):
        ingest.ingest(dataset, lenient, tmp_path / "shards")
    table.write_text("\n".join([lines[0], *lines[2:], "val/dark/001,dark,val"]))
    manifest = ingest.ingest(dataset, CONFIG, tmp_path / "shards").manifest
    assert (manifest.classes, manifest.class_counts) == (("bright", "dark"), {"train": (1, 1), "val": (0, 1)})
    assert manifest.sizes.keys() == {"train", "val"}


def test_ingest_twice_gives_the_same_bytes_as_one_process(made: shards.Shards, photos: Path, tmp_path: Path) -> None:
    again = ingest.ingest(image_folder.Config(root=photos), CONFIG, tmp_path / "again")
    assert again.manifest == made.manifest  # with the checksum of every file
    val = made.manifest.of("val")[0]
    ids = pq.read_table(made.path / val.name).column("image_id").to_pylist()
    records = tuple(Record(name, str(photos / name), "val", int("dark" in name)) for name in ids)
    alone = make_shard(tmp_path / "alone.parquet", "val", records, CONFIG)
    assert alone.shard
    assert alone.shard.sha256 == val.sha256


def test_ingest_over_the_reject_limit_shows_nothing_and_a_higher_limit_finishes_it(
    dataset: image_folder.Config, made: shards.Shards, tmp_path: Path
) -> None:
    strict = CONFIG.model_copy(update={"max_reject_share": 0.0})
    folder = tmp_path / "strict"
    folder.mkdir()
    with pytest.raises(DataError, match=r"1 of 194 images cannot be used \(format: 1\).*notes.txt"):
        ingest.ingest(dataset, strict, folder / "shards")
    assert all(path.name.startswith(".") for path in folder.iterdir())  # no dataset to be seen
    written = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert written.keys() == {shard.name for shard in made.manifest.shards}
    said: list[tuple[int, int, str]] = []
    after = ingest.ingest(dataset, CONFIG, folder / "shards", lambda *progress: said.append(progress))
    assert said == [(194, 194, "1 rejects")]  # of the earlier run, too
    assert after.manifest == made.manifest
    assert {name: (after.path / name).stat().st_mtime_ns for name in written} == written
    assert list(folder.iterdir()) == [after.path]  # the working folder is gone


def test_ingest_finished_before_is_left_alone_or_refused(made: shards.Shards, dataset: image_folder.Config) -> None:
    written = {path: path.stat().st_mtime_ns for path in made.path.iterdir()}
    assert ingest.ingest(dataset, CONFIG, made.path) == made
    assert {path: path.stat().st_mtime_ns for path in made.path.iterdir()} == written
    with pytest.raises(DataError, match="another configuration"):
        ingest.ingest(dataset, CONFIG.model_copy(update={"seed": 1}), made.path)


def equal(left: Batch, right: Batch) -> bool:
    return (left.ids, left.frames) == (right.ids, right.frames) and bool(
        torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)
    )


@pytest.mark.parametrize("way", ["letterbox", "resize"])
def test_loading_boxes_both_readers_give_the_same_batches(
    boxed_stripes: shards.Shards, way: Literal["letterbox", "resize"]
) -> None:
    spec = DetectorSpec(Fit(way, (48, 64), short_side=40, long_side=60))
    augment = detect.Augment(mosaic=0.5, scale=0.2)
    on_ray = Loading(batch_size=4, reader="ray", num_tasks=2)
    local = on_ray.model_copy(update={"reader": "local"})
    loaders = [Loader(boxed_stripes, spec, config, augment=augment) for config in (on_ray, local)]
    for both in (zip(*(one.train(0) for one in loaders), strict=True),
                 zip(*(one.evaluate("val") for one in loaders), strict=True)):  # fmt: skip
        pairs = list(both)
        assert pairs
        for left, right in pairs:
            assert (left.ids, left.frames, left.objects) == (right.ids, right.frames, right.objects)
            assert torch.equal(left.images, right.images)


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_loading_both_readers_give_the_same_batches(made: shards.Shards, model: Bundle, what: str) -> None:
    spec = model.card.model.input
    for rank in range(2):
        loaders = [
            Loader(
                made,
                spec,
                Loading(batch_size=8, reader=reader, batches_per_read=2),
                augment=Augment(brightness=0.3),
                seed=5,
                rank=rank,
                world_size=2,
            )
            for reader in ("ray", "local")
        ]
        ways = [list(loader.train(1) if what == "train" else loader.evaluate("val")) for loader in loaders]
        assert len(ways[0]) == len(ways[1]) == (5 if what == "train" else 7)
        assert all(map(equal, *ways))


def test_loading_damaged_shard_is_one_sentence(made: shards.Shards, model: Bundle) -> None:
    path = made.path / made.manifest.of("val")[0].name
    path.write_bytes(path.read_bytes()[:-100])
    loader = Loader(made, model.card.model.input, Loading(batch_size=8))
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read as a shard"):
        list(loader.evaluate("val"))


def test_evaluation_of_103_images_is_exact_on_any_number_of_tasks(made: shards.Shards, model: Bundle) -> None:
    network = model.build()
    assert isinstance(network, Classifier)
    alone = Loader(made, network.spec, Loading(batch_size=16, reader="local"))
    expected = count(network, alone.evaluate("val"), 2)
    assert expected.num_images == NUM_VAL
    reports = [evaluate(model, made, "val", batch_size=4, num_tasks=num_tasks) for num_tasks in (1, 2, 3)]
    for report in reports:
        assert report.num_images == NUM_VAL
        assert np.array_equal(report.confusion, expected.confusion)
        assert {name: report.metrics[name] for name in expected.metrics()} == pytest.approx(
            expected.metrics(), abs=1e-6
        )
        assert report.predictions.table().equals(reports[0].predictions.table(), check_metadata=True)
    said = reports[0].predictions
    assert list(said.ids) == sorted(said.ids)
    assert said.right().mean() == pytest.approx(expected.metrics()["top1"])
    assert reports[0].filters is not None
    assert (reports[0].errors is None) == bool(said.right().all())
    assert Counts.empty(2).num_images == 0


def test_evaluation_by_ten_views_averages_the_scores_of_ten_forward_passes(
    made: shards.Shards, model: Bundle, tmp_path: Path
) -> None:
    given = model.card.model.input
    assert isinstance(given, InputSpec)
    spec = dataclasses.replace(given, resize_short=32)
    config = model.card.model.model_copy(update={"input": spec})
    network = models.build_classifier(config).eval()
    ten = bundle.save(tmp_path / "b", network, config, classes=("bright", "dark"))
    report = evaluate(ten, made, "val", views="ten_crop")
    assert report.provenance["views"] == report.predictions.origin.views == "ten_crop"
    said = dict(zip(report.predictions.ids, report.predictions.label_scores, strict=True))
    for row in shards.read(made.path / made.manifest.of("val")[0].name, [0]).to_pylist():
        square = torch.from_numpy(evaluation(row["image"], InputSpec((32, 32), resize_short=32))[0])
        windows = [
            square[:, top : top + 28, left : left + 28] for top, left in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))
        ]
        with torch.no_grad():
            passes = [network(Batch(view[None])).softmax(1) for window in windows for view in (window, window.flip(2))]
        assert said[row["image_id"]] == pytest.approx(float(torch.cat(passes).mean(0)[row["label"]]), abs=1e-5)


def test_evaluation_of_a_flipped_byte_or_other_classes_is_refused(made: shards.Shards, model: Bundle) -> None:
    other = dataclasses.replace(made, manifest=made.manifest.model_copy(update={"classes": ("dark", "bright")}))
    with pytest.raises(DataError, match="classes that are not"):
        evaluate(model, other, "val")
    path = made.path / made.manifest.of("val")[1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: sha256 differs"):
        evaluate(model, made, "val")


@pytest.mark.slow
def test_bulk_prediction_goes_on_where_it_was_stopped(photos: Path, model: Bundle, tmp_path: Path) -> None:
    inputs = bulk.from_folder(photos / "train")
    output = bulk.predict(model, inputs, tmp_path / "out", kept=bulk.Kept(top_k=2), images_per_part=40)
    parts = sorted(output.glob("part-*.parquet"))
    rows = pq.read_table(parts).to_pylist()
    assert len(parts) == 3
    assert [row["image_id"] for row in rows] == sorted(
        str(path) for path in (photos / "train").rglob("*") if path.is_file()
    )
    (bad,) = [row for row in rows if row["error"]]
    assert bad["image_id"].endswith("notes.txt")
    assert bad["class_name"] is None
    before = {path: path.read_bytes() for path in parts}
    parts[1].unlink()
    (output / bulk.DONE).unlink()
    kept = parts[0].stat().st_mtime_ns
    bulk.predict(model, inputs, output, kept=bulk.Kept(top_k=2), images_per_part=40)
    assert {path: path.read_bytes() for path in parts} == before
    assert parts[0].stat().st_mtime_ns == kept
    assert (output / bulk.DONE).exists()
    with pytest.raises(DataError, match="other top_k"):
        bulk.predict(model, inputs, output, kept=bulk.Kept(top_k=1), images_per_part=40)


@pytest.mark.slow
def test_bulk_prediction_of_shards_equals_that_of_their_files(
    made: shards.Shards, model: Bundle, tmp_path: Path
) -> None:
    of_shards = bulk.predict(model, bulk.from_shards(made, "val"), tmp_path / "a", images_per_part=50)
    by_id = {row["image_id"]: row for path in of_shards.glob("part-*") for row in pq.read_table(path).to_pylist()}
    root = Path(str(made.manifest.config["dataset"]["root"]))
    listing = tmp_path / "list.csv"
    listing.write_text("uri\n" + "\n".join(str(root / name) for name in by_id) + f"\n{tmp_path / 'gone.jpg'}\n")
    of_list = bulk.predict(model, bulk.from_list(listing, tmp_path), tmp_path / "b", images_per_part=1000)
    *rows, gone = pq.read_table(next(of_list.glob("part-*"))).to_pylist()
    assert "cannot be read" in gone["error"]
    assert len(rows) == NUM_VAL
    for row in rows:
        expected = by_id[Path(row["image_id"]).relative_to(root).as_posix()]
        assert row["top_class_names"] == expected["top_class_names"]
        assert row["top_scores"] == pytest.approx(expected["top_scores"], abs=1e-6)
