"""Pascal VOC: one XML of boxes per image, lists of images per split, masks as PNG.

Source: VOC2012 development kit, sections 3 and 8. Layout below `root`: `JPEGImages/`, `Annotations/`,
`ImageSets/Main/<split>.txt`; with `masks: true` `ImageSets/Segmentation/` and `SegmentationClass/`, whose pixels are 0
for background, 1 for the first class as sorted and 255 at outlines, which is the house form already. Boxes count pixels
from 1, the last included, and may have decimals. Only an object's own box counts: those of its parts (head, hands) are
ignored. `difficult` and `truncated` are kept. Sizes in the XML become `frame_hw`. Left out: actions, poses, layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, NoReturn
from xml.etree.ElementTree import Element, ParseError  # types only: defusedxml parses

from defusedxml import DefusedXmlException, ElementTree
from pydantic import Field, field_validator

from pipeline import boxes, storage
from pipeline.data.datasets import DatasetConfig, folder_of
from pipeline.data.datasets._detection import MAX_PIXELS, PerSplit, lines, listing, objects, of_split, read_small
from pipeline.errors import ConfigError, DataError
from pipeline.types import Objects, Record, Split

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
_FLAGS = {"1": True, "true": True, "0": False, "false": False, "unspecified": False, "": False}


class Config(DatasetConfig):
    """`root` holds the folders of the development kit.

    Attributes:
        images: the folder of images, below `root`.
        annotations: the folder of XML files, below `root`.
        image_set: what the source calls each split: the name of its list without `.txt`.
        listed: whether lists say which images belong to a split; else every XML in `annotations` does.
        masks: take the images that have a mask, and their masks. Needs `classes`, since the pixels count on them.
        classes: the class names, sorted as text; None gathers them from all annotations, which are read
            once more for every split then.
    """

    name: Literal["voc"] = "voc"
    images: PerSplit = "JPEGImages"
    annotations: PerSplit = "Annotations"
    image_set: PerSplit = "{split}"
    listed: bool = True
    masks: bool = False
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)

    @field_validator("classes")
    @classmethod
    def _sorted(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if classes is not None and list(classes) != sorted(set(classes)):
            raise ValueError("expected each class once, sorted as text")
        return classes


class _Annotation(NamedTuple):
    file_name: str
    size_hw: tuple[int, int] | None
    classes: tuple[str, ...]
    boxes: list[list[float]]
    difficult: list[bool]
    truncated: list[bool]


def class_names(config: Config) -> tuple[str, ...]:
    """The configured classes, or those of all annotations of all splits, sorted as text.

    Raises:
        ConfigError: masks are wanted but the classes are not given.
        DataError: a list or an annotation cannot be read, or there is no object at all.
    """
    folder_of(config)
    if config.classes is not None:
        return config.classes
    if config.masks:
        raise ConfigError(
            "dataset.classes: expected all class names, since the pixels of masks count on them, got none"
        )
    found: set[str] = set()
    for split in config.splits:
        folder = _place(config, "annotations", split)
        for name in _listed(config, split):
            found.update(_read(storage.join(folder, f"{name}.xml")).classes)
    if not found:
        raise DataError(f"{config.root}: expected annotations with objects, got none with any; set dataset.classes")
    return tuple(sorted(found))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every image of one split in the order of its list.

    An image that is listed but missing is named all the same, so that it shows among the rejects.

    Raises:
        DataError: a list, an annotation or a mask is missing, damaged or contradicts the classes.
    """
    labels = {name: label for label, name in enumerate(class_names(config))}
    names, folder = _listed(config, split), _place(config, "images", split)
    annotations, mask_folder = (
        _place(config, "annotations", split),
        storage.join(folder_of(config), "SegmentationClass"),
    )
    images = listing(folder)
    mask_files = listing(mask_folder) if config.masks else {}
    missing = []
    for name in names:
        uri = storage.join(annotations, f"{name}.xml")
        annotation = _read(uri)
        mask = _mask(mask_files, mask_folder, name) if config.masks else None
        file = _image(images, name, annotation.file_name)
        missing += [name] if file is None else []
        if len(missing) == len(names):
            raise DataError(
                f"{folder}: expected images such as {names[0]}.jpg, got none that is listed; set dataset.images"
            )
        yield Record(
            image_id=f"{split}/{storage.printable(name)}",
            uri=storage.join(folder, f"{name}.jpg") if file is None else file.uri,
            split=split,
            objects=_objects(annotation, labels, uri),
            mask_uri=None if mask is None else mask.uri,
            size_bytes=0 if file is None else file.size_bytes,
            mask_bytes=0 if mask is None else mask.size_bytes,
        )


def _place(config: Config, field: str, split: Split) -> str:
    return storage.join(folder_of(config), of_split(config, field, split))


def _listed(config: Config, split: Split) -> list[str]:
    """The names of a split's images, without suffix."""
    if not config.listed:
        folder = _place(config, "annotations", split)
        names = [name.removesuffix(".xml") for name in listing(folder) if name.endswith(".xml")]
        where = f"{folder}: expected annotations (*.xml)"
    else:
        task, image_set = "Segmentation" if config.masks else "Main", of_split(config, "image_set", split)
        uri = storage.join(folder_of(config), "ImageSets", task, f"{image_set}.txt")
        names = [line for line in lines(uri) if line]
        where = f"{uri}: expected one name of an image per line"
    odd = next(
        (name for name in names if name.startswith("/") or storage.is_remote(name) or ".." in name.split("/")), None
    )
    if odd is not None or not names:
        raise DataError(f"{where}, got {'none' if odd is None else repr(odd)}")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"{where}, each once, got '{storage.printable(twice)}' again")
    return names


def _image(images: dict[str, storage.File], name: str, file_name: str) -> storage.File | None:
    """The file of an image: by its name in the list, else by the tag, which copies of a dataset often leave behind."""
    stem = storage.printable(name)
    wanted = (*(stem + suffix for suffix in _SUFFIXES), storage.printable(file_name))
    return next((images[each] for each in wanted if each in images), None)


def _mask(files: dict[str, storage.File], folder: str, name: str) -> storage.File:
    file = files.get(f"{storage.printable(name)}.png")
    if file is None:
        raise DataError(
            f"{folder}: expected a mask for each image of the list, got none for '{storage.printable(name)}'"
        )
    return file


def _objects(annotation: _Annotation, labels: dict[str, int], uri: str) -> Objects:
    odd = next((name for name in annotation.classes if name not in labels), None)
    if odd is not None:
        raise DataError(
            f"{uri}: expected classes among {', '.join(labels)[:200]}, got '{odd}'; add it to dataset.classes"
        )
    return objects(
        boxes.voc_to_xyxy(annotation.boxes),
        [labels[name] for name in annotation.classes],
        difficult=annotation.difficult,
        truncated=annotation.truncated,
        frame_hw=annotation.size_hw,
    )


def _read(uri: str) -> _Annotation:
    """Parse one XML, whatever is in it."""
    try:
        root = ElementTree.fromstring(read_small(uri))
    except DefusedXmlException as error:
        raise DataError(f"{uri}: expected an XML without entities of its own, got {type(error).__name__}") from None
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{uri}: expected a whole XML file, got one that is damaged ({error})") from None
    found = root.findall("object")
    return _Annotation(
        file_name=(root.findtext("filename") or "").strip(),
        size_hw=_size(root),
        classes=tuple(_text(each, "name", uri) for each in found),
        boxes=[_box(each, uri) for each in found],
        difficult=[_flag(each, "difficult", uri) for each in found],
        truncated=[_flag(each, "truncated", uri) for each in found],
    )


def _size(root: Element) -> tuple[int, int] | None:
    """Height and width; None where tools left them out or 0."""
    height, width = (root.findtext(f"size/{name}", "").strip() for name in ("height", "width"))
    known = all(side.isascii() and side.isdigit() and 0 < len(side) < 8 and int(side) for side in (height, width))
    return (int(height), int(width)) if known else None


def _box(found: Element, uri: str) -> list[float]:
    box = found.find("bndbox")
    if box is None:
        raise DataError(f"{uri}: expected a 'bndbox' in every object, got none")
    return [_number(_text(box, name, uri), name, uri) for name in ("xmin", "ymin", "xmax", "ymax")]


def _number(text: str, name: str, uri: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < MAX_PIXELS:
        _refuse(uri, name, "a number of pixels", text)
    return value


def _flag(found: Element, name: str, uri: str) -> bool:
    text = (found.findtext(name) or "").strip()
    if text.lower() not in _FLAGS:
        _refuse(uri, name, "0 or 1", text)
    return _FLAGS[text.lower()]


def _text(found: Element, name: str, uri: str) -> str:
    text = (found.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{uri}: expected a '{name}' in every {found.tag}, got none")
    return text


def _refuse(uri: str, name: str, expected: str, text: str) -> NoReturn:
    raise DataError(f"{uri}: expected {expected} in '{name}', got {text[:80]!r}")
