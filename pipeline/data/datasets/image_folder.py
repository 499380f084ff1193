"""Any images in class folders: `<root>/<split>/<class>/**/<image>`, the layout of ImageNet and of most small sets.

What is an image is decided by its content when it is read, not by its name, so every file counts except hidden ones.
Classes are the folder names, sorted as text; every split must have the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

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
    expected = _folders(root / first)
    for split in others:
        found = _folders(root / split)
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
    return tuple(expected)


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every file of one split, by class and path.

    Raises:
        DataError: a class has no file.
    """
    root = folder_of(config)
    for label, name in enumerate(class_names(config)):
        folder = root / split / name
        files = sorted(visible_files(folder))
        if not files:
            raise DataError(f"{folder}: the class '{name}' has no image; add some or remove its folders")
        for path in files:
            yield Record(path.relative_to(root).as_posix(), str(path), split, label)


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, except where it or a folder on the way to it (`.ipynb_checkpoints`) is hidden."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected {folder.parent}/<split>/<class>/<images>")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise DataError(f"{folder}: expected at least two class folders, found {len(found)}")
    return found
