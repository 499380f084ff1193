"""Digits that exist only as arrays, written once as PNG files so that they take the same road as every image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline import imaging
from pipeline.types import Int64Array, Record, Split, UInt8Array


def write_once(folder: Path, split: Split, images: UInt8Array, labels: Int64Array) -> Iterator[Record]:
    """Write grey images [N, H, W], leaving those that are there, and yield their records.

    The folder is named after the split and the content, so that other arrays never meet these files.
    """
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    target = folder / f"{split}-{content[:12]}"
    target.mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = target / f"{index:05d}.png"
        if not path.exists():
            partial = path.with_suffix(f".partial-{os.getpid()}")
            partial.write_bytes(imaging.encode_png(image))
            partial.rename(path)
        yield Record(f"{split}/{index:05d}", str(path), split, int(label))
