"""YOLO's text files: per image one line for each box, `class x_center y_center width height`, as shares of the image.

Source: the format of darknet and its successors. Layout: images anywhere below `root`; the boxes of `a/images/b/1.jpg`
lie in `a/labels/b/1.txt` (the last folder called `images` is exchanged), or beside the image where no folder is called
so. An image without a text, or with an empty one, has no object. `data.yaml` names the classes and each split's folder,
or a `.txt` that lists images. A line of the segmentation variant (`class x1 y1 x2 y2 ...`) gives the box around its
polygon; the polygon itself is left out, as are rotated boxes and key points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field

from pipeline import boxes, storage
from pipeline.data.datasets import DatasetConfig, folder_of
from pipeline.data.datasets._detection import PerSplit, lines, listing, objects, of_split, read_small
from pipeline.errors import DataError
from pipeline.types import Objects, Record, Split

_NO_IMAGES = (".txt", ".cache", ".json", ".xml", ".yaml", ".yml", ".npy", ".md", ".tsv", ".csv")
_SLACK = 1e-3  # shares are written with few digits


class Config(DatasetConfig):
    """`root` holds images, labels and their description.

    Attributes:
        description: the YAML with `names` and the place of each split; or a text with one class name per line, in the
            order of their indices. Below `root`.
        images: where each split's images lie, below `root`: a folder, or a `.txt` that lists them; None takes the
            description's word, and `images/<split>` where it says nothing.
        classes: the class names in the order of their indices, instead of the description's.
    """

    name: Literal["yolo"] = "yolo"
    description: str = "data.yaml"
    images: PerSplit | None = None
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)


def class_names(config: Config) -> tuple[str, ...]:
    """The class names, sorted as text: labels are not the indices of the files.

    Raises:
        DataError: the description cannot be read or names a class twice.
    """
    return tuple(sorted(_indexed(config).values()))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every image of one split by its path, or as listed; boxes are shares (`frame_hw` is (1, 1)).

    Raises:
        DataError: a place is empty, a listed image is missing, or a line is not what it should be.
    """
    ranked = {name: label for label, name in enumerate(class_names(config))}
    labels = {index: ranked[name] for index, name in _indexed(config).items()}
    root = folder_of(config)
    files = listing(root)
    names = [name for place in _places(config, split, files) for name in _images(root, place, files)]
    texts = {name: files.get(_label_name(name)) for name in names}
    if len(texts) < len(names) or not names:
        raise DataError(
            f"{root}: expected images of '{split}', each once, got {len(names)} of which {len(texts)} differ"
        )
    if not any(texts.values()):
        raise DataError(f"{root}: expected labels such as {_label_name(names[0])}, got none for any image of '{split}'")
    for name, text in texts.items():
        found = _objects(text.uri, labels) if text else objects(boxes.cxcywh_to_xyxy([], (1, 1)), [], frame_hw=(1, 1))
        yield Record(f"{split}/{name}", files[name].uri, split, objects=found, size_bytes=files[name].size_bytes)


def _indexed(config: Config) -> dict[int, str]:
    """The class names by the index that the files use."""
    where, names = "dataset.classes", dict(enumerate(config.classes or ()))
    if not names:
        where = storage.join(folder_of(config), config.description)
        names = _described(where) if _is_yaml(where) else dict(enumerate(line for line in lines(where) if line))
    if not names or len(set(names.values())) < len(names):
        raise DataError(
            f"{where}: expected class names, each once, got {len(names)}, {len(set(names.values()))} of them different"
        )
    return names


def _described(uri: str) -> dict[int, str]:
    names = _yaml(uri).get("names")
    pairs = names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else ()
    found: dict[int, str] = {}
    for index, name in pairs:
        if type(index) is not int or index < 0 or type(name) not in (str, int):
            raise DataError(
                f"{uri}: expected class names as text by index, got a {type(name).__name__}; put it in quotes"
            )
        found[index] = str(name)
    return found


def _is_yaml(uri: str) -> bool:
    return uri.endswith((".yaml", ".yml"))


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten short lines of them can stand for more text than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not followed; write out what it stands for")
        return super().compose_node(parent, index)


def _yaml(uri: str) -> Mapping[str, Any]:
    try:
        raw = yaml.load(read_small(uri), _Loader)  # noqa: S506  (a safe one)
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        raise DataError(f"{uri}: not YAML that can be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{uri}: expected a YAML with a key 'names', got a {type(raw).__name__}")
    return raw


def _places(config: Config, split: Split, files: Mapping[str, storage.File]) -> list[str]:
    """The folders and lists of one split, below the root."""
    root = folder_of(config)
    if config.images is not None:
        return [_plain(_below(of_split(config, "images", split), root))]
    described = _yaml(storage.join(root, config.description)) if _is_yaml(config.description) else {}
    given = described.get(split) or f"images/{split}"
    places = given if isinstance(given, list) else [given]
    if not all(isinstance(place, str) for place in places):
        raise DataError(f"{config.description}: expected folders of images in '{split}', got {str(given)[:80]}")
    base = _plain(_below(str(described.get("path") or ""), root))
    return [_existing(_plain(_below(place, root)), base, files) for place in places]


def _existing(place: str, base: str, files: Mapping[str, storage.File]) -> str:
    """Put a place below the description's `path`, unless that names the folder of another machine."""
    below = "/".join(part for part in (base, place) if part)
    return below if below in files or any(name.startswith(f"{below}/") for name in files) else place


def _below(place: str, root: str) -> str:
    """A place that is given in full without the root above it; others as they are."""
    return place.removeprefix(f"{root.rstrip('/')}/") if _is_absolute(place) else place


def _is_absolute(place: str) -> bool:
    return place.startswith("/") or storage.is_remote(place)


def _plain(place: str) -> str:
    """A place below the root, without the `./` and the wrong `../` that exporters put before it."""
    parts = [part for part in place.split("/") if part not in ("", ".")]
    while parts and parts[0] == "..":
        parts = parts[1:]
    return storage.printable("/".join(parts))


def _images(root: str, place: str, files: Mapping[str, storage.File]) -> list[str]:
    """The names of images in a folder, or on a list, below the root."""
    if place.endswith(".txt"):
        found = [_listed(line, place, root, files) for line in lines(storage.join(root, place)) if line]
    else:
        prefix = f"{place}/" if place else ""
        found = [name for name in files if name.startswith(prefix) and not name.lower().endswith(_NO_IMAGES)]
    odd = next((name for name in found if name not in files), None)
    if odd is not None or not found:
        sought = f"the image '{odd}' that '{place}' lists" if odd is not None else f"images in '{place}'"
        raise DataError(f"{root}: expected {sought}, got nothing there; set dataset.images")
    return found


def _listed(line: str, place: str, root: str, files: Mapping[str, storage.File]) -> str:
    """The name of an image on a list: an absolute path as it is, else one beside the list or below the root."""
    inside = _below(line, root)
    if _is_absolute(inside):
        raise DataError(
            f"{root}: '{place}' lists {line[:200]!r}, which does not lie below this folder; set dataset.root to a "
            "folder above its images, or list them by their paths below it"
        )
    beside = f"{place.rpartition('/')[0]}/{_plain(inside)}"
    return beside if not _is_absolute(line) and beside in files else _plain(inside)


def _label_name(image: str) -> str:
    """The text that belongs to an image."""
    parts = image.rpartition(".")[0].split("/") if "." in image.rpartition("/")[2] else image.split("/")
    folders = parts[:-1]
    if "images" in folders:
        parts[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return "/".join(parts) + ".txt"


def _objects(uri: str, labels: Mapping[int, int]) -> Objects:
    """The objects of one text."""
    found = [_line(line, f"{uri}:{number}", labels) for number, line in enumerate(lines(uri), 1) if line]
    shares = boxes.cxcywh_to_xyxy([box for _, box in found], (1, 1))
    return objects(shares, [label for label, _ in found], frame_hw=(1, 1))


def _line(line: str, where: str, labels: Mapping[int, int]) -> tuple[int, list[float]]:
    """The label and the box (x_center, y_center, width, height) of one line."""
    try:
        index, *values = map(float, line.split())
    except ValueError:
        raise DataError(
            f"{where}: expected numbers 'class x_center y_center width height', got {line[:80]!r}"
        ) from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f"{where}: expected a class and 4 numbers, or at least 3 points, got {len(values)} after the class"
        )
    if index not in labels:
        raise DataError(f"{where}: expected a class index of 0 to {max(labels)}, got {index:g}")
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise DataError(f"{where}: expected shares of the image's size, 0 to 1, got {line[:80]!r}")
    if len(values) > 4:
        lower, upper = np.min([values[::2], values[1::2]], axis=1), np.max([values[::2], values[1::2]], axis=1)
        values = [*((lower + upper) / 2).tolist(), *(upper - lower).tolist()]
    return labels[int(index)], values
