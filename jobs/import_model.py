"""Register weights that were trained elsewhere, so that they are evaluated and served without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs._run import Job, run, tracking_uri
from pipeline.inference import golden, importing
from pipeline.tracking import registry, runs
from pipeline.training.experiment import Registration


class ImportModel(Job):
    """Which weights become which model; relative paths lie in `data_root`.

    Attributes:
        golden: a folder of a few images. What the model says of them is kept in the bundle, and a version that says
            something else where it is about to be served is not; None: nothing of the kind is checked.
    """

    source: importing.Config
    golden: Path | None = None
    register_as: Registration
    tracking: runs.Config = runs.Config(experiment="import")


def import_model(job: ImportModel) -> None:
    """Make the bundle, register it, and say under which version."""
    images = [] if job.golden is None else golden.in_folder(job.data_folder / job.golden.expanduser())
    bundle = importing.bundle_from(job.source, job.data_folder, job.store / "runs" / f"import-{job.register_as.model}")
    if images:
        golden.keep(bundle, images)
    with (
        tracking_uri(job.store) as uri,
        runs.start(uri, job.tracking, params=bundle.card.provenance, tags={}) as tracked,
    ):
        version = registry.publish(tracked, bundle, job.register_as.model)
        if job.register_as.alias is not None:
            reason = f"imported by run {tracked.id}, {registry.NO_GATE}"
            version = registry.promote(uri, version.name, version.version, job.register_as.alias, reason)
    print(f"bundle   {bundle.path}")
    kept = f"{len(images)} images" if images else "none, so nothing is rehearsed before it is served; see `golden`"
    print(f"golden   {kept}")
    print(f"model    {version.name} version {version.version} ({', '.join(version.aliases) or 'no alias'})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.import_model jobs/configs/import_model/alexnet_imagenet.yaml."""
    return run(ImportModel, import_model, argv)


if __name__ == "__main__":
    sys.exit(main())
