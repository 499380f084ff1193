"""Measure this project: `ingest` (photos to batches, to shards), `train` (steps, with and without Ray) or `serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from jobs import _servers
from jobs._run import Job, ray_session, run
from pipeline import storage
from pipeline.benchmark import ingest as ingest_plane
from pipeline.benchmark import report, rounds, serving, serving_report, training, training_report
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs" / "benchmark"
ConfigT = TypeVar("ConfigT", ingest_plane.Config, training.Config, serving.Config)
say = partial(print, flush=True)


class Benchmark(Job):
    """What is measured, by one of three keys; folders for its files, which are removed, and for the reports in JSON."""

    ingest: ingest_plane.Config | None = None
    train: training.Config | None = None
    serve: serving.Config | None = None
    scratch: Path = Path("benchmarks/scratch")
    reports: Path = Path("benchmarks")


def ingest(job: Benchmark) -> None:
    """Measure reading and conversion."""
    config = _located(job, job.ingest)
    with ray_session(job.store, config.num_processes) as address:
        found = ingest_plane.run(config, job.store / job.scratch, address, say)
    _tell(job, "ingest", found, report.table(found))


def train(job: Benchmark) -> None:
    """Measure training; without Ray, where it is not installed."""
    session = None if find_spec("ray") is None else partial(ray_session, job.store)
    found = training.run(_located(job, job.train), job.store / job.scratch, session, say)
    _tell(job, "train", found, training_report.table(found))


def serve(job: Benchmark) -> None:
    """Measure the endpoint and its peers."""
    config = _located(job, job.serve).at(job.data_folder)
    found = _servers.measure(config, job.store, job.store / job.scratch, say)
    _tell(job, "serve", found, serving_report.table(found))


def _located(job: Benchmark, config: ConfigT | None) -> ConfigT:
    if config is None:
        raise ConfigError("expected the key that the command names (ingest, train, serve); see jobs/configs/benchmark")
    return config.model_copy(update={"sources": tuple(s.at(job.data_folder, job.store) for s in config.sources)})


def _tell(job: Benchmark, plane: str, found: rounds.Facts, table: str) -> None:
    path = job.store / job.reports / f"{plane}.json"
    storage.write(str(path), found.model_dump_json(indent=1).encode())
    print(f"{table}\nreport   {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.benchmark ingest|train|serve [config.yaml] [key=value ...]."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    planes = {"ingest": ingest, "train": train, "serve": serve}
    if verb not in planes:
        print("error: expected what to measure: python -m jobs.benchmark ingest (or train, serve)", file=sys.stderr)
        return 2
    named = any(word.endswith((".yaml", ".yml")) and "=" not in word for word in rest)
    return run(Benchmark, planes[verb], rest if named else [str(CONFIGS / f"{verb}.yaml"), *rest])


if __name__ == "__main__":
    sys.exit(main())
