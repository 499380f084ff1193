"""Turn a collection of images into validated Parquet shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from jobs._run import Job, progress, ray_session, run
from pipeline.data import datasets
from pipeline.data.datasets import AnyDataset
from pipeline.data.ingest import Config as Ingest
from pipeline.data.ingest import ingest


class Preprocess(Job):
    """What is read, how, and where the shards go.

    Attributes:
        shards: folder of the finished dataset; a relative path lies in `storage`.
        num_cpus: of the local Ray, where there is no cluster.
    """

    dataset: AnyDataset
    ingest: Ingest = Ingest()
    shards: Path
    num_cpus: int = Field(default=2, ge=1)


def preprocess(job: Preprocess) -> None:
    """Do it, and say what was made."""
    dataset = job.dataset.at(job.data_root, job.store)
    datasets.class_names(dataset)  # a wrong folder is found before Ray starts
    with ray_session(job.store, job.num_cpus):
        made = ingest(dataset, job.ingest, job.store / job.shards, progress("images"))
    manifest = made.manifest
    for split in dataset.splits:
        print(f"{split:8} {manifest.num_rows(split)} images in {len(manifest.of(split))} shards")
    print(f"classes  {len(manifest.classes)}")
    print(f"rejects  {manifest.num_rejects}  (reasons in {made.path / 'rejects.parquet'})")
    print(f"digest   {manifest.digest[:16]}")
    print(f"shards   {made.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.preprocess jobs/configs/preprocess/digits.yaml [key=value ...]."""
    return run(Preprocess, preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
