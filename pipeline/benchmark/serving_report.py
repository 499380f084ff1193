"""What the serving benchmark found: every block, ratios within a round, whether all answers are the same, the goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from pipeline.benchmark.rounds import Facts, Spread, aligned, circumstances, spread
from pipeline.benchmark.serving_block import Block, Level
from pipeline.benchmark.serving_model import BATCH, Bare
from pipeline.config import Strict

Group = Literal["limit", "own", "documented", "given"]
Value = Callable[[Level], float]
OURS, NULL = "ventral", "no model (limit of the load generator)"
DOCUMENTED, GIVEN = "bare model, as documented", "bare model, ours"
DOCUMENTED_GOAL, GIVEN_GOAL = 2.5, 1.1
"""What our requests/s should be of the best peer's, at `GOAL_CLIENTS`; at one client our median should be the least."""
GOAL_CLIENTS = 16
LEAST_AGREEMENT = 0.95
"""Of the best classes; a reduced precision may turn a tie."""


class Round(Strict):
    """The blocks of one round, by name."""

    blocks: dict[str, Block]
    bare: dict[str, Bare]


class Report(Facts):
    """All of it, as the JSON file holds it.

    Attributes:
        weights: which ones all servers have.
        pictures: what was sent.
        groups: of the servers.
        missing: servers whose package is not installed.
    """

    weights: str
    pictures: str
    groups: dict[str, Group]
    rounds: tuple[Round, ...]
    missing: dict[str, str] = Field(default_factory=dict)

    def levels(self, name: str, clients: int) -> list[Level] | None:
        """What so many clients met, round by round; None where a request failed in any of them."""
        found = [one.blocks[name].levels[clients] for one in self.rounds]
        return None if any(level.num_errors for level in found) else found

    def peers(self, group: Group, clients: int) -> list[str]:
        """The servers of a group whose requests at so many clients were all answered."""
        return [name for name, its in self.groups.items() if its == group and self.levels(name, clients)]

    def ratio(self, others: Sequence[str], clients: int, value: Value, best: Callable[..., float]) -> Spread | None:
        """Ours to the best of others, round by round; None without others, or where a request of ours failed."""
        ours = self.levels(OURS, clients) if OURS in self.groups else None
        if ours is None or not others:
            return None
        rivals = [self.levels(name, clients) or [] for name in others]
        rows = zip(ours, *rivals, strict=True)
        return spread([value(own) / best(map(value, peers)) for own, *peers in rows])

    def agreement(self, name: str) -> float:
        """The share of pictures, over all rounds, whose best class is that of the fp32 model without a server."""
        pairs = [
            (said, right)
            for one in self.rounds
            for said, right in zip(one.blocks[name].top1, one.bare[DOCUMENTED].top1, strict=True)
            if said is not None
        ]
        return sum(said == right for said, right in pairs) / max(len(pairs), 1)


def table(report: Report) -> str:
    """What a person reads."""
    clients = sorted(report.rounds[0].blocks[next(iter(report.groups))].levels)
    head = ["", *(cell for count in clients for cell in (f"at {count}: req/s", "p50 ms", "p99 ms", "CPU ms"))]
    lines = [_line(report, name, clients) for name in report.groups]
    return "\n".join([*aligned([[*head, "same answer"], *lines]), "", *_sentences(report, clients)])


def _line(report: Report, name: str, clients: Sequence[int]) -> list[str]:
    cells = [cell for count in clients for cell in _cells(report.levels(name, count))]
    return [name, *cells, "-" if report.groups[name] == "limit" else f"{report.agreement(name):.0%}"]


def _cells(levels: Sequence[Level] | None) -> tuple[str, ...]:
    if levels is None:
        return "failed", "-", "-", "-"
    rate = spread([level.requests_per_s for level in levels])
    times = [median(value(level) for level in levels) for value in (_p50, _p99, _cpu)]
    return rate.shown(0), *(f"{ms:.1f}" for ms in times)


def _sentences(report: Report, clients: Sequence[int]) -> list[str]:
    lines = [f"{report.pictures}; {report.weights}; CPU: of the server's processes, for a request"]
    lines += [f"{name}: {_bare(report, name)}" for name in (DOCUMENTED, GIVEN)]
    if NULL in report.groups:
        own = [level.client_cpu_ms for one in report.rounds for level in one.blocks[NULL].levels.values()]
        lines.append(f"the load generator takes {median(own):.2f} ms of CPU time for a request, on one core at most")
    if GOAL_CLIENTS in clients:
        lines += _goal(report, "documented", DOCUMENTED_GOAL) + _goal(report, "given", GIVEN_GOAL)
    if 1 in clients:
        rivals = report.peers("documented", 1) + report.peers("given", 1)
        if (found := report.ratio(rivals, 1, _p50, min)) is not None:
            lines.append(f"at 1 client: our p50 / the least of all peers': {found.shown(2)}; less than 1 is the goal")
    lines += _doubts(report, clients)
    lines += [f"{name}: left out, '{package}' is not installed" for name, package in report.missing.items()]
    shares = [
        level.others_share for one in report.rounds for found in one.blocks.values() for level in found.levels.values()
    ]
    shares += [bare.others_share for one in report.rounds for bare in one.bare.values()]
    return lines + circumstances(report, len(report.rounds), shares)


def _bare(report: Report, name: str) -> str:
    found = [one.bare[name] for one in report.rounds]
    one, many = (median(bare.forward_per_s[size] for bare in found) for size in (1, BATCH))
    whole = spread([bare.whole_per_s for bare in found])
    alone = median(bare.whole_ms for bare in found)
    return (
        f"{one:.0f} images/s forward at batch 1, {many:.0f} at {BATCH}; "
        f"with decoding {whole.shown(0)} in batches, {alone:.1f} ms one at a time"
    )


def _goal(report: Report, group: Group, goal: float) -> list[str]:
    rivals = report.peers(group, GOAL_CLIENTS)
    found = report.ratio(rivals, GOAL_CLIENTS, _rate, max)
    if found is None:
        return []
    best = max(rivals, key=lambda name: median(map(_rate, report.levels(name, GOAL_CLIENTS) or [])))
    return [
        f"at {GOAL_CLIENTS} clients: our requests/s / those of the best ({best}): {found.shown(2)}; {goal} is the goal"
    ]


def _doubts(report: Report, clients: Sequence[int]) -> list[str]:
    """Requests that failed, answers that differ."""
    lines = []
    for name, group in report.groups.items():
        for count in clients:
            failed = [level for one in report.rounds if (level := one.blocks[name].levels[count]).num_errors]
            if failed:
                number = sum(level.num_errors for level in failed)
                lines.append(f"{name}: {number} requests failed at {count} clients, so no figure: {failed[0].error}")
        if group != "limit" and report.agreement(name) < LEAST_AGREEMENT:
            lines.append(f"{name}: only {report.agreement(name):.0%} of its answers are those of the fp32 model")
    return lines


def _rate(level: Level) -> float:
    return level.requests_per_s


def _p50(level: Level) -> float:
    return level.p50_ms


def _p99(level: Level) -> float:
    return level.p99_ms


def _cpu(level: Level) -> float:
    return level.cpu_ms
