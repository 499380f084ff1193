"""A detector's batch prediction in the forms that other tools read: JSON lines, COCO's results, Pascal VOC's results.

Made from the Parquet parts that `bulk` has written; boxes are in pixels of the upright originals. No Ray.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import pyarrow.parquet as pq

from pipeline import boxes
from pipeline.errors import ConfigError
from pipeline.types import Task

Form = Literal["jsonl", "coco", "voc"]
Row = dict[str, Any]


def check(forms: Iterable[Form], task: Task) -> None:
    """Refuse forms for what no detector has said, before anything is predicted.

    Raises:
        ConfigError: the model is none.
    """
    if task != "detection" and [*forms]:
        raise ConfigError(f"forms: the model is for {task}, whose answers are Parquet only; leave it out")


def write(parts: Sequence[Path], classes: tuple[str, ...], folder: Path, forms: Iterable[Form]) -> list[Path]:
    """Write the detections of all parts to `folder` in some forms.

    - `jsonl`: `detections.jsonl`, one image a line: image_id, height, width, detections; or image_id and error.
    - `coco`: `coco.json`, a list of results as COCO's tools read them ([x, y, width, height], the category 1 + label),
      and `coco_images.json` with the images' numbers and the categories.
    - `voc`: `voc/<class>.txt`, a line for each detection: image id, score, x_min y_min x_max y_max, counted from 1.

    Returns:
        The files, or folders, that were made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_WRITERS[form](parts, classes, folder) for form in forms]


def _write_jsonl(parts: Sequence[Path], classes: tuple[str, ...], folder: Path) -> Path:
    path = folder / "detections.jsonl"
    with path.open("w") as file:
        for row in _rows(parts):
            file.write(json.dumps(_told(row, classes)) + "\n")
    return path


def _told(row: Row, classes: tuple[str, ...]) -> Row:
    if row["error"] is not None:
        return {"image_id": row["image_id"], "error": row["error"]}
    found = zip(row["labels"], row["scores"], row["boxes"], strict=True)
    detections = [
        {"label": label, "class_name": classes[label], "score": score, "box": box} for label, score, box in found
    ]
    return {key: row[key] for key in ("image_id", "height", "width")} | {"detections": detections}


def _write_coco(parts: Sequence[Path], classes: tuple[str, ...], folder: Path) -> Path:
    results, images = list[Row](), list[Row]()
    for number, row in enumerate(_rows(parts), start=1):
        images.append(
            {"id": number, "file_name": row["image_id"], "height": row["height"] or 0, "width": row["width"] or 0}
        )
        places = boxes.xyxy_to_xywh(row["boxes"] or []).tolist()
        for label, score, box in zip(row["labels"] or (), row["scores"] or (), places, strict=True):
            results.append({"image_id": number, "category_id": 1 + label, "bbox": box, "score": score})
    categories = [{"id": 1 + label, "name": name} for label, name in enumerate(classes)]
    path = folder / "coco.json"
    path.write_text(json.dumps(results))
    (folder / "coco_images.json").write_text(json.dumps({"images": images, "categories": categories}))
    return path


def _write_voc(parts: Sequence[Path], classes: tuple[str, ...], folder: Path) -> Path:
    lines: dict[int, list[str]] = {label: [] for label in range(len(classes))}
    for row in _rows(parts):
        places = boxes.xyxy_to_voc(row["boxes"] or []).tolist()
        for label, score, box in zip(row["labels"] or (), row["scores"] or (), places, strict=True):
            numbers = " ".join(f"{value:.2f}" for value in box)
            lines[label].append(f"{_without_suffix(row['image_id'])} {score:.6f} {numbers}")
    (folder / "voc").mkdir(exist_ok=True)
    for label, found in lines.items():
        name = urllib.parse.quote(classes[label], safe=" ")
        (folder / "voc" / f"{name}.txt").write_text("".join(f"{line}\n" for line in found))
    return folder / "voc"


def _without_suffix(image_id: str) -> str:
    """The whole id, so that pictures of two folders stay two, without the ending of an image file."""
    path = PurePath(image_id)
    return str(path.with_suffix("")) if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"} else image_id


_WRITERS: dict[Form, Callable[[Sequence[Path], tuple[str, ...], Path], Path]] = {
    "jsonl": _write_jsonl,
    "coco": _write_coco,
    "voc": _write_voc,
}


def _rows(parts: Sequence[Path]) -> Iterator[Row]:
    for part in parts:
        yield from pq.read_table(part).to_pylist()
