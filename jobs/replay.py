"""Tell MLflow what it has missed of a run: a job that ended while the server was away left it in the run's journal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field

from jobs._run import Job, run, tracking_uri
from pipeline.errors import TrackingError
from pipeline.tracking import registry, shipping


class Replay(Job):
    """Which run or sweep, by the name of its folder in `storage/runs` or `storage/sweeps`, and how long to try."""

    run: str = Field(pattern=registry.NAME)
    timeout_s: float = Field(default=600, gt=0)


def replay(job: Replay) -> None:
    """Do it, and say that it is done.

    Raises:
        TrackingError: something is left.
    """
    places = [job.store / kind / job.run for kind in ("runs", "sweeps")]
    folder = next((place for place in places if place.exists()), places[0])
    with tracking_uri(job.store) as uri:
        left = shipping.replay(folder, uri, job.timeout_s)
        if left:
            raise TrackingError(f"{folder}: {left} entries are left; {uri} does not take them now, try again later")
        print(f"{job.run}: MLflow at {uri} knows everything")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.replay run=lenet5_mnist."""
    return run(Replay, replay, argv)


if __name__ == "__main__":
    sys.exit(main())
