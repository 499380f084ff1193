"""Where conversion spends its time, and what each known way to do a step takes: milliseconds per photo on one core."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import simplejpeg
from PIL import Image

from pipeline import imaging
from pipeline.data import rows
from pipeline.data.transforms.resizing import shrink_short
from pipeline.types import UInt8Array

SHORT_SIDE, QUALITY, ROUNDS = 256, 90, 3
_ROW = dict.fromkeys(
    ("image_id", "label", "boxes", "box_labels", "sha256", "mask", "original_height", "original_width")
)
Lever = Callable[[Any], object]


def measure(originals: Sequence[bytes]) -> dict[str, float]:
    """Time every lever on every photo; the best of three rounds counts."""
    decoded = [imaging.decode(data) for data in originals]
    small = [shrink_short(image, SHORT_SIDE) for image in decoded]
    pillow = [Image.fromarray(image) for image in decoded]
    timed: dict[str, tuple[Sequence[Any], Lever]] = {
        **{name: (originals, lever) for name, lever in _decoders().items()},
        **{name: (decoded, lever) for name, lever in _resizers().items()},
        "resize: Pillow, bilinear": (pillow, _pillow_resize),
        **{name: (small, lever) for name, lever in _encoders().items()},
        "rows: sha256 of the original": (originals, lambda data: hashlib.sha256(data).hexdigest()),
        "rows: statistics of the pixels": (small, lambda image: rows._Counts().add(_ROW, image)),
        "rows: header": (originals, imaging.probe),
    }
    return {name: _best_ms(values, lever) for name, (values, lever) in timed.items()}


def _decoders() -> dict[str, Lever]:
    return {
        "decode: ours": imaging.decode,
        "decode: ours, scaled where it may": lambda data: imaging.decode(data, min_short=SHORT_SIDE),
        "decode: ours, scaled to just above": lambda data: imaging.decode(data, min_short=SHORT_SIDE // 2),
        "decode: simplejpeg, fast DCT": lambda data: simplejpeg.decode_jpeg(data, fastdct=True),
        "decode: simplejpeg, fast DCT and upsampling": lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        ),
        "decode: Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
    }


def _resizers() -> dict[str, Lever]:
    found: dict[str, Lever] = {
        "resize: ours (torch, antialiased)": lambda image: shrink_short(image, SHORT_SIDE),
    }
    with contextlib.suppress(ImportError):  # no dependency of this project
        cv2 = importlib.import_module("cv2")
        found["resize: OpenCV, area"] = lambda image: cv2.resize(
            image, _target_hw(image)[::-1], interpolation=cv2.INTER_AREA
        )
    return found


def _encoders() -> dict[str, Lever]:
    return {
        "encode: ours": lambda image: imaging.encode_jpeg(image, QUALITY),
        "encode: simplejpeg, fast DCT": lambda image: simplejpeg.encode_jpeg(
            image, QUALITY, "RGB", "420", fastdct=True
        ),
        "encode: Pillow": lambda image: Image.fromarray(image).save(io.BytesIO(), "JPEG", quality=QUALITY),
    }


def _target_hw(image: UInt8Array) -> tuple[int, int]:
    height, width = image.shape[:2]
    least = min(height, width)
    return height * SHORT_SIDE // least, width * SHORT_SIDE // least


def _pillow_resize(image: Image.Image) -> Image.Image:
    least = min(image.size)
    size = (image.width * SHORT_SIDE // least, image.height * SHORT_SIDE // least)
    return image.resize(size, Image.Resampling.BILINEAR)


def _best_ms(values: Sequence[Any], lever: Lever) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for value in values:
            lever(value)
        best = min(best, time.perf_counter() - started)
    return best / len(values) * 1000
