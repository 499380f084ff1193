"""Regions of objects as masks: polygons and run lengths to pixels, and the one picture of classes made of them.

Everything becomes run lengths first (`types.RunLengths`): they say the area, and they paint without a mask per object.
Polygons are filled by faster-coco-eval, so that masks agree with COCO's own to the pixel; run lengths are read here,
because its C++ trusts them and what comes from a file may lie. Left out: scaling masks, which imaging does with pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Int64Array, Objects, Polygons, Region, RunLengths, UInt8Array

NOT_JUDGED = 255
MAX_LABEL = 253


def mask(region: Region, size_hw: tuple[int, int]) -> UInt8Array:
    """The pixels of a region, uint8 [H, W] of 0 and 1; all 0 for no polygon at all.

    Raises:
        DataError: the region is malformed, or made for another size.
    """
    canvas = np.zeros(size_hw[0] * size_hw[1], np.uint8)
    _paint(canvas, _runs(region, size_hw), 1)
    return _upright(canvas, size_hw)


def run_lengths(pixels: UInt8Array) -> RunLengths:
    """The run lengths of a mask [H, W]; whatever is not 0 belongs to the object."""
    height, width = pixels.shape
    columns = np.concatenate([[0], pixels.ravel(order="F") != 0])  # the first run is of 0, if need be of none
    edges = np.flatnonzero(np.diff(columns))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    return RunLengths((height, width), tuple(counts.tolist()))


def decompress(text: str | bytes, size_hw: tuple[int, int]) -> RunLengths:
    """Read COCO's compressed run lengths: digits of 5 bits, low ones first, each after the second a difference.

    Source: `rleFrString` in cocoapi's maskApi.c describes the format (its 48 is added to every digit; 32 marks that
    more follow, 16 in the last one a negative number).

    Raises:
        DataError: a character that is none of theirs, a number that does not end, or lengths that do not add up.
    """
    raw = text.encode("latin-1", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    number = shift = 0
    for byte in raw:
        digit = byte - 48
        if not 0 <= digit < 64 or shift > 60:
            raise DataError(f"expected compressed run lengths of characters '0' to 'o', got {chr(byte)!r} in them")
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise DataError("the compressed run lengths end within a number")
    found = RunLengths(size_hw, tuple(counts))
    _checked(found)
    return found


def semantic(objects: Objects, size_hw: tuple[int, int]) -> UInt8Array:
    """The class of every pixel, uint8 [H, W]: 0 is background, 1 + label an object, 255 not to be judged.

    Objects without a region leave no trace. Crowds are painted first, as 255, then the others from the largest to the
    smallest, so that small objects stay visible. Regions must be in pixels of `size_hw`.

    Raises:
        DataError: a region is malformed or of another size, or a label does not fit into a byte beside 0 and 255.
    """
    if len(objects.regions) and objects.labels.max() > MAX_LABEL:
        raise DataError(
            f"expected labels 0 to {MAX_LABEL} for a mask of one byte per pixel, got {objects.labels.max()}; a dataset "
            "of more classes has no semantic masks"
        )
    runs = [_runs(region, size_hw) for region in objects.regions]
    areas = [int(counts[1::2].sum()) for counts in runs]
    canvas = np.zeros(size_hw[0] * size_hw[1], np.uint8)
    for index in sorted(range(len(runs)), key=lambda index: (not objects.crowd[index], -areas[index])):
        value = NOT_JUDGED if objects.crowd[index] else 1 + int(objects.labels[index])
        _paint(canvas, runs[index], value)
    return _upright(canvas, size_hw)


def _runs(region: Region, size_hw: tuple[int, int]) -> Int64Array:
    """Run lengths of any region, checked."""
    if not isinstance(region, RunLengths):
        return _runs_of_polygons(region, size_hw)
    if region.size_hw != size_hw:
        raise DataError(
            f"expected run lengths for an image of {size_hw} (height, width), got them for {region.size_hw}"
        )
    return _checked(region)


def _checked(region: RunLengths) -> Int64Array:
    height, width = region.size_hw
    negative = next((count for count in region.counts if count < 0), None)
    if negative is not None:
        raise DataError(f"expected run lengths of at least 0, got {negative}")
    if min(region.size_hw) < 0 or sum(region.counts) != height * width:
        raise DataError(
            f"expected run lengths that add up to {height} x {width} = {height * width} pixels, got "
            f"{len(region.counts)} that add up to {sum(region.counts)}"
        )
    return np.array(region.counts, np.int64)


def _runs_of_polygons(polygons: Polygons, size_hw: tuple[int, int]) -> Int64Array:
    from faster_coco_eval.core import mask as coco_mask  # noqa: PLC0415  (slow to import, needed only for polygons)

    height, width = size_hw
    for polygon in polygons:
        _check_polygon(polygon, size_hw)
    if not polygons:
        return np.array([height * width], np.int64)
    filled = coco_mask.frPyObjects([list(polygon) for polygon in polygons], height, width)
    merged = cast(dict[str, Any], coco_mask.merge(filled))
    return np.array(decompress(merged["counts"], size_hw).counts, np.int64)


def _check_polygon(polygon: Sequence[float], size_hw: tuple[int, int]) -> None:
    """Refuse what is no outline, or reaches so far outside that walking along it would take all memory."""
    if len(polygon) % 2 or len(polygon) < 6:
        raise DataError(f"expected a polygon of at least 3 points (x, y), got {len(polygon)} numbers")
    reach = 2 * max(size_hw)
    for value in polygon:
        if not math.isfinite(value) or abs(value) > reach:
            raise DataError(f"expected a polygon in pixels of an image of {size_hw} (height, width), got {value}")


def _paint(canvas: UInt8Array, counts: Int64Array, value: int) -> None:
    """Set the runs of 1 in a picture that is stored down its columns."""
    stops = np.cumsum(counts)
    for start, stop in zip(stops[:-1:2].tolist(), stops[1::2].tolist(), strict=True):
        canvas[start:stop] = value


def _upright(canvas: UInt8Array, size_hw: tuple[int, int]) -> UInt8Array:
    return np.ascontiguousarray(canvas.reshape(size_hw, order="F"))
