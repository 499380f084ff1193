"""How every plane measures: each block in a process of its own, rounds in turn, ratios within a round only.

Each round runs one block of everything that is measured, beginning with another one than the round before, so that
whatever slows the machine for a while meets all of them alike. Blocks of one round, minutes apart at most, may be
divided by each other; what is said of many rounds is the median, with the smallest and the largest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from pipeline import provenance
from pipeline.benchmark import machine
from pipeline.config import Strict
from pipeline.errors import DataError

ResultT = TypeVar("ResultT")
StrictT = TypeVar("StrictT", bound=Strict)
Say = Callable[[str], None]
"""Told what begins."""


class Spread(NamedTuple):
    """Median, smallest and largest of some figures."""

    median: float
    least: float
    most: float

    def shown(self, digits: int) -> str:
        """As a cell of a table."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}..{self.most:.{digits}f})"


class Facts(Strict):
    """What any report says of its circumstances.

    Attributes:
        quiet_share: of the machine's CPU time, that others may take before it is called busy.
        load: average over one minute, before and after.
    """

    commit: str
    versions: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    quiet_share: float
    load: tuple[float, float]


def facts(config: Strict, quiet_share: float, load_before: float) -> dict[str, Any]:
    """The fields of `Facts`, at the end of a run."""
    return {
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": machine.described(),
        "config": config.model_dump(mode="json"),
        "quiet_share": quiet_share,
        "load": (load_before, os.getloadavg()[0]),
    }


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(median(values), min(values), max(values))


@contextmanager
def workspace(scratch: Path) -> Iterator[Path]:
    """A new folder in `scratch`, which is removed at the end whatever happens."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def take_turns(
    names: Sequence[str], num_rounds: int, measure: Callable[[str, str], ResultT]
) -> tuple[dict[str, ResultT], ...]:
    """What `measure(name, round)` gives for every name in every round; `round` is `2/5` or the like, for people."""
    found = [
        {name: measure(name, f"{number + 1}/{num_rounds}") for name in rotated(names, number)}
        for number in range(num_rounds)
    ]
    return tuple({name: blocks[name] for name in names} for blocks in found)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of one round: another one first each time."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def in_process(
    main: Callable[[Path, Path], None],
    task: Strict,
    answer: type[StrictT],
    scratch: Path,
    env: Mapping[str, str] | None = None,
) -> StrictT | None:
    """Have `main` do a task in a process of its own: it reads the task's JSON and may write an answer's.

    Args:
        main: a function of a module, which the process imports.
        scratch: folder for both files.
        env: variables that the process is given on top.

    Raises:
        DataError: it failed; the message holds its last words.
    """
    asked, answered = scratch / "task.json", scratch / "result.json"
    asked.write_text(task.model_dump_json())
    answered.unlink(missing_ok=True)
    code = (
        f"import sys, pathlib; from {main.__module__} import {main.__name__} as m; m(*map(pathlib.Path, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(asked), str(answered)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    if ended.returncode != 0:
        words = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        raise DataError(f"its process failed: {words[0]}")
    return answer.model_validate_json(answered.read_bytes()) if answered.exists() else None


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column to the left, all others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]


def circumstances(report: Facts, num_rounds: int, others_shares: Sequence[float]) -> list[str]:
    """How busy the machine was, in a sentence or two; a warning where others took much of it in any block."""
    lines = [f"load average {report.load[0]:.2f} before, {report.load[1]:.2f} after; {num_rounds} rounds"]
    if (worst := max(others_shares)) > report.quiet_share:
        lines.append(
            f"The machine was not quiet: other processes took up to {worst:.0%} of its CPU time in a block, more than "
            f"{report.quiet_share:.0%}; measure again when nothing else runs."
        )
    return lines
