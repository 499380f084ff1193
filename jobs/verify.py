"""Check that shards are whole and sound, and that no picture is in two splits: a table, a JSON file, an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from jobs._run import Job, progress, ray_session, run
from pipeline.data import shards
from pipeline.data.findings import Config
from pipeline.data.verify import verify as look
from pipeline.errors import DataError


class Verify(Job):
    """What is checked.

    Attributes:
        shards: the dataset; a relative path lies in `storage`; `<folder>@<version>` names an older version.
        report: where the JSON goes; a relative path lies in `storage`. By default beside the dataset:
            `<shards>.verify.json`.
        num_cpus: of the local Ray, where there is no cluster.
    """

    shards: Path
    verify: Config = Config()
    report: Path | None = None
    num_cpus: int = Field(default=2, ge=1)


def verify(job: Verify) -> None:
    """Check, print what was found, and write it down.

    Raises:
        DataError: there are errors; it comes after the table.
    """
    folder = job.store / job.shards
    source = shards.load(folder)
    path = job.store / job.report if job.report else folder.with_name(f"{folder.name}.verify.json")
    with ray_session(job.store, job.num_cpus):
        report = look(source, job.verify, progress("images"))
    report.write(path)
    if report.counts:
        print(report.table())
    print(f"images   {report.num_images} in {report.num_shards} shards")
    print(f"errors   {report.total('error')}")
    print(f"warnings {report.total('warning')}")
    print(f"report   {path}")
    if report.total("error"):
        raise DataError(f"{source.path}: verification found {report.total('error')} errors; they are listed in {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.verify shards=shards/photos [verify.strict=true]."""
    return run(Verify, verify, argv)


if __name__ == "__main__":
    sys.exit(main())
