"""What one model said of every image of a split: the table that evaluation writes and comparison reads.

A Parquet file sorted by image id, one row an image; its metadata names model, data and classes, so that the file can
be judged by itself. Tables of parts of a split merge into the same table in any order. No torch, no MLflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.types import BoolArray, Float32Array, Int64Array, Split, Views

TOP_K = 5
ALL_CLASSES = 20
"""Up to so many classes every score is kept, so that precision and recall are exact; beyond, the `TOP_K` best."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("label", pa.int64()),
        ("predicted", pa.int64()),
        ("label_score", pa.float32()),
        ("predicted_score", pa.float32()),
        ("top_labels", pa.list_(pa.int64())),  # best first; of equal scores the lower class comes first
        ("top_scores", pa.list_(pa.float32())),
    ]
)
_ORIGIN = b"ventral.origin"
PLAIN = "eager-fp32"
"""The engine of models that are computed as they were trained; see `pipeline.inference.engine`."""


class Origin(Strict):
    """Whose predictions these are.

    Attributes:
        classes: class names; a label is an index into them.
        dataset_digest: of the manifest that the images were read by.
        views: of each image, whose scores were averaged.
        engine: that computed the model.
    """

    split: Split
    dataset: str
    dataset_digest: str
    weights_sha256: str
    classes: tuple[str, ...]
    views: Views = "centre"
    engine: str = PLAIN


@dataclass(frozen=True, eq=False)
class Predictions:
    """N images and what was said of each.

    Attributes:
        ids: text [N]; `merge` sorts by them.
        labels: int64 [N], the true classes.
        label_scores: float32 [N], the scores of the true classes.
        ranked: int64 [N, K], the best K classes, best first.
        scores: float32 [N, K], theirs.
    """

    origin: Origin
    ids: npt.NDArray[np.object_]
    labels: Int64Array
    label_scores: Float32Array
    ranked: Int64Array
    scores: Float32Array

    @classmethod
    def of(cls, origin: Origin, ids: Sequence[str], labels: Int64Array, scores: Float32Array) -> Predictions:
        """Rank the scores [B, num_classes] of one batch; of equal ones the lower class index wins."""
        num_classes = scores.shape[1]
        kept = num_classes if num_classes <= ALL_CLASSES else TOP_K
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
        label_scores = scores[np.arange(len(labels)), labels]
        return cls(origin, _text(ids), labels, label_scores, ranked, np.take_along_axis(scores, ranked, axis=1))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def predicted(self) -> Int64Array:
        """The best class of each image, int64 [N]."""
        return self.ranked[:, 0]

    @property
    def confidence(self) -> Float32Array:
        """The score of the best class, float32 [N]."""
        return self.scores[:, 0]

    @property
    def ranks_all(self) -> bool:
        """Whether every class of every image has its score."""
        return bool(self.ranked.shape[1] == len(self.origin.classes))

    def right(self, top: int = 1) -> BoolArray:
        """Whether the true class is among the best `top`, bool [N]."""
        found: BoolArray = (self.ranked[:, :top] == self.labels[:, None]).any(axis=1)
        return found

    def table(self) -> pa.Table:
        """All of it as Arrow, of `SCHEMA`."""
        kept = self.ranked.shape[1]
        offsets = np.arange(len(self) + 1, dtype=np.int32) * kept
        columns = [
            pa.array(self.ids, pa.string()),
            pa.array(self.labels),
            pa.array(self.predicted),
            pa.array(self.label_scores),
            pa.array(self.confidence),
            pa.ListArray.from_arrays(offsets, self.ranked.reshape(-1)),
            pa.ListArray.from_arrays(offsets, self.scores.reshape(-1)),
        ]
        made = pa.Table.from_arrays(columns, schema=SCHEMA)
        return made.replace_schema_metadata({_ORIGIN: self.origin.model_dump_json()})

    def write(self, path: Path) -> None:
        """Write as Parquet; equal predictions make equal files."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.table(), path, compression="zstd")


def merge(parts: Sequence[Predictions]) -> Predictions:
    """Put parts of one split together, sorted by image id.

    Raises:
        DataError: there is no part, or two speak of one image.
    """
    if not parts:
        raise DataError("expected the predictions of at least one image, got none; check the split's shards")
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids, kind="stable")
    names = ("labels", "label_scores", "ranked", "scores")
    labels, label_scores, ranked, scores = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in names
    )
    twice = ids[order][1:][ids[order][1:] == ids[order][:-1]]
    if len(twice):
        raise DataError(f"image '{twice[0]}' was predicted twice; image ids must be unique within a split")
    return Predictions(parts[0].origin, ids[order], labels, label_scores, ranked, scores)


def read(path: Path) -> Predictions:
    """Read what `Predictions.write` wrote.

    Raises:
        DataError: the file is missing, damaged or something else.
    """
    try:
        table = pq.read_table(path)
        origin = Origin.model_validate_json((table.schema.metadata or {})[_ORIGIN], strict=True)
    except (OSError, pa.ArrowException, KeyError, ValidationError) as error:
        raise DataError(
            f"{path}: expected a table of predictions as evaluation writes it, got {type(error).__name__}; "
            "evaluate the model again"
        ) from None
    ids, labels, label_scores = (table.column(name).to_numpy() for name in ("image_id", "label", "label_score"))
    ranked, scores = (
        table.column(name).combine_chunks().flatten().to_numpy().reshape(len(labels), -1)
        for name in ("top_labels", "top_scores")
    )
    return Predictions(origin, ids, labels, label_scores, ranked, scores)


def file_name(split: Split) -> str:
    """The file, also of a run's artifacts, that holds the predictions of a split."""
    return f"predictions-{split}.parquet"


def model_tag(split: Split) -> str:
    """The tag of a run that says which model it has predictions of, by its `identity`."""
    return f"evaluated.{split}"


def identity(weights_sha256: str, engine: str) -> str:
    """What tells models apart by their answers: the weights and, where it is not the plain one, the engine."""
    return weights_sha256 if engine == PLAIN or not weights_sha256 else f"{weights_sha256} on {engine}"


def views_tag(split: Split) -> str:
    """The tag of a run that says which views of each image its figures of a split are of; without it, `centre`."""
    return f"views.{split}"


def _text(ids: Sequence[str]) -> npt.NDArray[np.object_]:
    """As objects: fixed-width text would take the longest id's room for each."""
    found = np.empty(len(ids), object)
    found[:] = ids
    return found
