"""Detectors side by side on one dataset and one machine: accuracy and speed, as the lecture's table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from jobs._compared import Entry, Place, entries, trainings
from jobs._run import Job, ray_session, run, tracking_uri
from pipeline.benchmark import detector_table, detectors
from pipeline.config import flatten
from pipeline.data import shards
from pipeline.evaluation.run import check_truth
from pipeline.tracking import runs
from pipeline.types import Split


class CompareDetectors(Job):
    """What is compared on what.

    Attributes:
        models: that are trained here, or taken.
        shards: the dataset; a relative path lies in `storage`.
        split: that accuracy is measured on; its first pictures are those that speed is measured on.
        speed: how speed is measured.
        output: folder of `detectors.csv` and `detectors.txt`, in `storage`.
        num_cpus: of the local Ray, where there is no cluster.
    """

    models: tuple[Entry, ...] = Field(min_length=1)
    shards: Path
    split: Split = "test"
    speed: detectors.Config = detectors.Config()
    output: Path = Path("compare_detectors")
    num_cpus: int = Field(default=4, ge=1)
    tracking: runs.Config = runs.Config(experiment="compare-detectors")


def compare_detectors(job: CompareDetectors) -> None:
    """Train or take, evaluate, measure; all as one parent run."""
    source = shards.load(job.store / job.shards)
    check_truth(source, "detection", [job.split])
    trains, folder = trainings(job.models, job.shards), job.store / job.output
    tags, say = {"dataset_digest": source.manifest.digest}, partial(print, flush=True)
    with (
        tracking_uri(job.store) as uri,
        runs.start(uri, job.tracking, params=flatten(job), tags=tags) as parent,
    ):
        with ray_session(job.store, job.num_cpus):
            place = Place(job, source, job.split, parent, job.tracking.experiment, folder)
            found = entries(job.models, trains, place)
        bundles = {name: one.bundle for name, one in found.items()}
        speeds, others = detectors.measure(bundles, source, job.split, job.speed, job.store / "scratch", say)
        rows = [one.row(name, speeds[name]) for name, one in found.items()]
        text = detector_table.table(rows)
        parent.log_metrics(detector_table.metrics(rows), step=0)
        parent.log_text("detectors.csv", detector_table.as_csv(rows))
        parent.log_text("detectors.txt", text)
        parent.log_figure("detectors.png", detector_table.plot(rows, f"{source.manifest.dataset}, {job.split}"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "detectors.csv").write_text(detector_table.as_csv(rows))
    (folder / "detectors.txt").write_text(text + "\n")
    print(f"{text}\n\nother processes took up to {others:.0%} of the CPUs\ntable    {folder}\nrun      {parent.url}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.compare_detectors CONFIG [key=value ...]."""
    return run(CompareDetectors, compare_detectors, argv)


if __name__ == "__main__":
    sys.exit(main())
