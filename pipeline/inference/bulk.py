"""[Ray Data] Batch prediction: many images in, Parquet out, in parts that are written whole and never twice.

The inputs, in a fixed order, are cut into parts of equal size. Each part becomes one file; a run that was interrupted
and is started again makes only the missing ones. `done.json` is written last: without it the folder is not complete.
A file that is no image keeps its row, with the reason in `error` and no prediction.
"""

from __future__ import annotations

import csv
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import Field

from pipeline import imaging
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.data.datasets.image_folder import walk
from pipeline.errors import DataError, ImageError
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Classification, Detections, Split, Task

PLAN, DONE = "plan.json", "done.json"
MAX_NAME = 180  # characters of a picture's file name; file systems take 255 bytes

OUTPUT: dict[Task, pa.Schema] = {
    "classification": pa.schema(
        [
            ("image_id", pa.string()),
            ("class_name", pa.string()),
            ("score", pa.float32()),
            ("top_class_names", pa.list_(pa.string())),
            ("top_scores", pa.list_(pa.float32())),
            ("error", pa.string()),
        ]
    ),
    "detection": pa.schema(
        [
            ("image_id", pa.string()),
            ("height", pa.int64()),  # of the upright original, in whose pixels boxes are
            ("width", pa.int64()),
            ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, half-open; best first
            ("labels", pa.list_(pa.int64())),
            ("class_names", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float32())),
            ("error", pa.string()),
        ]
    ),
}


class Kept(Strict):
    """What is kept of each answer.

    Attributes:
        top_k: classes, of a classifier.
        score_threshold: of a detector's boxes; about 0.001 for average precision.
        pictures: write each picture with its boxes as `pictures/<image>.jpg`.
    """

    top_k: int = Field(default=5, ge=1)
    score_threshold: float = Field(default=0.25, ge=0, le=1)
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be predicted, in order: paths of images, or shards with the rows (first, end) that they hold."""

    ids: tuple[str, ...] = ()
    shards: tuple[tuple[str, int, int], ...] = ()
    num_images: int = 0
    digest: str = ""

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes | ImageError]]:
        """Ids and bytes of the images `start` to `stop`."""
        for path in self.ids[start:stop]:
            yield path, _read_file(path)
        for path, first, end in self.shards:
            if first < stop and start < end:
                yield from _read_shard(Path(path), max(start - first, 0), min(stop, end) - first)


def from_folder(folder: Path) -> Inputs:
    """Every file below a folder, hidden ones left out, by path."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds images")
    return _of_files([file.uri for file in walk(str(folder))], str(folder))


def from_shards(source: shards.Shards, split: Split) -> Inputs:
    """Every row of a split.

    Raises:
        DataError: a shard is not what the manifest says.
    """
    shards.check(source, split)
    files = source.manifest.of(split)
    bounds = np.cumsum([0, *(shard.num_rows for shard in files)]).tolist()
    located = tuple((str(source.path / shard.name), *span) for shard, span in zip(files, pairwise(bounds), strict=True))
    return Inputs(shards=located, num_images=bounds[-1], digest=source.manifest.digest)


def from_list(path: Path, folder: Path) -> Inputs:
    """Local paths from the column `uri` of a Parquet or CSV file, or the lines of a text file; relative to `folder`.

    Raises:
        DataError: the list cannot be read, is empty, or names what is no local path.
    """
    try:
        if path.suffix == ".parquet":
            uris = pq.read_table(path, columns=["uri"]).column("uri").to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                uris = [row["uri"] for row in csv.DictReader(file)]
        else:
            uris = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: expected a list of image paths (column 'uri', or one a line): {error}") from None
    remote = [uri for uri in uris if "://" in uri and not uri.startswith("file://")]
    if remote:
        raise DataError(f"{path}: expected local paths, got {remote[0]}; copy the images to a folder first")
    return _of_files([str(folder / uri.removeprefix("file://").strip()) for uri in uris], str(path))


def predict(
    bundle: Bundle,
    inputs: Inputs,
    destination: Path,
    *,
    kept: Kept | None = None,
    images_per_part: int = 1024,
    num_workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Predict all inputs on an initialised Ray; parts that exist already are kept.

    Raises:
        DataError: `destination` was begun with other inputs, another model or other settings; pictures of a classifier.
    """
    kept = kept or Kept()
    if kept.pictures and bundle.card.task != "detection":
        raise DataError(f"{bundle.path}: is a classifier, which has no boxes to draw; leave pictures out")
    _claim(destination, bundle, inputs, kept, images_per_part)
    bounds = [*range(0, inputs.num_images, images_per_part), inputs.num_images]
    parts = [(number, *span) for number, span in enumerate(pairwise(bounds))]
    missing = [part for part in parts if not _part(destination, part[0]).exists()]
    done = inputs.num_images - sum(stop - start for _, start, stop in missing)
    if missing:
        tasks = ray.data.from_items(
            [{"number": number, "start": start, "stop": stop} for number, start, stop in missing],
            override_num_blocks=len(missing),
        )
        finished = tasks.map(
            _Worker,
            fn_constructor_args=(bundle, inputs, destination, kept),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(missing))),
        )
        for row in finished.iter_rows():
            done += row["stop"] - row["start"]
            progress(done, inputs.num_images)
    (destination / DONE).write_text(json.dumps({"num_images": inputs.num_images, "num_parts": len(parts)}) + "\n")
    return destination


def parts_of(destination: Path) -> list[Path]:
    """The parts of a finished folder, in order."""
    return sorted(destination.glob("part-*.parquet"))


class _Worker:
    """An actor that holds the model and makes parts."""

    def __init__(self, bundle: Bundle, inputs: Inputs, destination: Path, kept: Kept) -> None:
        self.predictor = Predictor(bundle)
        self.inputs = inputs
        self.destination = destination
        self.kept = kept

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        rows = [row for batch in self._batches(part["start"], part["stop"]) for row in self._predict(batch)]
        path = _part(self.destination, part["number"])
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(rows, schema=OUTPUT[self.predictor.card.task]), partial)
        partial.rename(path)
        return part

    def _batches(self, start: int, stop: int) -> Iterator[list[tuple[str, bytes | ImageError]]]:
        size = self.predictor.batch_size
        for at in range(start, stop, size):
            yield list(self.inputs.read(at, min(at + size, stop)))

    def _predict(self, batch: list[tuple[str, bytes | ImageError]]) -> Iterator[dict[str, Any]]:
        answers = iter(self.predictor.predict([data for _, data in batch if not isinstance(data, ImageError)]))
        for image_id, data in batch:
            answer = data if isinstance(data, ImageError) else next(answers)
            if isinstance(answer, ImageError):
                yield {"image_id": image_id, "error": str(answer)}
            elif isinstance(answer, Detections):
                assert isinstance(data, bytes)
                yield {"image_id": image_id} | self._found(image_id, data, answer.best(self.kept.score_threshold))
            else:
                yield {"image_id": image_id} | self._ranked(answer)

    def _ranked(self, answer: Classification) -> dict[str, Any]:
        names = [self.predictor.classes[label] for label in answer.labels[: self.kept.top_k]]
        scores = answer.scores[: self.kept.top_k].tolist()
        return {"class_name": names[0], "score": scores[0], "top_class_names": names, "top_scores": scores}

    def _found(self, image_id: str, data: bytes, found: Detections) -> dict[str, Any]:
        if self.kept.pictures:
            path = self.destination / "pictures" / f"{_file_name(image_id)}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(imaging.encode_jpeg(self.predictor.drawn(data, found)))
        height, width = imaging.probe(data, self.predictor.card.decoding)
        return {
            "height": height,
            "width": width,
            "boxes": found.boxes_xyxy.tolist(),
            "labels": found.labels.tolist(),
            "class_names": list(self.predictor.class_names(found)),
            "scores": found.scores.tolist(),
        }


def _file_name(image_id: str) -> str:
    """An image's id, which may be a path, as the name of a file; no two ids share one."""
    name = urllib.parse.quote(image_id, safe="")
    if len(name) <= MAX_NAME:
        return name
    return f"{hashlib.sha256(image_id.encode()).hexdigest()[:16]}-{name[-MAX_NAME:]}"


def _claim(destination: Path, bundle: Bundle, inputs: Inputs, kept: Kept, images_per_part: int) -> None:
    """Make the folder, or check that it was begun for the same work."""
    listing = hashlib.sha256(json.dumps([inputs.ids, inputs.shards, inputs.digest]).encode()).hexdigest()
    plan = {
        "inputs_sha256": listing,
        "weights_sha256": bundle.card.weights_sha256,
        **kept.model_dump(mode="json"),
        "images_per_part": images_per_part,
    }
    path = destination / PLAN
    if not path.exists():
        destination.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan, indent=2) + "\n")
        partial.rename(path)
        return
    begun = json.loads(path.read_text())
    changed = [key for key, value in plan.items() if begun.get(key) != value]
    if changed:
        raise DataError(f"{destination}: was begun with other {', '.join(changed)}; choose another folder or delete it")


def _of_files(paths: list[str], where: str) -> Inputs:
    if not paths:
        raise DataError(f"{where}: names no image")
    return Inputs(ids=tuple(paths), num_images=len(paths))


def _part(destination: Path, number: int) -> Path:
    return destination / f"part-{number:05d}.parquet"


def _read_file(path: str) -> bytes | ImageError:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        return ImageError("unreadable", f"cannot be read ({error.strerror})")


def _read_shard(path: Path, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    """Rows `start` to `stop` of a shard."""
    with pq.ParquetFile(path, memory_map=True) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if first < stop and start < end:
                table = file.read_row_group(group, columns=["image_id", "image"])
                rows = table.slice(max(start - first, 0), min(stop, end) - max(start, first))
                for image_id, image in zip(rows.column("image_id"), rows.column("image"), strict=True):
                    yield image_id.as_py(), image.as_py()
            first = end
