"""ILSVRC-2012 as published: 1,281,167 training and 50,000 validation images of 1,000 synsets, packed or unpacked.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. Below `root`, whichever is
there, class folders first; tars are read in place, image by image:

- train: `train/<wnid>/*.JPEG`, or `ILSVRC2012_img_train.tar` with its tars `<wnid>.tar`;
- val: `val/<wnid>/*.JPEG`, or `ILSVRC2012_img_val.tar`, or its images in `val/`. The last two take their labels from
  the devkit: `ILSVRC2012_devkit_t12/data/` or `ILSVRC2012_devkit_t12.tar.gz`;
- with `boxes: true` the XML files: `Annotation/<wnid>/` or `bbox/<wnid>/` (also below their `train/`), and `val/`,
  `Annotation/val/` or `bbox/val/`.

Classes are WordNet ids, sorted, as Caffe, Keras and torchvision count them (0 is n01440764, the tench), not in the
order of the devkit's ILSVRC2012_ID. Fewer classes than 1,000 are fine if all splits have the same. The known odd files
(a PNG and 22 CMYK files called JPEG) need nothing here: `imaging` goes by content. Left out: the test split, whose
labels were never published.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element, ParseError  # types only: defusedxml parses

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

from pipeline import boxes, storage
from pipeline.data.datasets import DatasetConfig, _tar, folder_of
from pipeline.data.datasets._detection import lines, objects, read_small
from pipeline.data.datasets.image_folder import walk
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Location
from pipeline.types import Objects, Record, Split

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
BLACKLIST = "ILSVRC2014_clsloc_validation_blacklist.txt"
MAX_DEVKIT_BYTES = 64 * 2**20  # of one of its files, unpacked: ten times the largest

_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
_XML_FOLDERS = {
    "train": ("Annotation", "Annotation/train", "bbox", "bbox/train"),
    "val": ("Annotation/val", "bbox/val", "val"),
}


class Config(DatasetConfig):
    """`root` holds what was downloaded.

    Attributes:
        boxes: read the bounding boxes. About 42% of the training images have some; the others carry no objects.
        words: call a class by its id and the devkit's words ("n01440764 tench, Tinca tinca"); the order stays. Words
            alone do not tell classes apart: there are two cranes and two maillots.
        leave_out_blacklisted: leave out the 1,762 validation images that the 2014 devkit lists as wrongly labelled.
            Published results count all 50,000.
    """

    name: Literal["imagenet"] = "imagenet"
    root: Location | None = "imagenet"
    boxes: bool = False
    words: bool = False
    leave_out_blacklisted: bool = False


class _Image(NamedTuple):
    wnid: str
    name: str
    uri: str
    size_bytes: int
    byte_range: tuple[int, int] | None


def class_names(config: Config) -> tuple[str, ...]:
    """The WordNet ids that are there, sorted, with their words if the configuration says so.

    Raises:
        DataError: a split is missing, or the splits disagree; the message names the odd classes.
    """
    wnids = _wnids(config)
    if not config.words:
        return wnids
    words = dict(_synsets(folder_of(config)).values())
    unknown = [wnid for wnid in wnids if wnid not in words]
    if unknown:
        raise DataError(f"{config.root}: {DEVKIT} has no synset {unknown[0]}; set dataset.words=false")
    return tuple(f"{wnid} {words[wnid]}" for wnid in wnids)


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every image of one split: by class and name from folders, in the order of the tar from a tar.

    An image has the same `image_id`, `<split>/<wnid>/<file>`, in every layout.

    Raises:
        DataError: a file is missing, damaged or contradicts another one.
    """
    root, labels = folder_of(config), {wnid: label for label, wnid in enumerate(_wnids(config))}
    left_out = _blacklist(root) if config.leave_out_blacklisted and split == "val" else frozenset()
    annotations = _Annotations(root, split, set(labels)) if config.boxes else None
    for image in _images(root, split):
        stem, label = PurePosixPath(image.name).stem, labels[image.wnid]
        if left_out and _number(image.name) in left_out:
            continue
        yield Record(
            image_id=f"{split}/{image.wnid}/{image.name}",
            uri=image.uri,
            split=split,
            label=label,
            byte_range=image.byte_range,
            objects=annotations.of(stem, image.wnid, label) if annotations else None,
            size_bytes=image.size_bytes,
        )


def _wnids(config: Config) -> tuple[str, ...]:
    root = folder_of(config)
    if "test" in config.splits:
        raise ConfigError(
            "dataset 'imagenet' has the splits train and val only, since the labels of test were never published; "
            "take 'test' out of dataset.splits"
        )
    first, *others = config.splits
    expected = _wnids_of(root, first)
    for split in others:
        found = _wnids_of(root, split)
        for has, lacks, odd in ((split, first, found - expected), (first, split, expected - found)):
            if odd:
                raise DataError(
                    f"{root}: every split must hold the same classes, but '{has}' has {', '.join(sorted(odd)[:5])} "
                    f"({len(odd)} in all) that '{lacks}' lacks; add or move away their images"
                )
    if len(expected) < 2:
        raise DataError(f"{root}: expected at least two classes, found {len(expected)}")
    return tuple(sorted(expected))


def _wnids_of(root: str, split: Split) -> set[str]:
    folders = _class_folders(root, split)
    if folders:
        return set(folders)
    return {wnid for wnid, _ in _inner_tars(root)} if split == "train" else set(_ground_truth(root))


def _images(root: str, split: Split) -> Iterator[_Image]:
    folders = _class_folders(root, split)
    if not folders and split == "val":
        yield from _flat_val(root)
        return
    for wnid, inner in ((wnid, None) for wnid in folders) if folders else _inner_tars(root):
        empty = True
        for image in _in_folder(root, split, wnid) if inner is None else _in_tar(root, wnid, inner):
            empty = False
            yield image
        if empty:
            raise DataError(f"{root}: the class {wnid} has no image in '{split}'; fetch its images again")


def _class_folders(root: str, split: Split) -> list[str]:
    """The class folders of a split; none where it is not unpacked that way."""
    folder = storage.join(root, split)
    try:
        names = storage.folders(folder) if storage.is_folder(folder) else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {storage.reason(error)}") from None
    odd = [name for name in names if not _WNID.fullmatch(name)]
    if odd and len(odd) < len(names):
        raise DataError(
            f"{folder}: expected folders called after WordNet ids (n01440764), got {odd[0]!r}; move it away"
        )
    return [] if odd else names


def _in_folder(root: str, split: Split, wnid: str) -> Iterator[_Image]:
    for file in walk(storage.join(root, split, wnid)):
        yield _Image(wnid, file.name, file.uri, file.size_bytes, None)


def _in_tar(root: str, wnid: str, inner: _tar.Member) -> Iterator[_Image]:
    uri = storage.join(root, TRAIN_TAR)
    for member in _tar.members(uri, inner.byte_range):
        yield _Image(wnid, member.name, uri, member.length, member.byte_range)


def _inner_tars(root: str) -> Iterator[tuple[str, _tar.Member]]:
    uri = storage.join(root, TRAIN_TAR)
    if not _is_file(uri):
        raise DataError(f"{root}: expected train/<wnid>/<images> or {TRAIN_TAR}, got neither; set dataset.root")
    for member in _tar.members(uri):
        wnid = PurePosixPath(member.name).name.removesuffix(".tar")
        if not _WNID.fullmatch(wnid) or not member.name.endswith(".tar"):
            raise DataError(f"{uri}: expected tars called after WordNet ids (n01440764.tar), got {member.name!r}")
        yield wnid, member


def _flat_val(root: str) -> list[_Image]:
    """The validation images with the label that the devkit has for their number; 50,000 at most, so all at once."""
    truth, tar = _ground_truth(root), storage.join(root, VAL_TAR)
    found: list[tuple[str, str, int, tuple[int, int] | None]]
    if _is_file(tar):
        found = [(member.name, tar, member.length, member.byte_range) for member in _tar.members(tar)]
    elif storage.is_folder(folder := storage.join(root, "val")):
        files = (file for file in walk(folder) if not file.name.endswith(".xml"))
        found = [(file.name, file.uri, file.size_bytes, None) for file in files]
    else:
        raise DataError(f"{root}: expected val/<wnid>/<images> or {VAL_TAR}, got neither; set dataset.root")
    if len(found) != len(truth):
        raise DataError(
            f"{root}: {len(found)} validation images, but {len(truth)} lines in the devkit's ground truth; fetch both "
            "again"
        )
    numbers = [_number(name) for name, *_ in found]
    odd = next((at for at, number in enumerate(numbers) if number is None or not 1 <= number <= len(truth)), None)
    if odd is not None or len(set(numbers)) < len(numbers):
        raise DataError(
            f"{root}: expected ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(truth):08d}.JPEG, each once, got "
            f"{'one of them twice' if odd is None else repr(found[odd][0])}"
        )
    return [
        _Image(truth[number - 1], PurePosixPath(name).name, uri, size_bytes, byte_range)
        for number, (name, uri, size_bytes, byte_range) in zip(numbers, found, strict=True)
        if number is not None
    ]


def _number(name: str) -> int | None:
    found = _VAL_NAME.fullmatch(PurePosixPath(name).name)
    return int(found[1]) if found else None


def _ground_truth(root: str) -> list[str]:
    """The WordNet id of each validation image, in the order of their numbers."""
    name = "ILSVRC2012_validation_ground_truth.txt"
    wnids = _synsets(root)
    text = _devkit_file(root, name).decode("ascii", "replace").split()
    for row, number in enumerate(text, 1):
        if not (number.isdigit() and int(number) in wnids):
            raise DataError(f"{root}: {DEVKIT}: {name}: line {row}: expected an ILSVRC2012_ID, got {number[:40]!r}")
    return [wnids[int(number)][0] for number in text]


def _synsets(root: str) -> dict[int, tuple[str, str]]:
    """(WordNet id, words) by ILSVRC2012_ID, from the devkit's MATLAB file."""
    from scipy.io import loadmat  # noqa: PLC0415  (slow to import, needed only here)

    data = _devkit_file(root, "meta.mat")
    try:
        rows = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        names = [str(wnid) for wnid in rows["WNID"]]
        found = dict(
            zip(map(int, rows["ILSVRC2012_ID"]), zip(names, map(str, rows["words"]), strict=True), strict=True)
        )
    except Exception as error:  # whatever a damaged file makes scipy raise
        raise DataError(
            f"{root}: {DEVKIT}: meta.mat: expected a MATLAB file with 'synsets' ({type(error).__name__}); fetch it"
            " again"
        ) from None
    odd = [name for name in names if not _WNID.fullmatch(name)]
    if odd:
        raise DataError(f"{root}: {DEVKIT}: meta.mat: expected WordNet ids (n01440764), got {odd[0]!r}")
    return found


def _devkit_file(root: str, name: str) -> bytes:
    unpacked, packed = storage.join(root, DEVKIT, "data", name), storage.join(root, f"{DEVKIT}.tar.gz")
    if _is_file(unpacked):
        return read_small(unpacked)
    if not _is_file(packed):
        raise DataError(
            f"{root}: the labels of the validation images need {DEVKIT}/data/{name} or {DEVKIT}.tar.gz, found neither; "
            "put the devkit there, or sort the images into val/<wnid>/"
        )
    try:
        with tarfile.open(fileobj=io.BytesIO(read_small(packed)), mode="r:gz") as archive:
            found = archive.extractfile(f"{DEVKIT}/data/{name}")
            data = found.read(MAX_DEVKIT_BYTES + 1) if found else b""
    except (tarfile.TarError, KeyError, OSError, EOFError, ValueError, zlib.error) as error:
        said = " ".join(str(error).split())[:120]
        raise DataError(f"{packed}: expected a whole archive with data/{name} ({said}); fetch it again") from None
    if not 0 < len(data) <= MAX_DEVKIT_BYTES:
        raise DataError(f"{packed}: expected data/{name} of at most {MAX_DEVKIT_BYTES} bytes, got {len(data)} or more")
    return data


def _blacklist(root: str) -> frozenset[int]:
    places = [storage.join(root, BLACKLIST), storage.join(root, "ILSVRC2014_devkit", "data", BLACKLIST)]
    uri = next((place for place in places if _is_file(place)), None)
    if uri is None:
        raise DataError(f"{root}: {BLACKLIST} is missing; put it there or set dataset.leave_out_blacklisted=false")
    numbers = [line for line in lines(uri) if line]
    odd = [line for line in numbers if not (line.isascii() and line.isdigit())]
    if odd:
        raise DataError(f"{uri}: expected the number of an image in each line, got {odd[0][:40]!r}")
    return frozenset(map(int, numbers))


def _is_file(location: str) -> bool:
    try:
        return storage.is_file(location)
    except OSError as error:
        raise DataError(f"{location}: cannot be reached: {storage.reason(error)}") from None


class _Annotations:
    """The boxes of a split, one XML per image; files are listed class by class, since train has half a million."""

    def __init__(self, root: str, split: Split, wnids: set[str]) -> None:
        self.folder, self.by_class = self._find(root, split, wnids), split == "train"
        self.listed: tuple[str, dict[str, str]] = ("", {})

    def of(self, stem: str, wnid: str, label: int) -> Objects | None:
        """What is in an image; None where it was not annotated."""
        part = wnid if self.by_class else "val"
        if self.listed[0] != part:
            self.listed = (part, self._list(storage.join(self.folder, part) if self.by_class else self.folder))
        uri = self.listed[1].get(stem)
        return None if uri is None else _objects(uri, wnid, label)

    @staticmethod
    def _list(folder: str) -> dict[str, str]:
        files = walk(folder) if storage.is_folder(folder) else iter(())
        return {PurePosixPath(file.name).stem: file.uri for file in files if file.name.endswith(".xml")}

    @staticmethod
    def _find(root: str, split: Split, wnids: set[str]) -> str:
        for name in _XML_FOLDERS[split]:
            folder = storage.join(root, name)
            if not storage.is_folder(folder):
                continue
            if not wnids.isdisjoint(storage.folders(folder)) if split == "train" else _has_xml(folder):
                return folder
        raise DataError(
            f"{root}: dataset.boxes is true, but there is no XML for '{split}' in any of "
            f"{', '.join(_XML_FOLDERS[split])}; unpack the bounding boxes there"
        )


def _has_xml(folder: str) -> bool:
    return any(file.name.endswith(".xml") for file in walk(folder))


def _objects(uri: str, wnid: str, label: int) -> Objects:
    """The boxes of one XML.

    Every one gets the image's own class: the published files call some dogs by a word ("Scottish_deerhound"). Only a
    box that names another WordNet id is left out. Boxes count pixels of the size in the XML, which may not be that of
    the image, from 1, the last included; some have their corners swapped, some reach beyond the picture.
    """
    root = _parse(uri)
    found = [each for each in root.findall("object") if _is_of(each.findtext("name", "").strip(), wnid)]
    size_hw = _size(root)
    boxes_xyxy = boxes.voc_to_xyxy([_corners(each, uri) for each in found])
    return objects(
        boxes.clip(boxes_xyxy, size_hw) if size_hw else boxes_xyxy,
        [label] * len(found),
        difficult=[each.findtext("difficult", "").strip() == "1" for each in found],
        truncated=[each.findtext("truncated", "").strip() == "1" for each in found],
        frame_hw=size_hw,
    )


def _parse(uri: str) -> Element:
    try:
        parsed: Element = ElementTree.fromstring(read_small(uri))
    except DefusedXmlException as error:
        raise DataError(f"{uri}: expected an XML without entities of its own, got {type(error).__name__}") from None
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{uri}: expected a whole XML file, got one that is damaged ({error})") from None
    return parsed


def _is_of(name: str, wnid: str) -> bool:
    return name == wnid or not _WNID.fullmatch(name)


def _size(root: Element) -> tuple[int, int] | None:
    """Height and width; None where they are left out or 0."""
    height, width = (root.findtext(f"size/{name}", "").strip() for name in ("height", "width"))
    known = all(side.isascii() and side.isdigit() and 0 < len(side) < 8 and int(side) for side in (height, width))
    return (int(height), int(width)) if known else None


def _corners(found: Element, uri: str) -> list[float]:
    texts = [found.findtext(f"bndbox/{name}", "").strip() for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x_min, y_min, x_max, y_max = corners = [float(text) for text in texts]
    except ValueError:
        raise DataError(f"{uri}: expected four numbers in every bndbox, got {texts}") from None
    if not np.isfinite(corners).all():
        raise DataError(f"{uri}: expected four finite numbers in every bndbox, got {texts}")
    return [min(x_min, x_max), min(y_min, y_max), max(x_min, x_max), max(y_min, y_max)]
