"""What tests of detection share: pictures whose boxes are known as shards, and a detector that has learnt nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import imaging, models
from pipeline.batch import BoxTargets
from pipeline.config import parse
from pipeline.data import rows, shards
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.types import Detections, Objects, Record, Split

CLASSES = ("ant", "bee", "cat")
SMALL: dict[str, Any] = {"backbone": "plain", "channels": 16, "input": {"fit": {"size_hw": [64, 64]}}}
"""The keys of a `yolo_multiscale` that takes milliseconds."""
Annotated = tuple[bytes, Objects]
"""An encoded picture and what is in it."""


def objects(*marked: tuple[Sequence[float], int]) -> Objects:
    """Boxes and labels, without any flag."""
    no = np.zeros(len(marked), bool)
    boxes = np.array([box for box, _ in marked], np.float32).reshape(-1, 4)
    return Objects(boxes, np.array([label for _, label in marked], np.int64), no, no, no)


def photo(seed: int, height: int, width: int, orientation: int = 1) -> bytes:
    """A smooth PNG, stored with so many rows and columns; 6 and 8 say that it lies on its side."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(encoded, "PNG", exif=exif)
    return encoded.getvalue()


def shards_of(
    folder: Path, pictures: Mapping[Split, Sequence[Annotated]], classes: tuple[str, ...] = CLASSES
) -> shards.Shards:
    """Pictures as shards, made without Ray; none may be turned away. The picture `train/0003` is `train-0003.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    config, made = rows.Config(rows_per_group=4), dict[Split, rows.Made]()
    for split, ones in pictures.items():
        records = []
        for number, (data, marked) in enumerate(ones):
            path = folder / f"{split}-{number:04d}.png"
            path.write_bytes(data)
            records.append(Record(f"{split}/{number:04d}", str(path), split, objects=marked))
        made[split] = rows.make_shard(folder / f"{split}-00000.parquet", split, records, config)
        assert not made[split].rejects
    manifest = shards.Manifest(
        dataset="small",
        classes=classes,
        class_counts={split: (0,) * len(classes) for split in made},
        object_counts={
            split: tuple(one.object_counts.get(label, 0) for label in range(len(classes)))
            for split, one in made.items()
        },
        num_rejects=0,
        shards=tuple(one.shard for one in made.values() if one.shard),
        digest="0" * 64,
        decoding=imaging.DEFAULT,
        config={},
        tool_versions={},
    )
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json())
    return shards.load(folder)


def targets(*images: list[tuple[list[float], int]]) -> BoxTargets:
    """The boxes and labels of each image as a batch has them."""
    marked = [(box, label, place) for place, image in enumerate(images) for box, label in image]
    return BoxTargets(
        torch.tensor([box for box, _, _ in marked]).reshape(-1, 4),
        torch.tensor([label for _, label, _ in marked], dtype=torch.int64),
        torch.tensor([place for _, _, place in marked], dtype=torch.int64),
        len(images),
    )


def untaught(folder: Path, classes: tuple[str, ...], **keys: Any) -> Bundle:
    """A small detector that has learnt nothing, and says so at scores that a threshold can tell apart.

    It suppresses nothing: of boxes whose scores are all but equal, the last bits would decide which one stays.
    """
    torch.manual_seed(0)
    raw = SMALL | {"num_classes": len(classes), "select": {"max_detections": 1000, "iou_threshold": 1.0}}
    config = parse(models.config_of("yolo_multiscale"), raw | keys, "here")
    made = models.build(config)
    for name, value in made.named_parameters():
        if "classes" in name:
            torch.nn.init.normal_(value, mean=0.0 if name.endswith("weight") else -1.5, std=0.5)
    return bundle.save(folder, made, config, classes=classes)


def assert_same(found: Detections, expected: Detections, *, atol_px: float = 1e-2, atol: float = 1e-5) -> None:
    """Each has what the other has; of boxes whose scores are all but equal, the last bits decide on the order."""
    assert len(found) == len(expected) > 0
    apart = np.abs(found.boxes_xyxy[:, None] - expected.boxes_xyxy[None]).max(axis=2)
    apart += np.abs(found.scores[:, None] - expected.scores[None]) * (atol_px / atol)
    apart += np.where(found.labels[:, None] == expected.labels[None], 0, np.inf)
    assert apart.min(axis=0).max() <= 2 * atol_px
    assert apart.min(axis=1).max() <= 2 * atol_px
