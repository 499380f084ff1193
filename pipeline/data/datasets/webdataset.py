"""WebDataset: plain tars whose consecutive files of one basename make a sample, read in place.

Source: the `webdataset` package's format: a sample's key is its path up to the first dot of the file name, what follows
is the extension; files without a dot and those that begin with `__` do not belong to a sample. The label is the
integer in `.cls`, or the value of a key in `.json`. Without `classes` the class names are the numbers that were found,
sorted as text like all class names, so that "10" comes before "2" and a class's label here need not be its number
there. Finding them reads every header once more: give `classes` for large collections. Left out: compressed tars.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from pipeline import storage
from pipeline.data.datasets import DatasetConfig, _tar, folder_of, is_text
from pipeline.data.datasets.image_folder import walk
from pipeline.errors import ConfigError, DataError
from pipeline.types import Record, Split

_KEY = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")
_MAX_EXPANDED = 1_000_000


class Config(DatasetConfig):
    """`root` holds the tars.

    Attributes:
        tars: for each split its tars: a location below `root` or absolute, with `{000..009}`, `{a,b}`, `*`, `?`, or a
            list of such. A split that is not mentioned has `<split>-*.tar`.
        images: extensions of the image in a sample, which must have exactly one of them.
        label_key: the key of `.json` that holds the label, an integer or a class name; None takes `.cls`.
        classes: class names in the order of the source's labels.
    """

    name: Literal["webdataset"] = "webdataset"
    tars: dict[Split, str | tuple[str, ...]] = Field(default_factory=dict)
    images: tuple[str, ...] = Field(default=("jpg", "jpeg", "png", "webp"), min_length=1)
    label_key: str | None = None
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if classes is not None and len(set(classes)) < len(classes):
            raise ValueError("expected each class name once")
        return classes


class _Sample(NamedTuple):
    key: str
    uri: str
    image: _tar.Member
    class_name: str


def class_names(config: Config) -> tuple[str, ...]:
    """The configured names, or the labels of all samples of all splits, sorted as text.

    Raises:
        DataError: a tar or a sample is damaged, or there is only one class.
    """
    folder_of(config)
    if config.classes is not None:
        return tuple(sorted(config.classes))
    found = {sample.class_name for split in config.splits for sample in _samples(config, split)}
    if len(found) < 2:
        raise DataError(f"{config.root}: expected at least two classes, found {len(found)}")
    return tuple(sorted(found))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every sample of one split, in the order of the tars and within them.

    Raises:
        ConfigError: a pattern cannot be expanded.
        DataError: a tar is missing or damaged, or a sample lacks its image or label; the message names tar and key.
    """
    labels = {name: label for label, name in enumerate(class_names(config))}
    root = folder_of(config)
    for sample in _samples(config, split):
        yield Record(
            image_id=f"{split}/{_tar_name(sample.uri, root)}/{sample.key}",
            uri=sample.uri,
            split=split,
            label=labels[sample.class_name],
            byte_range=sample.image.byte_range,
            size_bytes=sample.image.length,
        )


def expand(pattern: str) -> list[str]:
    """A pattern without its braces: `a-{08..10}` is a-08, a-09, a-10; `{x,y}` is x, y.

    Raises:
        ConfigError: a range runs backwards or is far too long.
    """
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, listed = found.groups()
    if listed is None and not 0 <= int(last) - int(first) < _MAX_EXPANDED:
        raise ConfigError(f"dataset.tars: expected a rising range of at most {_MAX_EXPANDED} tars, got {found[0]}")
    parts = listed.split(",") if listed else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    rests = expand(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{part}{rest}" for part in parts for rest in rests]


def _tars(config: Config, split: Split) -> list[str]:
    """The locations of a split's tars: as they are listed, what a wildcard stands for sorted."""
    root, wanted = folder_of(config), config.tars.get(split, f"{split}-*.tar")
    patterns = [each for text in ([wanted] if isinstance(wanted, str) else wanted) for each in expand(text)]
    found = [uri for pattern in patterns for uri in _matches(storage.join(root, pattern))]
    twice = next((uri for uri, count in Counter(found).items() if count > 1), None)
    if twice or not found:
        raise DataError(f"{root}: dataset.tars: '{split}' {f'has {twice} more than once' if twice else 'has no tar'}")
    return found


def _matches(pattern: str) -> list[str]:
    parts = pattern.split("/")
    fixed = next((at for at, part in enumerate(parts) if _WILD.search(part)), None)
    if fixed is None:
        return [pattern]
    folder, rest = "/".join(parts[:fixed]), parts[fixed:]
    found = [file.uri for file in walk(folder) if _fits(file.name.split("/"), rest)]
    if not found:
        raise DataError(f"{folder}: no tar matches {'/'.join(rest)!r}; set dataset.tars")
    return found


def _fits(names: list[str], patterns: list[str]) -> bool:
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _tar_name(uri: str, root: str) -> str:
    """What tells a tar from the others in an image's id: its path below `root`, else the whole without its scheme."""
    name = uri.removeprefix(f"{root.rstrip('/')}/").rpartition("://")[2].lstrip("/")
    return storage.printable(name.removesuffix(".tar"))


def _samples(config: Config, split: Split) -> Iterator[_Sample]:
    for uri in _tars(config, split):
        keys = set[str]()
        for key, parts in _grouped(config, uri):
            if key in keys:
                raise DataError(f"{uri}: the sample '{key}' comes twice; write the tar again with distinct keys")
            keys.add(key)
            yield _Sample(key, uri, _image(config, parts, uri, key), _class_name(config, parts, uri, key))


def _grouped(config: Config, uri: str) -> Iterator[tuple[str, dict[str, _tar.Member]]]:
    """Key and members by extension, in lower case, of each sample."""
    label = "cls" if config.label_key is None else "json"
    key, parts = "", dict[str, _tar.Member]()
    for member in _tar.members(uri, content_of=lambda name: _split(name)[1] == label):
        of, extension = _split(member.name)
        if not of:
            continue
        if of != key and parts:
            yield key, parts
            parts = {}
        if extension in parts:
            raise DataError(f"{uri}: the sample '{of}' has two files .{extension}; write the tar again")
        key, parts[extension] = of, member
    if parts:
        yield key, parts


def _split(name: str) -> tuple[str, str]:
    found = None if name.startswith("__") else _KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def _image(config: Config, parts: dict[str, _tar.Member], uri: str, key: str) -> _tar.Member:
    found = [extension for extension in config.images if extension in parts]
    if len(found) != 1:
        raise DataError(
            f"{uri}: the sample '{key}' has {'no image' if not found else 'images .' + ' and .'.join(found)} among its "
            f"files (.{', .'.join(parts)}); set dataset.images to the one extension of its image"
        )
    return parts[found[0]]


def _class_name(config: Config, parts: dict[str, _tar.Member], uri: str, key: str) -> str:
    """The name of a sample's class, the number itself where no names are given."""
    value = _label(config, parts, uri, key)
    if isinstance(value, str):
        if config.classes is not None and value not in config.classes:
            raise DataError(f"{uri}: the sample '{key}' has the class {value[:80]!r}, which dataset.classes lacks")
        return value
    if config.classes is None:
        return str(value)
    if not 0 <= value < len(config.classes):
        raise DataError(
            f"{uri}: the sample '{key}' has the label {value}, but dataset.classes has {len(config.classes)} names"
        )
    return config.classes[value]


def _label(config: Config, parts: dict[str, _tar.Member], uri: str, key: str) -> int | str:
    """What stands in a sample for its class: a number or, in JSON, a name."""
    extension = "cls" if config.label_key is None else "json"
    content = parts[extension].content if extension in parts else None
    if content is None:
        raise DataError(
            f"{uri}: the sample '{key}' has no label: expected .{extension} among its files (.{', .'.join(parts)})"
        )
    value = _number(content) if config.label_key is None else _value(content, config.label_key)
    if value is None:
        expected = "a number" if config.label_key is None else f"a number or a name at '{config.label_key}'"
        raise DataError(f"{uri}: the sample '{key}': expected {expected} in its .{extension}, got {content[:40]!r}")
    return value


def _number(content: bytes) -> int | None:
    return int(content) if content.strip().isdigit() and len(content) < 20 else None


def _value(content: bytes, name: str) -> int | str | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    value = found.get(name) if isinstance(found, dict) else None
    if isinstance(value, str) and value.strip() and is_text(value):
        return storage.printable(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
