"""Measure this project: `ingest` (photos to batches, originals to shards) or `train` (steps, with and without Ray)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from jobs._run import Job, ray_session, run
from pipeline import storage
from pipeline.benchmark import ingest as ingest_plane
from pipeline.benchmark import report, rounds, training, training_report
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs" / "benchmark"
ConfigT = TypeVar("ConfigT", ingest_plane.Config, training.Config)


class Benchmark(Job):
    """What is measured, by one of two keys; folders for its files, which are removed, and for the reports in JSON."""

    ingest: ingest_plane.Config | None = None
    train: training.Config | None = None
    scratch: Path = Path("benchmarks/scratch")
    reports: Path = Path("benchmarks")


def ingest(job: Benchmark) -> None:
    """Measure reading and conversion."""
    config = _located(job, job.ingest)
    with _ray(job, config.num_processes) as address:
        found = ingest_plane.run(config, job.store / job.scratch, address, partial(print, flush=True))
    _tell(job, "ingest", found, report.table(found))


def train(job: Benchmark) -> None:
    """Measure training; without Ray, where it is not installed."""
    session = None if find_spec("ray") is None else partial(_ray, job)
    found = training.run(_located(job, job.train), job.store / job.scratch, session, partial(print, flush=True))
    _tell(job, "train", found, training_report.table(found))


@contextmanager
def _ray(job: Benchmark, num_cpus: int) -> Iterator[str]:
    with ray_session(job.store, num_cpus):
        import ray  # noqa: PLC0415  (as in jobs._run)

        yield ray.get_runtime_context().gcs_address


def _located(job: Benchmark, config: ConfigT | None) -> ConfigT:
    if config is None:
        raise ConfigError("expected the key that the command names, ingest or train; see jobs/configs/benchmark")
    return config.model_copy(update={"sources": tuple(s.at(job.data_folder, job.store) for s in config.sources)})


def _tell(job: Benchmark, plane: str, found: rounds.Facts, table: str) -> None:
    path = job.store / job.reports / f"{plane}.json"
    storage.write(str(path), found.model_dump_json(indent=1).encode())
    print(f"{table}\nreport   {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.benchmark ingest|train [config.yaml] [key=value ...]."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    planes = {"ingest": ingest, "train": train}
    if verb not in planes:
        print("error: expected what to measure: python -m jobs.benchmark ingest (or train)", file=sys.stderr)
        return 2
    named = any(word.endswith((".yaml", ".yml")) and "=" not in word for word in rest)
    return run(Benchmark, planes[verb], rest if named else [str(CONFIGS / f"{verb}.yaml"), *rest])


if __name__ == "__main__":
    sys.exit(main())
