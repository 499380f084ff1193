"""[Ray Data] From a dataset to validated shards: whole or not at all, and never twice.

The records are listed, shuffled once by seed and cut into parts (`plan`); one Ray task makes one shard of one part
(`rows`), so the files do not depend on how many workers there were. All of it grows in a hidden folder beside the
destination (`work`), so that a job that was killed and is run again makes only what is missing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline import imaging, provenance, storage
from pipeline.data import datasets, plan, rows, shards, work
from pipeline.data.plan import Part
from pipeline.data.rows import DIGEST_MODULUS, Made
from pipeline.data.work import Work
from pipeline.errors import DataError, own_cause
from pipeline.types import Record, Split

Progress = Callable[[int, int, str], None]
"""Called with (images done, images in all, what else there is to say) while the work goes on."""
Outcome = list[tuple[Part, Made]]
"""Every part and what became of it."""


class Config(rows.Config):
    """How a dataset becomes shards.

    Attributes:
        rows_per_shard: images in a shard before rejects.
        max_reject_share: share of unusable images above which the job fails.
        seed: of the shuffle.
    """

    rows_per_shard: int = Field(default=1024, ge=1)
    max_reject_share: float = Field(default=0.01, ge=0, le=1)
    seed: int = Field(default=0, ge=0)


_DEFAULTS = Config().model_dump(mode="json")


def ingest(
    dataset: datasets.DatasetConfig,
    config: Config,
    destination: Path,
    progress: Progress = lambda done, total, more: None,
    *,
    append: bool = False,
) -> shards.Shards:
    """Turn a dataset into shards at `destination`; a finished one of the same files and configuration is left alone.

    Needs an initialised Ray. A run that was interrupted goes on where it stopped.

    Args:
        dataset: what is read.
        config: how.
        destination: folder of the shards.
        progress: told now and then.
        append: where `destination` holds an older state of the same collection, add the images that are new, and those
            that were turned away and are usable now.

    Raises:
        DataError: the dataset contradicts itself, too many images are unusable, the disk is full, another job is at
            it, or `destination` holds other data, such as an image that has another label now.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with work.locked(destination):
            finished = _finished(dataset, config, destination, progress, append=append)
            work.clean(destination)
    except OSError as error:
        where = destination if error.filename is None else error.filename
        raise DataError(f"{where}: cannot be written: {storage.reason(error)}; mend that and run again") from None
    return finished


def _finished(
    dataset: datasets.DatasetConfig, config: Config, destination: Path, progress: Progress, *, append: bool
) -> shards.Shards:
    before = _existing(destination)
    classes = datasets.class_names(dataset)
    asked: dict[str, Any] = {"dataset": dataset.model_dump(mode="json"), "ingest": config.model_dump(mode="json")}
    earlier: list[dict[str, Any]] = []  # rejects
    if before is not None:
        _check_same(before, asked, classes)
    with work.listing_folder(destination) as folder:
        listings = {split: _listed(dataset, split, folder, classes, before) for split in dataset.splits}
        plan.check_strangers(listings)
        asked["files_sha256"] = hashlib.sha256(
            "".join(found.digest for found in listings.values()).encode()
        ).hexdigest()
        if before is not None:
            if not append and asked["files_sha256"] == before.manifest.config.get("files_sha256"):
                return before
            earlier = shards.rejects(before)
            listings = {split: _only_new(found, before, earlier, split, config) for split, found in listings.items()}
            if not sum(map(len, listings.values())):
                return before
            if not append:
                raise DataError(
                    f"{destination}: holds a dataset made from other files; choose another folder, delete this one, or "
                    "give append=true to add what is new"
                )
        place = Work(destination, asked | {"ingest": _of_rows(asked["ingest"])}, before)
        parts = place.plan(listings, config.rows_per_shard, config.seed)
    _make(parts, place, config, progress)
    made = [(part, place.receipt(part)) for part in parts]
    _check_rejects(made, config)
    rejects = [*_still_rejected(earlier, parts, place), *_named(made, classes)]
    manifest = _manifest(dataset, config, classes, asked, made, before, len(rejects))
    return place.publish(manifest, rejects)


def _listed(
    dataset: datasets.DatasetConfig, split: Split, folder: Path, classes: tuple[str, ...], before: shards.Shards | None
) -> plan.Listing:
    records = plan.with_known_labels(datasets.records(dataset, split), len(classes))
    if split == "train" and before is None:
        records = plan.with_every_class(records, classes)
    return plan.write_listing(folder / f"{split}.jsonl", records)


def _only_new(
    listing: plan.Listing, before: shards.Shards, rejects: list[dict[str, Any]], split: Split, config: Config
) -> plan.Listing:
    """The images that a dataset does not hold; of those that it has turned away, the ones that were mended since."""
    seen = plan.Seen(_stored(before, split), config)
    rejected = {row["image_id"] for row in rejects if row["split"] == split and row["reason"] != "box"}

    def is_new(record: Record) -> bool:
        return not seen.holds(record) and (record.image_id not in rejected or rows.is_usable(record, config))

    found = plan.only(listing, is_new)
    seen.check()
    return found


def _stored(before: shards.Shards, split: Split) -> Iterator[dict[str, Any]]:
    """What a dataset on disk knows of the images of one split."""
    for shard in before.manifest.shards:
        if shard.split == split:
            for group in range(len(shard.row_groups)):
                yield from shards.read(before.path / shard.name, [group], plan.Seen.COLUMNS).to_pylist()


def _still_rejected(rejects: list[dict[str, Any]], parts: list[Part], place: Work) -> list[dict[str, Any]]:
    """What a dataset has turned away, without the images that are read again."""
    known = {(row["split"], row["image_id"]) for row in rejects}
    again = known.intersection((part.split, record.image_id) for part in parts for record in place.records(part))
    return [row for row in rejects if (row["split"], row["image_id"]) not in again]


def _make(parts: list[Part], place: Work, config: Config, progress: Progress) -> None:
    """Make the missing shards as Ray tasks."""
    import ray.data  # noqa: PLC0415  (so that planning runs in a plain Python shell)
    import ray.exceptions  # noqa: PLC0415

    finished = {part: place.receipt(part) for part in parts if place.is_done(part)}
    missing = [part for part in parts if part not in finished]
    total, earlier = sum(part.num_records for part in parts), finished.values()
    done, rejects = sum(made.num_records for made in earlier), sum(len(made.rejects) for made in earlier)
    progress(done, total, f"{rejects} rejects")
    if not missing:
        return

    def make(row: dict[str, Any]) -> dict[str, Any]:
        try:
            made = place.make(Part(**row), config)
        except DataError as error:  # as data, for Ray keeps only the text of an error's cause, and logs it at length
            return {"num_records": 0, "num_rejects": 0, "error": str(error)}
        return {"num_records": made.num_records, "num_rejects": len(made.rejects), "error": ""}

    tasks = ray.data.from_items([part._asdict() for part in missing], override_num_blocks=len(missing))
    try:
        for result in tasks.map(make).iter_rows():
            if result["error"]:
                raise DataError(result["error"])
            done += result["num_records"]
            rejects += result["num_rejects"]
            progress(done, total, f"{rejects} rejects")
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None


def _manifest(
    dataset: datasets.DatasetConfig,
    config: Config,
    classes: tuple[str, ...],
    asked: dict[str, Any],
    made: Outcome,
    before: shards.Shards | None,
    num_rejects: int,
) -> shards.Manifest:
    """What is said of all shards, the old and the new."""
    old = before and before.manifest
    version = old.version + 1 if old else 1
    by_split = {split: [one for part, one in made if part.split == split] for split in dataset.splits}
    counts = {
        name: {
            split: _counts(
                [getattr(one, name) for one in found], len(classes), getattr(old, name).get(split, ()) if old else ()
            )
            for split, found in by_split.items()
        }
        for name in ("class_counts", "object_counts")
    }
    _check_classes(classes, counts["class_counts"])
    digest = sum(int(one.digest, 16) for _, one in made) + (int(old.digest, 16) if old else 0)
    return shards.Manifest(
        version=version,
        dataset=dataset.name,
        classes=classes,
        class_counts=counts["class_counts"],
        object_counts=counts["object_counts"],
        num_rejects=num_rejects,
        rejects=(shards.REJECTS if version == 1 else f"rejects-{version:05d}.parquet",),
        shards=(*(old.shards if old else ()), *(one.shard for _, one in made if one.shard)),
        digest=f"{digest % DIGEST_MODULUS:064x}",
        pixels=_sums(by_split, "pixels", old.pixels if old else {}),
        sizes=_sums(by_split, "sizes", old.sizes if old else {}),
        decoding=_decoding(config),
        config=asked,
        tool_versions=provenance.versions(),
    )


def _decoding(config: Config) -> imaging.Decoding:
    """How the stored images are read: as the originals, and in the format of those that were resized."""
    rewrites = config.train_short_side is not None or config.train_format == "decoded"
    stored: imaging.Format = "NPY" if config.stores_npy else "JPEG"
    formats = tuple(dict.fromkeys((*config.decoding.formats, *[stored] * rewrites)))
    return config.decoding.model_copy(update={"formats": formats})


def _counts(counted: list[dict[int, int]], num_classes: int, old: tuple[int, ...]) -> tuple[int, ...]:
    total = Counter(dict(enumerate(old)))
    for counts in counted:
        total.update(counts)
    return tuple(total[label] for label in range(num_classes))


def _sums(by_split: dict[Split, list[Made]], name: str, old: dict[Split, Any]) -> dict[Split, Any]:
    """The parts of each split added up; a split without an image has none."""
    found = {
        split: [part for part in (old.get(split), *(getattr(one, name) for one in made)) if part is not None]
        for split, made in by_split.items()
    }
    return {split: reduce(add, parts) for split, parts in found.items() if parts}


def _existing(destination: Path) -> shards.Shards | None:
    if not destination.exists():
        return None
    if not (destination / shards.MANIFEST).is_file():
        raise DataError(f"{destination}: is there already and is no dataset; choose another folder or delete this one")
    return shards.load(destination)


def _check_same(before: shards.Shards, asked: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Refuse what an existing dataset cannot become."""
    manifest = before.manifest
    made_with = manifest.config
    if made_with["dataset"] != asked["dataset"] or _of_rows(made_with["ingest"]) != _of_rows(asked["ingest"]):
        raise DataError(
            f"{before.path}: holds a dataset made with another configuration; choose another folder or delete this one"
        )
    if manifest.classes != classes:
        odd = sorted(set(manifest.classes) ^ set(classes))
        raise DataError(
            f"{before.path}: its {len(manifest.classes)} classes are not those of the collection now ({len(classes)}; "
            f"'{odd[0]}' is in one only): labels would change; choose another folder"
        )


def _of_rows(config: dict[str, Any]) -> dict[str, Any]:
    """What the shards depend on: another limit of rejects changes none of them, and must not cost what is done.

    A key that is younger than a dataset has its default there.
    """
    return {name: value for name, value in (_DEFAULTS | config).items() if name != "max_reject_share"}


def _check_rejects(made: Outcome, config: Config) -> None:
    total = sum(part.num_records for part, _ in made)
    rejects = [reject for _, one in made for reject in one.rejects if reject.reason != "box"]
    if len(rejects) > config.max_reject_share * total:
        reasons = Counter(reject.reason for reject in rejects)
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(
            f"{len(rejects)} of {total} images cannot be used ({counts}), more than max_reject_share "
            f"{config.max_reject_share} allows; the first is {rejects[0].uri}: {rejects[0].message} Mend them or allow "
            "more; what is done is kept"
        )


def _check_classes(classes: tuple[str, ...], counts: dict[Split, tuple[int, ...]]) -> None:
    """Of images that have a class, training needs some of each; rejects may have emptied one."""
    found = counts.get("train", ())
    if any(found) and not all(found):
        raise DataError(
            f"split 'train': the class '{classes[found.index(0)]}' has no usable image, all of its own were turned "
            "away; add some, or leave the class out of every split"
        )


def _named(made: Outcome, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """All rejects, with the name of their class."""
    found = [reject for _, one in made for reject in one.rejects]
    return [
        reject.model_dump() | {"class_name": classes[int(reject.class_name)] if reject.class_name else ""}
        for reject in found
    ]
