"""Picture sheets: what is drawn lies where it should, nothing leaves its tile, and the choice is a seed's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import imaging
from pipeline.data import shards, sheet
from pipeline.data.sheet import GAP_PX, GREY, PAPER, Tile, colour_of
from pipeline.errors import DataError
from pipeline.types import UInt8Array

CLASSES = ("cat", "dog", "emu")
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)
LONG = "a name that no tile holds, " * 40 + "\x07\U0001f63a" + "W" * 500


def plain(colour: tuple[int, int, int], size_hw: tuple[int, int] = (40, 40)) -> UInt8Array:
    return np.full((*size_hw, 3), colour, np.uint8)


def drawn(*tiles: Tile, columns: int = 8, tile_px: int = 64) -> UInt8Array:
    return imaging.decode(sheet.sheet(tiles, columns, tile_px))


def share(image: UInt8Array, colour: tuple[int, int, int]) -> float:
    """Share of an image's pixels that have exactly this colour."""
    return float((image == colour).all(axis=2).mean())


def make(path: Path, rows: list[dict[str, Any]], rejects: list[dict[str, Any]] | None = None) -> shards.Shards:
    """A dataset of one shard in row groups of 4; rows need an image and what differs from the rest."""
    path.mkdir()
    with shards.Writer(path / "train-00000.parquet", "train", 4) as writer:
        for number, row in enumerate(rows):
            size = {f"{prefix}{side}": 40 for prefix in ("", "original_") for side in ("height", "width")}
            writer.add({"image_id": f"train/{number}", **size} | row)
    assert writer.shard is not None
    pq.write_table(pa.Table.from_pylist(rejects or [], schema=shards.REJECT_SCHEMA), path / shards.REJECTS)
    return shards.Shards(
        path,
        shards.Manifest(
            dataset="pets",
            classes=CLASSES,
            class_counts={},
            num_rejects=len(rejects or []),
            shards=(writer.shard,),
            digest="0" * 64,
            decoding=imaging.Decoding(),
            config={},
            tool_versions={},
        ),
    )


def coloured(*items: tuple[tuple[int, int, int], int]) -> list[dict[str, Any]]:
    return [{"image": imaging.encode_png(plain(colour)), "label": label} for colour, label in items]


def page(source: shards.Shards, **options: Any) -> UInt8Array:
    """The only page of a dataset."""
    (png,) = sheet.of_dataset(source, "train", **options)
    return imaging.decode(png)


def test_sheet_puts_tiles_in_rows() -> None:
    tiles = [Tile(plain(colour), "") for colour in (RED, GREEN, BLUE)]
    image = drawn(*tiles, columns=2, tile_px=64)
    assert image.shape == (2 * (64 + 28) + 3 * GAP_PX, 2 * 64 + 3 * GAP_PX, 3)
    at = GAP_PX + 32, 2 * GAP_PX + 64 + 32
    assert [tuple(image[y, x].tolist()) for y, x in ((at[0], at[0]), (at[0], at[1]), (at[0] + 98, at[0]))] == [
        RED,
        GREEN,
        BLUE,
    ]


def test_sheet_keeps_the_aspect_and_shows_small_pictures_pixel_by_pixel() -> None:
    wide = drawn(Tile(plain(RED, (10, 40)), ""))
    rows, columns = np.nonzero((wide == RED).all(axis=2))
    assert (rows.max() - rows.min(), columns.max() - columns.min()) == (15, 63)
    checker = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    picture = drawn(Tile(checker, ""))[GAP_PX : GAP_PX + 64, GAP_PX : GAP_PX + 64]
    assert np.array_equal(picture, checker.repeat(8, axis=0).repeat(8, axis=1))


@pytest.mark.parametrize("shape", [(1, 3000, 3), (3000, 1, 3), (5, 5, 1), (5, 5, 2), (5, 5, 6)])
def test_sheet_shows_any_shape_and_number_of_bands(shape: tuple[int, ...]) -> None:
    assert share(drawn(Tile(np.full(shape, 77, np.uint8), "")), (77, 77, 77)) > 0


def test_sheet_of_no_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        sheet.sheet([])


def test_boxes_lie_on_the_pixels_that_they_hold() -> None:
    corners = np.array([[10, 20, 30, 40]], np.float32)  # of an image of 40 x 40, enlarged to 80
    image = drawn(Tile(plain(RED), "", corners, np.array([1])), tile_px=80)[GAP_PX : GAP_PX + 80, GAP_PX : GAP_PX + 80]
    rows, columns = np.nonzero((image == colour_of(1)).all(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (20, 40, 60, 80)
    assert len(rows) == 2 * 40 + 2 * 38  # an outline of one pixel


def test_boxes_have_the_colours_of_their_labels() -> None:
    corners = np.array([[0, 0, 9, 9], [20, 20, 30, 30], [5, 25, 12, 39]], np.float32)
    image = drawn(Tile(plain(RED), "", corners, np.array([0, 1, 0]), ("cat", "dog", "cat")))
    assert share(image, colour_of(0)) > 0 < share(image, colour_of(1))
    assert share(image, colour_of(2)) == 0
    assert len({colour_of(label) for label in range(90)}) == 90


def test_captions_never_leave_their_tile() -> None:
    corners = np.array([[0, 0, 40, 40], [39, 39, 40, 40], [-50, -50, 900, 900], [7, 7, 7, 7], [9, 9, 2, 2]], np.float32)
    crowded = Tile(plain(RED), f"{LONG}\n{LONG}\nthird line", corners, np.arange(5), (LONG,) * 5)
    image = drawn(crowded, Tile(None, LONG, message=LONG), crowded, columns=2)
    gaps = np.ones(image.shape[:2], bool)
    for top in (GAP_PX, GAP_PX + 64 + 28 + GAP_PX):
        for left in (GAP_PX, 2 * GAP_PX + 64):
            gaps[top : top + 64 + 28, left : left + 64] = False
    assert (image[gaps] == PAPER).all()
    assert share(image, PAPER) < 0.9


@pytest.mark.parametrize("at", [0, -1])
def test_captions_that_are_too_long_keep_both_ends(at: int) -> None:
    whole = ["n"] * 300
    other = whole.copy()
    other[at] = "W"
    corners = np.array([[0, 30, 40, 40]], np.float32)
    pictures = []
    for text in ("".join(whole), "".join(other)):
        caption, plate, message = Tile(plain(RED), text), Tile(plain(RED), "", corners, None, (text,)), Tile(None, text)
        pictures.append([drawn(tile) for tile in (caption, plate, dataclasses.replace(message, message=text))])
    assert not any(np.array_equal(left, right) for left, right in zip(*pictures, strict=True))


def test_tile_without_an_image_is_grey_with_its_message() -> None:
    silent, spoken = (drawn(Tile(None, "", message=message)) for message in ("", "The file is gone."))
    assert share(silent, GREY) == pytest.approx(64 * 64 / (76 * 104))
    assert share(spoken, GREY) < share(silent, GREY)


def test_of_dataset_shows_each_class_as_often_as_asked(tmp_path: Path) -> None:
    source = make(tmp_path / "d", coloured(*[(RED, 0)] * 9, *[(GREEN, 2)] * 2))
    image = page(source, per_class=3, tile_px=40)
    size = image.shape[0] * image.shape[1] / 40**2
    assert (round(share(image, RED) * size), round(share(image, GREEN) * size)) == (3, 2)


def test_of_dataset_of_many_classes_has_pages_of_whole_classes_and_bounded_work(tmp_path: Path) -> None:
    colours = [(200, 10 * label, 0) for label in range(25)]
    made = make(tmp_path / "d", coloured(*((colour, label) for label, colour in enumerate(colours)), *[(BLUE, 7)] * 9))
    of_25, of_1000 = (
        dataclasses.replace(made, manifest=made.manifest.model_copy(update={"classes": ("c",) * count}))
        for count in (25, 1000)
    )
    first, second = map(imaging.decode, sheet.of_dataset(of_25, "train", tile_px=16))  # of 20 classes and of 5
    early, late = ([label for label in range(25) if share(image, colours[label])] for image in (first, second))
    assert (set(range(20)) - {7} <= set(early) <= set(range(20)), late) == (True, list(range(20, 25)))
    tile = 16**2 / (first.shape[0] * first.shape[1])
    assert round((share(first, BLUE) + share(first, colours[7])) / tile) == 4
    image = page(of_1000, tile_px=16)  # 2,000 pictures would be two of each class
    tile = 16**2 / (image.shape[0] * image.shape[1])
    assert round((share(image, BLUE) + share(image, colours[7])) / tile) == 2


def test_of_dataset_is_a_function_of_the_seed(tmp_path: Path) -> None:
    shades = [((20 * number, 255 - 20 * number, 128), 0) for number in range(12)]
    source = make(tmp_path / "d", coloured(*shades))
    sheets = [next(sheet.of_dataset(source, "train", per_class=2, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert sheets[0] == sheets[1]
    assert len(set(sheets)) > 1


def test_of_dataset_without_image_classes_draws_boxes_of_the_original_and_masks(tmp_path: Path) -> None:
    mask = np.zeros((80, 80), np.uint8)
    mask[:40] = 1
    size = {"original_height": 80, "original_width": 80}
    objects = {"boxes": [[40, 40, 80, 80]], "box_labels": [2]} | {
        name: [False] for name in ("difficult", "truncated", "crowd")
    }
    png = imaging.encode_png(plain((0, 0, 0)))
    source = make(tmp_path / "d", [{"image": png} | size | objects, {"image": png, "mask": imaging.encode_mask(mask)}])
    image = page(source, tile_px=40)
    left, right = (image[GAP_PX : GAP_PX + 80, at : at + 80] for at in (GAP_PX, 2 * GAP_PX + 80))
    rows, columns = np.nonzero((left == colour_of(2)).all(axis=2))
    assert (rows.max(), columns.max()) == (79, 79)
    assert (rows[columns > 75].min(), columns.min()) == (40, 40)  # the plate above is narrower than the box
    half = tuple(level // 2 for level in colour_of(0))
    assert share(right[:38], half) == 1.0  # type: ignore[arg-type]
    assert share(right[42:], (0, 0, 0)) == 1.0


def test_of_dataset_shows_what_does_not_decode_as_grey(tmp_path: Path) -> None:
    source = make(tmp_path / "d", [{"image": b"no image", "label": 0}, {"image": None, "label": 7}])
    assert share(page(source), GREY) > 0.3


def test_of_dataset_of_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no split 'val'"):
        next(sheet.of_dataset(make(tmp_path / "d", coloured((RED, 0))), "val"))


def reject(uri: Path, reason: str, **more: Any) -> dict[str, Any]:
    text = {"image_id": uri.name, "uri": str(uri), "reason": reason, "message": f"{uri}: {reason}"}
    return text | {"split": "train", "class_name": "cat"} | more


def test_of_rejects_shows_what_can_be_shown_and_says_the_rest(tmp_path: Path) -> None:
    bmp, text = tmp_path / "a.bmp", tmp_path / "b.txt"
    bmp.write_bytes(bmp_of(plain(BLUE)))
    text.write_text("not an image")
    rejects = [reject(bmp, "format"), reject(text, "format"), reject(tmp_path / "gone", "unreadable")]
    made = sheet.of_rejects(make(tmp_path / "d", coloured((RED, 0)), [*rejects, reject(tmp_path, "unreadable")]))
    assert made is not None
    image = imaging.decode(made)
    assert image.shape[1] == 4 * (128 + GAP_PX) + GAP_PX
    assert 0.5 < share(image, GREY) / (3 * share(image, BLUE)) < 1


def test_of_rejects_in_a_tar_reads_each_by_its_bytes(tmp_path: Path) -> None:
    tar, images = tmp_path / "all.tar", [bmp_of(plain(colour)) for colour in (RED, GREEN)]
    tar.write_bytes(bytes(512) + b"".join(images))
    size = len(images[0])
    ranges = [(512, size), (512 + size, size), (0, 512), (10**9, 5)]  # the last two are no picture
    rejects = [reject(tar, "format", byte_range=found) for found in ranges]
    made = sheet.of_rejects(make(tmp_path / "d", coloured((BLUE, 0)), rejects))
    assert made is not None
    image = imaging.decode(made)
    assert share(image, RED) == share(image, GREEN) > 0
    assert 0.8 < share(image, GREY) / (2 * share(image, RED)) < 1


def bmp_of(image: npt.NDArray[np.uint8]) -> bytes:
    """A BMP of 24 bits: two headers, then rows from below, blue first (here without padding)."""
    height, width = image.shape[:2]
    assert width % 4 == 0
    numbers = (54 + image.size, 0, 54, 40, width, height, 1 | 24 << 16, 0, image.size, 2835, 2835, 0, 0)
    return b"BM" + np.array(numbers, "<u4").tobytes() + image[::-1, :, ::-1].tobytes()


def test_of_rejects_is_nothing_without_any(tmp_path: Path) -> None:
    assert sheet.of_rejects(make(tmp_path / "d", coloured((RED, 0)))) is None


def test_of_many_rejects_is_a_sample_of_bounded_size(tmp_path: Path) -> None:
    rejects = [reject(tmp_path / f"{number}", "unreadable") for number in range(500)]
    source = make(tmp_path / "d", coloured((RED, 0)), rejects)
    made = sheet.of_rejects(source)
    assert made == sheet.of_rejects(source) != sheet.of_rejects(source, seed=1)
    assert made is not None
    assert imaging.probe(made)[0] == sheet.MAX_REJECTS // 8 * (128 + 28 + GAP_PX) + GAP_PX


def test_of_rejects_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    source = make(tmp_path / "d", coloured((RED, 0)))
    gone = dataclasses.replace(
        source, manifest=source.manifest.model_copy(update={"rejects": ("gone.parquet",), "num_rejects": 1})
    )
    with pytest.raises(DataError, match=r"gone\.parquet: cannot be read"):
        sheet.of_rejects(gone)


def test_sheets_of_real_photographs_are_made(real_data: Path, tmp_path: Path) -> None:
    paths = sorted((real_data / "clothing10" / "val" / "hat").glob("*.jpg"))[:6]
    rows = [{"image": path.read_bytes(), "label": 1} for path in paths]
    height, width = page(make(tmp_path / "d", rows), per_class=6).shape[:2]
    assert width == 6 * (128 + GAP_PX) + GAP_PX
    assert height <= 128 + 28 + 2 * GAP_PX
