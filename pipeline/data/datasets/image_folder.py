"""Any images in class folders: `<root>/<split>/<class>/**/<image>`, the layout of ImageNet and of most small sets.

What is an image is decided by its content when it is read, not by its name, so every file counts except hidden ones.
Classes are the folder names, sorted as text; every split must have the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pipeline import storage
from pipeline.data.datasets import DatasetConfig, folder_of
from pipeline.errors import DataError
from pipeline.types import Record, Split


class Config(DatasetConfig):
    """`root` holds one folder per split, which holds one folder per class."""

    name: Literal["image_folder"] = "image_folder"


def class_names(config: Config) -> tuple[str, ...]:
    """The folder names of the first split, sorted as text.

    Raises:
        DataError: a folder is missing, or the splits disagree; the message names the odd folders.
    """
    root = folder_of(config)
    first, *others = config.splits
    expected = _folders(storage.join(root, first))
    for split in others:
        found = _folders(storage.join(root, split))
        extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
        if extra or missing:
            raise DataError(
                f"{root}: every split must hold the same class folders, but '{split}' "
                + " and ".join(
                    [f"has {', '.join(map(repr, extra))} that '{first}' lacks"] * bool(extra)
                    + [f"lacks {', '.join(map(repr, missing))}"] * bool(missing)
                )
                + "; move the odd folders away"
            )
    return tuple(map(storage.printable, expected))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every file of one split, by class and path.

    Raises:
        DataError: a class has no file, or a folder cannot be listed.
    """
    root = folder_of(config)
    class_names(config)  # the splits agree
    for label, name in enumerate(_folders(storage.join(root, split))):
        folder, empty = storage.join(root, split, name), True
        for file in walk(folder):
            empty = False
            image_id = f"{split}/{storage.printable(name)}/{file.name}"
            yield Record(image_id, file.uri, split, label, size_bytes=file.size_bytes)
        if empty:
            raise DataError(f"{folder}: the class '{name}' has no image; add some or remove its folders")


def walk(folder: str) -> Iterator[storage.File]:
    """Every visible file below a folder.

    Raises:
        DataError: a folder cannot be listed.
    """
    try:
        yield from storage.walk(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be listed: {storage.reason(error)}") from None


def _folders(folder: str) -> list[str]:
    if not storage.is_folder(folder):
        parent = folder.rsplit("/", 1)[0]
        raise DataError(f"{folder} is not a folder; expected {parent}/<split>/<class>/<images>")
    try:
        found = storage.folders(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {storage.reason(error)}") from None
    if len(found) < 2:
        raise DataError(f"{folder}: expected at least two class folders, found {len(found)}")
    return found
