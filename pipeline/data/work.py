"""The hidden folder in which a dataset grows until it is whole, `.<name>.work-<digest of what is asked for>`. No Ray.

`plan/` says what each shard is made of, `dataset/` holds the shards that are done, `receipts/` what became of each, and
`scratch/` what is half-written. A shard counts once its receipt is there, so that a job that was killed at any moment
and is run again makes only what is missing. The dataset appears under its name by one rename; shards that are added to
one count once its `manifest.json` names them. `.<name>.lock` keeps a second job away meanwhile.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data import plan, rows, shards, sheet
from pipeline.data.plan import Part
from pipeline.data.rows import Made
from pipeline.errors import DataError
from pipeline.types import Record, Split


class Work:
    """One such folder.

    Args:
        destination: where the dataset appears, locked.
        asked: all that its shards depend on.
        before: the dataset that shards are added to.
    """

    def __init__(self, destination: Path, asked: dict[str, Any], before: shards.Shards | None = None) -> None:
        key = asked | {"before": before and (before.manifest.version, before.manifest.digest)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.destination = destination
        self._before = before
        self.folder = destination.with_name(f".{destination.name}.work-{digest[:16]}")
        self.dataset = self.folder / "dataset"
        self.scratch = self.folder / "scratch"

    def plan(self, listings: dict[Split, plan.Listing], rows_per_shard: int, seed: int) -> list[Part]:
        """The parts to make: those that an earlier run wrote down, or new ones."""
        shutil.rmtree(self.scratch, ignore_errors=True)  # what killed processes have left may fill the disk
        for name in ("plan", "receipts", "scratch", "dataset"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        index = self.folder / "plan.json"
        if not index.exists():
            first = {split: _next_number(self._before, split) for split in listings}
            parts = plan.write_parts(self.folder / "plan", listings, rows_per_shard, seed, first)
            self._write(index, json.dumps(parts))
        return [Part(*part) for part in json.loads(index.read_bytes())]

    def is_done(self, part: Part) -> bool:
        """Whether a part's receipt is there, and the shard that it speaks of, here or where publishing has moved it."""
        if not self._receipt(part).exists():
            return False
        shard = self.receipt(part).shard
        if shard is None:
            return True
        here, there = self.dataset / shard.name, self.destination / shard.name
        if here.is_file():
            return here.stat().st_size == shard.size_bytes
        return there.is_file() and shards.sha256(there) == shard.sha256

    def make(self, part: Part, config: rows.Config) -> Made:
        """Make one shard, and its receipt last; runs in a Ray task, which Ray may start again."""
        if self.is_done(part):
            return self.receipt(part)
        path = self.dataset / f"{part.name}.parquet"
        made = rows.make_shard(path, part.split, self.records(part), config, self.scratch)
        self._write(self._receipt(part), made.model_dump_json())
        return made

    def records(self, part: Part) -> Iterator[Record]:
        """What a part is made of."""
        return plan.read_part(self.folder / "plan", part)

    def receipt(self, part: Part) -> Made:
        """What became of a part that is done."""
        return Made.model_validate_json(self._receipt(part).read_bytes(), strict=True)

    def publish(self, manifest: shards.Manifest, rejects: list[dict[str, Any]]) -> shards.Shards:
        """Write the rest of what belongs beside the shards, and let the whole appear."""
        folder = self.dataset if manifest.version == 1 else self.destination
        text = manifest.model_dump_json(indent=2) + "\n"
        pq.write_table(pa.Table.from_pylist(rejects, schema=shards.REJECT_SCHEMA), self.dataset / manifest.rejects[-1])
        if folder != self.dataset:
            for path in sorted(self.dataset.iterdir()):
                path.rename(folder / path.name)
        _draw(shards.Shards(folder, manifest))
        for name in (shards.version_name(manifest.version), shards.MANIFEST):
            self._write(folder / name, text)
        if folder == self.dataset:
            folder.rename(self.destination)
        return shards.Shards(self.destination, manifest)

    def _receipt(self, part: Part) -> Path:
        return self.folder / "receipts" / f"{part.name}.json"

    def _write(self, path: Path, text: str) -> None:
        """Whole or not at all, and on the disk when this returns."""
        partial = self.scratch / f"{path.name}.{uuid.uuid4().hex}"
        try:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {storage.reason(error)}; free space and run again") from None
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Keep other jobs away from a destination; the lock goes with the process, however that ends.

    Raises:
        DataError: another job is there.
    """
    path = destination.with_name(f".{destination.name}.lock")
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{destination}: another job is making it; wait until that ends") from None
            if not _is_at(path, lock):
                continue  # the job that held it has removed it in this moment
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def listing_folder(destination: Path) -> Iterator[Path]:
    """A folder beside a destination, for as long as this process needs it."""
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.listing-", dir=destination.parent) as folder:
        yield Path(folder)


def clean(destination: Path) -> None:
    """Remove what this and earlier attempts at a destination have left beside it."""
    for what in ("work", "listing"):
        for folder in destination.parent.glob(f".{glob.escape(destination.name)}.{what}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _is_at(path: Path, file: TextIO) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _draw(dataset: shards.Shards) -> None:
    """Picture sheets, for people: a sample of each class of each split, and of what was left out."""
    for split in dataset.manifest.class_counts:
        if any(shard.split == split for shard in dataset.manifest.shards):
            for number, page in enumerate(sheet.of_dataset(dataset, split), 1):
                name = f"sheet-{split}.png" if number == 1 else f"sheet-{split}-{number:02d}.png"
                (dataset.path / name).write_bytes(page)
    rejects = sheet.of_rejects(dataset)
    if rejects is not None:
        (dataset.path / "sheet-rejects.png").write_bytes(rejects)


def _next_number(before: shards.Shards | None, split: Split) -> int:
    """The number of the next shard of a split; numbers are not used twice."""
    known = before.manifest.shards if before else ()
    return max(
        (int(Path(shard.name).stem.rpartition("-")[2]) + 1 for shard in known if shard.split == split), default=0
    )
