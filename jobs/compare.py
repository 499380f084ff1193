"""Which of these runs should be champion, and how sure are we? Name runs, experiments or models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from jobs._run import Job, run, tracking_uri
from pipeline.tracking import compare as comparison


class Compare(Job):
    """What is compared, and where the page goes.

    Attributes:
        what: run ids, names of experiments, or registered models (`name@alias`, `name/3`); on the command line simply
            words.
        page: the HTML page; a relative path lies in `storage`.
    """

    what: tuple[str, ...] = Field(min_length=1)
    compare: comparison.Config = comparison.Config()
    page: Path = Path("comparison.html")


def compare(job: Compare) -> None:
    """Print the table, and write the page."""
    with tracking_uri(job.store) as uri:
        found = comparison.compare(uri, job.what, job.compare)
    path = job.store / job.page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.html())
    print(f"{found.text()}\n\npage  {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.compare mnist [lenet5-mnist@champion ...] [compare.metric=top5 ...]."""
    return run(Compare, compare, _as_keys(sys.argv[1:] if argv is None else argv))


def _as_keys(argv: Sequence[str]) -> list[str]:
    """Words that are no option, no `key=value` and no YAML file name what is compared."""
    words = [word for word in argv if not word.startswith("-") and "=" not in word and not word.endswith(".yaml")]
    others = [word for word in argv if word not in words]
    return [*others, f"what={json.dumps(words)}"] if words else others


if __name__ == "__main__":
    sys.exit(main())
