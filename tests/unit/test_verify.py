"""Verification without Ray: every kind of damage is found, and named as what it is; what is sound is left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import imaging
from pipeline.data import duplicates, shards
from pipeline.data.findings import KINDS, Config, Findings, Report
from pipeline.data.transforms.resizing import resize_interleaved, shrink_short
from pipeline.data.verify import conclude, verify_shard
from pipeline.types import SPLITS, UInt8Array

Row = dict[str, Any]
CLASSES = ("cat", "dog")


def picture(seed: int, size_hw: tuple[int, int] = (64, 72)) -> UInt8Array:
    """Soft blobs; each seed another picture."""
    return resize_interleaved(np.random.default_rng(seed).integers(0, 256, (8, 9, 3)).astype(np.uint8), size_hw)


def row(name: str, data: bytes, label: int | None = 0, **changes: Any) -> Row:
    """A sound row of a picture of 64 x 72, but for the changes."""
    size = {"height": 64, "width": 72, "original_height": 64, "original_width": 72}
    digest = hashlib.sha256(data).hexdigest()
    return {"image_id": name, "image": data, "label": label, **size, "original_bytes": len(data), "sha256": digest} | (
        changes
    )


def boxed(boxes: list[list[float]], labels: Sequence[int] = (), **changes: Any) -> Row:
    """A row with boxes, of label 0 unless given."""
    flags = {name: [False] * len(boxes) for name in ("difficult", "truncated", "crowd")}
    return row("a", PNGS[0], None, boxes=boxes, box_labels=labels or [0] * len(boxes), **flags) | changes


PNGS = [imaging.encode_png(picture(seed)) for seed in range(12)]


def make(path: Path, **rows: Sequence[Row]) -> shards.Shards:
    """A dataset of one shard for each split, in row groups of 4, with a manifest that counts rightly."""
    path.mkdir()
    made, class_counts, object_counts = [], {}, {}
    for split in (split for split in SPLITS if split in rows):
        with shards.Writer(path / f"{split}-00000.parquet", split, 4) as writer:
            for item in rows[split]:
                writer.add(item)
        assert writer.shard is not None
        made.append(writer.shard)
        class_counts[split] = count([item["label"] for item in rows[split]])
        object_counts[split] = count([label for item in rows[split] for label in item.get("box_labels") or ()])
    pq.write_table(pa.Table.from_pylist([], schema=shards.REJECT_SCHEMA), path / shards.REJECTS)
    manifest = shards.Manifest(
        dataset="pets",
        classes=CLASSES,
        class_counts=class_counts,
        object_counts=object_counts,
        num_rejects=0,
        shards=tuple(made),
        digest="0" * 64,
        decoding=imaging.Decoding(),
        config={},
        tool_versions={},
    )
    (path / shards.MANIFEST).write_text(manifest.model_dump_json())
    return shards.load(path)


def count(labels: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(sum(label == index for label in labels) for index in range(len(CLASSES)))


def changed(source: shards.Shards, **fields: Any) -> shards.Shards:
    """The same files under a manifest that says something else."""
    return dataclasses.replace(source, manifest=source.manifest.model_copy(update=fields))


def look(source: shards.Shards, **options: Any) -> Report:
    """What the job does, in this process."""
    config, manifest = Config(**options), source.manifest
    facts = [
        verify_shard(source.path / shard.name, shard, len(manifest.classes), manifest.decoding, config)
        for shard in manifest.shards
    ]
    return conclude(source, facts, config)


@pytest.fixture
def sound(tmp_path: Path) -> shards.Shards:
    train = [row(f"train/{index}", PNGS[index], index % 2) for index in range(6)]
    return make(tmp_path / "sound", train=train, val=[row(f"val/{index}", PNGS[index]) for index in range(6, 9)])


def test_verify_of_sound_shards_finds_nothing(sound: shards.Shards) -> None:
    report = look(sound)
    assert (report.counts, report.examples, report.num_images, report.num_shards) == ({}, (), 9, 2)
    assert report.table() == ""


def test_verify_of_the_house_s_own_shards_finds_nothing_wrong(stripes: shards.Shards) -> None:
    report = look(stripes)
    assert report.total("error") == 0
    assert report.num_images == 53


@pytest.mark.parametrize(
    ("instead", "kind", "said"),
    [
        ("nothing", "shard_missing", "is not there"),
        ("a folder", "shard_missing", "is not there"),
        ("a loop", "shard_unreadable", "Too many levels of symbolic links"),
        ("a failing disk", "shard_unreadable", "Input/output error"),
    ],
)
def test_verify_of_a_shard_that_cannot_be_read_is_a_finding(
    sound: shards.Shards, instead: str, kind: str, said: str
) -> None:
    path = sound.path / "train-00000.parquet"
    path.unlink()
    if instead == "a folder":
        path.mkdir()
    elif instead == "a loop":
        path.symlink_to(path)
    elif instead == "a failing disk":
        path.symlink_to("/proc/self/mem")  # whose first bytes cannot be read
    report = look(sound)
    assert report.counts == {kind: 1}
    assert said in report.examples[0].message
    assert report.num_images == 3


def test_verify_of_a_flipped_byte_names_the_shard_and_the_image(sound: shards.Shards) -> None:
    path = sound.path / "train-00000.parquet"
    data = path.read_bytes()
    at = data.index(PNGS[3]) + 60  # in the picture's pixels
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    report = look(sound)
    assert report.counts == {"shard_checksum": 1, "undecodable": 1, "sha256": 1}
    assert {(found.shard, found.image_id) for found in report.examples} == {
        ("train-00000.parquet", ""),
        ("train-00000.parquet", "train/3"),
    }


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_verify_of_a_truncated_shard_says_so_and_compares_no_counts(sound: shards.Shards, kept: int) -> None:
    path = sound.path / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    report = look(sound)
    assert report.counts == {"shard_checksum": 1, "shard_unreadable": 1}
    assert report.num_images == 3


def test_verify_of_a_missing_shard_says_so(sound: shards.Shards) -> None:
    (sound.path / "val-00000.parquet").unlink()
    assert look(sound).counts == {"shard_missing": 1}


def test_verify_of_any_flipped_byte_ends_with_a_report(sound: shards.Shards) -> None:
    path = sound.path / "val-00000.parquet"
    data = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 60).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        assert look(sound).counts["shard_checksum"] == 1


def test_verify_of_other_columns_says_which(sound: shards.Shards) -> None:
    path = sound.path / "val-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns("mask"), path)
    report = look(sound)
    assert report.counts == {"shard_checksum": 1, "shard_columns": 1}
    assert any("mask" in found.message for found in report.examples)


@pytest.mark.parametrize("groups", [(4, 3), (3, 3), (6,)])
def test_verify_of_other_row_counts_says_so(sound: shards.Shards, groups: tuple[int, ...]) -> None:
    first, second = sound.manifest.shards
    report = look(changed(sound, shards=(first.model_copy(update={"row_groups": groups}), second)))
    assert report.counts == {"shard_rows": 1}
    assert report.examples[0].message.startswith("6 rows in 2 row groups, in the manifest")


def test_verify_of_drifted_classes_names_the_class(sound: shards.Shards) -> None:
    wrong = changed(sound, class_counts={"train": (3, 3), "val": (2, 1)}, object_counts={"train": (0, 7)})
    report = look(wrong)
    assert report.counts == {"class_counts": 2, "object_counts": 1}
    assert [found.message for found in report.examples] == [
        "split 'val', class 'cat': 3, in the manifest 2",
        "split 'val', class 'dog': 0, in the manifest 1",
        "split 'train', class 'dog': 0, in the manifest 7",
    ]
    assert look(changed(sound, class_counts={"train": (3, 3, 0), "val": (3, 0)})).counts == {"class_counts": 1}
    (sound.path / shards.MANIFEST).unlink()  # with other classes than the next one
    assert look(changed(sound, classes=("cat", "cat"))).counts == {"class_list": 1}


@pytest.mark.parametrize(
    ("older", "sentence"),
    [
        (("dog", "cat"), "label 0 is 'cat' here and 'dog' in manifest-00001.json"),
        (("cat", "fox"), "label 1 is 'dog' here and 'fox' in manifest-00001.json"),
        (("cat",), "label 1 is 'dog' here and None in manifest-00001.json"),
        (("cat", "dog", "emu"), "label 2 is None here and 'emu' in manifest-00001.json"),
        (("cat", "dog"), ""),
    ],
)
def test_verify_of_classes_that_another_version_has_not_says_where_they_part(
    sound: shards.Shards, older: tuple[str, ...], sentence: str
) -> None:
    other = sound.manifest.model_copy(update={"classes": older})
    (sound.path / shards.version_name(1)).write_text(other.model_dump_json())
    report = look(changed(sound, version=2))
    assert [found.message for found in report.examples] == [sentence] * bool(sentence)
    assert report.counts == ({"class_list": 1} if sentence else {})


def test_verify_counts_rejects_and_strays_and_knows_other_versions(sound: shards.Shards) -> None:
    assert look(changed(sound, num_rejects=2)).counts == {"rejects": 1}
    (sound.path / shards.REJECTS).write_bytes(b"PAR1 no more")
    (sound.path / "notes.txt").touch()
    (sound.path / "sheet-train.png").touch()
    assert look(sound).counts == {"rejects": 1, "stray_file": 1}
    manifest = json.loads((sound.path / shards.MANIFEST).read_text())
    manifest["shards"][0]["name"] = "notes.txt"
    (sound.path / shards.version_name(2)).write_text(json.dumps(manifest))
    assert look(sound).counts == {"rejects": 1}


GREY = imaging.encode_mask(np.full((64, 72), 1, np.uint8))
DAMAGE: Mapping[str, tuple[Row, dict[str, int], str]] = {
    "label": (row("a", PNGS[0], 2), {"label": 1}, "label 2 is none of 0 to 1"),
    "negative label": (row("a", PNGS[0], -1), {"label": 1}, "label -1"),
    "box label": (boxed([[0, 0, 1, 1]], [2]), {"label": 1}, "label 2"),
    "no image": (row("a", b""), {"undecodable": 1}, "empty: "),
    "not an image": (row("a", b"not an image"), {"undecodable": 1}, "format: "),
    "cut": (row("a", PNGS[0][:-20]), {"undecodable": 1}, "truncated: "),
    "size": (row("a", PNGS[0], width=71), {"size": 1}, "decodes to 64 x 72, recorded 64 x 71"),
    "turned": (row("a", PNGS[0], height=72, width=64), {"size": 1}, "decodes to 64 x 72, recorded 72 x 64"),
    "original": (row("a", PNGS[0], original_width=71), {"size": 1}, "original of 64 x 71 is smaller"),
    "sha256": (row("a", PNGS[0], sha256="0" * 64), {"sha256": 1}, "recorded 000000000000"),
    "sha256 text": (row("a", PNGS[0], sha256="xyz"), {"sha256": 1}, "expected 64 hexadecimal digits"),
    "box outside": (boxed([[0, 0, 72.5, 64]]), {"boxes": 1}, "box (0, 0, 72.5, 64) reaches outside"),
    "box before": (boxed([[-1, 0, 7, 6]]), {"boxes": 1}, "reaches outside the image of 64 x 72"),
    "box of no width": (boxed([[5, 5, 5, 9], [9, 9, 2, 2]]), {"boxes": 1}, "has no area (and 1 more)"),
    "box turned": (boxed([[5, 5, 9, 4]]), {"boxes": 1}, "has no area"),
    "box not finite": (boxed([[0, 0, float("nan"), 9]]), {"boxes": 1}, "is not finite"),
    "lists": (boxed([[0, 0, 1, 1]], crowd=[]), {"objects": 1}, "boxes 1, box_labels 1, difficult 1"),
    "labels without boxes": (row("a", PNGS[0], box_labels=[1]), {"objects": 1}, "boxes 0, box_labels 1"),
    "mask size": (row("a", PNGS[0], original_height=65, original_bytes=9, mask=GREY), {"mask": 1}, "has 64 x 72"),
    "mask class": (
        row("a", PNGS[0], mask=imaging.encode_mask(np.full((64, 72), 3, np.uint8))),
        {"mask": 1},
        "holds 3",
    ),
    "mask bytes": (row("a", PNGS[0], mask=b"no mask"), {"mask": 1}, "format: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_of_a_damaged_row_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    damaged, counts, message = DAMAGE[name]
    report = look(make(tmp_path / "d", train=[damaged, row("b", PNGS[1])]))
    assert report.counts == counts
    assert message in report.examples[0].message
    assert (report.examples[0].shard, report.examples[0].image_id) == ("train-00000.parquet", "a")
    assert report.total("error") == 1


def test_verify_of_sound_annotations_finds_nothing(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8).repeat(32, axis=0).repeat(36, axis=1)
    rows = [
        boxed([[0, 0, 72, 64], [0.5, 0.5, 1, 1]], [1, 0]),
        boxed([]) | {"image_id": "b", **row("b", PNGS[1], None)},
        row("c", PNGS[2], mask=imaging.encode_mask(values)),
        row("d", PNGS[3], 1, original_height=128, original_width=144, original_bytes=9, sha256="ab" * 32),
    ]
    assert look(make(tmp_path / "d", train=rows)).counts == {}


def test_verify_of_the_same_file_twice_is_grave_across_splits_only(tmp_path: Path) -> None:
    train = [row("a", PNGS[0]), row("b", PNGS[1]), row("c", PNGS[0])]
    report = look(make(tmp_path / "d", train=train, val=[row("d", PNGS[1])]))
    assert report.counts == {"duplicate_across_splits": 1, "duplicate": 1}  # and not near-duplicates as well
    assert [(found.image_id, found.message) for found in report.examples] == [
        ("d", "is the same file as b (train, train-00000.parquet)"),
        ("c", "is the same file as a (train, train-00000.parquet)"),
    ]
    assert (report.total("error"), report.total("warning")) == (1, 1)
    strict = look(make(tmp_path / "s", train=train), strict=True)
    assert (strict.counts, strict.total("error"), strict.total("warning")) == ({"duplicate": 1}, 1, 0)


def test_verify_of_an_id_twice_is_an_error(tmp_path: Path) -> None:
    report = look(make(tmp_path / "d", train=[row("a", PNGS[0])], test=[row("a", PNGS[1])]))
    assert report.counts == {"image_id": 1}
    assert report.total("error") == 1


def test_verify_of_copies_at_another_quality_or_size_warns(tmp_path: Path) -> None:
    def jpeg(pixels: UInt8Array) -> bytes:
        return imaging.encode_jpeg(pixels, 40)

    again = row("again", jpeg(picture(0)))
    larger = row("larger", jpeg(resize_interleaved(picture(1), (128, 144)))) | {
        name: side for prefix in ("", "original_") for name, side in ((f"{prefix}height", 128), (f"{prefix}width", 144))
    }
    source = make(tmp_path / "d", train=[row("a", PNGS[0]), row("b", PNGS[1]), again], val=[larger, row("c", PNGS[2])])
    report = look(source)
    assert report.counts == {"near_duplicate_across_splits": 1, "near_duplicate": 1}
    assert [(found.image_id, found.message.split(" (")[0]) for found in report.examples] == [
        ("larger", "looks like b"),
        ("again", "looks like a"),
    ]
    assert report.total("error") == 0
    assert look(source, max_distance=None).counts == {}


def test_verify_keeps_few_examples_and_counts_all(tmp_path: Path) -> None:
    rows = [row(f"{index}", PNGS[index], label=5) for index in range(10)]
    report = look(make(tmp_path / "d", train=rows[:6], val=rows[6:]), num_examples=2)
    assert report.counts == {"label": 10}
    assert [found.image_id for found in report.examples] == ["0", "1"]
    assert report.table().splitlines() == [
        "error    label                                10",
        "           train-00000.parquet: 0: label 5 is none of 0 to 1",
        "           train-00000.parquet: 1: label 5 is none of 0 to 1",
    ]


def test_report_written_is_read_back(tmp_path: Path, sound: shards.Shards) -> None:
    report = look(changed(sound, num_rejects=1))
    report.write(tmp_path / "new" / "verify.json")
    assert Report.model_validate_json((tmp_path / "new" / "verify.json").read_bytes()) == report


def test_findings_of_two_shards_keep_the_first_ones() -> None:
    tallies = [Findings(2), Findings(2)]
    for number, tally in enumerate(tallies):
        for index in range(number + 1):
            tally.add("size", f"{number}.{index}")
    tallies[0].merge(tallies[1])
    assert tallies[0].counts == {"size": 3}
    assert [found.message for found in tallies[0].examples] == ["0.0", "1.0"]
    assert all(kind in KINDS for kind in tallies[0].counts)


Item = tuple[int, int, int]


@st.composite
def related(draw: st.DrawFn) -> list[Item]:
    """Pairs of hashes with a group each; some differ in a few bits, or none."""
    words = st.integers(0, 2**64 - 1)
    flips = st.sets(st.integers(0, 63), max_size=7).map(lambda bits: sum(1 << bit for bit in bits))
    base = draw(st.lists(st.tuples(words, words), min_size=1, max_size=5))
    copies = draw(st.lists(st.tuples(st.sampled_from(base), flips, flips), max_size=12))
    pairs = base + [(rows ^ first, down ^ second) for (rows, down), first, second in copies]
    return [(rows, down, draw(st.integers(0, 2))) for rows, down in draw(st.permutations(pairs))]


@given(related(), st.integers(0, 6))
def test_near_finds_exactly_what_comparing_all_pairs_finds(items: list[Item], distance: int) -> None:
    hashes = np.array([item[:2] for item in items], np.uint64)
    within, across = duplicates.near(hashes, np.array([group for *_, group in items]), distance)

    def alike(left: Item, right: Item) -> bool:
        plain = any(not distance < item[0].bit_count() < 64 - distance for item in (left, right))
        return not plain and all((left[at] ^ right[at]).bit_count() <= distance for at in (0, 1))

    for number, item in enumerate(items):
        earlier = [other for other in range(number) if alike(item, items[other])]
        same = [other for other in earlier if items[other][2] == item[2]]
        if item in [items[other] for other in same]:  # said of the first: equal ones are compared once
            assert (within[number], across[number]) == (items.index(item), -1)
        else:
            assert within[number] == min(same, default=-1)
            assert across[number] == min(set(earlier) - set(same), default=-1)


def test_near_of_groups_is_kept_apart() -> None:
    value = 0x0123_4567_89AB_CDEF
    rows = [value, value ^ 0b1111, value, value ^ (0b11111 << 40), value]
    down = [value, value ^ (0b1111 << 9), value, value, value ^ 0b11111]
    hashes = np.array([rows, down], np.uint64).T
    within, across = duplicates.near(hashes, np.array([0, 1, 0, 0, 0]), 4)
    assert within.tolist() == [-1, -1, 0, -1, -1]
    assert across.tolist() == [-1, 0, -1, -1, -1]  # the third was said to be the first again


def test_near_of_pictures_without_detail_compares_nothing() -> None:
    rows = np.array([0, 0, 2**64 - 1, 0b1111, 2**64 - 2], np.uint64)
    within, across = duplicates.near(np.stack([rows, rows], axis=1), np.zeros(5, np.int64), 4)
    assert set(within.tolist() + across.tolist()) == {-1}


def test_repeats_name_the_first_of_their_kind() -> None:
    found, firsts = duplicates.repeats(np.array([7, 2**63, 7, 9, 7, 2**63], np.uint64))
    assert (found.tolist(), firsts.tolist()) == ([2, 4, 5], [0, 0, 1])
    assert [len(part) for part in duplicates.repeats(np.zeros(0, np.uint64))] == [0, 0]


def test_difference_hashes_are_those_of_hand_made_pictures() -> None:
    whole = 2**64 - 1
    brighter = (np.arange(72, dtype=np.uint8)[None, :, None] * 3).repeat(72, axis=0).repeat(3, axis=2)
    assert duplicates.difference_hashes(brighter) == (whole, 0)
    assert duplicates.difference_hashes(brighter[:, ::-1].copy()) == (0, 0)
    assert duplicates.difference_hashes(brighter.transpose(1, 0, 2).copy()) == (0, whole)
    assert duplicates.difference_hashes(brighter[:, :, :1].repeat(5, axis=2)) == (whole, 0)  # five bands
    brighter[:9] = 0  # the first row of eight is flat
    assert duplicates.difference_hashes(brighter)[0] == whole >> 8


def test_difference_hashes_survive_encoding_and_tell_pictures_apart(real_data: Path) -> None:
    paths = sorted((real_data / "clothing10" / "val").rglob("*.jpg"))[:60]
    images = [imaging.decode(path.read_bytes()) for path in paths]
    again = [imaging.decode(imaging.encode_jpeg(shrink_short(image, 176), 60)) for image in images]
    before, after = (
        np.array([duplicates.difference_hashes(image) for image in some], np.uint64) for some in (images, again)
    )
    near = (np.bitwise_count(before[:, None] ^ after) <= 4).all(axis=2)
    assert near.diagonal().mean() >= 0.95
    assert near.sum() == near.diagonal().sum()
