"""[Ray Data] Region proposals of a whole dataset: made once, kept beside its shards, read by a training.

`<dataset>/proposals/<name>/` holds `plan.json`, what they were begun for; a `part-<shard>-<row group>.parquet` for each
row group of the shards; and, written last, `proposals.json`: the settings, and how much of what was annotated the
regions cover. One Ray task makes one part, whole or not at all, so that a job that was killed and is run again makes
only what is missing. The regions themselves are the business of `regions`; which of them teach a detector what, that of
the detector.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import StringConstraints, ValidationError

from pipeline import boxes, imaging, provenance, storage
from pipeline.config import Strict
from pipeline.data import lookup, regions, shards, work
from pipeline.errors import DataError, ImageError, VentralError, own_cause
from pipeline.types import Float32Array, Split

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while the work goes on."""
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
"""Of one set of proposals, the name of its folder."""

FOLDER, PLAN, INDEX = "proposals", "plan.json", "proposals.json"
PARTS_IN_MEMORY = 32  # a training reads from 16 row groups at a time; of 128 images with 2,000 regions each, 131 MB
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy, half-open, pixels of the upright original
        ("num_regions", pa.int32()),
        ("best_overlaps", pa.list_(pa.float64())),  # largest IoU of each object with a region; null: not annotated
        ("seconds", pa.float64()),  # decoding and search, one core
    ]
)
_COLUMNS = ["image_id", "image", "original_height", "original_width", "boxes", "difficult", "crowd"]


class Figures(Strict):
    """What the proposals of one split are worth; crowds and difficult objects are left out.

    Attributes:
        mean_regions: of an image.
        seconds_per_image: on one core, without the reading of shards.
        num_objects: that were to be covered; where there is none, the figures below are None.
        recall_at_iou_0_5: share of objects that some region overlaps with an IoU of at least 0.5.
        recall_at_iou_0_7: the same with 0.7.
        mean_best_overlap: mean over objects, of all classes together, of the largest IoU with a region.
    """

    num_images: int
    mean_regions: float
    seconds_per_image: float
    num_objects: int
    recall_at_iou_0_5: float | None
    recall_at_iou_0_7: float | None
    mean_best_overlap: float | None

    @classmethod
    def of(cls, rows: pa.Table) -> Figures:
        """Sum up rows of `SCHEMA`, at least one."""
        best = rows.column("best_overlaps").combine_chunks().flatten().to_numpy()
        covered = [float(part.mean()) if len(best) else None for part in (best >= 0.5, best >= 0.7, best)]
        return cls(
            num_images=len(rows),
            mean_regions=float(rows.column("num_regions").to_numpy().mean()),
            seconds_per_image=float(rows.column("seconds").to_numpy().mean()),
            num_objects=len(best),
            recall_at_iou_0_5=covered[0],
            recall_at_iou_0_7=covered[1],
            mean_best_overlap=covered[2],
        )


class Made(Strict):
    """What `proposals.json` says: of which dataset, how made, how good.

    Attributes:
        digest: of the dataset's manifest.
        splits: those that have proposals.
    """

    schema_version: Literal[1] = 1
    dataset: str
    digest: str
    search: regions.Config
    splits: dict[Split, Figures]
    tool_versions: dict[str, str]


class Part(NamedTuple):
    """The images of one row group of a shard."""

    shard: str
    group: int
    num_images: int

    @property
    def file(self) -> str:
        """Where their proposals are."""
        return f"part-{Path(self.shard).stem}-{self.group:05d}.parquet"


@dataclass(frozen=True, slots=True)
class Proposals:
    """The proposals of a dataset, read when they are asked for; a few row groups stay in memory.

    May travel between processes: it is a path and the place of each image.

    Attributes:
        path: their folder.
        made: how they were made.
        files: the parts.
        places: of each image id, the index of its part and its row there.
    """

    path: Path
    made: Made
    files: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def of(self, image_id: str) -> Float32Array:
        """The regions of one image, float32 [P, 4] xyxy, half-open, in pixels of the upright original; a copy.

        Raises:
            DataError: there are none of this image, or their part cannot be read.
        """
        place = self.places.get(image_id)
        if place is None:
            raise DataError(
                f"{self.path}: has no proposals of image '{image_id}', only of {len(self)} images of the splits "
                f"{', '.join(self.made.splits)}; run jobs.propose for its split"
            )
        offsets, coordinates = _boxes(self.path / self.files[place[0]], self.made.digest, self.made.search)
        return coordinates[slice(*offsets[place[1] : place[1] + 2].tolist())].copy()


def name_of(config: regions.Config) -> str:
    """What proposals are called where nothing else is said."""
    return f"{config.mode}-{config.max_proposals}"


def make(
    source: shards.Shards,
    config: regions.Config,
    *,
    name: str | None = None,
    splits: Sequence[Split] | None = None,
    progress: Progress = lambda done, total: None,
) -> Proposals:
    """Search every image of some splits for regions, on an initialised Ray; parts that exist already are kept.

    Args:
        source: the dataset.
        config: what is searched for.
        name: of the folder; by default mode and number.
        splits: by default all that the dataset has. Those that were made earlier stay.
        progress: told now and then.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: there is no such split, a shard is damaged, an image does not decode, the folder was begun for
            another dataset or with other settings, another job is at it, or it cannot be written.
    """
    opencv = {"opencv": regions.opencv_version()}
    wanted = splits if splits is not None else [*dict.fromkeys(shard.split for shard in source.manifest.shards)]
    parts = {split: _parts(source.manifest, split) for split in wanted}
    folder = source.path / FOLDER / (name or name_of(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with work.locked(folder):
            earlier = _begun(folder, source, config)
            _make_missing(source, parts, folder, config, progress)
            figures = {split: Figures.of(_told(folder, parts[split])) for split in wanted}
            made = Made(
                dataset=source.manifest.dataset,
                digest=source.manifest.digest,
                search=config,
                splits=earlier | figures,
                tool_versions=provenance.versions() | opencv,
            )
            _write(folder / INDEX, made.model_dump_json(indent=2) + "\n")
    except OSError as error:
        where = folder if error.filename is None else error.filename
        raise DataError(f"{where}: cannot be written: {storage.reason(error)}; mend that and run again") from None
    return read(source, folder.name)


def read(source: shards.Shards, name: str) -> Proposals:
    """The proposals of a dataset. Ids are read, no box: 0.9 s and 4 MB for 100,000 images (made up, on one slow core).

    Raises:
        DataError: none of that name were made, or not to the end, or for other images than the dataset has now.
    """
    folder = source.path / FOLDER / name
    made = _made(folder, source)
    if made.digest != source.manifest.digest:
        raise DataError(
            f"{folder}: proposals were made for a dataset of digest {made.digest[:12]}, but {source.address} has "
            f"{source.manifest.digest[:12]}; make some under another name, or delete them and run jobs.propose"
        )
    files = tuple(part.file for split in made.splits for part in _parts(source.manifest, split))
    ids = (_column(folder / file, "image_id").to_pylist() for file in files)
    places = {image_id: (at, row) for at, here in enumerate(ids) for row, image_id in enumerate(here)}
    return Proposals(folder, made, files, places)


def make_part(source: shards.Shards, part: Part, config: regions.Config, path: Path) -> None:
    """Search the images of one row group and write the file, which appears whole or not at all; runs in a Ray task.

    Raises:
        ConfigError: OpenCV is not installed on this node.
        DataError: the shard cannot be read, an image in it does not decode, or the disk is full.
    """
    found = shards.read(source.path / part.shard, [part.group], _COLUMNS).to_pylist()
    rows = [_row(row, source, config) for row in found]
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {storage.reason(error)}; free some space and run again") from None
    finally:
        partial.unlink(missing_ok=True)


def _row(row: dict[str, Any], source: shards.Shards, config: regions.Config) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        image = imaging.decode(row["image"], source.manifest.decoding)
    except ImageError as error:
        raise DataError(f"{source.path}: image '{row['image_id']}' does not decode: {error}; run jobs.verify") from None
    original_hw = row["original_height"], row["original_width"]
    found = regions.selective_search(lookup.visible(image), config)
    found = boxes.scale(found, image.shape[:2], original_hw)
    return {
        "image_id": row["image_id"],
        "boxes": found.tolist(),
        "num_regions": len(found),
        "seconds": time.perf_counter() - started,
        "best_overlaps": _overlaps(row, found),
    }


def _overlaps(row: dict[str, Any], found: Float32Array) -> list[float] | None:
    """The largest IoU of each object that counts."""
    if row["boxes"] is None:
        return None
    counts = ~(np.array(row["difficult"], bool) | np.array(row["crowd"], bool))
    truth = np.array(row["boxes"], np.float32).reshape(-1, 4)[counts]
    overlaps: list[float] = regions.best_overlaps(found, truth).tolist()
    return overlaps


def _parts(manifest: shards.Manifest, split: Split) -> list[Part]:
    return [Part(shard.name, at, num) for shard in manifest.of(split) for at, num in enumerate(shard.row_groups)]


def _begun(folder: Path, source: shards.Shards, config: regions.Config) -> dict[Split, Figures]:
    """Check that the folder was begun for the same work, or begin; the splits that are done."""
    for left_over in folder.glob(".*.partial"):  # by a process that was killed
        left_over.unlink(missing_ok=True)
    asked = config.model_dump(mode="json") | {"dataset": source.manifest.digest}
    path = folder / PLAN
    if not path.exists():
        _write(path, json.dumps(asked, indent=2) + "\n")
    begun = json.loads(path.read_text())
    changed = [key for key, value in asked.items() if begun.get(key) != value]
    if changed:
        raise DataError(
            f"{folder}: proposals were begun with another {', '.join(changed)}; give another name, or delete the folder"
        )
    return _made(folder, source).splits if (folder / INDEX).exists() else {}


def _make_missing(
    source: shards.Shards,
    parts: Mapping[Split, Sequence[Part]],
    folder: Path,
    config: regions.Config,
    progress: Progress,
) -> None:
    """Make the parts that are not there as Ray tasks."""
    import ray.data  # noqa: PLC0415  (so that a training which reads proposals needs no Ray)
    import ray.exceptions  # noqa: PLC0415

    missing = {split: [part for part in found if not (folder / part.file).exists()] for split, found in parts.items()}
    total = sum(part.num_images for found in parts.values() for part in found)
    rows = [part._asdict() for found in missing.values() for part in found]
    done = total - sum(row["num_images"] for row in rows)
    progress(done, total)
    for split in (split for split, found in missing.items() if found):
        shards.check(source, split)

    def search(row: dict[str, Any]) -> dict[str, Any]:
        part = Part(**row)
        try:
            regions.use_one_thread()
            make_part(source, part, config, folder / part.file)
        except VentralError as error:  # as data, for Ray keeps only the text of an error's cause, and logs it at length
            return row | {"error": str(error)}
        return row | {"error": ""}

    if not rows:
        return
    try:
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(search).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            done += row["num_images"]
            progress(done, total)
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None


def _made(folder: Path, source: shards.Shards) -> Made:
    try:
        return Made.model_validate_json((folder / INDEX).read_bytes(), strict=True)
    except OSError:
        known = sorted(path.parent.name for path in folder.parent.glob(f"*/{INDEX}"))
        begun = " to the end" if folder.exists() else ""
        raise DataError(
            f"{folder}: no such proposals were made{begun} (known: {', '.join(known) or 'none'}); run "
            f"python -m jobs.propose shards={source.address} name={folder.name}"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{folder / INDEX}: not one that this version reads: {where}: {first['msg']}; delete the folder and run "
            "jobs.propose"
        ) from None


def _told(folder: Path, parts: Sequence[Part]) -> pa.Table:
    """What figures are made of: all columns but the ids and the boxes."""
    columns = [name for name in SCHEMA.names if name not in {"image_id", "boxes"}]
    return pa.concat_tables([_read(folder / part.file, columns) for part in parts])


@lru_cache(maxsize=PARTS_IN_MEMORY)
def _boxes(path: Path, digest: str, search: regions.Config) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """Of N images of a part: where each one's regions begin and the last one's end [N + 1], and all regions [P, 4].

    The other arguments tell the file from one that lay there earlier.
    """
    lists = _column(path, "boxes").combine_chunks()
    return lists.offsets.to_numpy(), lists.values.flatten().to_numpy().reshape(-1, 4)


def _column(path: Path, name: str) -> pa.ChunkedArray:
    return _read(path, [name]).column(name)


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=list(columns))
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: proposals cannot be read: {reason}; delete the file and run jobs.propose again"
        ) from None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(text)
    partial.rename(path)
