"""Stop exactly the servers that `make up` or a kept job left running."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs._run import Job, run
from jobs._stack import Stack


class Down(Job):
    """Whose servers: those written down in `storage`."""


def down(job: Down) -> None:
    """Stop them, and say which there were."""
    stopped = Stack.down(job.store)
    print("stopped  " + (", ".join(service.name for service in stopped) or "nothing: no stack was up"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.down."""
    return run(Down, down, argv)


if __name__ == "__main__":
    sys.exit(main())
