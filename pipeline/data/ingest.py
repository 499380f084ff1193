"""[Ray Data] From a dataset to validated shards, whole or not at all.

The records of each split are shuffled once by seed and cut into shards; one Ray task makes one shard, so the files do
not depend on how many workers there were. Every image is decoded here, so that nothing undecodable reaches training:
what fails goes to `rejects.parquet` with its reason. Training images may be stored with their short side resized;
validation and test images keep their original bytes, so that offline and served answers can be equal.

The shards grow in a hidden folder beside their final place, which appears by one rename once the manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline import imaging, provenance
from pipeline.config import Strict
from pipeline.data import datasets, shards
from pipeline.errors import DataError, ImageError
from pipeline.types import Record, Split

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while the work goes on."""


class Config(Strict):
    """How images become shards.

    Attributes:
        train_short_side: training images whose short side is longer are resized to it and stored as JPEG; None keeps
            the original bytes.
        jpeg_quality: of the resized training images.
        rows_per_shard: images in a shard before rejects.
        rows_per_group: images in a Parquet row group, the unit of random access.
        max_reject_share: share of undecodable images above which the job fails.
    """

    train_short_side: int | None = Field(default=256, ge=8)
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    rows_per_shard: int = Field(default=1024, ge=1)
    rows_per_group: int = Field(default=128, ge=1)
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    decoding: imaging.Decoding = imaging.Decoding()
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to make."""

    path: Path
    split: Split
    records: tuple[Record, ...]


def ingest(
    dataset: datasets.DatasetConfig, config: Config, destination: Path, progress: Progress = lambda done, total: None
) -> shards.Shards:
    """Turn a dataset into shards at `destination`; a finished one of the same files and configuration is left alone.

    Needs an initialised Ray.

    Raises:
        DataError: the dataset contradicts itself, too many images are undecodable, or `destination` holds other data.
    """
    classes = datasets.class_names(dataset)
    records = {split: list(datasets.records(dataset, split)) for split in dataset.splits}
    resolved = {
        "dataset": dataset.model_dump(mode="json"),
        "ingest": config.model_dump(mode="json"),
        "files_sha256": _listing(records),
    }
    if destination.exists():
        return _existing(destination, resolved)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    partial.chmod(0o755)
    try:
        tasks = [task for split, found in records.items() for task in _plan(found, split, partial, config)]
        made = list(_run(tasks, config, progress))
        rejects = [reject | {"class_name": classes[reject["label"]]} for result in made for reject in result["rejects"]]
        _check_rejects(rejects, sum(len(task.records) for task in tasks), config)
        rows = [row for result in made for row in result["rows"]]
        manifest = shards.Manifest(
            dataset=dataset.name,
            classes=classes,
            class_counts={split: _count(rows, split, classes) for split in dataset.splits},
            num_rejects=len(rejects),
            shards=tuple(shards.Shard(**result["shard"]) for result in made if result["shard"]),
            digest=_digest(rows),
            decoding=config.decoding,
            config=resolved,
            tool_versions=provenance.versions(),
        )
        pq.write_table(pa.Table.from_pylist(rejects, schema=shards.REJECT_SCHEMA), partial / shards.REJECTS)
        (partial / shards.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return shards.Shards(destination, manifest)


def make_shard(task: Task, config: Config) -> dict[str, Any]:
    """Read, check and store the images of one shard; a pure function of the files and the configuration."""
    columns: dict[str, list[Any]] = {name: [] for name in shards.SCHEMA.names}
    rejects: list[dict[str, Any]] = []
    for record in task.records:
        try:
            row = _row(record, config)
        except ImageError as error:
            rejects.append(asdict(record) | {"reason": error.reason, "message": str(error)})
        else:
            for name, value in row.items():
                columns[name].append(value)
    shard = shards.write(task.path, task.split, columns, config.rows_per_group) if columns["image"] else None
    return {
        "shard": shard and shard.model_dump(),
        "rows": [
            (task.split, *row) for row in zip(columns["image_id"], columns["label"], columns["sha256"], strict=True)
        ],
        "rejects": rejects,
    }


def _row(record: Record, config: Config) -> dict[str, Any]:
    try:
        data = Path(record.uri).read_bytes()
    except OSError as error:
        raise ImageError("unreadable", f"{record.uri}: cannot be read ({error.strerror})") from None
    image = imaging.decode(data, config.decoding)
    stored, stored_hw = data, image.shape[:2]
    if record.split == "train" and config.train_short_side and min(stored_hw) > config.train_short_side:
        image = imaging.resize_short(image, config.train_short_side)
        stored, stored_hw = imaging.encode_jpeg(image, config.jpeg_quality), image.shape[:2]
    original_hw = imaging.probe(data, config.decoding)
    return {
        "image_id": record.image_id,
        "image": stored,
        "label": record.label,
        "height": stored_hw[0],
        "width": stored_hw[1],
        "original_height": original_hw[0],
        "original_width": original_hw[1],
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _plan(records: list[Record], split: Split, folder: Path, config: Config) -> Iterator[Task]:
    """Shuffle by seed and cut into shards."""
    order = np.random.default_rng([config.seed, *split.encode()]).permutation(len(records))
    for number, start in enumerate(range(0, len(records), config.rows_per_shard)):
        chosen = tuple(records[index] for index in order[start : start + config.rows_per_shard])
        yield Task(folder / f"{split}-{number:05d}.parquet", split, chosen)


def _run(tasks: list[Task], config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Make the shards as Ray tasks; results come in any order and are returned in the order of the tasks."""
    import ray.data  # noqa: PLC0415  (so that make_shard runs in a plain Python shell)

    rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]

    def make(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": pickle.dumps(make_shard(pickle.loads(row["task"]), config))}  # noqa: S301  (our own)

    total, done = sum(len(task.records) for task in tasks), 0
    results: dict[int, dict[str, Any]] = {}
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(make).iter_rows():
        results[row["number"]] = pickle.loads(row["result"])  # noqa: S301  (our own)
        done += len(tasks[row["number"]].records)
        progress(done, total)
    return [results[number] for number in range(len(tasks))]


def _listing(records: dict[Split, list[Record]]) -> str:
    """A digest of what there is to read: ids, labels and sizes, without reading it."""
    rows = [
        (record.image_id, record.label, Path(record.uri).stat().st_size)
        for found in records.values()
        for record in found
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _existing(destination: Path, resolved: dict[str, Any]) -> shards.Shards:
    if not (destination / shards.MANIFEST).is_file():
        raise DataError(f"{destination}: is there already and is no dataset; choose another folder or delete this one")
    found = shards.load(destination)
    if found.manifest.config != resolved:
        raise DataError(
            f"{destination}: holds a dataset made from other files or another configuration; choose another folder "
            "or delete this one"
        )
    return found


def _check_rejects(rejects: list[dict[str, Any]], total: int, config: Config) -> None:
    if len(rejects) > config.max_reject_share * total:
        reasons = Counter(reject["reason"] for reject in rejects)
        first = rejects[0]
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(
            f"{len(rejects)} of {total} images cannot be used ({counts}), more than max_reject_share "
            f"{config.max_reject_share} allows; the first is {first['uri']}: {first['message']}"
        )


def _count(rows: list[tuple[Split, str, int, str]], split: Split, classes: tuple[str, ...]) -> tuple[int, ...]:
    """Images of each class of one split; a class that rejects have emptied is an error."""
    labels = Counter(label for of, _, label, _ in rows if of == split)
    empty = [name for label, name in enumerate(classes) if not labels[label]]
    if empty:
        raise DataError(f"split '{split}': the class '{empty[0]}' has no usable image; add some or remove its folder")
    return tuple(labels[label] for label in range(len(classes)))


def _digest(rows: list[tuple[Split, str, int, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
