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
from pipeline.data.shards import Manifest
from pipeline.types import Split


class Preprocess(Job):
    """What is read, how, and where the shards go.

    Attributes:
        shards: folder of the finished dataset; a relative path lies in `storage`.
        append: where `shards` holds an older state of the same collection, add the images that are new.
        num_cpus: of the local Ray, where there is no cluster.
    """

    dataset: AnyDataset
    ingest: Ingest = Ingest()
    shards: Path
    append: bool = False
    num_cpus: int = Field(default=2, ge=1)


def preprocess(job: Preprocess) -> None:
    """Do it, and say what was made."""
    dataset = job.dataset.at(job.data_root, job.store)
    datasets.class_names(dataset)  # a wrong folder is found before Ray starts
    with ray_session(job.store, job.num_cpus):
        made = ingest(dataset, job.ingest, job.store / job.shards, progress("images"), append=job.append)
    manifest = made.manifest
    for split in dataset.splits:
        print(
            f"{split:8} {manifest.num_rows(split)} images in {len(manifest.of(split))} shards{_boxes(manifest, split)}"
        )
    print(f"classes  {len(manifest.classes)}")
    print(f"rejects  {manifest.num_rejects}  (reasons in {made.path / manifest.rejects[-1]})")
    for split, pixels in manifest.pixels.items():
        mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (pixels.mean, pixels.std))
        height, width = manifest.sizes[split].mean_hw
        print(f"{split:8} mean {mean}  std {std}  size {height:.0f} x {width:.0f} on average")
    print(f"digest   {manifest.digest[:16]}")
    print(f"version  {manifest.version}")
    print(f"shards   {made.path}")


def _boxes(manifest: Manifest, split: Split) -> str:
    total = sum(manifest.object_counts[split])
    return f", {total} boxes" if total else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.preprocess jobs/configs/preprocess/digits.yaml [key=value ...]."""
    return run(Preprocess, preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
