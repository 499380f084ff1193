"""Datasets in tars and tables: what they name is what an independent unpacking finds, and damage is one clear error."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as published  # the format's own package
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from pipeline import storage
from pipeline.config import parse
from pipeline.data import datasets
from pipeline.data.datasets import DatasetConfig, _tar, imagenet, uri_list, webdataset
from pipeline.errors import ConfigError, DataError
from pipeline.types import Record, Split


def packed(files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar of files, in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def content(record: Record) -> bytes:
    return storage.read(record.uri, record.byte_range)


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def damaged(uri: Path | str) -> str:
    with pytest.raises(DataError) as error:
        list(_tar.members(str(uri)))
    return str(error.value)


# --- tars


NAMES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=150), max_size=6)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.randoms())
def test_members_of_any_tar_are_where_their_bytes_are(names: list[str], form: int, random: Any) -> None:
    files = [
        (f"d/{index}{name}", random.randbytes(random.choice([0, 1, 511, 512, 2000])))
        for index, name in enumerate(names)
    ]
    whole = b"before" + packed(files, form) + b"after"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "open_input", lambda uri: io.BytesIO(whole))
        found = list(_tar.members("any.tar", (6, len(whole) - 11)))
    assert [member.name for member in found] == [storage.printable(name) for name, _ in files]
    assert [whole[at : at + length] for at, length in (member.byte_range for member in found)] == [d for _, d in files]


def test_members_leave_out_what_is_hidden_or_no_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("./a/1.jpg", "a/.hidden", ".git/x", "a/._1.jpg", "../up", "a//2.jpg", "b\n\udce9"):
            archive.addfile(tarfile.TarInfo(name))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"kind{kind!r}.jpg")
            info.type, info.linkname = kind, "a/1.jpg"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("last"))
    assert [member.name for member in _tar.members(str(tmp_path / "a.tar"))] == [
        "a/1.jpg",
        "a/2.jpg",
        "b%0A%E9",
        "last",
    ]


def test_members_read_the_contents_asked_for_only(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", packed([("1.cls", b"7"), ("1.jpg", b"image"), ("2.cls", b"")]))
    found = _tar.members(str(tmp_path / "a.tar"), content_of=lambda name: name.endswith(".cls"))
    assert [(member.name, member.content) for member in found] == [("1.cls", b"7"), ("1.jpg", None), ("2.cls", b"")]


def test_members_whose_wanted_content_is_huge_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", packed([("1.json", bytes(_tar.MAX_CONTENT_BYTES + 1))]))
    with pytest.raises(DataError, match=r"a.tar: expected at most 1048576 bytes in '1.json', got 1048577"):
        list(_tar.members(str(tmp_path / "a.tar"), content_of=lambda name: True))


def test_tar_cut_off_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = packed([("a", b"x" * 600), ("b" * 200, b"y" * 10), ("c", b"")], tarfile.GNU_FORMAT)
    used = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # what follows are the end marks
    for length in [0, 1, 511, 512, 513, 1024, 1111, 1112, *range(1536, used, 512), used - 1, used, used + 511]:
        said = damaged(put(tmp_path / "cut.tar", whole[:length]))
        assert "cut.tar" in said
        assert "fetch or write it again" in said, length
    assert len(list(_tar.members(str(put(tmp_path / "cut.tar", whole[: used + 512]))))) == 3


def test_tar_in_a_tar_that_was_cut_off_does_not_reach_into_what_follows(tmp_path: Path) -> None:
    inner = packed([("a", b"x" * 600), ("b", b"y" * 600)])
    for length in (1000, 512 + 1024, 512 + 1024 + 512 + 600):
        put(tmp_path / "a.tar", packed([("1.tar", inner[:length]), ("2.tar", inner)]))
        first, second = _tar.members(str(tmp_path / "a.tar"))
        with pytest.raises(DataError, match=r"a\.tar \(the tar inside it at byte 512\): is no tar, or a damaged one"):
            list(_tar.members(str(tmp_path / "a.tar"), first.byte_range))
        assert len(list(_tar.members(str(tmp_path / "a.tar"), second.byte_range))) == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), min_size=1, max_size=4))
def test_tar_with_any_bytes_changed_is_listed_within_its_bounds_or_refused(changes: list[tuple[int, int]]) -> None:
    whole = bytearray(packed([("a", b"x" * 600), ("ü" * 120, b"y"), ("c", b"z")]))
    for at, value in changes:
        whole[at] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "open_input", lambda uri: io.BytesIO(whole))
        try:
            found = list(_tar.members("any.tar"))
        except DataError as error:
            assert "any.tar" in str(error)  # noqa: PT017  (either is right)
        else:
            assert all(0 <= member.offset <= member.offset + member.length <= len(whole) for member in found)


def test_tar_with_a_damaged_header_in_the_middle_does_not_end_there(tmp_path: Path) -> None:
    whole = bytearray(packed([("a", b"x"), ("b", b"y"), ("c", b"z")]))
    whole[1024 + 148] ^= 1  # in the check sum of the second header
    assert "no header and no end mark at byte 1024" in damaged(put(tmp_path / "a.tar", bytes(whole)))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_is_refused_with_what_to_do(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("x"))
    assert "is compressed with" in damaged(tmp_path / "a.tar")
    assert "unpack it to a plain tar" in damaged(tmp_path / "a.tar")


def test_what_is_no_tar_or_not_there_is_one_error(tmp_path: Path) -> None:
    assert "no tar, or a damaged one" in damaged(put(tmp_path / "a.tar", b"\x89PNG" + bytes(range(256)) * 9))
    assert "cannot be read: No such file" in damaged(tmp_path / "none.tar")
    assert "cannot be read: Is a directory" in damaged(tmp_path)


def test_sparse_member_is_refused_since_its_bytes_are_not_in_one_piece(tmp_path: Path) -> None:
    info = tarfile.TarInfo("holes.jpg")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "holes.jpg"}
    info.pax_headers |= {"GNU.sparse.size": "2048", "GNU.sparse.map": "1024,512"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(bytes(512)))
    assert "'holes.jpg' is stored with holes" in damaged(tmp_path / "a.tar")


def test_listing_a_tar_takes_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    peaks, counts = [], (500, 5_000)
    for count in counts:
        put(tmp_path / "a.tar", packed((f"{index:06d}.jpg", b"x") for index in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in _tar.members(str(tmp_path / "a.tar"))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 10 * (counts[1] - counts[0])  # bytes a member; a kept name alone takes 60


# --- ImageNet

WNIDS = {3: "n01440764", 1: "n02018795", 2: "n03126707"}  # the devkit's numbers are in another order than the ids
TRUTH = [2, 3, 1, 3, 2]


def jpeg(*of: object) -> bytes:
    """Content is not looked at, but each is another."""
    return f"image {of}".encode()


def devkit(truth: list[int]) -> dict[str, bytes]:
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(number, wnid, f"word {number}, other", "", 0) for number, wnid in sorted(WNIDS.items())]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array([*rows, (4, "n00001740", "entity", "", 2)], kind)})
    name = "ILSVRC2012_validation_ground_truth.txt"
    return {"meta.mat": buffer.getvalue(), name: "".join(f"{number}\n" for number in truth).encode()}


def put_devkit(root: Path, truth: list[int], *, unpacked: bool = True) -> None:
    files = {f"{imagenet.DEVKIT}/data/{name}": data for name, data in devkit(truth).items()}
    if unpacked:
        for name, data in files.items():
            put(root / name, data)
    else:
        put(root / f"{imagenet.DEVKIT}.tar.gz", gzip.compress(packed(files.items())))


def train_files() -> dict[str, list[tuple[str, bytes]]]:
    return {wnid: [(f"{wnid}_{at}.JPEG", jpeg(wnid, at)) for at in range(2 + number)] for number, wnid in WNIDS.items()}


def val_files(count: int = len(TRUTH)) -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{number:08d}.JPEG", jpeg("val", number)) for number in range(1, count + 1)]


def as_tars(root: Path) -> imagenet.Config:
    """What was downloaded, nothing unpacked."""
    inner = [(f"{wnid}.tar", packed(files)) for wnid, files in train_files().items()]
    put(root / imagenet.TRAIN_TAR, packed(inner))
    put(root / imagenet.VAL_TAR, packed(val_files()))
    put_devkit(root, TRUTH, unpacked=False)
    return imagenet.Config(root=str(root))


def as_folders(root: Path) -> imagenet.Config:
    """The same images sorted into class folders."""
    for wnid, files in train_files().items():
        for name, data in files:
            put(root / "train" / wnid / name, data)
    for (name, data), number in zip(val_files(), TRUTH, strict=True):
        put(root / "val" / WNIDS[number] / name, data)
    return imagenet.Config(root=str(root))


def found(config: DatasetConfig, split: Split) -> dict[str, tuple[int | None, bytes, int]]:
    records = list(datasets.records(config, split))
    assert len({record.image_id for record in records}) == len(records)
    return {record.image_id: (record.label, content(record), record.size_bytes) for record in records}


def test_imagenet_in_tars_is_the_same_as_unpacked(tmp_path: Path) -> None:
    tars, folders = as_tars(tmp_path / "tars"), as_folders(tmp_path / "folders")
    assert imagenet.class_names(tars) == imagenet.class_names(folders) == tuple(sorted(WNIDS.values()))
    for split in tars.splits:
        assert found(tars, split) == found(folders, split)
    assert not list((tmp_path / "tars").glob("*/*"))  # nothing was unpacked


def test_imagenet_labels_count_sorted_ids_not_the_devkit_numbers(tmp_path: Path) -> None:
    val = found(as_tars(tmp_path), "val")
    assert [(name, label) for name, (label, _, _) in val.items()] == [
        ("val/n03126707/ILSVRC2012_val_00000001.JPEG", 2),
        ("val/n01440764/ILSVRC2012_val_00000002.JPEG", 0),
        ("val/n02018795/ILSVRC2012_val_00000003.JPEG", 1),
        ("val/n01440764/ILSVRC2012_val_00000004.JPEG", 0),
        ("val/n03126707/ILSVRC2012_val_00000005.JPEG", 2),
    ]
    assert all(size == len(data) for _, data, size in val.values())


def test_imagenet_validation_images_in_one_folder_take_the_devkit_labels(tmp_path: Path) -> None:
    tars = as_tars(tmp_path)
    expected = found(tars, "val")
    (tmp_path / imagenet.VAL_TAR).unlink()
    (tmp_path / f"{imagenet.DEVKIT}.tar.gz").unlink()
    put_devkit(tmp_path, TRUTH)
    for name, data in val_files():
        put(tmp_path / "val" / name, data)
    put(tmp_path / "val/ILSVRC2012_val_00000001.xml", "<annotation/>")
    assert found(tars, "val") == expected


def test_imagenet_with_words_names_classes_in_the_same_order(tmp_path: Path) -> None:
    config = as_tars(tmp_path).model_copy(update={"words": True})
    assert imagenet.class_names(config) == (
        *("n01440764 word 3, other", "n02018795 word 1, other", "n03126707 word 2, other"),
    )


def test_imagenet_blacklist_is_left_out_only_when_asked(tmp_path: Path) -> None:
    config = as_tars(tmp_path)
    put(tmp_path / imagenet.BLACKLIST, "2\n5\n")
    assert len(found(config, "val")) == 5
    without = found(config.model_copy(update={"leave_out_blacklisted": True}), "val")
    assert [name[-6] for name in without] == ["1", "3", "4"]
    assert len(found(config.model_copy(update={"leave_out_blacklisted": True}), "train")) == 12
    (tmp_path / imagenet.BLACKLIST).unlink()
    with pytest.raises(DataError, match=r"blacklist\.txt is missing; put it there or set dataset\.leave_out_bl"):
        found(config.model_copy(update={"leave_out_blacklisted": True}), "val")


def refused(config: DatasetConfig, *splits: Split) -> str:
    """What the one error says that reading raises."""
    with pytest.raises(DataError) as error:
        [record for split in splits or config.splits for record in datasets.records(config, split)]
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_imagenet_with_other_classes_in_val_names_them(tmp_path: Path) -> None:
    config = as_tars(tmp_path)
    put_devkit(tmp_path, [2, 3, 3, 3, 2])
    assert "'train' has n02018795 (1 in all) that 'val' lacks" in refused(config)


def test_imagenet_of_some_classes_is_usable(tmp_path: Path) -> None:
    config = as_tars(tmp_path)
    put(tmp_path / imagenet.TRAIN_TAR, packed((f"{WNIDS[n]}.tar", packed(train_files()[WNIDS[n]])) for n in (1, 3)))
    put(tmp_path / imagenet.VAL_TAR, packed(val_files(3)))
    put_devkit(tmp_path, [3, 1, 3])
    assert imagenet.class_names(config) == ("n01440764", "n02018795")
    assert [label for label, _, _ in found(config, "val").values()] == [0, 1, 0]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: put_devkit(root, TRUTH[:-1]), "5 validation images, but 4 lines in the devkit's ground truth"),
        (lambda root: put_devkit(root, [*TRUTH[:-1], 7]), "line 5: expected an ILSVRC2012_ID, got '7'"),
        (lambda root: put(root / imagenet.VAL_TAR, packed([*val_files(4), ("x.JPEG", b"")])), "got 'x.JPEG'"),
        (lambda root: put(root / imagenet.VAL_TAR, packed([*val_files(4), val_files(4)[0]])), "got one of them twice"),
        (lambda root: (root / imagenet.VAL_TAR).unlink(), "expected val/<wnid>/<images> or ILSVRC2012_img_val.tar"),
        (lambda root: (root / imagenet.TRAIN_TAR).unlink(), "expected train/<wnid>/<images> or ILSVRC2012_img_train"),
        (lambda root: (root / f"{imagenet.DEVKIT}.tar.gz").unlink(), "or ILSVRC2012_devkit_t12.tar.gz, found neither"),
        (lambda root: put(root / f"{imagenet.DEVKIT}.tar.gz", b"\x1f\x8b no"), "expected a whole archive with data/"),
        (
            lambda root: put(root / f"{imagenet.DEVKIT}/data/meta.mat", b"MATLAB 5.0" * 99),
            "expected a MATLAB file with",
        ),
        (lambda root: put(root / imagenet.TRAIN_TAR, packed([("readme.txt", b"")])), "got 'readme.txt'"),
        (
            lambda root: put(root / imagenet.TRAIN_TAR, packed([("n01440764.tar", b"")])),
            "the tar inside it at byte 512",
        ),
        (lambda root: put(root / "train/n01440764/1", b"").parent.with_name("n1").mkdir(), "got 'n1'; move it away"),
    ],
)
def test_imagenet_that_contradicts_itself_is_one_clear_error(
    tmp_path: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    config = as_tars(tmp_path)
    spoil(tmp_path)
    if "the tar inside" in sentence:
        config = config.model_copy(update={"splits": ("train",)})
        put(tmp_path / imagenet.TRAIN_TAR, packed([("n01440764.tar", b""), ("n02018795.tar", b"")]))
    assert sentence in refused(config)


def test_imagenet_class_without_images_is_named(tmp_path: Path) -> None:
    config = as_tars(tmp_path)
    inner = [
        (f"{wnid}.tar", packed(files if number != 1 else []))
        for (number, wnid), files in zip(WNIDS.items(), train_files().values(), strict=True)
    ]
    put(tmp_path / imagenet.TRAIN_TAR, packed(inner))
    assert "the class n02018795 has no image in 'train'" in refused(config, "train")


def test_imagenet_has_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="splits train and val only, since the labels of test were never published"):
        imagenet.class_names(imagenet.Config(root=str(tmp_path), splits=("train", "test")))


def xml(*found: tuple[str, str], size: tuple[int, int] | None = (100, 200)) -> str:
    """An annotation of (class, content of bndbox) in a picture of height and width."""
    sides = "" if size is None else f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    each = "".join(
        f"<object><name>{name}</name><truncated>1</truncated><difficult>0</difficult><bndbox>{box}</bndbox>"
        "<part><name>head</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>"
        for name, box in found
    )
    return f"<annotation><filename>%s</filename>{sides}{each}</annotation>"


def corners(*values: float) -> str:
    return "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True))


def test_imagenet_boxes_are_in_the_house_form_in_every_layout(tmp_path: Path) -> None:
    wnid = WNIDS[3]
    tars, folders = as_tars(tmp_path / "tars"), as_folders(tmp_path / "folders")
    train = xml((wnid, corners(1, 2, 10, 20)), (wnid, corners(50, 30, 40, 5)), (wnid, corners(0, 0, 201, 101)))
    for root, train_folder, val_folder in (("tars", "Annotation", "val"), ("folders", "bbox/train", "bbox/val")):
        put(tmp_path / root / train_folder / wnid / f"{wnid}_1.xml", train)
        val = xml(("Scottish_deerhound", corners(5.5, 6, 7, 8)), (WNIDS[1], corners(1, 1, 2, 2)), size=None)
        put(tmp_path / root / val_folder / "ILSVRC2012_val_00000002.xml", val)
    for config in (tars.model_copy(update={"boxes": True}), folders.model_copy(update={"boxes": True})):
        by_id = {
            record.image_id: record.objects for split in config.splits for record in imagenet.records(config, split)
        }
        annotated = {name: objects for name, objects in by_id.items() if objects is not None}
        first, second = annotated[f"train/{wnid}/{wnid}_1.JPEG"], annotated[f"val/{wnid}/ILSVRC2012_val_00000002.JPEG"]
        assert len(annotated) == 2
        assert first.boxes_xyxy.tolist() == [[0, 1, 10, 20], [39, 4, 50, 30], [0, 0, 200, 100]]  # swapped; clipped
        assert (first.labels.tolist(), first.frame_hw, first.truncated.tolist()) == ([0] * 3, (100, 200), [True] * 3)
        # a word for a class is the image's own class; a box of another id is left out
        assert (second.boxes_xyxy.tolist(), second.labels.tolist(), second.frame_hw) == ([[4.5, 5, 7, 8]], [0], None)


BOMB = '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BOMB, "expected an XML without entities of its own"),
        ("<annotation><object>", "expected a whole XML file"),
        (xml(("dog", "<xmin>1</xmin>")), "expected four numbers in every bndbox"),
        (xml(("dog", corners(1, 2, float("nan"), 4))), "expected four finite numbers"),
    ],
)
def test_imagenet_annotation_that_is_damaged_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    config = as_folders(tmp_path).model_copy(update={"boxes": True})
    put(tmp_path / "Annotation" / WNIDS[3] / f"{WNIDS[3]}_0.xml", text)
    said = refused(config, "train")
    assert sentence in said
    assert f"{WNIDS[3]}_0.xml" in said


def test_imagenet_boxes_that_are_nowhere_say_where_they_were_sought(tmp_path: Path) -> None:
    config = as_folders(tmp_path).model_copy(update={"boxes": True})
    assert "no XML for 'train' in any of Annotation, Annotation/train, bbox" in refused(config)


# --- WebDataset


def shards(root: Path, split: str, count: int, per_tar: int, label: Callable[[int], int]) -> None:
    """Tars written by the format's own package."""
    root.mkdir(parents=True, exist_ok=True)
    with published.ShardWriter(str(root / f"{split}-%06d.tar"), maxcount=per_tar, verbose=0) as writer:
        for index in range(count):
            image, target = {"raw": 0, "jpg": jpeg(split, index)}["jpg"], label(index)
            writer.write({"__key__": f"part.1/{index:04d}", "jpg": image, "cls": target, "json": {"label": target}})


def wds(root: Path, **keys: Any) -> webdataset.Config:
    return parse(webdataset.Config, {"root": str(root), "splits": ["train"], **keys}, "here")


def test_webdataset_reads_what_its_own_package_writes_and_reads(tmp_path: Path) -> None:
    shards(tmp_path, "train", 25, 10, lambda index: index % 12)
    config = wds(tmp_path, tars={"train": "train-{000000..000002}.tar"})
    mine = list(webdataset.records(config, "train"))
    names = webdataset.class_names(config)
    urls = str(tmp_path / "train-{000000..000002}.tar")
    theirs = list(published.WebDataset(urls, shardshuffle=False))
    assert [content(record) for record in mine] == [sample["jpg"] for sample in theirs]
    assert [names[record.label or 0] for record in mine] == [sample["cls"].decode() for sample in theirs]
    assert [record.image_id.split("/", 2)[2] for record in mine] == [sample["__key__"] for sample in theirs]
    assert mine[10].image_id == "train/train-000001/part.1/0010"


def test_webdataset_numbers_are_class_names_sorted_as_text(tmp_path: Path) -> None:
    shards(tmp_path, "train", 12, 12, lambda index: index)
    config = wds(tmp_path)
    assert webdataset.class_names(config) == ("0", "1", "10", "11", *"23456789")
    labels = [record.label for record in webdataset.records(config, "train")]
    assert labels == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]


@pytest.mark.parametrize("label_key", [None, "label"])
def test_webdataset_class_names_in_label_order_are_mapped_by_name(tmp_path: Path, label_key: str | None) -> None:
    shards(tmp_path, "train", 3, 3, lambda index: index)
    config = wds(tmp_path, classes=["zebra", "ant", "cat"], label_key=label_key)
    assert webdataset.class_names(config) == ("ant", "cat", "zebra")
    assert [record.label for record in webdataset.records(config, "train")] == [2, 0, 1]


def test_webdataset_groups_as_its_package_does(tmp_path: Path) -> None:
    files = [
        ("__meta__/x.jpg", b"0"),
        ("a/1.seg.PNG", b"1"),
        ("a/1.JPG", b"2"),
        ("a/1.cls", b"0"),
        ("README", b"3"),
        ("a.b/1.cls", b"1\n"),
        ("a.b/1.jpg", b"4"),
        ("K.jpg", b"5"),
        ("K.cls", b"1"),
    ]
    path = put(tmp_path / "train-0.tar", packed(files))
    mine = [
        (record.image_id.split("/", 2)[2], content(record)) for record in webdataset.records(wds(tmp_path), "train")
    ]
    theirs = [(sample["__key__"], sample["jpg"]) for sample in published.WebDataset(str(path), shardshuffle=False)]
    assert mine == theirs == [("a/1", b"2"), ("a.b/1", b"4"), ("K", b"5")]


def test_webdataset_takes_wildcards_lists_and_folders_elsewhere(tmp_path: Path) -> None:
    pair = [[("1.jpg", b""), ("1.cls", b"0")], [("2.jpg", b""), ("2.cls", b"1")]]
    for name in ("root/x/b-1.tar", "root/x/a-1.tar", "root/x/deep/a-1.tar", "root/y.tar", "other/z.tar"):
        put(tmp_path / name, packed(pair[0] + pair[1]))

    def tars(wanted: Any) -> list[str]:
        config = wds(tmp_path / "root", tars={"train": wanted}, classes=["a", "b"])
        records = webdataset.records(config, "train")
        return list(dict.fromkeys(record.image_id.removeprefix("train/").rpartition("/")[0] for record in records))

    assert tars("x/*.tar") == ["x/a-1", "x/b-1"]
    assert tars("*/?-1.tar") == ["x/a-1", "x/b-1"]
    assert tars(["y.tar", "x/{b,a}-[0-9].tar"]) == ["y", "x/b-1", "x/a-1"]
    assert tars(str(tmp_path / "other/z.tar")) == [str(tmp_path / "other/z").lstrip("/")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{x,y}{0..1}", ["x0", "x1", "y0", "y1"]),
        ("{one}", ["{one}"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern: str, expected: list[str]) -> None:
    assert webdataset.expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["{5..1}", "{0..99999999}"])
def test_braces_that_run_backwards_or_without_end_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="expected a rising range"):
        webdataset.expand(pattern)


@pytest.mark.parametrize(
    ("files", "keys", "sentence"),
    [
        ([("k.jpg", b"")], {}, "the sample 'k' has no label: expected .cls among its files (.jpg)"),
        ([("k.cls", b"0")], {}, "the sample 'k' has no image among its files (.cls)"),
        ([("k.jpg", b""), ("k.png", b""), ("k.cls", b"0")], {}, "the sample 'k' has images .jpg and .png"),
        ([("k.jpg", b""), ("k.jpg", b""), ("k.cls", b"0")], {}, "the sample 'k' has two files .jpg"),
        ([("k.jpg", b""), ("k.cls", b"cat")], {}, "expected a number in its .cls, got b'cat'"),
        ([("k.jpg", b""), ("k.cls", b"-1")], {}, "expected a number in its .cls, got b'-1'"),
        ([("k.jpg", b""), ("k.cls", b"2")], {"classes": ["a", "b"]}, "the label 2, but dataset.classes has 2 names"),
        ([("k.jpg", b""), ("k.json", b"{")], {"label_key": "y"}, "expected a number or a name at 'y' in its .json"),
        ([("k.jpg", b""), ("k.json", b'{"y": true}')], {"label_key": "y"}, "a number or a name at 'y' in its .json"),
        (
            [("k.jpg", b""), ("k.json", b'{"y": "\\ud800"}')],
            {"label_key": "y"},
            "a number or a name at 'y' in its .json",
        ),
        ([("k.jpg", b""), ("k.json", b"[" * 10**5)], {"label_key": "y"}, "a number or a name at 'y' in its .json"),
        (
            [("k.jpg", b""), ("k.json", b'{"y": "c"}')],
            {"label_key": "y", "classes": ["a", "b"]},
            "has the class 'c', which dataset.classes lacks",
        ),
        (
            [(name, b"0") for name in ("k.jpg", "k.cls", "l.jpg", "l.cls", "k.jpg", "k.cls")],
            {},
            "the sample 'k' comes twice",
        ),
    ],
)
def test_webdataset_sample_that_is_not_whole_is_named_with_its_tar(
    tmp_path: Path, files: list[tuple[str, bytes]], keys: dict[str, Any], sentence: str
) -> None:
    put(tmp_path / "train-0.tar", packed(files))
    said = refused(wds(tmp_path, **keys))
    assert sentence in said
    assert "train-0.tar: the sample 'k'" in said


def test_webdataset_without_tars_or_with_one_twice_says_so(tmp_path: Path) -> None:
    put(tmp_path / "train-0.tar", packed([]))
    assert "no tar matches 'x-*.tar'" in refused(wds(tmp_path, tars={"train": "x-*.tar"}))
    assert "train-0.tar more than once" in refused(wds(tmp_path, tars={"train": ["train-0.tar", "*.tar"]}))
    assert "cannot be read: No such file" in refused(
        wds(tmp_path, tars={"train": "train-{0..1}.tar"}, classes=["a", "b"])
    )


def test_webdataset_names_from_json_are_classes(tmp_path: Path) -> None:
    files = [
        (f"{at}.{kind}", data)
        for at, name in enumerate("ba")
        for kind, data in (("jpg", b""), ("json", f'{{"y": "{name}"}}'.encode()))
    ]
    put(tmp_path / "train-0.tar", packed(files))
    config = wds(tmp_path, label_key="y")
    assert webdataset.class_names(config) == ("a", "b")
    assert [record.label for record in webdataset.records(config, "train")] == [1, 0]


# --- tables of URIs

ROWS = [
    {"uri": "a/1.jpg", "class_name": "dog", "split": "train"},
    {"uri": "/abs/2.jpg", "class_name": "cat", "split": "val"},
    {"uri": "s3://bucket/k 3.jpg", "class_name": "cat", "split": "train"},
    {"uri": "4.jpg", "class_name": 'ünï, "quoted"\nline', "split": "val"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def table(root: Path, rows: list[dict[str, Any]], name: str = "images.csv", **keys: Any) -> uri_list.Config:
    write(root / name, rows)
    return parse(uri_list.Config, {"root": str(root), "tables": name, **keys}, "here")


def named(config: uri_list.Config) -> Iterator[tuple[str, str, str, int | None]]:
    for split in config.splits:
        for record in uri_list.records(config, split):
            yield split, record.image_id, record.uri, record.label


@pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
def test_table_names_images_anywhere(tmp_path: Path, name: str) -> None:
    config = table(tmp_path, ROWS, name)
    assert uri_list.class_names(config) == ("cat", "dog", 'ünï, "quoted"%0Aline')
    assert list(named(config)) == [
        ("train", "train/a/1.jpg", f"{tmp_path}/a/1.jpg", 1),
        ("train", "train/bucket/k 3.jpg", "s3://bucket/k 3.jpg", 0),
        ("val", "val/abs/2.jpg", "/abs/2.jpg", 0),
        ("val", "val/4.jpg", f"{tmp_path}/4.jpg", 2),
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_table_per_split_needs_no_column_split_and_numbers_are_names(tmp_path: Path, suffix: str) -> None:
    for split, labels in (("train", (10, 2)), ("val", (2, 10))):
        rows = [
            {"uri": f"{label}.jpg", "label": label, "image_id": f"{split}-{label}", "other": 0.5} for label in labels
        ]
        write(tmp_path / f"lists/{split}.{suffix}", rows)
    tables = {split: f"lists/{split}.{suffix}" for split in ("train", "val")}
    config = parse(uri_list.Config, {"root": str(tmp_path), "tables": tables}, "here")
    assert uri_list.class_names(config) == ("10", "2")
    assert [(image_id, label) for _, image_id, _, label in named(config)] == [
        *(("train-10", 0), ("train-2", 1), ("val-2", 1), ("val-10", 0)),
    ]


def changed(at: int, **keys: Any) -> list[dict[str, Any]]:
    return [{**row, **keys} if index == at else row for index, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (changed(2, split="valid"), "expected a split of train, val, test, got 'valid'"),
        (changed(2, uri=" "), "expected text in the column 'uri', got ' '"),
        (changed(2, class_name=""), "expected text in the column 'class_name', got ''"),
    ],
)
@pytest.mark.parametrize(("name", "where"), [("images.csv", "line 4"), ("images.parquet", "row 3")])
def test_table_with_an_odd_row_names_it(
    tmp_path: Path, rows: list[dict[str, Any]], sentence: str, name: str, where: str
) -> None:
    assert f"{name}: {where}: {sentence}" in refused(table(tmp_path, rows, name))


@pytest.mark.parametrize("column", ["uri", "class_name", "split"])
@pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
def test_table_without_a_column_names_it(tmp_path: Path, column: str, name: str) -> None:
    rows = [{key: value for key, value in row.items() if key != column} for row in ROWS]
    assert f"{name}: has no column '{column}' (columns: " in refused(table(tmp_path, rows, name))


def test_table_with_nothing_in_a_value_of_parquet_names_the_row(tmp_path: Path) -> None:
    assert "row 4: expected text in the column 'uri', got None" in refused(
        table(tmp_path, changed(3, uri=None), "a.parquet")
    )


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"uri,class_name,split\na,b\n", "line 2: expected 3 values as in the header, got 2"),
        (b"uri,class_name,split\na,\xe9,train\n", "expected CSV in UTF-8"),
        (b'uri,class_name,split\na,"b,train\n', "expected CSV in UTF-8 (unexpected end of data)"),
        (b"", "has no column 'uri'"),
        (b"uri,class_name,split\na,b,train\n\n", "expected at least two classes in the table, found 1"),
    ],
)
def test_table_that_is_no_csv_is_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    put(tmp_path / "images.csv", data)
    assert sentence in refused(uri_list.Config(root=str(tmp_path)))


def test_table_that_is_missing_damaged_or_without_a_split_is_refused(tmp_path: Path) -> None:
    assert "images.csv: cannot be read: No such file" in refused(uri_list.Config(root=str(tmp_path)))
    put(tmp_path / "a.parquet", b"PAR1" + bytes(50) + b"PAR1")
    assert "a.parquet: cannot be read: Couldn't deserialize" in refused(
        uri_list.Config(root=str(tmp_path), tables="a.parquet")
    )
    put(tmp_path / "a.parquet", b"uri,class_name,split")
    assert "a.parquet: expected a Parquet file" in refused(uri_list.Config(root=str(tmp_path), tables="a.parquet"))
    odd = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "<i4")), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"uri": odd, "class_name": ["a"], "split": ["train"]}), tmp_path / "a.parquet")
    assert "a.parquet: expected a Parquet file, got a damaged one ('utf-8' codec can't decode" in refused(
        uri_list.Config(root=str(tmp_path), tables="a.parquet")
    )
    config = table(tmp_path, ROWS, splits=["train", "test"])
    assert "no row belongs to 'test'; take it out of dataset.splits" in refused(config)
    with pytest.raises(ConfigError, match="expected a table for each split, got none for 'val'"):
        uri_list.class_names(uri_list.Config(root=str(tmp_path), tables={"train": "images.csv"}))
