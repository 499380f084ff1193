"""Train many variants of one training, stop those that look bad, and say which is the best."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Self

from pydantic import Field, model_validator

from jobs._run import Job, ray_session, run, tracking_uri
from pipeline.tracking import registry
from pipeline.tracking.comparison.table import grid
from pipeline.training import experiment, outcomes, sweep, trials


class Sweep(Job):
    """One named sweep; its table goes to `storage/sweeps/<name>`, each trial's files to `storage/runs/<trial>`.

    Attributes:
        training: what every trial starts from; `register_as` is for the best one only.
        sweep: what the trials change.
        resume: go on with an earlier sweep of this name; trials that have come to an end are not run again.
    """

    name: str = Field(pattern=registry.NAME)
    training: experiment.Config
    sweep: trials.Config
    resume: bool = False

    @cached_property
    def planned(self) -> tuple[trials.Trial, ...]:
        """Every configuration that is tried, checked."""
        return trials.expand(self.name, self.training, self.sweep)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        _ = self.planned  # raises what is wrong with a trial, also where Python leaves out assertions
        return self

    def remarks(self) -> Iterator[str]:
        """The trials."""
        for trial in self.planned:
            yield f"trial {trial.name}: {json.dumps(trial.changes)}"


def search(job: Sweep) -> None:
    """Do it, and print the table."""
    found = job.planned
    experiment.source_of(job.training, job.store)  # what is missing is found before anything starts
    print(f"{len(found)} trials of {', '.join(job.sweep.keys) or 'the training as it is'}", flush=True)
    num_cpus = job.sweep.concurrent * max(trial.training.num_cpus() for trial in found)
    with tracking_uri(job.store) as uri:
        place = outcomes.Place(job.name, job.store, uri, (job.data_folder,))
        try:
            with ray_session(job.store, num_cpus):
                became = sweep.run(place, found, job.training, job.sweep, resume=job.resume)
        except KeyboardInterrupt:
            sweep.close_runs(place, found)
            raise
    print(grid(outcomes.rows(became, job.sweep)))
    best = outcomes.best_of(became, job.training)
    print(f"best     {best.name if best else 'none'}  ({job.training.recipe.watch.metric})")
    print(f"table    {place.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.sweep jobs/configs/sweep/lenet5_digits.yaml [key=value ...]."""
    return run(Sweep, search, argv)


if __name__ == "__main__":
    sys.exit(main())
