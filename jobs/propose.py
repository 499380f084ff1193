"""Search the images of a dataset for regions that may hold an object, for detectors that are told where to look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from jobs._run import Job, progress, ray_session, run
from pipeline.data import proposals, regions, shards
from pipeline.data.proposals import Figures, Name
from pipeline.types import Split


class Propose(Job):
    """What is searched, how, and what the result is called.

    Attributes:
        shards: the dataset; a relative path lies in `storage`; `<folder>@<version>` names an older version.
        splits: by default all that it has; those that were made earlier stay.
        name: the proposals lie in `<shards>/proposals/<name>`; by default `<mode>-<max_proposals>`.
        num_cpus: of the local Ray, where there is no cluster.
    """

    shards: Path
    splits: tuple[Split, ...] | None = Field(default=None, min_length=1)
    search: regions.Config = regions.Config()
    name: Name | None = None
    num_cpus: int = Field(default=2, ge=1)


def propose(job: Propose) -> None:
    """Do it, and say where the regions are and how much of what was annotated they cover."""
    source = shards.load(job.store / job.shards)
    regions.opencv_version()  # what is not installed is found before Ray starts
    with ray_session(job.store, job.num_cpus):
        found = proposals.make(source, job.search, name=job.name, splits=job.splits, progress=progress("images"))
    for split, figures in found.made.splits.items():
        print(
            f"{split:8} {figures.num_images} images, {figures.mean_regions:.0f} regions and "
            f"{figures.seconds_per_image:.2f} s each"
        )
        print(f"{split:8} {_covered(figures)}")
    print(f"proposals {found.path}")


def _covered(figures: Figures) -> str:
    if figures.recall_at_iou_0_5 is None:
        return "no object is annotated"
    return (
        f"recall {figures.recall_at_iou_0_5:.3f} at IoU 0.5, {figures.recall_at_iou_0_7:.3f} at IoU 0.7, mean best "
        f"overlap {figures.mean_best_overlap:.3f}, of {figures.num_objects} objects"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.propose jobs/configs/propose/voc_bccd.yaml [key=value ...]."""
    return run(Propose, propose, argv)


if __name__ == "__main__":
    sys.exit(main())
