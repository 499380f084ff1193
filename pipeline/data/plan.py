"""What ingest is going to read: every record of a dataset on disk, shuffled once by seed and cut into shards. No Ray.

The plan lies as JSON lines in the working folder, one file per shard, so that a job that was killed finds it again, a
task on another node reads only its own part, and the memory of the job does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import storage
from pipeline.data import rows
from pipeline.errors import DataError, ImageError
from pipeline.types import Objects, Record, RunLengths, Split

MAX_NAMED = 3  # images that changed, in an error


class Part(NamedTuple):
    """One shard to make: its name without suffix, its split and how many records it is made of."""

    name: str
    split: Split
    num_records: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The records of one split, in a file; only their positions and keys are held, 16 bytes of each.

    Attributes:
        path: JSON lines.
        offsets: where each line begins.
        keys: of the ids of all records.
        digest: of ids, labels, boxes and the sizes of images and masks, not of where the files lie.
    """

    path: Path
    offsets: array[int]
    keys: array[int]
    digest: str

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.offsets)


def write_listing(path: Path, records: Iterable[Record]) -> Listing:
    """Write down the records of one split.

    Raises:
        DataError: two records have one id.
    """
    offsets, keys, digest, at = array("q"), array("q"), hashlib.sha256(), 0
    with path.open("wb") as file:
        for record in map(_sized, records):
            fields = _to_json(record)
            digest.update(json.dumps([value for key, value in fields.items() if "uri" not in key]).encode())
            keys.append(_key(record.image_id))
            offsets.append(at)
            at += file.write(json.dumps(fields).encode() + b"\n")
    found = Listing(path, offsets, keys, digest.hexdigest())
    for record in _repeated([found]):
        raise DataError(f"image id '{record.image_id}' is there twice in split '{record.split}'; rename one")
    return found


def check_strangers(listings: Mapping[Split, Listing]) -> None:
    """Refuse an image id that two splits have.

    Raises:
        DataError: there is one.
    """
    for record in _repeated(listings.values()):
        splits = " and ".join(f"'{split}'" for split, found in listings.items() if _key(record.image_id) in found.keys)
        raise DataError(
            f"image id '{record.image_id}' is in the splits {splits}; leave it in one of them, or rename one if they "
            "are two images"
        )


def only(listing: Listing, wanted: Callable[[Record], bool]) -> Listing:
    """The same listing with some of its records."""
    with listing.path.open("rb") as file:
        kept = (at for at, line in zip(listing.offsets, file, strict=True) if wanted(_from_json(json.loads(line))))
        return replace(listing, offsets=array("q", kept))


def with_known_labels(records: Iterable[Record], num_classes: int) -> Iterator[Record]:
    """The same records.

    Raises:
        DataError: a label is not an index into the classes.
    """
    for record in records:
        labels = [] if record.label is None else [record.label]
        if record.objects is not None:
            labels += record.objects.labels.tolist()
        odd = next((label for label in labels if not 0 <= label < num_classes), None)
        if odd is not None:
            raise DataError(
                f"image '{record.image_id}': expected labels 0 to {num_classes - 1} for {num_classes} classes, got "
                f"{odd}; correct the annotation"
            )
        yield record


def with_every_class(records: Iterable[Record], classes: Sequence[str]) -> Iterator[Record]:
    """The same records, of a split that is learned from.

    Raises:
        DataError: they have classes, but not each of these; known, and so said, at the end.
    """
    missing, labelled = set(range(len(classes))), False
    for record in records:
        if record.label is not None:
            missing.discard(record.label)
            labelled = True
        yield record
    if labelled and missing:
        raise DataError(
            f"split 'train': {len(missing)} of {len(classes)} classes have no image, the first is "
            f"'{classes[min(missing)]}'; add some, or leave these classes out of every split"
        )


def write_parts(
    folder: Path, listings: dict[Split, Listing], rows_per_shard: int, seed: int, first: dict[Split, int]
) -> list[Part]:
    """Shuffle each split by seed and write the part of each shard; they are numbered from `first`."""
    parts = []
    for split, listing in listings.items():
        order = np.random.default_rng([seed, first[split], *split.encode()]).permutation(len(listing))
        with listing.path.open("rb") as file:
            for number, start in enumerate(range(0, len(order), rows_per_shard), first[split]):
                chosen = order[start : start + rows_per_shard]
                part = Part(f"{split}-{number:05d}", split, len(chosen))
                with (folder / f"{part.name}.jsonl").open("wb") as out:
                    for index in chosen:
                        file.seek(listing.offsets[int(index)])
                        out.write(file.readline())
                    out.flush()
                    os.fsync(out.fileno())
                parts.append(part)
    return parts


def read_part(folder: Path, part: Part) -> Iterator[Record]:
    """The records of one shard, in its order.

    Raises:
        DataError: they are not all there.
    """
    path, found = folder / f"{part.name}.jsonl", 0
    with suppress(ValueError), path.open("rb") as file:  # a line that was cut
        for line in file:
            record = _from_json(json.loads(line))
            found += 1
            yield record
    if found != part.num_records:
        raise DataError(
            f"{path}: expected {part.num_records} records, got {found}: the plan is damaged; delete "
            f"{folder.with_suffix('.json')} and run again, which writes it anew and keeps the finished shards"
        )


class Seen:
    """Images that a dataset on disk holds already, by id, and what they mean there: 40 bytes of memory each.

    Args:
        found: their rows, of `COLUMNS`.
        config: how they became rows.
    """

    COLUMNS = ("image_id", "original_bytes", "original_height", "original_width", *rows.ANNOTATION)

    def __init__(self, found: Iterable[Mapping[str, Any]], config: rows.Config) -> None:
        facts = array("q")
        for row in found:
            size = (row["original_bytes"], row["original_height"], row["original_width"])
            facts.extend((_key(row["image_id"]), *size, _key(rows.meaning(row))))
        table = np.frombuffer(facts, np.int64).reshape(-1, 5)
        table = table[np.argsort(table[:, 0], kind="stable")]
        self._keys, self._facts, self._config = table[:, 0].copy(), table[:, 1:].copy(), config
        self._changes, self._num_changed = list[str](), 0

    def holds(self, record: Record) -> bool:
        """Whether the record is there; where its file or its meaning has changed since, that is noted."""
        key = _key(record.image_id)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return False
        change = self._change(record, *self._facts[at].tolist())
        if change is not None:
            self._num_changed += 1
            self._changes += [f"{record.image_id}: {change}"] * (len(self._changes) < MAX_NAMED)
        return True

    def check(self) -> None:
        """Refuse images that have changed.

        Raises:
            DataError: some have; it names the first ones.
        """
        if self._num_changed:
            more = self._num_changed - len(self._changes)
            named = "; ".join([*self._changes, *[f"and {more} more"] * (more > 0)])
            raise DataError(
                f"{self._num_changed} images have changed since the dataset was made: {named}. Images can be added, "
                "not changed: make a new dataset in another folder"
            )

    def _change(self, record: Record, size_bytes: int, height: int, width: int, meaning: int) -> str | None:
        if record.size_bytes not in {0, size_bytes}:
            return f"has {record.size_bytes} bytes, had {size_bytes}"
        try:
            row = rows.annotation(record, (height, width), self._config, [])
        except ImageError as error:
            return str(error).rstrip(".")
        return None if _key(rows.meaning(row)) == meaning else "has another label, other boxes or another mask"


def _repeated(listings: Collection[Listing]) -> Iterator[Record]:
    """The records whose ids these have more than once: 8 bytes of each are held, so the files are read again."""
    ordered = np.sort(np.concatenate([np.frombuffer(found.keys, np.int64) for found in listings]))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    for found in listings if twice else ():
        with found.path.open("rb") as file:
            records = (_from_json(json.loads(line)) for line in file)
            yield from (record for record in records if _key(record.image_id) in twice)


def _key(text: str) -> int:
    """64 bits of a hash: two of a million different ids meet with a chance of 1 in 10 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _sized(record: Record) -> Record:
    """The record with its sizes, where its dataset did not say them."""
    image_bytes = record.size_bytes or (record.byte_range[1] if record.byte_range else _size(record.uri))
    mask_bytes = record.mask_bytes or (_size(record.mask_uri) if record.mask_uri else 0)
    return replace(record, size_bytes=image_bytes, mask_bytes=mask_bytes)


def _size(uri: str) -> int:
    """Bytes of a local file; 0 where it is not there, which is found out when it is read."""
    try:
        return 0 if storage.is_remote(uri) else Path(uri).stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return 0


def _to_json(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = {"image_id": record.image_id, "uri": record.uri, "split": record.split}
    optional = {"label": record.label, "byte_range": record.byte_range, "mask_uri": record.mask_uri}
    fields |= {name: value for name, value in optional.items() if value is not None}
    fields |= {name: size for name in ("size_bytes", "mask_bytes") if (size := getattr(record, name))}
    if record.objects is not None:
        fields["objects"] = _objects_to_json(record.objects)
    return fields


def _objects_to_json(objects: Objects) -> dict[str, Any]:
    arrays = ("boxes_xyxy", "labels", "difficult", "truncated", "crowd")
    fields: dict[str, Any] = {name: getattr(objects, name).tolist() for name in arrays}
    if objects.regions:
        fields["regions"] = [
            {"size_hw": region.size_hw, "counts": region.counts} if isinstance(region, RunLengths) else region
            for region in objects.regions
        ]
    return fields | {"frame_hw": objects.frame_hw}


def _from_json(fields: dict[str, Any]) -> Record:
    byte_range, objects = fields.pop("byte_range", None), fields.pop("objects", None)
    return Record(
        **fields,
        byte_range=None if byte_range is None else (byte_range[0], byte_range[1]),
        objects=None if objects is None else _objects_from_json(objects),
    )


def _objects_from_json(fields: dict[str, Any]) -> Objects:
    regions = (
        RunLengths(tuple(region["size_hw"]), tuple(region["counts"]))
        if isinstance(region, dict)
        else tuple(map(tuple, region))
        for region in fields.get("regions", ())
    )
    frame_hw = fields["frame_hw"]
    return Objects(
        boxes_xyxy=np.array(fields["boxes_xyxy"], np.float32).reshape(-1, 4),
        labels=np.array(fields["labels"], np.int64),
        difficult=np.array(fields["difficult"], np.bool_),
        truncated=np.array(fields["truncated"], np.bool_),
        crowd=np.array(fields["crowd"], np.bool_),
        regions=tuple(regions),
        frame_hw=None if frame_hw is None else (frame_hw[0], frame_hw[1]),
    )
