"""[Ray Data] Whether a dataset on disk is what its manifest says, and its splits are strangers to each other.

One Ray task reads one shard, decodes every picture in it and brings back a few bytes for each: its id, keys of its id
and of its original bytes, two difference hashes. The driver puts these side by side (1.3 million of them in 0.4 GB and
10 s, made up, on one core) and finds what no single shard can show: counts that do not add up, and pictures that are
there twice.

- **Errors** (a job ends with 3): a shard that is missing, changed, unreadable, of other columns or row counts than the
  manifest's; a class list that is another one in the manifest of another version; labels outside the class list and
  counts that differ from the manifest's; pictures that do not decode, or to another size than recorded, or whose
  sha256 is not the recorded one; boxes outside the image, without area or not finite; lists of unequal length; masks of
  another size or with values that are no class; an image id that is there twice; the same file in two splits, because
  then a test measures memory.
- **Warnings** (reported, errors only where `strict`): the same file twice in a split; near-duplicates within and across
  splits; files that the manifest does not name.

Near-duplicates are pictures whose difference hashes (dHash) along rows and along columns differ in at most
`max_distance` of 64 bits each: the same picture at another size or quality, not a crop or a mirrored one. With 4, of
photos at half their size and JPEG quality 50, 99 of 100 are found (986 of clothing, 364 through a microscope) and 90 of
100 (500 of single objects, many on white); among these 1,850 one pair looked alike without being a copy. So it is a
hint that wants eyes. Pictures of next to no detail are not compared; drawings on an empty ground come close to each
other (more than half of 20,000 MNIST digits): say `max_distance: null` there.

Left out: repairing anything, and the manifest's `digest`, which the checks of every row and file imply.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline import imaging, storage
from pipeline.data import duplicates, shards
from pipeline.data.duplicates import UInt64Array
from pipeline.data.findings import KINDS, Config, Findings, Report
from pipeline.errors import DataError, ImageError
from pipeline.types import SPLITS, Int64Array, Split

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) while the work goes on."""

_UNREADABLE = (OSError, ValueError, MemoryError, pa.ArrowException)
"""What reading a damaged Parquet file may raise: names that are no text, sizes that no memory holds."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN_FILES = re.compile(r"manifest(-\d+)?\.json|sheet-.*\.png|proposals")


@dataclass(frozen=True, slots=True)
class Facts:
    """What one shard brings home: its findings, and of each of its N rows what is compared with other shards.

    Attributes:
        image_ids: large_string [N].
        id_keys: uint64 [N], keys of the image ids.
        file_keys: uint64 [N], keys of the original bytes.
        hashes: uint64 [N, 2], difference hashes; `NO_HASHES` where the picture cannot be compared.
        class_counts: int64 [C], images of each class.
        object_counts: int64 [C], boxes of each class.
        whole: every row was read.
    """

    findings: Findings
    image_ids: pa.Array
    id_keys: UInt64Array
    file_keys: UInt64Array
    hashes: UInt64Array
    class_counts: Int64Array
    object_counts: Int64Array
    whole: bool


def verify(source: shards.Shards, config: Config, progress: Progress = lambda done, total: None) -> Report:
    """Read every shard of every split, and say what is wrong. Needs an initialised Ray."""
    return conclude(source, list(_run(source, config, progress)), config)


def verify_shard(
    path: Path, shard: shards.Shard, num_classes: int, decoding: imaging.Decoding, config: Config
) -> Facts:
    """Check one shard by itself; whatever is wrong with it becomes a finding. A pure function of the file.

    Args:
        path: of the file.
        shard: what the manifest says of it.
        num_classes: labels lie below.
        decoding: which images are accepted, from the manifest.
        config: what is looked for.
    """
    findings, rows, whole = Findings(config.num_examples), [], True
    counts = np.zeros((2, num_classes), np.int64)
    for group in range(_num_groups(path, shard, findings)):
        try:
            found = shards.read(path, [group]).to_pylist()
        except (DataError, *_UNREADABLE) as error:
            reason = str(error).removeprefix(f"{path}: ")
            findings.add("shard_unreadable", f"row group {group}: {reason}", shard=shard.name)
            whole = False
            continue
        for row in found:
            rows.append(_check_row(row, shard.name, num_classes, decoding, findings))
            counts[0] += _histogram([row["label"]], num_classes)
            counts[1] += _histogram(row["box_labels"] or [], num_classes)
    return Facts(
        findings=findings,
        image_ids=pa.array([name for name, _, _ in rows], pa.large_string()),
        id_keys=np.array([duplicates.key(hashlib.sha256(name.encode()).digest()) for name, _, _ in rows], np.uint64),
        file_keys=np.array([duplicates.key(digest) for _, digest, _ in rows], np.uint64),
        hashes=np.array([values for _, _, values in rows], np.uint64).reshape(-1, 2),
        class_counts=counts[0],
        object_counts=counts[1],
        whole=whole and bool(rows or not shard.num_rows),
    )


def conclude(source: shards.Shards, facts: Sequence[Facts], config: Config) -> Report:
    """Put the facts of all shards, in the manifest's order, side by side."""
    manifest, findings = source.manifest, Findings(config.num_examples)
    for fact in facts:
        findings.merge(fact.findings)
    _check_folder(source, findings)
    _check_counts(manifest, facts, findings)
    _check_repeats(manifest, facts, config, findings)
    return Report(
        dataset=manifest.dataset,
        digest=manifest.digest,
        num_shards=len(manifest.shards),
        num_images=sum(len(fact.hashes) for fact in facts),
        counts={kind: findings.counts[kind] for kind in KINDS if findings.counts[kind]},
        examples=tuple(sorted(findings.examples, key=lambda found: list(KINDS).index(found.kind))),
        config=config,
    )


def _run(source: shards.Shards, config: Config, progress: Progress) -> Iterator[Facts]:
    """Check the shards as Ray tasks; results come in any order and are returned in the manifest's."""
    import ray.data  # noqa: PLC0415  (so that verify_shard runs in a plain Python shell)

    manifest = source.manifest
    decoding, num_classes, folder = manifest.decoding, len(manifest.classes), source.path
    total, done = sum(shard.num_rows for shard in manifest.shards), 0
    rows = [{"number": number, "shard": pickle.dumps(shard)} for number, shard in enumerate(manifest.shards)]
    if not rows:
        return

    def check(row: dict[str, Any]) -> dict[str, Any]:
        shard: shards.Shard = pickle.loads(row["shard"])  # noqa: S301  (our own)
        facts = verify_shard(folder / shard.name, shard, num_classes, decoding, config)
        return {"number": row["number"], "facts": pickle.dumps(facts)}

    results: dict[int, Facts] = {}
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(check).iter_rows():
        results[row["number"]] = pickle.loads(row["facts"])  # noqa: S301  (our own)
        done += manifest.shards[row["number"]].num_rows
        progress(done, total)
    for number in range(len(rows)):
        yield results.pop(number)


def _num_groups(path: Path, shard: shards.Shard, findings: Findings) -> int:
    """Row groups that can be read, after a comparison of the file with the manifest."""
    try:
        digest = shards.sha256(path)
    except (FileNotFoundError, IsADirectoryError):
        findings.add("shard_missing", "the manifest names it, but it is not there", shard=shard.name)
        return 0
    except OSError as error:
        findings.add("shard_unreadable", storage.reason(error), shard=shard.name)
        return 0
    if digest != shard.sha256:
        message = f"sha256 is {digest[:12]}, in the manifest {shard.sha256[:12]}"
        findings.add("shard_checksum", message, shard=shard.name)
    try:
        with pq.ParquetFile(path, memory_map=True) as parquet:
            schema = parquet.schema_arrow
            groups = tuple(parquet.metadata.row_group(at).num_rows for at in range(parquet.num_row_groups))
    except _UNREADABLE as error:
        findings.add("shard_unreadable", " ".join(str(error).split())[:200], shard=shard.name)
        return 0
    if not schema.equals(shards.SCHEMA):
        wrong = sorted(set(map(str, schema)) ^ set(map(str, shards.SCHEMA)))
        message = f"columns are not those of this version; they differ in {', '.join(wrong) or 'their order'}"
        findings.add("shard_columns", message, shard=shard.name)
        return 0
    if groups != shard.row_groups:
        message = (
            f"{sum(groups)} rows in {len(groups)} row groups, in the manifest {shard.num_rows} in "
            f"{len(shard.row_groups)}"
        )
        findings.add("shard_rows", message, shard=shard.name)
    return len(groups)


def _check_row(
    row: dict[str, Any], shard: str, num_classes: int, decoding: imaging.Decoding, findings: Findings
) -> tuple[str, bytes, tuple[int, int]]:
    """Look at one row; its id, the sha256 of its original and its difference hashes."""
    name = row["image_id"] or ""

    def note(kind: str, message: str) -> None:
        findings.add(kind, message, shard=shard, image_id=name)

    labels = [row["label"], *(row["box_labels"] or [])]
    wrong = [label for label in labels if label is not None and not 0 <= label < num_classes]
    if wrong:
        note("label", f"label {wrong[0]} is none of 0 to {num_classes - 1}")
    digest = _check_sha256(row, note)
    _check_objects(row, note)
    _check_mask(row, num_classes, note)
    return name, digest, _check_image(row, decoding, note)


Note = Callable[[str, str], None]
"""Called with a kind and a message about the row at hand."""


def _check_sha256(row: dict[str, Any], note: Note) -> bytes:
    """The recorded digest of the original, compared with the bytes where these were stored; if malformed, theirs."""
    image, recorded = row["image"] or b"", row["sha256"] or ""
    found = hashlib.sha256(image)
    if not _SHA256.fullmatch(recorded):
        note("sha256", f"expected 64 hexadecimal digits, got {recorded[:80]!r}")
        return found.digest()
    same_size = (row["height"], row["width"]) == (row["original_height"], row["original_width"])
    if same_size and row["original_bytes"] == len(image) and found.hexdigest() != recorded:
        note("sha256", f"of the stored bytes is {found.hexdigest()[:12]}, recorded {recorded[:12]}")
    return bytes.fromhex(recorded)


def _check_image(row: dict[str, Any], decoding: imaging.Decoding, note: Note) -> tuple[int, int]:
    """The difference hashes of the decoded picture."""
    try:
        image = imaging.decode(row["image"] or b"", decoding)
    except ImageError as error:
        note("undecodable", f"{error.reason}: {error}")
        return duplicates.NO_HASHES
    recorded, original = ((row[f"{what}height"], row[f"{what}width"]) for what in ("", "original_"))
    if image.shape[:2] != recorded:
        note("size", f"decodes to {image.shape[0]} x {image.shape[1]}, recorded {recorded[0]} x {recorded[1]}")
    elif any(mine is None or mine < stored for mine, stored in zip(original, recorded, strict=True)):
        note(
            "size",
            f"original of {original[0]} x {original[1]} is smaller than the stored {recorded[0]} x {recorded[1]}",
        )
    return duplicates.difference_hashes(image)


def _check_objects(row: dict[str, Any], note: Note) -> None:
    lists = {name: row[name] or [] for name in ("boxes", "box_labels", "difficult", "truncated", "crowd")}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        note("objects", "lists of unequal length: " + ", ".join(f"{name} {size}" for name, size in lengths.items()))
    wrong = [(box, reason) for box in lists["boxes"] if (reason := _wrong_box(box, row))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        note("boxes", f"{_text(wrong[0][0])} {wrong[0][1]}{more}")


def _wrong_box(box: Sequence[float | None] | None, row: dict[str, Any]) -> str | None:
    """What is wrong with one box in pixels of the original, or nothing."""
    values = np.array([np.nan if value is None else value for value in box or ()], np.float64)
    if values.shape != (4,) or not np.isfinite(values).all():
        return "is not finite"
    if (values[2:] <= values[:2]).any():
        return "has no area"
    height, width = row["original_height"] or 0, row["original_width"] or 0
    if (values[:2] < 0).any() or values[2] > width or values[3] > height:
        return f"reaches outside the image of {height} x {width}"
    return None


def _text(box: Sequence[float | None] | None) -> str:
    return f"box ({', '.join('none' if value is None else f'{value:g}' for value in box or ())})"


def _check_mask(row: dict[str, Any], num_classes: int, note: Note) -> None:
    if row["mask"] is None:
        return
    try:
        mask = imaging.decode_mask(row["mask"])
    except ImageError as error:
        note("mask", f"{error.reason}: {error}")
        return
    original = (row["original_height"], row["original_width"])
    if mask.shape != original:
        note("mask", f"has {mask.shape[0]} x {mask.shape[1]} pixels, the original {original[0]} x {original[1]}")
    wrong = [value for value in np.unique(mask).tolist() if num_classes < value < 255]
    if wrong:
        note("mask", f"holds {wrong[0]}, which is neither 0, nor 1 + a label up to {num_classes}, nor 255")


def _histogram(labels: Sequence[int | None], num_classes: int) -> Int64Array:
    """Labels of each class; those that are none are left out."""
    known = [label for label in labels if label is not None and 0 <= label < num_classes]
    return np.bincount(np.array(known, np.int64), minlength=num_classes).astype(np.int64)


def _check_folder(source: shards.Shards, findings: Findings) -> None:
    """Compare what lies in the folder with what the manifest, or that of another version, names."""
    others = dict(_other_versions(source))
    _check_class_lists(source.manifest, others, findings)
    known = {name for manifest in (source.manifest, *others.values()) for name in _named(manifest)}
    for path in sorted(source.path.iterdir()):
        if path.name not in known and not _OWN_FILES.fullmatch(path.name):
            findings.add("stray_file", f"{path.name}: no manifest names it")
    num_rejects = 0
    for name in source.manifest.rejects:
        if not (source.path / name).is_file():
            continue  # of no rejects, or the numbers differ
        try:
            num_rejects += pq.read_metadata(source.path / name).num_rows
        except _UNREADABLE as error:
            findings.add("rejects", f"{name}: cannot be read: {' '.join(str(error).split())[:200]}")
            return
    if num_rejects != source.manifest.num_rejects:
        findings.add("rejects", f"{num_rejects} are listed, in the manifest {source.manifest.num_rejects}")


def _named(manifest: shards.Manifest) -> tuple[str, ...]:
    return (*(shard.name for shard in manifest.shards), *manifest.rejects)


def _other_versions(source: shards.Shards) -> Iterator[tuple[str, shards.Manifest]]:
    """The manifests of all versions that can be read, by file; what only the others name is not amiss."""
    for path in sorted(source.path.glob("manifest*.json")):
        try:
            yield path.name, shards.Manifest.model_validate_json(path.read_bytes(), strict=True)
        except (OSError, ValidationError):
            continue  # then the files that it names are strays


def _check_class_lists(manifest: shards.Manifest, others: Mapping[str, shards.Manifest], findings: Findings) -> None:
    """One finding for each other list of classes, also a longer one: what is added to a dataset brings no class."""
    for theirs, name in {other.classes: name for name, other in others.items()}.items():
        pairs = enumerate(itertools.zip_longest(manifest.classes, theirs))
        odd = next(((label, mine, other) for label, (mine, other) in pairs if mine != other), None)
        if odd is not None:
            label, mine, other = odd
            findings.add("class_list", f"label {label} is {mine!r} here and {other!r} in {name}")


def _check_counts(manifest: shards.Manifest, facts: Sequence[Facts], findings: Findings) -> None:
    """Compare the class list, and the labels of splits that were read whole, with what the manifest counts."""
    twice = [name for name, count in Counter(manifest.classes).items() if count > 1]
    if twice:
        findings.add("class_list", f"the class '{twice[0]}' is there twice")
    for split in SPLITS:
        mine = [fact for shard, fact in zip(manifest.shards, facts, strict=True) if shard.split == split]
        if not all(fact.whole for fact in mine):
            continue
        zeros = np.zeros(len(manifest.classes), np.int64)
        images, boxes = (
            sum((fact.class_counts for fact in mine), zeros),
            sum((fact.object_counts for fact in mine), zeros),
        )
        _compare("class_counts", split, images, manifest, findings)
        _compare("object_counts", split, boxes, manifest, findings)


def _compare(kind: str, split: Split, found: Int64Array, manifest: shards.Manifest, findings: Findings) -> None:
    """One finding for each class of a split whose count is another; a split that is not counted counts as none."""
    counts: Mapping[Split, tuple[int, ...]] = getattr(manifest, kind)
    expected = counts.get(split) or (0,) * len(found)
    if len(expected) != len(found):
        findings.add(kind, f"split '{split}': {len(expected)} counts for {len(found)} classes")
        return
    for label in np.flatnonzero(found != np.array(expected, np.int64)):
        name = manifest.classes[label]
        findings.add(kind, f"split '{split}', class '{name}': {found[label]}, in the manifest {expected[label]}")


@dataclass(frozen=True, slots=True)
class _Rows:
    """All rows of a dataset by number, in the order of the manifest."""

    files: tuple[shards.Shard, ...]
    starts: Int64Array  # the number of each shard's first row, and of all
    image_ids: pa.Array
    id_keys: UInt64Array
    file_keys: UInt64Array
    hashes: UInt64Array
    splits: Int64Array  # indices into SPLITS

    @classmethod
    def of(cls, manifest: shards.Manifest, facts: Sequence[Facts]) -> _Rows:
        sizes, none = [len(fact.hashes) for fact in facts], np.zeros(0, np.uint64)
        return cls(
            files=manifest.shards,
            starts=np.cumsum([0, *sizes], dtype=np.int64),
            image_ids=pa.concat_arrays([pa.array([], pa.large_string()), *(fact.image_ids for fact in facts)]),
            id_keys=np.concatenate([none, *(fact.id_keys for fact in facts)]),
            file_keys=np.concatenate([none, *(fact.file_keys for fact in facts)]),
            hashes=np.concatenate([none.reshape(0, 2), *(fact.hashes for fact in facts)]),
            splits=np.repeat(np.array([SPLITS.index(shard.split) for shard in manifest.shards], np.int64), sizes),
        )

    def shard_of(self, number: int) -> str:
        return self.files[int(np.searchsorted(self.starts, number, side="right")) - 1].name

    def place(self, number: int) -> str:
        return f"{self.image_ids[number]} ({SPLITS[self.splits[number]]}, {self.shard_of(number)})"

    def report(self, kind: str, numbers: Int64Array, others: Int64Array, what: str, findings: Findings) -> None:
        """Count every row, and write out as many as are shown."""
        shown = max(0, findings.limit - findings.counts[kind])
        for number, other in zip(numbers[:shown].tolist(), others[:shown].tolist(), strict=True):
            name = self.image_ids[number].as_py()
            findings.add(kind, f"{what} {self.place(other)}", shard=self.shard_of(number), image_id=name)
        findings.counts[kind] += len(numbers[shown:])


def _check_repeats(manifest: shards.Manifest, facts: Sequence[Facts], config: Config, findings: Findings) -> None:
    """Ids, files and pictures that are there more than once; each finding is a row that repeats an earlier one."""
    rows = _Rows.of(manifest, facts)
    rows.report("image_id", *duplicates.repeats(rows.id_keys), "is also the id of", findings)
    copies, firsts = duplicates.repeats(rows.file_keys)
    same = rows.splits[copies] == rows.splits[firsts]
    rows.report("duplicate_across_splits", copies[~same], firsts[~same], "is the same file as", findings)
    rows.report("duplicate", copies[same], firsts[same], "is the same file as", findings)
    if config.max_distance is None:
        return
    hashes = rows.hashes
    hashes[copies] = duplicates.NO_HASHES  # said already
    within, across = duplicates.near(hashes, rows.splits, config.max_distance)
    for kind, found in (("near_duplicate_across_splits", across), ("near_duplicate", within)):
        numbers = np.flatnonzero(found >= 0)
        rows.report(kind, numbers, found[numbers], "looks like", findings)
