"""The comparison in a terminal: the answer first, then the groups, the tests and the parameters that differ."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from pipeline.tracking.comparison import groups as grouping
from pipeline.tracking.comparison.groups import Group
from pipeline.tracking.comparison.verdict import Verdict, percent, points, probability

MAX_VALUE = 28  # letters of a parameter's value


def text(verdict: Verdict, notes: Sequence[str] = ()) -> str:
    """All of it, ready to print."""
    width = shutil.get_terminal_size((100, 24)).columns
    parts = [
        textwrap.fill(verdict.sentence(), width),
        grid([_HEAD, *(_row(verdict, group) for group in verdict.ranked)]),
    ]
    if verdict.contrasts:
        rows = [["against the first", "ahead by", "95 % interval", "p images", "p seeds", "p, all tests"]]
        for each in verdict.contrasts:
            interval = f"{100 * each.images.low:+.2f} to {100 * each.images.high:+.2f}" if each.images else ""
            p_values = [_p(value) for value in (each.images_p, each.seeds_p, each.p)]
            rows.append([each.other.name, points(each.difference), interval, *p_values])
        parts.append(grid(rows))
    differing = grouping.differences(verdict.ranked)
    if differing:
        rows = [["differs", *(group.name for group in verdict.ranked)]]
        rows += [[row.key, *(_cut(value) for value in row.values)] for row in differing]
        parts.append(grid(rows))
    parts += [textwrap.fill(f"Note: {note}", width) for note in notes]
    return "\n\n".join(parts)


_HEAD = ["group", "runs", "seeds", "metric", "mean", "+-", "images/s", "seconds"]


def _row(verdict: Verdict, group: Group) -> list[str]:
    std = group.std(verdict.metric)
    speed = group.averaged("images_per_s")
    return [
        group.name,
        str(len(group.trials)),
        ",".join(grouping.seed(trial) for trial in group.trials) or "-",
        verdict.metric,
        percent(group.mean(verdict.metric)),
        "" if std is None else f"{100 * std:.2f}",
        f"{sum(speed) / len(speed):.0f}" if speed else "",
        f"{sum(trial.seconds for trial in group.trials) / len(group.trials):.0f}",
    ]


def _p(value: float | None) -> str:
    return "" if value is None else probability(value)


def _cut(value: str) -> str:
    return value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}\u2026"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
