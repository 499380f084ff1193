"""[Ray] A stored bundle against a split of shards, on any number of Ray tasks; the counts are summed, none is lost."""

from __future__ import annotations

import time

import ray

from pipeline import provenance
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import DataError
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.live import evaluate as count
from pipeline.evaluation.report import Report
from pipeline.inference import bundle
from pipeline.types import Split


def evaluate(
    model: bundle.Bundle, source: shards.Shards, split: Split, *, batch_size: int = 64, num_tasks: int = 2
) -> Report:
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
    task = ray.remote(_count)
    parts = [task.remote(model, source, split, batch_size, rank, num_tasks) for rank in range(num_tasks)]
    counts = sum(ray.get(parts), Counts.empty(len(model.card.classes)))
    return Report.of(
        counts,
        split,
        model.card.classes,
        {
            "weights_sha256": model.card.weights_sha256,
            "dataset": source.manifest.dataset,
            "dataset_digest": source.manifest.digest,
            "commit": provenance.commit(),
            "seconds": f"{time.monotonic() - started:.1f}",
        },
    )


def _count(
    model: bundle.Bundle, source: shards.Shards, split: Split, batch_size: int, rank: int, world_size: int
) -> Counts:
    loading = Loading(batch_size=batch_size, num_tasks=0)
    network = model.build()
    loader = Loader(source, network.spec, loading, rank=rank, world_size=world_size)
    return count(network, loader.evaluate(split), len(model.card.classes))
