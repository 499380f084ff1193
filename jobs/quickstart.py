"""The whole road in one command: preprocess, train, track, evaluate, register, serve, predict."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from pydantic import Field

from jobs import _deploy
from jobs._run import Job, connected_to, progress, run, stage
from jobs._stack import Stack
from pipeline.data.datasets import AnyDataset, records
from pipeline.data.ingest import Config as Ingest
from pipeline.data.ingest import ingest
from pipeline.evaluation import parity
from pipeline.inference.client import Client
from pipeline.tracking import registry
from pipeline.training import experiment


class Quickstart(Job):
    """Everything one road needs.

    Attributes:
        name: of the model and, with the time added, of the run.
        num_images: held-out images sent to the endpoint and compared with the offline evaluation.
        keep: leave MLflow, Ray and the endpoint running; `python -m jobs.down` stops them.
    """

    name: str = Field(pattern=registry.NAME)
    dataset: AnyDataset
    ingest: Ingest = Ingest()
    training: experiment.Config
    num_images: int = Field(default=32, ge=1)
    keep: bool = False


def quickstart(job: Quickstart) -> None:
    """Walk the road, stage by stage, and end with a table."""
    Stack.refuse_second(job.store)
    dataset, seconds, split = job.dataset.at(job.data_root, job.store), dict[str, float](), job.training.evaluate[-1]
    run_name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    training = job.training.model_copy(update={"register_as": experiment.Registration(model=job.name)})
    with Stack(job.store) as stack:
        with stage("start MLflow and Ray", seconds):
            mlflow, head = stack.mlflow(), stack.ray(num_cpus=max(training.num_cpus(), 4))
        with connected_to(head):
            with stage("preprocess", seconds):
                source = ingest(dataset, job.ingest, job.store / training.shards, progress("images"))
            with stage("train, evaluate, register", seconds):
                outcome = experiment.conduct(run_name, training, storage=job.store, uri=mlflow.address)
        with stage("deploy", seconds):
            config = _deploy.application(job.name, "champion", mlflow.address, job.store)
            url = _deploy.deploy(head, config)
        with stage(f"compare {job.num_images} served answers with offline ones", seconds):
            found = parity.compare(Client(url), job.name, outcome.bundle, source, split, job.num_images)
        report = outcome.reports[split]
        print(f"\naccuracy   {report.metrics['top1']:.4f} top-1 on {report.num_images} held-out images")
        print(f"served     {found.num_images} answers equal the offline ones, scores within {found.max_difference:.1e}")
        print(f"run        {outcome.run_url}\nendpoint   {url}/predict/{job.name}")
        print("".join(f"{value:7.1f} s  {name}\n" for name, value in seconds.items()), end="")
        print(f"{sum(seconds.values()):7.1f} s  in all", flush=True)
        if job.keep:
            stack.keep()
            example = next(iter(records(dataset, split))).uri
            print(f"\nMLflow     {mlflow.address}\nRay        {head.dashboard}")
            print(
                f"try        curl --data-binary '@{example}' {url}/predict/{job.name}\nstop       make down", flush=True
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.quickstart jobs/configs/quickstart/digits.yaml [keep=true]."""
    return run(Quickstart, quickstart, argv)


if __name__ == "__main__":
    sys.exit(main())
