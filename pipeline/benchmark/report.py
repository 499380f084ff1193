"""What the ingest benchmark found: every block, ratios between blocks of one round, and the table a person reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import Field

from pipeline.benchmark.block import Figures
from pipeline.benchmark.contender import CONTENDERS, LIMIT, LOCAL, RAY, Decoder
from pipeline.benchmark.rounds import Facts, Spread, aligned, circumstances, spread
from pipeline.config import Strict

Round = dict[str, Figures]
"""The blocks of one round, by contender."""


class Conversion(Strict):
    """How fast original photos become shards.

    Attributes:
        images_per_s: of each converter, round by round.
        ratios: of each of ours to the peer's, round by round.
        levers: milliseconds per photo on one core, of each step in each way.
    """

    num_images: int
    images_per_s: dict[str, tuple[float, ...]]
    ratios: dict[str, tuple[float, ...]]
    levers: dict[str, float]
    others_share: float


class Report(Facts):
    """All of it, as the JSON file holds it.

    Attributes:
        missing: contenders whose library is not installed.
    """

    rounds: tuple[Round, ...]
    missing: dict[str, str] = Field(default_factory=dict)
    conversion: Conversion | None = None

    def ratio(self, name: str, others: Iterable[str]) -> Spread | None:
        """Steady rate of one contender to that of the fastest of others, round by round."""
        rivals = [other for other in others if other != name and other in self.rounds[0]]
        if not rivals:
            return None
        return spread(
            [found[name].images_per_s / max(found[rival].images_per_s for rival in rivals) for found in self.rounds]
        )


def peers(decoder: Decoder) -> list[str]:
    """The contenders from elsewhere that decode in one way."""
    return [name for name, entry in CONTENDERS.items() if entry.group == "peer" and entry.decoder == decoder]


def table(report: Report) -> str:
    """What a person reads."""
    head = ("", "images/s", "/ limit", "/ best same", "/ best documented", "first", "restart", "memory", "spilled")
    lines = aligned([head, *(_line(report, name) for name in report.rounds[0])])
    return "\n".join([*lines, "", *_sentences(report)])


def _line(report: Report, name: str) -> tuple[str, ...]:
    def of(value: Callable[[Figures], float]) -> Spread:
        return spread([value(found[name]) for found in report.rounds])

    ratios = (
        report.ratio(name, [LIMIT]),
        report.ratio(name, peers("same")),
        report.ratio(name, peers("documented")),
    )
    return (
        name,
        of(lambda block: block.images_per_s).shown(0),
        *(_ratio(found) for found in ratios),
        f"{of(lambda block: block.first_batch_s).median:.2f} s",
        f"{of(lambda block: block.restart_s).median:.2f} s",
        f"{of(lambda block: block.peak_bytes).median / 2**20:.0f} MiB",
        f"{of(lambda block: block.spilled_bytes).most / 2**20:.0f} MiB",
    )


def _ratio(found: Spread | None) -> str:
    return "-" if found is None else found.shown(2)


def _sentences(report: Report) -> list[str]:
    lines = [f"{name}: left out, '{library}' is not installed" for name, library in report.missing.items()]
    if RAY in report.rounds[0] and (ours := report.ratio(RAY, [LOCAL])) is not None:
        lines.append(f"{RAY} / {LOCAL}: {ours.shown(2)}")
    conversion = report.conversion
    if conversion is not None:
        lines.append(f"{conversion.num_images} original photos to short side 256 in shards, images/s:")
        for name, rates in conversion.images_per_s.items():
            ratio = f", ratio {_ratio(spread(conversion.ratios[name]))}" if name in conversion.ratios else ""
            lines.append(f"  {name}: {spread(rates).shown(0)}{ratio}")
        lines += [f"  {name}: {ms:.2f} ms" for name, ms in conversion.levers.items()]
    shares = [block.others_share for found in report.rounds for block in found.values()]
    if conversion is not None:
        shares.append(conversion.others_share)
    return lines + circumstances(report, len(report.rounds), shares)
