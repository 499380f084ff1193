"""Which pictures are there twice, and which nearly so: hashes, and searches that never compare all pairs.

Arrays in, arrays out: no files, no Ray. `verify` says what it means.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.types import BoolArray, Int64Array, UInt8Array

UInt64Array = npt.NDArray[np.uint64]

NO_HASHES = (0, 0)
"""The difference hashes of what cannot be compared."""
_AGREEING = 3  # bands that a pair must share to be compared; more would be more searches for fewer candidates


def difference_hashes(image: UInt8Array) -> tuple[int, int]:
    """The dHash of a picture [H, W, C] along its rows and along its columns, 64 bits each.

    The picture is made grey and shrunk to 8 rows of 9 pixels; a bit says that a pixel is darker than the next one. The
    second hash is that of 9 rows of 8, downwards. Copies at another size or quality differ in a few bits of each, other
    pictures in about half; but every bright shirt on a dark ground has the same rows, which is why there are two.

    Source: N. Krawetz, "Kind of Like That", The Hacker Factor Blog, 2013 (rows only).
    """
    grey = image if image.shape[2] == 3 else image.mean(axis=2).astype(np.uint8)  # bands have no weights
    picture = Image.fromarray(grey).convert("L")
    wide, high = (np.asarray(picture.resize(size, Image.Resampling.BOX)) for size in ((9, 8), (8, 9)))
    return _number(wide[:, :-1] < wide[:, 1:]), _number(high[:-1] < high[1:])


def _number(bits: BoolArray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes())


def key(digest: bytes) -> int:
    """The first 64 bits of a cryptographic digest: of 14 million, two are equal by chance once in 190,000 datasets."""
    return int.from_bytes(digest[:8])


def repeats(keys: UInt64Array) -> tuple[Int64Array, Int64Array]:
    """Equal values among uint64 [N], by their numbers.

    Returns:
        int64 [R] and [R]: everyone that repeats an earlier one, in order, and the first one that it repeats.
    """
    _, first, kind = np.unique(keys, return_index=True, return_inverse=True)
    first_of = first[kind].astype(np.int64)
    found = np.flatnonzero(first_of != np.arange(len(keys)))
    return found, first_of[found]


def near(hashes: UInt64Array, groups: Int64Array, max_distance: int) -> tuple[Int64Array, Int64Array]:
    """Pairs of hashes that differ from an earlier pair in at most `max_distance` bits, each of the two.

    Two hashes that differ in at most d bits agree in at least 3 of d + 3 bands of bits (pigeonhole), so the first
    hashes are sorted by every choice of 3 bands, and only neighbours that agree in these are compared: 35 sorts where d
    is 4, and few candidates even where many pictures share a band (borders, skies). Equal ones are compared once.

    Rows that are nearly all 0 or all 1, at most `max_distance` bits from it, belong to pictures without detail, or to
    none: they are compared with nothing.

    Args:
        hashes: uint64 [N, 2], `difference_hashes`.
        groups: int64 [N], what each belongs to, here its split.
        max_distance: 0 to 61 bits.

    Returns:
        int64 [N] and [N]: the number of the first near one within the same group, and in any other; -1 where none is.
    """
    none = np.int64(len(hashes))
    within, across = np.full(len(hashes), none), np.full(len(hashes), none)
    bits = np.bitwise_count(hashes[:, 0])
    telling = np.flatnonzero((bits > max_distance) & (bits < 64 - max_distance))
    order = telling[np.lexsort((telling, groups[telling], hashes[telling, 1], hashes[telling, 0]))]
    starts = np.ones(len(order), bool)
    starts[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1) | (np.diff(groups[order]) != 0)
    kept = order[starts]  # the first of each pair of hashes in each group
    within[order[~starts]] = kept[np.cumsum(starts) - 1][~starts]
    for mask in _masks(max_distance + _AGREEING):
        _search(hashes[kept], kept, groups[kept], mask, max_distance, within, across)
    return np.where(within < none, within, -1), np.where(across < none, across, -1)


def _masks(num_bands: int) -> list[np.uint64]:
    """The bits of every choice of bands, where 64 bits fall into `num_bands` of about one width."""
    edges = [64 * band // num_bands for band in range(num_bands + 1)]
    bands = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(bands, _AGREEING)]


def _search(
    hashes: UInt64Array,
    numbers: Int64Array,
    groups: Int64Array,
    mask: np.uint64,
    max_distance: int,
    within: Int64Array,
    across: Int64Array,
) -> None:
    """Compare hashes [K, 2] whose first agree under `mask`; lower `within` and `across` to the earliest near number."""
    keys = hashes[:, 0] & mask
    order = np.argsort(keys)
    keys = keys[order]
    at, step = np.arange(len(keys)), 1
    while len(at := at[: np.searchsorted(at, len(keys) - step)]):
        at = at[keys[at] == keys[at + step]]
        left, right = order[at], order[at + step]
        close = (np.bitwise_count(hashes[left] ^ hashes[right]) <= max_distance).all(axis=1)
        left, right = left[close], right[close]
        earlier = np.minimum(numbers[left], numbers[right])
        later = np.maximum(numbers[left], numbers[right])
        same = groups[left] == groups[right]
        np.minimum.at(within, later[same], earlier[same])
        np.minimum.at(across, later[~same], earlier[~same])
        step += 1
