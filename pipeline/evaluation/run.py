"""[Ray] A stored bundle against a split of shards, on any number of Ray tasks: what they count and judge is merged.

The split is cut into chunks of a few batches, and tasks take whole chunks: an image is in the same batch on any number
of tasks, so that its scores are the same to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
import ray.exceptions

from pipeline import provenance
from pipeline.batch import Batch
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.data.transforms.classify import shown
from pipeline.errors import ConfigError, DataError, own_cause
from pipeline.evaluation import figures, localise, mistakes, sightings
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.detection_report import DetectionEvaluation, DetectionReport
from pipeline.evaluation.live import Found
from pipeline.evaluation.live import evaluate as count
from pipeline.evaluation.live import evaluate_detector as judge
from pipeline.evaluation.report import ClassificationReport, Evaluation, evidence_metrics
from pipeline.evaluation.sightings import Sighting
from pipeline.inference import bundle
from pipeline.models._contract import Classifier
from pipeline.models._detector import Detector, check_proposals
from pipeline.tracking.predictions import Origin, Predictions, merge
from pipeline.types import Detections, Float32Array, Split, Task, Views

BATCHES_PER_CHUNK = 8
BATCH_SIZE: dict[Task, int] = {"classification": 64, "detection": 8}

PartT = TypeVar("PartT")


def evaluate(
    model: bundle.Bundle,
    source: shards.Shards,
    split: Split,
    *,
    views: Views = "centre",
    proposals: str | None = None,
    batch_size: int | None = None,
    num_tasks: int = 2,
) -> Evaluation | DetectionEvaluation:
    """Evaluate on an initialised Ray, as the model's task has it.

    Args:
        views: of each image, for a classifier.
        proposals: name of those of the dataset, for a detector that judges given regions.
        batch_size: images at once in each task; None: as many as suit the task.

    Raises:
        DataError: the classes of model and data differ, a shard is not what the manifest says, or there are no such
            proposals of this split.
        ConfigError: several views for a detector, proposals for a classifier, or none for a model that needs them.
    """
    size = batch_size or BATCH_SIZE[model.card.task]
    if model.card.task == "classification":
        if proposals is not None:
            raise ConfigError(f"proposals: a classifier is shown no regions, got '{proposals}'; leave them out")
        return evaluate_classifier(model, source, split, views=views, batch_size=size, num_tasks=num_tasks)
    if views != "centre":
        raise ConfigError(f"views: a detector is shown whole pictures only, got '{views}'; leave it out")
    return evaluate_detector(model, source, split, proposals=proposals, batch_size=size, num_tasks=num_tasks)


def evaluate_classifier(
    model: bundle.Bundle,
    source: shards.Shards,
    split: Split,
    *,
    views: Views = "centre",
    batch_size: int = BATCH_SIZE["classification"],
    num_tasks: int = 2,
) -> Evaluation:
    """The same for a classifier."""
    check_fits(model, source, split)
    started = time.monotonic()
    work = _Work(model, source, split, batch_size, views)
    parts = _distribute(work, num_tasks, _classify)
    predictions = merge([part.predictions for part in parts])
    counts = sum((part.counts for part in parts), Counts.empty(len(model.card.classes)))
    report = ClassificationReport.of(counts, split, model.card.classes, {"views": views} | _facts(work, started))
    measured = report.model_copy(update={"metrics": report.metrics | evidence_metrics(predictions)})
    return Evaluation(
        **dict(measured),
        predictions=predictions,
        filters=figures.first_filters(model.build().network, model.card.model.name),
        errors=mistakes.error_sheet(predictions, source),
    )


def evaluate_detector(
    model: bundle.Bundle,
    source: shards.Shards,
    split: Split,
    *,
    proposals: str | None = None,
    batch_size: int = BATCH_SIZE["detection"],
    num_tasks: int = 2,
) -> DetectionEvaluation:
    """The same for a detector."""
    check_proposals(model.card.model, proposals, source.address)
    check_fits(model, source, split)
    started = time.monotonic()
    work = _Work(model, source, split, batch_size, proposals=proposals)
    parts = _distribute(work, num_tasks, _detect)
    found = Found.merged(part.found for part in parts)
    seen = sorted((one for part in parts for one in part.seen), key=lambda one: one.image_id)
    report = DetectionReport.of_found(found, split, model.card.classes, _facts(work, started))
    if all(len(one.objects) <= 1 for one in seen):  # as in ILSVRC's task of classification and localisation
        counts = sum((localise.Counts.of(one.found, one.objects) for one in seen), localise.Counts())
        report = report.model_copy(update={"metrics": report.metrics | counts.metrics()})
    pictures = sightings.sheets(seen, source, split, report.metrics["voc_f1_score"])
    return DetectionEvaluation(**dict(report), judged=found.judged, seen=tuple(seen), sheets=pictures)


def check_truth(source: shards.Shards, task: Task, splits: Sequence[Split]) -> None:
    """Make sure that the images of some splits have what a task is measured by: a class, or boxes.

    Raises:
        DataError: there is no such split, or some have it not.
    """
    if task == "classification":
        shards.check_labels(source, splits)
        return
    shards.check_objects(source, splits)
    for split in splits:
        if split != "train" and not sum(source.manifest.object_counts.get(split, (1,))):
            raise DataError(f"{source.path}: '{split}' holds no object at all, so nothing can be measured on it")


def check_fits(model: bundle.Bundle, source: shards.Shards, split: Split) -> None:
    """Make sure that a model can be measured on a split.

    Raises:
        DataError: its classes are not those of the data, or a shard is not what the manifest says.
    """
    if model.card.classes != source.manifest.classes:
        raise DataError(
            f"{model.path} knows {len(model.card.classes)} classes that are not the {len(source.manifest.classes)} of "
            f"{source.path}, or in another order; evaluate it on shards with its own class list"
        )
    shards.check(source, split)


@dataclass(frozen=True)
class _Work:
    """What all tasks are told."""

    model: bundle.Bundle
    source: shards.Shards
    split: Split
    batch_size: int
    views: Views = "centre"
    proposals: str | None = None

    @property
    def origin(self) -> Origin:
        """Whose predictions these are."""
        return Origin(
            split=self.split,
            dataset=self.source.manifest.dataset,
            dataset_digest=self.source.manifest.digest,
            weights_sha256=self.model.card.weights_sha256,
            classes=self.model.card.classes,
            views=self.views,
            engine=str(self.model.card.engine),
        )

    @property
    def num_chunks(self) -> int:
        """Of at most `BATCHES_PER_CHUNK` batches each; a function of the data and the batch size only."""
        rows = self.source.manifest.num_rows(self.split)
        return max(1, -(-rows // (self.batch_size * BATCHES_PER_CHUNK)))


def _facts(work: _Work, started: float) -> dict[str, str]:
    """What a report says of its origin; `started` by the monotonic clock."""
    manifest = work.source.manifest
    facts = {} if work.proposals is None else {"proposals": work.proposals}
    return facts | {
        "weights_sha256": work.model.card.weights_sha256,
        "engine": str(work.model.card.engine),
        "dataset": manifest.dataset,
        "dataset_digest": manifest.digest,
        "commit": provenance.commit(),
        "seconds": f"{time.monotonic() - started:.1f}",
    }


def _distribute(work: _Work, num_tasks: int, measure: Callable[[_Work, range], PartT]) -> list[PartT]:
    task = ray.remote(measure)
    shares = [range(first, work.num_chunks, num_tasks) for first in range(min(num_tasks, work.num_chunks))]
    try:
        parts: list[PartT] = ray.get([task.remote(work, share) for share in shares])
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None
    return parts


@dataclass(frozen=True)
class _Classified:
    """What one task found."""

    counts: Counts
    predictions: Predictions


def _classify(work: _Work, chunks: range) -> _Classified:
    """Evaluate some chunks of the split; to the loader, each chunk is the share of one rank."""
    network = work.model.start()
    assert isinstance(network, Classifier)
    loading, origin = Loading(batch_size=work.batch_size, num_tasks=0), work.origin
    seen: list[Predictions] = []

    def watch(batch: Batch, scores: Float32Array) -> None:
        seen.append(Predictions.of(origin, batch.ids, batch.labels.numpy(), scores))

    counts = Counts.empty(len(origin.classes))
    for chunk in chunks:
        loader = Loader(work.source, shown(network.spec, origin.views), loading, rank=chunk, world_size=work.num_chunks)
        batches = loader.evaluate(work.split)
        counts += count(network, batches, len(origin.classes), watch=watch, views=origin.views)
    return _Classified(counts, merge(seen))


@dataclass(frozen=True)
class _Detected:
    """What one task found."""

    found: Found
    seen: list[Sighting]


def _detect(work: _Work, chunks: range) -> _Detected:
    """As `_classify`."""
    network = work.model.start()
    assert isinstance(network, Detector)
    loading = Loading(batch_size=work.batch_size, num_tasks=0, proposals=work.proposals)
    seen: list[Sighting] = []

    def watch(batch: Batch, found: list[Detections]) -> None:
        seen.extend(Sighting(*one) for one in zip(batch.ids, found, batch.objects, strict=True))

    parts = []
    for chunk in chunks:
        loader = Loader(work.source, network.spec, loading, rank=chunk, world_size=work.num_chunks)
        parts.append(judge(network, loader.evaluate(work.split), len(work.model.card.classes), watch=watch))
    return _Detected(Found.merged(parts), seen)
