"""Measure which engine and precision answer quickest and still as fp32 does, and make a bundle that uses them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from jobs._run import Job, bundle_of, run, tracking_uri
from pipeline.config import flatten
from pipeline.data import shards
from pipeline.data.proposals import Name
from pipeline.evaluation import tuning
from pipeline.inference import bundle
from pipeline.tracking import registry, runs
from pipeline.tracking.registry import Version
from pipeline.types import Split


class Optimize(Job):
    """Which model is measured on what.

    Attributes:
        model: `name@alias` or `name/3` in the registry, which gets a new version, or the folder of a bundle.
        shards: the dataset; a relative path lies in `storage`.
        proposals: name of those that `jobs.propose` made of the dataset, for a detector that judges given regions.
        device: that will answer.
        tune: how engines are measured, and what is asked of them.
    """

    model: str
    shards: Path
    split: Split = "val"
    proposals: Name | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    tune: tuning.Config = tuning.Config()
    tracking: runs.Config = runs.Config(experiment="optimize")


def optimize(job: Optimize) -> None:
    """Measure, and write the bundle; of a registered model, register it too. No alias moves."""
    source = shards.load(job.store / job.shards)
    in_folder = (Path(job.model) / bundle.CARD).exists()
    with nullcontext("") if in_folder else tracking_uri(job.store) as uri:
        version = None if in_folder else registry.resolve(uri, job.model)
        origin = f"{version.name}/{version.version}" if version else job.model
        made = bundle_of(origin, uri, job.store)
        found = tuning.tune(made, source, job.split, job.tune, proposals=job.proposals, device=job.device, say=print)
        print(found.table())
        if found.chosen.engine == made.card.engine:
            print(f"nothing to write: {made.card.engine} is what it uses already")
            return
        name = origin.replace("/", "-") if version else Path(job.model).resolve().name
        written = found.write(job.store / "optimized" / f"{name}-{found.chosen.engine}", origin if version else name)
        print(f"bundle   {written.path}")
        if version is not None:
            known = registry.published(uri, written, version.name, f"tags.optimized_from = '{origin}'")
            ours = known or _register(job, uri, version, found, written)
            print(f"model    {ours.name} version {ours.version} (no alias moves)")
            print(f"promote  python -m jobs.promote model={ours.name} version={ours.version} force=true")


def _register(job: Optimize, uri: str, of: Version, found: tuning.Tuning, written: bundle.Bundle) -> Version:
    manifest = found.source.manifest
    tags = {"dataset_digest": manifest.digest, "optimized_from": f"{of.name}/{of.version}"}
    with runs.start(uri, job.tracking, params=flatten(job), tags=tags) as tracked:
        tracked.log_dataset(manifest.dataset, manifest.digest, found.source.address, job.split)
        tracked.log_text("engines.txt", found.table())
        return registry.publish(tracked, written, of.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.optimize model=digits@champion shards=shards/digits."""
    return run(Optimize, optimize, argv)


if __name__ == "__main__":
    sys.exit(main())
