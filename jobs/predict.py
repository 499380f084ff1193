"""Predict many images with Ray Data: a folder, shards or a list of paths in; Parquet out; resumable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from jobs._run import Job, bundle_of, progress, ray_session, run, tracking_uri
from pipeline.data import shards
from pipeline.inference import bulk, results
from pipeline.types import Split


class Predict(Job):
    """What is predicted by what; exactly one of `folder`, `shards` and `list` is given.

    Attributes:
        model: `name@alias` or `name/3` in the registry, or the folder of a bundle.
        folder: images below it, in `data_root`.
        shards: with `split`, a dataset in `storage`.
        list: Parquet or CSV with a column `uri`, or text with a path on each line, in `data_root`.
        output: folder of the Parquet parts, in `storage`; a run that was stopped goes on there.
        forms: of a detector's answers, beside Parquet: `jsonl`, `coco`, `voc`.
    """

    model: str
    folder: Path | None = None
    shards: Path | None = None
    split: Split = "val"
    list: Path | None = None
    output: Path
    kept: bulk.Kept = bulk.Kept()
    forms: tuple[results.Form, ...] = ()
    images_per_part: int = Field(default=1024, ge=1)
    num_workers: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _one_input(self) -> Predict:
        if sum(value is not None for value in (self.folder, self.shards, self.list)) != 1:
            raise ValueError("expected exactly one of folder, shards and list")
        return self

    def inputs(self) -> bulk.Inputs:
        """The images, in order."""
        if self.folder is not None:
            return bulk.from_folder(self.data_folder / self.folder)
        if self.shards is not None:
            return bulk.from_shards(shards.load(self.store / self.shards), self.split)
        return bulk.from_list(self.data_folder / str(self.list), self.data_folder)


def predict(job: Predict) -> None:
    """Do it, and say where the answers are."""
    inputs = job.inputs()
    with tracking_uri(job.store) as uri:
        bundle = bundle_of(job.model, uri, job.store)
    results.check(job.forms, bundle.card.task)
    with ray_session(job.store, job.num_workers):
        output = bulk.predict(
            bundle,
            inputs,
            job.store / job.output,
            kept=job.kept,
            **job.model_dump(include={"images_per_part", "num_workers"}),
            progress=progress("images"),
        )
    made = results.write(bulk.parts_of(output), bundle.card.classes, output, job.forms)
    print("\n         ".join([f"images   {inputs.num_images}\noutput   {output}", *map(str, made)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.predict model=digits@champion folder=photos output=answers."""
    return run(Predict, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
