"""Move an alias, such as champion, to a version of a registered model, if that is proven better than the holder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs._run import Job, run, tracking_uri
from pipeline.tracking import gate as gates
from pipeline.tracking import registry
from pipeline.tracking.gate import Gate


class Promote(Job):
    """Which version an alias means from now on.

    Attributes:
        gate: what the version must prove against the present holder of the alias.
        force: promote it although the gate does not hold; its tag says so.
    """

    model: str
    version: int
    alias: str = registry.CHAMPION
    gate: Gate = Gate()
    force: bool = False


def promote(job: Promote) -> None:
    """Do it, and say what the alias means now, and why."""
    with tracking_uri(job.store) as uri:
        version, reason = gates.promote(uri, job.model, str(job.version), job.alias, gate=job.gate, force=job.force)
    print(f"{version.name}@{job.alias} is version {version.version}")
    print(f"reason   {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.promote model=digits version=2 [gate.min_improvement=0.005 ...]."""
    return run(Promote, promote, argv)


if __name__ == "__main__":
    sys.exit(main())
