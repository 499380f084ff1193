"""Picture sheets: PNGs of many pictures of a dataset, or of its rejects, because people look rather than read.

`sheet` draws tiles; `of_dataset` and `of_rejects` choose them. Pillow draws and `imaging` decodes; no Ray, no plots.
Left out: where a PNG goes.
"""

from __future__ import annotations

import colorsys
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import boxes, imaging, storage
from pipeline.data import shards
from pipeline.data.lookup import visible
from pipeline.errors import ImageError
from pipeline.types import Float32Array, Int64Array, Split, UInt8Array

Colour = tuple[int, int, int]
PAPER, INK, GREY, FAINT = (255, 255, 255), (30, 30, 30), (205, 205, 205), (120, 120, 120)
GAP_PX = 6
MAX_REJECTS = 64
MAX_TILES, PAGE_TILES = 2000, 80  # of a split: half a minute or so of decoding; of one page
_FONT_SIZE, _LINE_PX, _PLATE_PX = 11, 14, 13
_CAPTION_LINES = 2
_DETAIL_PX = 256  # of the short side, at least: larger pictures may be decoded at a part of their size
# Rejects are shown whatever their format and, within reason, their size; of a longer file its beginning is enough.
_PERMISSIVE = imaging.Decoding(
    formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"), max_pixels=50_000_000, max_side=65_535
)
_MAX_READ_BYTES = 64 << 20  # of a longer file, or part of a tar
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\u024f\u2010-\u2026]")  # what the font has


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One picture of a sheet and what is said about it.

    Attributes:
        image: uint8 [H, W, C], or None where there is none: then `message` is written on grey.
        caption: up to two lines below the picture; each keeps its end where it is too long.
        boxes_xyxy: float32 [N, 4], half-open, in pixels of `image`.
        labels: int64 [N], each with its colour.
        box_captions: one for each box, or none.
        message: why there is no image.
    """

    image: UInt8Array | None
    caption: str
    boxes_xyxy: Float32Array | None = None
    labels: Int64Array | None = None
    box_captions: tuple[str, ...] = ()
    message: str = ""


def sheet(tiles: Sequence[Tile], columns: int = 8, tile_px: int = 128) -> bytes:
    """Draw tiles in rows; every picture is shrunk or enlarged to fit into `tile_px` x `tile_px` pixels.

    Returns:
        A PNG.
    """
    if not tiles:
        raise ValueError("expected at least one tile")
    columns = min(columns, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(_fitted(tile, tile_px)[0] for tile in row) for row in rows]
    under = _CAPTION_LINES * _LINE_PX + GAP_PX
    size = columns * (tile_px + GAP_PX) + GAP_PX, sum(heights) + len(rows) * under + GAP_PX
    canvas, top = Image.new("RGB", size, PAPER), GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            canvas.paste(_draw(tile, tile_px, height), (GAP_PX + column * (tile_px + GAP_PX), top))
        top += height + under
    return imaging.encode_png(np.asarray(canvas))


def of_dataset(
    source: shards.Shards, split: Split, per_class: int = 4, seed: int = 0, tile_px: int = 128
) -> Iterator[bytes]:
    """Pages with a random sample of one split: of each class, or, where images have none, one of all with their boxes.

    A page has at most 80 pictures and whole classes. All pages have at most 2,000: fewer of each class where there are
    more than 500, and one of a random choice of classes where there are more than 2,000. The pages are a function of
    the shards, the counts and the seed.

    Raises:
        DataError: there is no such split, or a shard cannot be read.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    labels = _labels(source, split)
    if not (labels >= 0).any():
        chosen = sorted(rng.permutation(len(labels))[: PAGE_TILES // 2].tolist())
        yield sheet(list(_tiles(source, split, chosen)), columns=4, tile_px=2 * tile_px)
        return
    per_class = max(1, min(per_class, MAX_TILES // len(source.manifest.classes)))
    sample = _sample(labels, per_class, rng)
    columns = per_class * max(1, 8 // per_class)  # whole classes in a row
    for start in range(0, len(sample), PAGE_TILES // per_class):
        numbers = [number for of_class in sample[start : start + PAGE_TILES // per_class] for number in of_class]
        yield sheet(list(_tiles(source, split, numbers)), columns=columns, tile_px=tile_px)


def of_rejects(source: shards.Shards, seed: int = 0, tile_px: int = 128) -> bytes | None:
    """A random sample of up to 64 rejects with their reasons, None where there are none.

    The files are read again where they still are. What cannot be decoded although every format is allowed is a grey
    tile with the message; a box that was left out shows its image.

    Raises:
        DataError: a list of rejects cannot be read.
    """
    if not source.manifest.num_rejects:
        return None
    rejects = shards.rejects(source)
    if not rejects:  # the manifest says otherwise, which is for verification to find
        return None
    order = np.random.default_rng(seed).permutation(len(rejects))[:MAX_REJECTS]
    chosen = sorted((rejects[index] for index in order), key=lambda row: (row["reason"], row["image_id"]))
    return sheet([_reject_tile(row) for row in chosen], tile_px=tile_px)


def colour_of(label: int) -> Colour:
    """A bright colour for a label; neighbouring labels differ most (steps of the golden ratio around the hues)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def drawn(image: UInt8Array, boxes_xyxy: Float32Array, labels: Int64Array, captions: Sequence[str]) -> UInt8Array:
    """A picture [H, W, C] with boxes in its own pixels and what is said of each, as RGB of the same size."""
    tile = Tile(image, "", boxes_xyxy, labels, tuple(captions))
    return np.asarray(_picture(tile, image, max(image.shape[:2])))


def _sample(labels: Int64Array, per_class: int, rng: np.random.Generator) -> list[list[int]]:
    """Some rows of each class, in the order of the classes."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    known, starts = np.unique(labels[order], return_index=True)
    of_classes = np.split(order, starts[1:])
    shown = np.sort(rng.permutation(np.flatnonzero(known >= 0))[: MAX_TILES // per_class])
    return [np.sort(of_classes[at][:per_class]).tolist() for at in shown.tolist()]


def _labels(source: shards.Shards, split: Split) -> Int64Array:
    """The label of every row of a split in order, int64 [N]; -1 where there is none."""
    found = [
        shards.read(source.path / shard.name, range(len(shard.row_groups)), ["label"]).column("label").fill_null(-1)
        for shard in source.manifest.of(split)
    ]
    labels: Int64Array = np.concatenate([column.to_numpy() for column in found])
    return labels


def _tiles(source: shards.Shards, split: Split, numbers: Sequence[int]) -> Iterator[Tile]:
    """The rows of a split with these numbers, as tiles in this order."""
    groups = [(shard, group) for shard in source.manifest.of(split) for group in range(len(shard.row_groups))]
    starts = np.cumsum([0, *(shard.row_groups[group] for shard, group in groups)])
    for number in numbers:
        index = int(np.searchsorted(starts, number, side="right")) - 1
        shard, group = groups[index]
        table = shards.read(source.path / shard.name, [group])
        yield _tile(table.slice(number - int(starts[index]), 1).to_pylist()[0], source.manifest)


def _tile(row: dict[str, Any], manifest: shards.Manifest) -> Tile:
    """A row with its class, its boxes and its mask."""
    caption = f"{_name(manifest, row['label'])}\n{row['image_id']}".strip()
    try:
        image = visible(imaging.decode(row["image"] or b"", manifest.decoding, min_short=_DETAIL_PX))
        if row["mask"] is not None:
            image = _painted(image, imaging.decode_mask(row["mask"]))
    except ImageError as error:
        return Tile(None, caption, message=str(error))
    if not row["boxes"]:
        return Tile(image, caption)
    labels = row["box_labels"]
    found = boxes.scale(row["boxes"], (row["original_height"], row["original_width"]), image.shape[:2])
    names = tuple(_name(manifest, label) for label in labels)
    return Tile(image, caption, found, np.array(labels, np.int64), names)


def _name(manifest: shards.Manifest, label: int | None) -> str:
    if label is None:
        return ""
    return manifest.classes[label] if 0 <= label < len(manifest.classes) else f"class {label}?"


def _reject_tile(row: dict[str, Any]) -> Tile:
    caption = f"{row['reason']} {row['class_name']}\n{row['image_id']}"
    offset, length = row["byte_range"] or (0, _MAX_READ_BYTES)
    try:
        with storage.open_input(row["uri"]) as file:
            file.seek(min(offset, file.seek(0, os.SEEK_END)))  # pyarrow refuses to go beyond the end
            data = file.read(min(length, _MAX_READ_BYTES))
        return Tile(visible(imaging.decode(data, _PERMISSIVE, min_short=_DETAIL_PX)), caption)
    except (OSError, ImageError):
        return Tile(None, caption, message=row["message"])


def _painted(image: UInt8Array, mask: UInt8Array) -> UInt8Array:
    """Lay the colours of a mask's classes half over the picture, and white where it is not judged."""
    height, width = image.shape[:2]
    values = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    palette = np.array([(0, 0, 0), *(colour_of(label) for label in range(254)), (255, 255, 255)], np.uint16)
    blended = (image + palette[values]) // 2
    return np.where(values[:, :, None] > 0, blended, image).astype(np.uint8)


def _fitted(tile: Tile, tile_px: int) -> tuple[int, int]:
    """Height and width of a tile's picture, enlarged or shrunk until its long side is `tile_px`."""
    if tile.image is None:
        return tile_px, tile_px
    height, width = tile.image.shape[:2]
    longest = max(height, width)
    return max(1, round(height * tile_px / longest)), max(1, round(width * tile_px / longest))


def _draw(tile: Tile, width_px: int, height_px: int) -> Image.Image:
    """One tile: the picture in the middle of an area of this size, the caption below it."""
    canvas = Image.new("RGB", (width_px, height_px + _CAPTION_LINES * _LINE_PX), PAPER)
    draw = ImageDraw.Draw(canvas)
    if tile.image is None:
        draw.rectangle((0, 0, width_px - 1, height_px - 1), GREY)
        for number, line in enumerate(_wrap(tile.message, width_px - 8)[: (height_px - 8) // _LINE_PX]):
            draw.text((4, 4 + number * _LINE_PX), line, INK, _font())
    else:
        canvas.paste(_picture(tile, tile.image, width_px), _corner(tile, width_px, height_px))
    for number, line in enumerate(tile.caption.split("\n")[:_CAPTION_LINES]):
        draw.text((0, height_px + number * _LINE_PX), _fit(line, width_px), (INK, FAINT)[number], _font())
    return canvas


def _corner(tile: Tile, width_px: int, height_px: int) -> tuple[int, int]:
    height, width = _fitted(tile, width_px)
    return (width_px - width) // 2, (height_px - height) // 2


def _picture(tile: Tile, image: UInt8Array, tile_px: int) -> Image.Image:
    """The picture at the size of its tile with its boxes, large ones first, so that none hides below another."""
    height, width = _fitted(tile, tile_px)
    small = height < 2 * image.shape[0]
    way = Image.Resampling.BICUBIC if small else Image.Resampling.NEAREST  # show the pixels of very small pictures
    picture = Image.fromarray(visible(image)).resize((width, height), way)
    if tile.boxes_xyxy is None or not len(tile.boxes_xyxy):
        return picture
    found = boxes.clip(boxes.scale(tile.boxes_xyxy, image.shape[:2], (height, width)), (height, width))
    corners = np.concatenate([np.floor(found[:, :2]), np.ceil(found[:, 2:]) - 1], axis=1).astype(int)
    corners = np.clip(corners, 0, [width - 1, height - 1] * 2)
    corners[:, 2:] = np.maximum(corners[:, :2], corners[:, 2:])  # also what is no box has a place
    labels = [0] * len(found) if tile.labels is None else tile.labels.tolist()
    order = np.argsort(-boxes.area(found), kind="stable").tolist()
    draw = ImageDraw.Draw(picture)
    for index in order:
        draw.rectangle(tuple(corners[index].tolist()), outline=colour_of(labels[index]), width=max(1, tile_px // 128))
    for index in order if tile.box_captions else ():
        _write_plate(draw, corners[index].tolist(), tile.box_captions[index], colour_of(labels[index]), picture.size)
    return picture


def _write_plate(
    draw: ImageDraw.ImageDraw, corners: Sequence[int], text: str, colour: Colour, size_wh: tuple[int, int]
) -> None:
    """Write above a box, or below where there is no room, or else within; on a plate that stays in the picture."""
    text = _fit(text, size_wh[0] - 4)
    width = math.ceil(_font().getlength(text)) + 4
    left, top, _, bottom = corners
    x, y = max(0, min(left, size_wh[0] - width)), top - _PLATE_PX
    if y < 0:
        tall = bottom - top > 2 * _PLATE_PX
        y = top if tall or bottom + 1 + _PLATE_PX > size_wh[1] else bottom + 1
    draw.rectangle((x, y, x + width - 1, y + _PLATE_PX - 1), colour)
    dark = sum(weight * level for weight, level in zip((0.3, 0.59, 0.11), colour, strict=True)) < 140
    draw.text((x + 2, y - 1), text, PAPER if dark else INK, _font())


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(_FONT_SIZE)


def _fit(text: str, width_px: int) -> str:
    """The text, its middle left out where it is longer than `width_px`; what the font lacks becomes `?`."""
    text = _UNPRINTABLE.sub("?", text)
    if _font().getlength(text) <= width_px:
        return text
    text = text[:width_px] + text[-width_px:] if len(text) > 2 * width_px else text  # no letter is below a pixel
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: kept // 2]}\u2026{text[len(text) - (kept - kept // 2) :]}"
        if _font().getlength(short) <= width_px:
            return short
    return ""


def _wrap(text: str, width_px: int) -> list[str]:
    """Break between words; a word that is too long for a line loses its middle."""
    lines = [""]
    for word in (_fit(word, width_px) for word in text.split()):
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
