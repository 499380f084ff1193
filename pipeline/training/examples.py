"""Regions and what there is to learn from them, as rows of a table that need not fit into memory. No Ray.

Between `models._solvable`, whose examples are tensors of one batch, and `solve`, which looks through all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.models._solvable import Examples
from pipeline.types import Float32Array, Int64Array

ORDER, RANK = "order", "rank"
COMPARED = (ORDER, "overlaps", "label", "is_object", "wanted")
"""The columns beside `features` and `pooled`."""


def table(found: Examples, ids: Sequence[str], correction_iou: float) -> pa.Table:
    """The regions of the images `ids` as rows.

    `features` and `pooled` are in half precision; the latter is left empty for a region that overlaps no object by
    `correction_iou`. `order` in [0, 1) is as good as random, but the same for a region whenever it is looked at.
    """
    found = Examples(*(column.cpu() for column in found))
    counts = np.bincount(found.of_image.numpy(), minlength=len(ids)).tolist()
    overlaps, pooled = found.overlaps.numpy(), found.pooled.numpy().astype(np.float16)
    teaches = overlaps.max(axis=1) >= correction_iou
    ends = np.concatenate([[0], np.cumsum(teaches * pooled.shape[1])])
    return pa.table(
        {
            ORDER: np.concatenate([_orders(*image) for image in zip(ids, counts, strict=True)]),
            "features": _lists(found.features.numpy().astype(np.float16)),
            "pooled": pa.LargeListArray.from_arrays(pa.array(ends), pa.array(pooled[teaches].ravel())),
            "overlaps": _lists(overlaps),
            "label": found.labels.numpy(),
            "is_object": found.is_object.numpy(),
            "wanted": _lists(found.wanted.numpy()),
        }
    )


class Rows:
    """N regions of a table, with one of its columns `features` and `pooled` as their values."""

    def __init__(self, of: pa.Table, values: str) -> None:
        self.table, self._values = of, values

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Those of all parts, which have the same values."""
        columns = [*COMPARED, parts[0]._values]
        return cls(pa.concat_tables([part.table.select(columns) for part in parts]), parts[0]._values)

    def __len__(self) -> int:
        """Return N."""
        return len(self.table)

    @cached_property
    def order(self) -> npt.NDArray[np.float64]:
        """Of each its number [N], see `table`."""
        return cast(npt.NDArray[np.float64], self.table[ORDER].to_numpy())

    @cached_property
    def values(self) -> Float32Array:
        """Features [N, F], or pooled maps [N, P] where all have one."""
        return _matrix(self.table[self._values])

    @cached_property
    def overlaps(self) -> Float32Array:
        """Largest IoU with an object of each class [N, C]."""
        return _matrix(self.table["overlaps"])

    @cached_property
    def labels(self) -> Int64Array:
        """Class of the object that each overlaps most [N], or -1."""
        return cast(Int64Array, self.table["label"].to_numpy())

    @cached_property
    def is_object(self) -> npt.NDArray[np.bool_]:
        """Whether each is an annotated object itself [N]."""
        return cast(npt.NDArray[np.bool_], self.table["is_object"].to_numpy())

    @cached_property
    def wanted(self) -> Float32Array:
        """Correction of each to that object [N, 4]."""
        return _matrix(self.table["wanted"])


def lowest(of: pa.Table, most: int | None) -> pa.Table:
    """The rows of the lowest rank, at most so many."""
    if most is None or len(of) <= most:
        return of
    return of.sort_by([(RANK, "ascending"), (ORDER, "ascending")]).slice(0, most)


def _orders(image_id: str, count: int) -> npt.NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8])
    return np.random.default_rng(seed).random(count)


def _lists(matrix: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def _matrix(column: pa.ChunkedArray) -> Float32Array:
    """Lists of one length as float32 [N, length]."""
    lists = column.combine_chunks()
    values: Float32Array = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = lists.type.list_size if pa.types.is_fixed_size_list(lists.type) else -1 if len(lists) else 0
    return values.reshape(len(lists), width)
