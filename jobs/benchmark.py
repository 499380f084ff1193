"""Measure this project against its peers in one run: `ingest` (photos to batches, originals to shards)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from jobs._run import Job, ray_session, run
from pipeline.benchmark import ingest as plane
from pipeline.benchmark.report import table

CONFIG = Path(__file__).parent / "configs" / "benchmark" / "ingest.yaml"


class Ingest(Job):
    """What is measured and where the figures go.

    Attributes:
        ingest: the benchmark itself.
        scratch: folder for the contenders' files, which are removed at the end; a relative path lies in `storage`.
        report: the JSON file; a relative path lies in `storage`.
    """

    ingest: plane.Config
    scratch: Path = Path("benchmarks/scratch")
    report: Path = Path("benchmarks/ingest.json")


def ingest(job: Ingest) -> None:
    """Measure, print the table and write everything down."""
    sources = tuple(source.at(job.data_folder, job.store) for source in job.ingest.sources)
    config = job.ingest.model_copy(update={"sources": sources})
    with ray_session(job.store, config.num_processes):
        address = ray.get_runtime_context().gcs_address
        report = plane.run(config, job.store / job.scratch, address, lambda line: print(line, flush=True))
    path = job.store / job.report
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.model_dump(mode="json"), indent=1))
    print(table(report))
    print(f"report   {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.benchmark ingest [config.yaml] [key=value ...]."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["ingest"]:
        print("error: expected what to measure: python -m jobs.benchmark ingest [config.yaml]", file=sys.stderr)
        return 2
    rest = words[1:]
    if not any(word.endswith((".yaml", ".yml")) and "=" not in word for word in rest):
        rest = [str(CONFIG), *rest]
    return run(Ingest, ingest, rest)


if __name__ == "__main__":
    sys.exit(main())
