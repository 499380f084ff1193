"""Measure a registered model, or a bundle on disk, on a split of shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs._run import Job, bundle_of, ray_session, run, tracking_uri
from pipeline.config import flatten
from pipeline.data import shards
from pipeline.data.proposals import Name
from pipeline.evaluation.run import check_truth
from pipeline.evaluation.run import evaluate as measure
from pipeline.tracking import runs
from pipeline.types import Split, Views


class Evaluate(Job):
    """What is measured on what.

    Attributes:
        model: `name@alias` or `name/3` in the registry, or the folder of a bundle.
        shards: the dataset; a relative path lies in `storage`.
        views: of each image, whose scores are averaged; `ten_crop` is how AlexNet's and ResNet's papers measured.
        proposals: name of those that `jobs.propose` made of the dataset, for a detector that judges given regions.
        report: where the JSON goes; a relative path lies in `storage`.
    """

    model: str
    shards: Path
    split: Split = "val"
    views: Views = "centre"
    proposals: Name | None = None
    num_tasks: int = 2
    report: Path = Path("report.json")
    tracking: runs.Config = runs.Config(experiment="evaluate")


def evaluate(job: Evaluate) -> None:
    """Measure, write the report, and log both to MLflow."""
    source = shards.load(job.store / job.shards)
    with tracking_uri(job.store) as uri:
        bundle = bundle_of(job.model, uri, job.store)
        check_truth(source, bundle.card.task, [job.split])
        with (
            runs.start(
                uri, job.tracking, params=flatten(job), tags={"dataset_digest": source.manifest.digest}
            ) as tracked,
            ray_session(job.store, job.num_tasks),
        ):
            tracked.log_dataset(source.manifest.dataset, source.manifest.digest, source.address, job.split)
            report = measure(
                bundle, source, job.split, views=job.views, proposals=job.proposals, num_tasks=job.num_tasks
            )
            report.record(tracked, job.store / job.report)
    for name, value in report.metrics.items():
        print(f"{name:14} {value:.4f}")
    print(f"images         {report.num_images}  (views: {job.views})")
    print(f"report         {job.store / job.report}")
    print(f"run            {tracked.url}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.evaluate model=digits@champion shards=shards/digits."""
    return run(Evaluate, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
