"""COCO's object detection format: one JSON per split with images, categories and boxes, and folders of images.

Source: cocodataset.org, "Data format", section 1 (Object Detection). Boxes are (x, y, width, height) in continuous
pixels from 0. Category ids may have gaps; labels are indices into the category names sorted as text. `iscrowd` becomes
`crowd`; outlines (polygons, run lengths plain or compressed) are kept with `masks: true`. The JSON is streamed: memory
holds some 60 bytes per annotation, not the file. Sizes of images become `frame_hw`, so that a collection that was
resized after it was annotated stays right. Left out: keypoints, captions, panoptic PNGs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from pydantic import Field

from pipeline import boxes, masks, storage
from pipeline.data.datasets import DatasetConfig, folder_of
from pipeline.data.datasets._detection import MAX_PIXELS, PerSplit, listing, objects, of_split
from pipeline.data.datasets._json import elements
from pipeline.errors import DataError
from pipeline.types import Int64Array, Objects, Record, Region, RunLengths, Split

_Id = int | str
_Outlines: TypeAlias = "tuple[array[float], ...] | RunLengths"  # an array takes an eighth of a tuple


class Config(DatasetConfig):
    """`root` holds the JSON files and the images.

    Attributes:
        annotations: the JSON of each split, below `root`.
        images: the folder of each split's images, below `root`.
        masks: keep the outlines of objects.
        missing_images: what to do with an image that the JSON names and the folder lacks. `reject`: it is listed all
            the same, and shows among the rejects. `skip`: it belongs to another split; so one JSON can serve several.
        max_json_bytes: larger files are refused.
    """

    name: Literal["coco"] = "coco"
    annotations: PerSplit = "annotations/instances_{split}2017.json"
    images: PerSplit = "{split}2017"
    masks: bool = False
    missing_images: Literal["reject", "skip"] = "reject"
    max_json_bytes: int = Field(default=4 * 2**30, ge=1)


def class_names(config: Config) -> tuple[str, ...]:
    """The category names, sorted as text.

    Raises:
        DataError: a file cannot be read, has no categories, or the splits disagree; the message names the odd ones.
    """
    root = folder_of(config)
    first, *others = dict.fromkeys(
        storage.join(root, of_split(config, "annotations", split)) for split in config.splits
    )
    expected = _names(first, config)
    for uri in others:
        odd = sorted(set(expected) ^ set(_names(uri, config)))
        if odd:
            raise DataError(f"{uri}: expected the same categories as in {first}, but only one of them has {odd}")
    return expected


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every image of one split in the order of its JSON; images without annotations have zero objects.

    Raises:
        DataError: the JSON is damaged or contradicts itself, or the folder has none of its images.
    """
    root = folder_of(config)
    folder = storage.join(root, of_split(config, "images", split))
    content = _read(storage.join(root, of_split(config, "annotations", split)), config)
    found = listing(folder)
    if not content.names & found.keys():
        raise DataError(
            f"{folder}: expected the images that {content.uri} names, for example {min(content.names)}, got none of "
            "them; set dataset.images"
        )
    rows = content.rows_of_images()
    labels = content.labels_of_annotations()
    for image, chosen in zip(content.images.values(), rows, strict=True):
        file = found.get(image.name)
        if file is None and config.missing_images == "skip":
            continue
        yield Record(
            image_id=f"{split}/{image.name}",
            uri=storage.join(folder, image.name) if file is None else file.uri,
            split=split,
            objects=content.objects(chosen, labels, image),
            size_bytes=0 if file is None else file.size_bytes,
        )


class _Image(NamedTuple):
    name: str
    size_hw: tuple[int, int] | None


@dataclass(slots=True)
class _Content:
    """What one file says; annotations in arrays, with ids numbered as they first come (`codes`)."""

    uri: str
    keep_regions: bool
    categories: dict[_Id, str] = field(default_factory=dict)
    images: dict[_Id, _Image] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    image_codes: dict[_Id, int] = field(default_factory=dict)
    category_codes: dict[_Id, int] = field(default_factory=dict)
    image_of: array[int] = field(default_factory=lambda: array("q"))
    category_of: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    crowd: array[int] = field(default_factory=lambda: array("b"))
    regions: list[_Outlines] = field(default_factory=list)

    def add_category(self, element: Any) -> None:
        key = self._id(element, "id", "category")
        name = element.get("name")
        if not isinstance(name, str) or key in self.categories or name in self.categories.values():
            raise self._error("category", key, f"expected an id and a name of its own, got {_show(name)}")
        self.categories[key] = name

    def class_names(self) -> tuple[str, ...]:
        """Sorted as text."""
        if not self.categories:
            raise DataError(
                f"{self.uri}: expected a COCO file of images, annotations and categories, got no categories"
            )
        return tuple(sorted(self.categories.values()))

    def add_image(self, element: Any) -> None:
        key = self._id(element, "id", "image")
        name = element.get("file_name")
        if not isinstance(name, str) or not name:
            raise self._error("image", key, f"expected a file_name, got {_show(name)}")
        name = storage.printable(name.replace("\\", "/"))
        if name.startswith("/") or storage.is_remote(name) or ".." in name.split("/"):
            raise self._error("image", key, f"expected a file_name below the folder of images, got {_show(name)}")
        if key in self.images or name in self.names:
            raise self._error("image", key, f"expected every id and file_name once, got one again (file_name '{name}')")
        size_hw = (element.get("height"), element.get("width"))
        known = all(isinstance(side, int) and side > 0 for side in size_hw)
        self.images[key] = _Image(name, cast(tuple[int, int], size_hw) if known else None)
        self.names.add(name)

    def add_annotation(self, element: Any) -> None:
        key = element.get("id") if isinstance(element, dict) else None
        image, category = self._id(element, "image_id", "annotation"), self._id(element, "category_id", "annotation")
        box = element.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise self._error("annotation", key, f"expected a bbox of 4 numbers, got {_show(box)}")
        self.image_of.append(self.image_codes.setdefault(image, len(self.image_codes)))
        self.category_of.append(self.category_codes.setdefault(category, len(self.category_codes)))
        self.boxes.extend(box)
        self.crowd.append(element.get("iscrowd", 0) not in (0, False))
        if self.keep_regions:
            self.regions.append(self._outlines(key, element.get("segmentation")))

    def rows_of_images(self) -> list[Int64Array]:
        """For each image the indices of its annotations, in the order of the file."""
        index_of = {key: index for index, key in enumerate(self.images)}
        self._all_known("image", self.image_codes, index_of)
        index_of_code = np.array([index_of[key] for key in self.image_codes], np.int64)
        images = index_of_code[np.frombuffer(self.image_of, np.int64)] if self.image_of else np.zeros(0, np.int64)
        order = np.argsort(images, kind="stable")
        return np.split(order, np.searchsorted(images[order], np.arange(1, len(self.images))))

    def labels_of_annotations(self) -> Int64Array:
        """The label of each annotation."""
        self._all_known("category", self.category_codes, self.categories)
        ranked = {name: label for label, name in enumerate(self.class_names())}
        label_of_code = np.array([ranked[self.categories[key]] for key in self.category_codes], np.int64)
        return label_of_code[np.frombuffer(self.category_of, np.int64)] if self.category_of else np.zeros(0, np.int64)

    def objects(self, rows: Int64Array, labels: Int64Array, image: _Image) -> Objects:
        """The objects of one image, whose annotations are at `rows`."""
        numbers = np.array([self.boxes[4 * row : 4 * row + 4] for row in rows.tolist()])
        return objects(
            boxes.xywh_to_xyxy(numbers),
            labels[rows],
            crowd=[bool(self.crowd[row]) for row in rows.tolist()],
            regions=tuple(_region(self.regions[row]) for row in rows.tolist()) if self.keep_regions else (),
            frame_hw=image.size_hw,
        )

    def _outlines(self, key: Any, segmentation: Any) -> _Outlines:
        """The outline of one object; none where it is missing or empty."""
        try:
            if isinstance(segmentation, dict):
                return _run_lengths(segmentation)
            return tuple(array("d", polygon) for polygon in segmentation or [])
        except (DataError, TypeError, OverflowError) as error:
            raise self._error("annotation", key, f"segmentation: {error}") from None

    def _id(self, element: Any, name: str, kind: str) -> _Id:
        value = element.get(name) if isinstance(element, dict) else None
        if isinstance(value, int | str):
            return value
        own = element.get("id") if isinstance(element, dict) else element
        raise self._error(kind, own, f"expected an entry with '{name}', a number or a text, got {_show(value)}")

    def _all_known(self, kind: str, codes: dict[_Id, int], known: Mapping[_Id, object]) -> None:
        odd = next((key for key in codes if key not in known), None)
        if odd is not None:
            raise DataError(f"{self.uri}: expected only known {kind} ids in the annotations, got {_show(odd)}")

    def _error(self, kind: str, key: Any, sentence: str) -> DataError:
        return DataError(f"{self.uri}: {kind} {_show(key)}: {sentence}")


def _read(uri: str, config: Config) -> _Content:
    """One pass over a file, whose lists come in any order."""
    content = _Content(uri, config.masks)
    add = {
        "categories": content.add_category,
        "images": content.add_image,
        "annotations": content.add_annotation,
    }
    for key, element in elements(uri, tuple(add), config.max_json_bytes):
        add[key](element)
    if not content.images:
        raise DataError(f"{uri}: expected a COCO file of images, annotations and categories, got no images")
    return content


def _names(uri: str, config: Config) -> tuple[str, ...]:
    """The category names of one file, which is read only as far as needed."""
    content = _Content(uri, keep_regions=False)
    for _, category in elements(uri, ("categories",), config.max_json_bytes):
        content.add_category(category)
    return content.class_names()


def _run_lengths(segmentation: dict[str, Any]) -> RunLengths:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise DataError(f"expected run lengths with a size (height, width), got {_show(size)}")
    if isinstance(counts, str):
        return masks.decompress(counts, (size[0], size[1]))
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise DataError(f"expected run lengths as a list of integers or a text, got {_show(counts)}")
    return RunLengths((size[0], size[1]), tuple(counts))


def _region(outlines: _Outlines) -> Region:
    return outlines if isinstance(outlines, RunLengths) else tuple(map(tuple, outlines))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_PIXELS


def _show(value: Any) -> str:
    return repr(value)[:80]
