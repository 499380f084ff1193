"""Images that lie anywhere, named by a table: Parquet or CSV with the columns `uri` and `class_name`.

`label` stands for `class_name` where that is not there; either way the text is the class's name, and labels count the
names sorted as text. Relative uris lie in `root`; URLs and absolute paths stand for themselves. A column `split` says
which rows belong to which split; without it each split needs a table of its own. A column `image_id` replaces the ids
that are made from split and uri. Tables are read row by row, twice: once for the classes. Left out: boxes and masks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, cast

from pipeline import storage
from pipeline.data.datasets import DatasetConfig, folder_of
from pipeline.errors import ConfigError, DataError
from pipeline.types import SPLITS, Record, Split

BATCH_ROWS = 4096
_COLUMNS = ("uri", "class_name", "label", "split", "image_id")

Row = tuple[str, dict[str, Any]]
"""Where a row stands, as a person would look for it, and its values."""


class Config(DatasetConfig):
    """`root` holds the tables, and the images that they name by a relative path.

    Attributes:
        tables: one location, below `root` or absolute, of a table with a column `split`; or one for each split.
            `.parquet` is Parquet, everything else CSV with a header, in UTF-8.
    """

    name: Literal["uri_list"] = "uri_list"
    tables: str | dict[Split, str] = "images.csv"


def class_names(config: Config) -> tuple[str, ...]:
    """The classes of all rows of all splits, sorted as text.

    Raises:
        DataError: a table cannot be read or lacks a column, a row lacks a value, or there is only one class.
    """
    rows = (row for split in config.splits for row in _rows_of(config, split))
    found = {_class_name(where, row) for where, row in rows}
    if len(found) < 2:
        raise DataError(f"{config.root}: expected at least two classes in the table, found {len(found)}")
    return tuple(sorted(found))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Every row of one split, in the order of the table.

    Raises:
        ConfigError: no table is given for the split.
        DataError: a table cannot be read or lacks a column, a row lacks a value; the message names the row.
    """
    labels = {name: label for label, name in enumerate(class_names(config))}
    root, empty = folder_of(config), True
    for where, row in _rows_of(config, split):
        uri, empty = _text(where, row, "uri"), False
        image_id = _text(where, row, "image_id") if "image_id" in row else f"{split}/{_path(uri)}"
        yield Record(
            image_id=storage.printable(image_id),
            uri=storage.join(root, uri),
            split=split,
            label=labels[_class_name(where, row)],
        )
    if empty:
        raise DataError(f"{_table(config, split)}: no row belongs to '{split}'; take it out of dataset.splits")


def _path(uri: str) -> str:
    return uri.partition("://")[2] if storage.is_remote(uri) else uri.lstrip("/")


def _rows_of(config: Config, split: Split) -> Iterator[Row]:
    """The rows of one split; where the table does not tell, all."""
    for where, row in _rows(_table(config, split), alone=len(config.splits) == 1 or isinstance(config.tables, dict)):
        if "split" in row and _text(where, row, "split") not in SPLITS:
            raise DataError(f"{where}: expected a split of {', '.join(SPLITS)}, got {str(row['split'])[:40]!r}")
        if row.get("split", split) == split:
            yield where, row


def _table(config: Config, split: Split) -> str:
    if isinstance(config.tables, dict) and split not in config.tables:
        raise ConfigError(f"dataset.tables: expected a table for each split, got none for '{split}'; add it")
    name = config.tables if isinstance(config.tables, str) else config.tables[split]
    return storage.join(folder_of(config), name)


def _rows(uri: str, *, alone: bool) -> Iterator[Row]:
    """The rows of a table with the columns that count; `alone`: it serves one split, so needs no column `split`."""
    try:
        with storage.open_input(uri) as file:
            yield from _parquet(file, uri, alone) if uri.endswith(".parquet") else _csv(file, uri, alone)
    except OSError as error:
        raise DataError(f"{uri}: cannot be read: {storage.reason(error)}; set dataset.tables") from None


def _parquet(file: BinaryIO, uri: str, alone: bool) -> Iterator[Row]:
    import pyarrow as pa  # noqa: PLC0415  (slow to import, not needed for CSV)
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table, number = pq.ParquetFile(file), 0
        columns = _known(table.schema_arrow.names, uri, alone)
        for batch in table.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{uri}: row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:120]
        raise DataError(f"{uri}: expected a Parquet file, got a damaged one ({said}); write it again") from None


def _csv(file: BinaryIO, uri: str, alone: bool) -> Iterator[Row]:
    lines = io.TextIOWrapper(io.BufferedReader(cast(Any, file)), "utf-8-sig", newline="")
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        columns = _known(header, uri, alone)
        for values in reader:
            where = f"{uri}: line {reader.line_num}"
            if len(values) != len(header) and values:
                raise DataError(f"{where}: expected {len(header)} values as in the header, got {len(values)}")
            if values:
                yield where, {name: value for name, value in zip(header, values, strict=True) if name in columns}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: line {reader.line_num + 1}: expected CSV in UTF-8 ({error})") from None


def _known(names: list[str], uri: str, alone: bool) -> list[str]:
    """The columns that count; those that must be there are."""
    found = [name for name in _COLUMNS if name in names]
    missing = [name for name in ("uri", *(() if alone else ("split",))) if name not in found]
    if "class_name" not in found and "label" not in found:
        missing.append("class_name")
    if missing:
        hint = ", or give dataset.tables one table for each split" if "split" in missing else ""
        raise DataError(f"{uri}: has no column '{missing[0]}' (columns: {', '.join(names)[:200]}); add it{hint}")
    return found


def _class_name(where: str, row: dict[str, Any]) -> str:
    return storage.printable(_text(where, row, "class_name" if "class_name" in row else "label"))


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value = row[column]
    text = str(value) if column == "label" and isinstance(value, int) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected text in the column '{column}', got {value!r}")
    return text
