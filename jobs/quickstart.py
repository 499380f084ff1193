"""The whole road in one command: preprocess, train, track, evaluate, register, serve, predict."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import _deploy
from jobs._run import Job, connected_to, progress, run
from jobs._stack import Stack
from pipeline.data.datasets import AnyDataset
from pipeline.data.ingest import Config as Ingest
from pipeline.data.ingest import ingest
from pipeline.errors import ClusterError
from pipeline.evaluation import parity
from pipeline.inference.client import Client
from pipeline.training import experiment


class Quickstart(Job):
    """Everything one road needs.

    Attributes:
        name: of the model and, with the time added, of the run.
        num_cpus: logical CPUs of the local Ray: each training worker and each of its decoding tasks takes one.
        num_images: held-out images sent to the endpoint and compared with the offline evaluation.
        keep: leave MLflow, Ray and the endpoint running; `python -m jobs.down` stops them.
    """

    name: str
    dataset: AnyDataset
    ingest: Ingest = Ingest()
    training: experiment.Config
    num_cpus: int = 4
    num_images: int = 32
    keep: bool = False


def quickstart(job: Quickstart) -> None:
    """Walk the road, stage by stage, and end with a table."""
    if Stack.kept(job.store):
        raise ClusterError(f"{job.store}: a stack is up already; python -m jobs.down stops it (or make down)")
    seconds: dict[str, float] = {}
    with Stack(job.store) as stack:
        with _stage("start MLflow and Ray", seconds):
            mlflow = stack.mlflow()
            head = stack.ray(num_cpus=job.num_cpus)
        with connected_to(head):
            with _stage("preprocess", seconds):
                source = ingest(
                    job.dataset.at(job.data_root, job.store),
                    job.ingest,
                    job.store / job.training.shards,
                    progress("images"),
                )
            with _stage("train, evaluate, register", seconds):
                run_name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
                outcome = experiment.conduct(run_name, job.training, storage=job.store, uri=mlflow.address)
        registration = job.training.register_as or experiment.Registration(model=job.name)
        with _stage("deploy", seconds):
            config = _deploy.application(registration.model, registration.alias, mlflow.address, job.store)
            endpoint = _deploy.deploy(head, config)
        split = job.training.evaluate[-1]
        with _stage(f"compare {job.num_images} served answers with offline ones", seconds):
            found = parity.compare(
                Client(endpoint), registration.model, outcome.bundle, source, split, num_images=job.num_images
            )
        report = outcome.reports[split]
        print(f"\naccuracy   {report.metrics['top1']:.4f} top-1 on {report.num_images} held-out images")
        print(f"served     {found.num_images} answers equal the offline ones, scores within {found.max_difference:.1e}")
        print(f"run        {outcome.run_url}")
        print(f"endpoint   {endpoint}/predict/{registration.model}")
        for stage, value in seconds.items():
            print(f"{value:7.1f} s  {stage}")
        print(f"{sum(seconds.values()):7.1f} s  in all", flush=True)
        if job.keep:
            stack.keep()
            image = shlex.quote(str(_example(job)))
            print(f"\nMLflow     {mlflow.address}\nRay        {head.dashboard}")
            print(f"try        curl --data-binary @{image} {endpoint}/predict/{registration.model}")
            print("stop       make down", flush=True)


def _example(job: Quickstart) -> Path:
    """One held-out image, to try the endpoint with."""
    from pipeline.data import datasets  # noqa: PLC0415

    return Path(next(datasets.records(job.dataset.at(job.data_root, job.store), "val")).uri)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.quickstart jobs/configs/quickstart/digits.yaml [keep=true]."""
    return run(Quickstart, quickstart, argv)


if __name__ == "__main__":
    sys.exit(main())
