"""One file per dataset or layout; the file name is its name. No pixel is decoded here, and torch is never imported.

A dataset file holds `Config` (a `DatasetConfig` with `name: Literal["<file name>"]`), `class_names(config)` and
`records(config, split)`. Nothing else needs to be edited: it is imported when its name is asked for, and the contract
tests pick it up. Where a dataset's images exist only as arrays, `records` first writes them as PNG files, once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from pipeline import storage
from pipeline.config import ByName, Strict, nearest
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Location
from pipeline.types import Record, Split

DATA_ROOT = "VENTRAL_DATA"


class DatasetConfig(Strict):
    """Keys that every dataset has; each `Config` narrows `name` to its file's name.

    Attributes:
        root: the dataset's folder, local or in a bucket (`s3://`, `gs://`). A relative one lies in the job's
            `data_root`, which is the folder that the environment variable VENTRAL_DATA names unless the configuration
            does, else the working directory.
        splits: the parts to read.
    """

    name: str
    root: Location | None = None
    splits: tuple[Split, ...] = Field(default=("train", "val"), min_length=1)

    @field_validator("splits")
    @classmethod
    def _each_once(cls, splits: tuple[Split, ...]) -> tuple[Split, ...]:
        if len(set(splits)) < len(splits):
            raise ValueError("expected each split once")
        return splits

    def at(self, data_root: Path | None, store: Path) -> DatasetConfig:
        """The same configuration with absolute paths: `root` in the data root, what is written in `store`."""
        base = data_root or Path(os.environ.get(DATA_ROOT, "."))
        paths: dict[str, Any] = {"root": None if self.root is None else storage.absolute(self.root, base)}
        if isinstance(self, ArraysConfig):
            paths["png"] = (store / self.png.expanduser()).absolute()
        return self.model_copy(update=paths)


class ArraysConfig(DatasetConfig):
    """A dataset whose images exist only as arrays.

    Attributes:
        png: where they are written as PNG files, once; a relative path lies in the job's `storage`.
    """

    png: Path


def names() -> list[str]:
    """Every dataset's name, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def config_of(name: str) -> type[DatasetConfig]:
    """The `Config` of the dataset called `name`."""
    return cast(type[DatasetConfig], _module(name).Config)


def class_names(config: DatasetConfig) -> tuple[str, ...]:
    """The class names, sorted as text; a label is an index into them.

    Raises:
        DataError: the collection contradicts itself, or a name is no text.
    """
    found = cast(tuple[str, ...], _module(config.name).class_names(config))
    odd = next((name for name in found if not is_text(name)), None)
    if odd is not None:
        raise DataError(
            f"{config.root}: expected class names in UTF-8, got {ascii(odd)[:80]}; write the file that names the "
            "classes in UTF-8"
        )
    return found


def is_text(name: str) -> bool:
    """Whether UTF-8 can write a name: it holds no byte that was not decoded and no half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def records(config: DatasetConfig, split: Split) -> Iterator[Record]:
    """Every labelled image of one split, in a stable order."""
    return cast(Iterator[Record], _module(config.name).records(config, split))


def folder_of(config: DatasetConfig) -> str:
    """The location of the dataset's folder, which must exist.

    Raises:
        ConfigError: `root` is not given.
        DataError: it is not a folder.
    """
    if config.root is None:
        raise ConfigError(f"dataset '{config.name}': root is missing; give the folder, for example dataset.root=photos")
    try:
        found = storage.is_folder(config.root)
    except OSError as error:
        raise DataError(
            f"dataset '{config.name}': {config.root} cannot be reached: {storage.reason(error)}; check the address, "
            "the credentials and the endpoint in the environment"
        ) from None
    if not found:
        raise DataError(
            f"dataset '{config.name}': {config.root} is not a folder; set dataset.root, data_root or the environment "
            f"variable {DATA_ROOT}"
        )
    return config.root


def _module(name: str) -> Any:
    if name not in names():
        raise ConfigError(f"unknown dataset '{name}'; {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


AnyDataset = Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(ByName("dataset", names, config_of))]
"""A configuration field that takes any dataset by its `name`."""
