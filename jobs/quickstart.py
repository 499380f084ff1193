"""Whole roads in one command: preprocess, train, track, evaluate, register, serve, predict."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from jobs import _deploy
from jobs._road import Road, compare, walk
from jobs._run import Job, connected_to, run, stage
from jobs._stack import Stack
from pipeline.data.datasets import records
from pipeline.evaluation.headline import headline
from pipeline.inference.client import Client


class Quickstart(Job):
    """What is walked.

    Attributes:
        roads: one after the other; all their models are served by one endpoint.
        keep: leave MLflow, Ray and the endpoint running; `python -m jobs.down` stops them.
    """

    roads: tuple[Road, ...] = Field(min_length=1)
    keep: bool = False

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        if len({road.name for road in self.roads}) < len(self.roads):
            raise ValueError(f"roads: expected each name once, got {', '.join(road.name for road in self.roads)}")
        return self


def quickstart(job: Quickstart) -> None:
    """Walk every road, stage by stage, and end with a table."""
    Stack.refuse_second(job.store)
    seconds, at = dict[str, float](), time.strftime("%Y%m%d-%H%M%S")
    with Stack(job.store) as stack:
        with stage("start MLflow and Ray", seconds):
            num_cpus = max(4, *(road.training.num_cpus() for road in job.roads))
            mlflow, head = stack.mlflow(), stack.ray(num_cpus=num_cpus)
        with connected_to(head):
            walked = [walk(road, at, job, mlflow.address, seconds) for road in job.roads]
        names = [road.name for road in job.roads]
        with stage("deploy", seconds):
            config = _deploy.application(names, "champion", mlflow.address, job.store)
            url = _deploy.deploy(head, config)
        for road, (source, outcome) in zip(job.roads, walked, strict=True):
            found = compare(road, Client(url), source, outcome, seconds)
            report = outcome.reports[road.split]
            print(f"\n{road.name}: {headline(report.metrics)} on {report.num_images} held-out images")
            print(f"  served    {found.num_images} answers equal the offline ones within {found.max_difference:.1e}")
            print(f"  run       {outcome.run_url}\n  endpoint  {url}/predict/{road.name}")
        print("".join(f"{value:7.1f} s  {name}\n" for name, value in seconds.items()), end="")
        print(f"{sum(seconds.values()):7.1f} s  in all", flush=True)
        if job.keep:
            stack.keep()
            print(f"\nMLflow     {mlflow.address}\nRay        {head.dashboard}")
            for road in job.roads:
                example = next(iter(records(road.dataset.at(job.data_root, job.store), road.split))).uri
                print(f"try        curl --data-binary '@{example}' {url}/predict/{road.name}")
            print("stop       make down", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.quickstart jobs/configs/quickstart/digits.yaml [keep=true]."""
    return run(Quickstart, quickstart, argv)


if __name__ == "__main__":
    sys.exit(main())
