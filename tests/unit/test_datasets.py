"""The datasets one by one: counts, labels, and folders or files that contradict themselves."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline import boxes, imaging
from pipeline.config import parse
from pipeline.data import datasets
from pipeline.data.datasets import digit_scenes, digits, image_folder, mnist
from pipeline.errors import ConfigError, DataError


def folder(root: Path, *files: str) -> image_folder.Config:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content is not looked at")
    return image_folder.Config(root=root)


def idx(values: Any) -> bytes:
    array = np.asarray(values, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(root: Path, prefix: str, count: int) -> None:
    (root / "raw").mkdir(parents=True, exist_ok=True)
    images = np.arange(count)[:, None, None] * np.ones((28, 28))
    (root / "raw" / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
    (root / "raw" / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))


def test_digits_are_split_by_class_and_written_once(tmp_path: Path) -> None:
    config = digits.Config(png=tmp_path)
    train, val = (list(digits.records(config, split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    every, held_out = (Counter(record.label for record in part) for part in (train + val, val))
    assert all(held_out[label] == every[label] // 5 for label in range(10))
    image = imaging.decode(Path(train[0].uri).read_bytes())
    assert (image.shape, image.min(), image.max()) == ((8, 8, 3), 0, 239)  # row 0 is a zero whose ink reaches 15 of 16
    Path(val[0].uri).write_bytes(b"kept")
    assert list(digits.records(config, "val")) == val
    assert Path(val[0].uri).read_bytes() == b"kept"


SCENES: dict[str, Any] = {"num_scenes": (12, 6), "size_hw": (96, 128), "sides": (16, 40)}


def test_digit_scenes_hold_digits_apart_from_each_other_and_of_the_given_size(tmp_path: Path) -> None:
    config = digit_scenes.Config(png=tmp_path, **SCENES)
    found = list(digit_scenes.records(config, "train"))
    assert len(found) == 12
    assert {len(record.objects) for record in found if record.objects is not None} <= set(range(1, 7))
    for record in found:
        assert record.objects is not None
        boxes_xyxy = record.objects.boxes_xyxy
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        assert (sides >= 3).all()
        assert (sides <= 40 * 1.2 + 1).all()
        assert (boxes_xyxy >= 0).all()
        assert (boxes_xyxy <= [128, 96, 128, 96]).all()
        near = boxes.iou(boxes_xyxy, boxes_xyxy) - np.eye(len(boxes_xyxy))
        assert near.max(initial=0) <= digit_scenes.MAX_IOU + 1e-9


def test_digit_scenes_have_ink_in_their_boxes_and_none_around(tmp_path: Path) -> None:
    config = digit_scenes.Config(png=tmp_path, num_scenes=(20, 1), digits=(1, 1))
    for record in digit_scenes.records(config, "train"):
        assert record.objects is not None
        pixels = imaging.decode(Path(record.uri).read_bytes()).astype(float)
        left, top, right, bottom = record.objects.boxes_xyxy[0].astype(int)
        outside = np.ones(pixels.shape[:2], bool)
        outside[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = False
        from_around = np.abs(pixels - np.median(pixels[outside], axis=0)).mean(axis=2)
        assert from_around[top:bottom, left:right].max() > 1.5 * np.percentile(from_around[outside], 90)


def test_digit_scenes_follow_from_the_seed_their_split_and_their_number(tmp_path: Path) -> None:
    def bytes_of(folder: str, **keys: Any) -> list[bytes]:
        config = digit_scenes.Config(png=tmp_path / folder, **{**SCENES, **keys})
        return [Path(record.uri).read_bytes() for record in digit_scenes.records(config, "train")]

    first = bytes_of("a")
    assert bytes_of("b", num_scenes=(5, 1)) == first[:5]
    assert bytes_of("c", seed=1)[0] != first[0]
    with pytest.raises(ConfigError, match="train and val only"):
        next(digit_scenes.records(digit_scenes.Config(png=tmp_path), "test"))


@pytest.mark.parametrize(
    ("keys", "message"), [({"sides": (40, 20)}, "smaller number first"), ({"sides": (20, 90)}, "does not fit a scene")]
)
def test_digit_scenes_that_cannot_be_drawn_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        digit_scenes.Config(**{**SCENES, **keys})


def test_digits_have_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="splits train and val only"):
        next(digits.records(digits.Config(png=tmp_path), "test"))


def test_mnist_is_read_plain_and_packed_with_the_last_rows_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "NUM_VAL", 3)
    for prefix, count in (("train", 13), ("t10k", 4)):
        mnist_files(tmp_path, prefix, count)
    config = mnist.Config(root=tmp_path, png=tmp_path / "png")
    found = {split: list(mnist.records(config, split)) for split in config.splits}
    assert {split: [record.label for record in records] for split, records in found.items()} == {
        "train": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        "val": [0, 1, 2],
        "test": [0, 1, 2, 3],
    }
    assert imaging.decode(Path(found["val"][0].uri).read_bytes())[0, 0].tolist() == [10, 10, 10]


def test_mnist_with_other_counts_of_images_and_labels_is_refused(tmp_path: Path) -> None:
    mnist_files(tmp_path, "train", 13)
    (tmp_path / "raw/train-labels-idx1-ubyte").write_bytes(idx([1, 2]))  # the plain file wins
    with pytest.raises(DataError, match="13 train images but 2 labels"):
        next(mnist.records(mnist.Config(root=tmp_path, png=tmp_path / "png"), "train"))


GOOD = idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\x08", b"\0\0\x08\x02\0\0", GOOD[:-1], GOOD + b"\0", b"\0\0\x0d" + GOOD[3:], b"\0\0\x08\0"]
)
def test_idx_that_is_not_what_its_header_says_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(DataError, match=f"expected an IDX file of bytes, got {len(data)} bytes"):
        mnist.read_idx(tmp_path / "a")


def test_idx_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\[\.gz\] is missing; .*dataset\.download=true"):
        mnist.read_idx(tmp_path / "a")


@pytest.mark.parametrize("damage", ["torn", "flipped", "no gzip"])
def test_idx_in_a_damaged_gzip_file_is_named(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(idx(np.random.default_rng(0).integers(0, 9, (50, 50))))
    middle = bytearray(packed)
    middle[40:60] = b"\xff" * 20
    data = {"torn": packed[:50], "flipped": bytes(middle), "no gzip": b"hello"}[damage]
    (tmp_path / "a.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.gz: not a readable gzip file"):
        mnist.read_idx(tmp_path / "a")


def test_image_folder_takes_every_visible_file_at_any_depth(tmp_path: Path) -> None:
    config = folder(
        tmp_path,
        *("train/b/1.jpg", "train/b/deep/0.PNG", "train/B/x", "val/b/1", "val/B/1"),
        *("train/b/.hidden.jpg", "train/b/.ipynb_checkpoints/1.jpg", "train/.cache/1.jpg", "train/notes.txt"),
    )
    assert image_folder.class_names(config) == ("B", "b")  # as text: capitals first
    found = [(record.image_id, record.label) for record in image_folder.records(config, "train")]
    assert found == [("train/B/x", 0), ("train/b/1.jpg", 1), ("train/b/deep/0.PNG", 1)]


def test_image_folder_whose_splits_disagree_names_the_odd_folders(tmp_path: Path) -> None:
    config = folder(tmp_path, "train/a/1", "train/b/1", "train/c/1", "val/a/1", "val/b/1", "val/dogs/1")
    with pytest.raises(DataError, match="'val' has 'dogs' that 'train' lacks and lacks 'c'; move the odd folders away"):
        image_folder.class_names(config)
    with pytest.raises(DataError, match="dogs"):
        list(image_folder.records(config, "train"))


def test_image_folder_with_an_extra_folder_names_only_that(tmp_path: Path) -> None:
    config = folder(tmp_path, "train/a/1", "train/b/1", "val/a/1", "val/b/1", "val/dogs/1")
    with pytest.raises(DataError, match="'val' has 'dogs' that 'train' lacks; move"):
        image_folder.class_names(config)


def test_image_folder_with_an_empty_class_names_it(tmp_path: Path) -> None:
    config = folder(tmp_path, "train/a/1", "train/b/.keep", "val/a/1", "val/b/1")
    with pytest.raises(DataError, match="the class 'b' has no image"):
        list(image_folder.records(config, "train"))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (("train/a/1", "train/b/1"), "val is not a folder; expected"),
        (("train/a/1", "val/a/1"), "expected at least two class folders, found 1"),
    ],
)
def test_image_folder_of_another_layout_says_what_was_expected(
    tmp_path: Path, files: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        image_folder.class_names(folder(tmp_path, *files))


def test_root_that_is_missing_or_no_folder_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'image_folder': root is missing; .*dataset.root=photos"):
        datasets.class_names(image_folder.Config())
    with pytest.raises(DataError, match=r"none is not a folder; set dataset.root, data_root or .*VENTRAL_DATA"):
        datasets.class_names(image_folder.Config(root=tmp_path / "none"))


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'mnits'; did you mean 'mnist'"):
        datasets.config_of("mnits")


@pytest.mark.parametrize("splits", [[], ["train", "train"], ["train", "valid"]])
def test_splits_that_are_none_twice_or_unknown_are_refused(splits: list[str]) -> None:
    with pytest.raises(ConfigError, match="splits"):
        parse(image_folder.Config, {"splits": splits}, "here")


def test_at_takes_data_root_then_the_environment_then_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = image_folder.Config(root=Path("photos"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VENTRAL_DATA", raising=False)
    assert config.at(None, Path("storage")).root == str(tmp_path / "photos")
    monkeypatch.setenv("VENTRAL_DATA", "/env")
    assert config.at(None, Path("storage")).root == "/env/photos"
    assert config.at(Path("/given"), Path("storage")).root == "/given/photos"


def test_at_keeps_absolute_paths_expands_home_and_puts_arrays_into_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_folder.Config(root=Path("/abs")).at(Path("/given"), Path("/s")).root == "/abs"
    assert image_folder.Config(root=Path("~/x")).at(Path("/given"), Path("/s")).root == str(tmp_path / "x")
    assert image_folder.Config(root=Path("x")).at(Path("~/d"), Path("/s")).root == str(tmp_path / "d/x")
    assert image_folder.Config().at(Path("/given"), Path("/s")).root is None
    placed = digits.Config().at(Path("/given"), Path("/s"))
    assert isinstance(placed, digits.Config)
    assert placed.png == Path("/s/digits")
