"""Move an alias, such as champion, to a version of a registered model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs._run import Job, run, tracking_uri
from pipeline.tracking import registry


class Promote(Job):
    """Which version an alias means from now on."""

    model: str
    version: int
    alias: str = registry.CHAMPION


def promote(job: Promote) -> None:
    """Do it, and say what the alias means now."""
    with tracking_uri(job.store) as uri:
        version = registry.promote(uri, job.model, str(job.version), job.alias)
    print(f"{version.name}@{job.alias} is version {version.version}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.promote model=digits version=2."""
    return run(Promote, promote, argv)


if __name__ == "__main__":
    sys.exit(main())
