"""Train a model on shards, evaluate it, register it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field

from jobs._run import Job, ray_session, run, tracking_uri
from pipeline.evaluation.headline import headline
from pipeline.tracking import registry
from pipeline.training import experiment, launch


class Train(Job):
    """One named run; its files go to `storage/runs/<name>`."""

    name: str = Field(pattern=registry.NAME)
    training: experiment.Config


def train(job: Train) -> None:
    """Do it, and say where the result is."""
    folder = job.store / "runs" / job.name
    launch.check_folder(folder, job.training.checkpoints, resume=job.training.resume)
    outcome = experiment.finished(job.name, job.training, folder) or _conduct(job)
    for split, report in outcome.reports.items():
        print(f"{split:8} {headline(report.metrics)} of {report.num_images} images")
    print(f"bundle   {outcome.bundle.path}")
    print(f"run      {outcome.run_url}")
    if outcome.version:
        aliases = ", ".join(outcome.version.aliases)
        print(f"model    {outcome.version.name} version {outcome.version.version} ({aliases or 'no alias'})")
    print("seconds  " + "  ".join(f"{stage} {value:.0f}" for stage, value in outcome.seconds.items()))


def _conduct(job: Train) -> experiment.Outcome:
    experiment.source_of(job.training, job.store)  # what is missing is found before anything starts
    with tracking_uri(job.store) as uri, ray_session(job.store, job.training.num_cpus()):
        return experiment.conduct(job.name, job.training, storage=job.store, uri=uri, roots=(job.data_folder,))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.train jobs/configs/train/lenet5_digits.yaml [key=value ...]."""
    return run(Train, train, argv)


if __name__ == "__main__":
    sys.exit(main())
