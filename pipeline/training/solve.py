"""[Ray Data] The stage after `fit` of a model whose last layers are solved for: R-CNN's machines and box corrections.

    fitted bundle ──► features of every region, Parquet      extraction, one pass of the network, `num_tasks` actors
        ──► machines of the objects and some of the rest     first pass over the features
        ──► the same with what those get wrong               hard negatives, one pass for each round
        ──► ridge regressions of corrections                 one pass over pooled maps
        ──► finished bundle

Source: Girshick et al., CVPR 2014, section 2.3 and appendices B and C; Felzenszwalb et al., PAMI 2010, section 4.3 for
hard negatives. An object is an example for its class; a region that overlaps no object of a class by `negative_iou` is
one against it. All features do not fit into memory, and do not have to: a pass, by the driver, keeps the rows that it
looks for, in number bounded, and which of too many does not depend on the number of tasks or the order in which these
ended. Extraction is what takes time; a pass over its result costs less than Ray tasks take to start.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import ray.exceptions
import torch
from pyarrow import dataset

from pipeline.config import Strict
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import own_cause
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.models._detector import Detector
from pipeline.models._solvable import Layer, Solvable
from pipeline.training import examples, linear
from pipeline.training.examples import ORDER, RANK, Rows
from pipeline.training.linear import BoolArray, Config, Solution

FEATURES = "features"
BATCH_SIZE = 4  # images whose regions are looked at together
CHUNK = 16  # images that are read together
PASS_ROWS = 8192  # regions that a pass looks at together: 134 MB of AlexNet's features

log = logging.getLogger("ventral.training")


class Solved(Strict):
    """What the layers were solved from.

    Attributes:
        objects: by class name.
        hard_negatives: that each round added, by class name.
        corrections: regions by class name, that box corrections were learnt from.
    """

    objects: dict[str, int]
    hard_negatives: tuple[dict[str, int], ...]
    corrections: dict[str, int]


def solve(
    folder: Path,
    fitted: Bundle,
    source: shards.Shards,
    config: Config,
    *,
    proposals: str | None,
    num_tasks: int = 1,
    gpu: bool = False,
) -> tuple[Bundle, Solved]:
    """Solve for the last layers of a fitted model, on an initialised Ray, and replace its bundle in `folder`.

    Args:
        folder: of the run, on storage that every node reaches; the features lie there meanwhile.
        proposals: name of those of the dataset, which the model judges.
        num_tasks: networks that extract features at the same time.
        gpu: each of them has one.

    Raises:
        VentralError: what a task raised.
    """
    place = folder.absolute() / FEATURES
    num_chunks = -(-source.manifest.num_rows("train") // CHUNK)
    shutil.rmtree(place, ignore_errors=True)
    try:
        _extract(place, _Extraction(fitted, source, config, proposals, "cuda" if gpu else "cpu", num_chunks), num_tasks)
        classes, boxes, told = _layers(place, fitted.card.classes, config)
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    model = fitted.build()
    assert isinstance(model, Solvable)
    finished, made = model.solved(*(Layer(*map(torch.from_numpy, found)) for found in (classes, boxes)))
    assert isinstance(made, Detector)
    card = fitted.card
    saved = bundle.save(
        folder / "bundle",
        made,
        finished,
        classes=card.classes,
        decoding=card.decoding,
        search=card.search,
        provenance=card.provenance,
    )
    return saved, told


def _layers(place: Path, names: Sequence[str], config: Config) -> tuple[Solution, Solution, Solved]:
    """The machines and the corrections, from the features that lie in `place`."""
    objects = _gathered(place, "features", _objects)
    others = _gathered(place, "features", partial(_others, config=config), config.first_negatives)
    machines, rounds = _machines([objects, others], config), []
    for _ in range(config.hard_rounds):
        known = np.sort(others.order)
        hard = _gathered(
            place, "features", partial(_hard, machines=machines, known=known, config=config), config.hard_negatives
        )
        rounds.append(_by_name(names, (_against(hard, config) & (machines(hard.values) > -1)).sum(axis=0)))
        others = Rows.joined([others, hard])
        machines = _machines([objects, others], config)
        log.info("solve: %d regions were wrongly taken for objects", len(hard.order))
    moved = _gathered(place, "pooled", partial(_moved, config=config), config.corrections)
    told = Solved(
        objects=_by_name(names, np.bincount(objects.labels, minlength=len(names))),
        hard_negatives=tuple(rounds),
        corrections=_by_name(names, np.bincount(moved.labels, minlength=len(names))),
    )
    return machines, _corrections(moved, len(names), config.ridge_penalty), told


def _machines(parts: Sequence[Rows], config: Config) -> Solution:
    rows = Rows.joined(parts)
    of_class = rows.labels[:, None] == np.arange(rows.overlaps.shape[1])
    return linear.support_vectors(
        rows.values,
        of_class & rows.is_object[:, None],
        _against(rows, config),
        c=config.svm_c,
        norm=config.feature_norm,
        positive_weight=config.positive_weight,
    )


def _corrections(rows: Rows, num_classes: int, penalty: float) -> Solution:
    """Of each class its own regression: weights [4 C, P], those of a class together."""
    found = [
        linear.ridge(rows.values[rows.labels == label], rows.wanted[rows.labels == label], penalty)
        for label in range(num_classes)
    ]
    return Solution(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _by_name(names: Sequence[str], counts: Any) -> dict[str, int]:
    return dict(zip(names, map(int, counts), strict=True))


Choice = Callable[[Rows], tuple[BoolArray, npt.NDArray[np.float64]]]
"""Which of N regions a pass keeps [N], and their rank [N]: of too many those of the lowest stay."""


def _objects(rows: Rows) -> tuple[BoolArray, npt.NDArray[np.float64]]:
    return rows.is_object, rows.order


def _others(rows: Rows, config: Config) -> tuple[BoolArray, npt.NDArray[np.float64]]:
    return ~rows.is_object & _against(rows, config).any(axis=1), rows.order


def _hard(
    rows: Rows, machines: Solution, known: npt.NDArray[np.float64], config: Config
) -> tuple[BoolArray, npt.NDArray[np.float64]]:
    """What a machine takes for an object of its class, or nearly so, and is none."""
    margins = np.where(_against(rows, config), machines(rows.values), -np.inf).max(axis=1)
    return (margins > -1) & ~rows.is_object & ~np.isin(rows.order, known), -margins.astype(np.float64)


def _moved(rows: Rows, config: Config) -> tuple[BoolArray, npt.NDArray[np.float64]]:
    return rows.overlaps.max(axis=1) >= config.correction_iou, rows.order


def _against(rows: Rows, config: Config) -> BoolArray:
    """Which regions are examples against which class [N, C]."""
    return rows.overlaps < config.negative_iou


def _gathered(place: Path, values: str, choice: Choice, most: int | None = None) -> Rows:
    """The regions that a pass over all of them keeps, `most` of them: those of the lowest rank."""
    every = dataset.dataset(place, format="parquet")
    columns = [*examples.COMPARED, values]
    found = None
    for batch in every.to_batches(columns=columns, batch_size=PASS_ROWS):
        table = pa.Table.from_batches([batch])
        kept, rank = choice(Rows(table, values))
        part = table.append_column(RANK, pa.array(rank)).filter(pa.array(kept))
        found = examples.lowest(part if found is None else pa.concat_tables([found, part]), most)
    assert found is not None  # each file has rows
    return Rows(found.sort_by(ORDER), values)


@dataclass(frozen=True)
class _Extraction:
    """What is extracted from; the training images are read in so many parts."""

    fitted: Bundle
    source: shards.Shards
    config: Config
    proposals: str | None
    device: str
    num_chunks: int


class _Extractor:
    """A network that looks at one chunk of the training images after the other."""

    def __init__(self, job: _Extraction) -> None:
        self._job, self._model = job, job.fitted.build(job.device)

    def __call__(self, chunks: dict[str, Any]) -> Iterator[pa.Table]:
        assert isinstance(self._model, Solvable)
        assert isinstance(self._model, Detector)
        loading = Loading(batch_size=BATCH_SIZE, num_tasks=0, proposals=self._job.proposals)
        count = self._job.num_chunks
        for chunk in chunks["chunk"].tolist():
            loader = Loader(self._job.source, self._model.spec, loading, rank=chunk, world_size=count)
            for batch in loader.evaluate("train"):
                with torch.inference_mode():
                    found = self._model.examples(batch.to(self._job.device))
                yield examples.table(found, batch.ids, self._job.config.correction_iou)


def _extract(place: Path, job: _Extraction, num_tasks: int) -> None:
    shards.check(job.source, "train")
    chunks = [{"chunk": number} for number in range(job.num_chunks)]
    ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _Extractor,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_tasks, len(chunks))),
        num_gpus=1 if job.device == "cuda" else None,
    ).write_parquet(str(place))
