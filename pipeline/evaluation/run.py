"""[Ray] A stored bundle against a split of shards, on any number of Ray tasks: counts are summed, predictions merged.

The split is cut into chunks of a few batches, and tasks take whole chunks: an image is in the same batch on any number
of tasks, so that its scores are the same to the last bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray

from pipeline import provenance
from pipeline.batch import Batch
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.data.transforms.classify import shown
from pipeline.errors import DataError
from pipeline.evaluation import figures, mistakes
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.live import evaluate as count
from pipeline.evaluation.report import Evaluation, Report, evidence_metrics
from pipeline.inference import bundle
from pipeline.tracking.predictions import Origin, Predictions, merge
from pipeline.types import Float32Array, Split, Views

BATCHES_PER_CHUNK = 8


def evaluate(
    model: bundle.Bundle,
    source: shards.Shards,
    split: Split,
    *,
    views: Views = "centre",
    batch_size: int = 64,
    num_tasks: int = 2,
) -> Evaluation:
    """Evaluate on an initialised Ray.

    Raises:
        DataError: the classes of model and data differ, or a shard is not what the manifest says.
    """
    if model.card.classes != source.manifest.classes:
        raise DataError(
            f"{model.path} knows {len(model.card.classes)} classes that are not the {len(source.manifest.classes)} of "
            f"{source.path}, or in another order; evaluate it on shards with its own class list"
        )
    shards.check(source, split)
    started = time.monotonic()
    origin = Origin(
        split=split,
        dataset=source.manifest.dataset,
        dataset_digest=source.manifest.digest,
        weights_sha256=model.card.weights_sha256,
        classes=model.card.classes,
        views=views,
    )
    parts = _distribute(_Work(model, source, origin, batch_size), num_tasks)
    predictions = merge([part.predictions for part in parts])
    seconds = time.monotonic() - started
    report = Report.of(
        sum((part.counts for part in parts), Counts.empty(len(model.card.classes))),
        split,
        model.card.classes,
        {
            "weights_sha256": model.card.weights_sha256,
            "dataset": source.manifest.dataset,
            "dataset_digest": source.manifest.digest,
            "views": views,
            "commit": provenance.commit(),
            "seconds": f"{seconds:.1f}",
        },
    )
    measured = report.model_copy(update={"metrics": report.metrics | evidence_metrics(predictions)})
    return Evaluation(
        **dict(measured),
        predictions=predictions,
        filters=figures.first_filters(model.build().network, model.card.model.name),
        errors=mistakes.error_sheet(predictions, source),
    )


@dataclass(frozen=True)
class _Work:
    """What all tasks are told."""

    model: bundle.Bundle
    source: shards.Shards
    origin: Origin
    batch_size: int

    @property
    def num_chunks(self) -> int:
        """Of at most `BATCHES_PER_CHUNK` batches each; a function of the data and the batch size only."""
        rows = self.source.manifest.num_rows(self.origin.split)
        return max(1, -(-rows // (self.batch_size * BATCHES_PER_CHUNK)))


@dataclass(frozen=True)
class _Part:
    """What one task found."""

    counts: Counts
    predictions: Predictions


def _distribute(work: _Work, num_tasks: int) -> list[_Part]:
    task = ray.remote(_measure)
    shares = [range(first, work.num_chunks, num_tasks) for first in range(min(num_tasks, work.num_chunks))]
    parts: list[_Part] = ray.get([task.remote(work, share) for share in shares])
    return parts


def _measure(work: _Work, chunks: range) -> _Part:
    """Evaluate some chunks of the split; to the loader, each chunk is the share of one rank."""
    network = work.model.build()
    loading = Loading(batch_size=work.batch_size, num_tasks=0)
    seen: list[Predictions] = []

    def watch(batch: Batch, scores: Float32Array) -> None:
        seen.append(Predictions.of(work.origin, batch.ids, batch.labels.numpy(), scores))

    counts, views = Counts.empty(len(work.origin.classes)), work.origin.views
    for chunk in chunks:
        loader = Loader(work.source, shown(network.spec, views), loading, rank=chunk, world_size=work.num_chunks)
        batches = loader.evaluate(work.origin.split)
        counts += count(network, batches, len(work.origin.classes), watch=watch, views=views)
    return _Part(counts, merge(seen))
