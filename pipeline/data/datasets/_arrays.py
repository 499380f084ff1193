"""Images that exist only as arrays, written once as PNG files so that they take the same road as every image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import imaging
from pipeline.types import Int64Array, Record, Split, UInt8Array

DIGIT_LEVELS = 16  # the brightest value of scikit-learn's digits


def load_digits(split: Split) -> tuple[npt.NDArray[np.float64], Int64Array]:
    """Scikit-learn's handwritten digits [N, 8, 8] in 0..16, ink bright, and their labels; see `digits`.

    Every fifth of each class is for validation, no other split has any.
    """
    from sklearn import datasets  # noqa: PLC0415  (slow to import, needed only here)

    source = datasets.load_digits()
    labels = source.target.astype(np.int64)
    rank_in_class = np.zeros(len(labels), np.int64)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    chosen = (rank_in_class % 5 == 4) == (split == "val")
    return source.images[chosen], labels[chosen]


def write_once(folder: Path, split: Split, images: UInt8Array, labels: Int64Array) -> Iterator[Record]:
    """Write grey images [N, H, W], leaving those that are there, and yield their records."""
    for (name, path), label in zip(written(folder, split, images), labels, strict=True):
        yield Record(name, path, split, int(label))


def written(folder: Path, split: Split, images: UInt8Array) -> Iterator[tuple[str, str]]:
    """Write images [N, H, W] or [N, H, W, 3], leaving those that are there; the id and the path of each.

    The folder is named after the split and the content, so that other arrays never meet these files.
    """
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    target = folder / f"{split}-{content[:12]}"
    target.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = target / f"{index:05d}.png"
        if not path.exists():
            partial = path.with_suffix(f".partial-{os.getpid()}")
            partial.write_bytes(imaging.encode_png(image))
            partial.rename(path)
        yield f"{split}/{index:05d}", str(path)
