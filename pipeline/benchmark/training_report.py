"""What the training benchmark found: every block, ratios between blocks of one round, and the table a person reads."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from pipeline.benchmark.clock import Figures
from pipeline.benchmark.flops import Format
from pipeline.benchmark.rounds import Facts, Spread, aligned, circumstances, spread
from pipeline.benchmark.training_block import Data, Way
from pipeline.config import Strict
from pipeline.models._contract import ModelConfig

TITLES: dict[Way, str] = {"loop": "loop", "ray": "loop under Ray Train", "script": "plain script"}
GOAL = 1.03
"""What Ray Train's step may take of the plain loop's."""


class Block(Strict):
    """What was measured under one name: a case, its data, and the way it was trained.

    Attributes:
        device: `cpu`, or the name of the card.
        flop_per_image: that the model needs, forward and backward.
        peak: FLOP/s of one worker's card in `number_format`; None where it is not stated.
    """

    case: str
    data: Data
    way: Way
    num_workers: int
    device: str
    threads: int
    number_format: Format
    flop_per_image: int
    peak: float | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        workers = f"{self.num_workers} worker{'s' * (self.num_workers > 1)}"
        return f"{self.case}, {self.data}, {TITLES[self.way]}, {workers}"


class Report(Facts):
    """All of it, as the JSON file holds it.

    Attributes:
        models: of each case.
        blocks: by name.
        left_out: what was not measured, and why.
    """

    models: dict[str, dict[str, object]]
    blocks: dict[str, Block]
    rounds: tuple[dict[str, Figures], ...]
    left_out: dict[str, str] = Field(default_factory=dict)

    def of(self, name: str, value: Callable[[Figures], float]) -> Spread:
        """One figure of one block, over the rounds."""
        return spread([value(found[name]) for found in self.rounds])

    def ratio(self, name: str, other: str, value: Callable[[Figures], float]) -> Spread:
        """The figure of one block by that of another, round by round."""
        return spread([value(found[name]) / value(found[other]) for found in self.rounds])

    def rival(self, name: str, way: Way) -> str | None:
        """What was trained in another way and is the same in everything else."""
        if self.blocks[name].way == way:
            return None
        other = self.blocks[name].model_copy(update={"way": way}).name
        return other if other in self.blocks else None

    def utilisation(self, name: str) -> Spread | None:
        """Model FLOP/s by what the cards of all workers could do."""
        block = self.blocks[name]
        if block.peak is None:
            return None
        per_image = block.flop_per_image / (block.peak * block.num_workers)
        return self.of(name, lambda figures: figures.images_per_s * per_image)

    def on_cpu(self, name: str) -> str | None:
        """The loop on this machine's CPU with the same model and data, for a loop on a card; its fastest."""
        block, model = self.blocks[name], self.models[self.blocks[name].case]
        if block.device == "cpu" or block.way != "loop":
            return None
        same = [
            other
            for other, found in self.blocks.items()
            if found.device == "cpu" and (found.way, found.data) == ("loop", block.data)
            if self.models[found.case] == model
        ]
        return max(same, key=lambda other: self.of(other, _rate).median, default=None)


def model_of(config: ModelConfig) -> dict[str, object]:
    """A model's configuration, to be compared with others."""
    return config.model_dump(mode="json")


def table(report: Report) -> str:
    """What a person reads."""
    head = ("", "step ms", "mean", "images/s", "/ loop", "/ script", "data wait", "start", "memory", "GPU", "MFU")
    lines = aligned([head, *(_line(report, name) for name in report.blocks)])
    return "\n".join([*lines, "", *_sentences(report)])


def _line(report: Report, name: str) -> tuple[str, ...]:
    gpu = report.of(name, lambda figures: figures.gpu_bytes or 0).most
    utilisation = report.utilisation(name)
    return (
        name,
        report.of(name, _step_ms).shown(1),
        f"{report.of(name, lambda figures: figures.mean_step_ms).median:.1f}",
        f"{report.of(name, _rate).median:.0f}",
        _ratio(report, name, "loop"),
        _ratio(report, name, "script"),
        f"{report.of(name, lambda figures: figures.wait_share).median:.1%}",
        f"{report.of(name, lambda figures: figures.start_s).median:.1f} s",
        f"{report.of(name, lambda figures: figures.peak_bytes).median / 2**20:.0f} MiB",
        f"{gpu / 2**20:.0f} MiB" if gpu else "-",
        "-" if utilisation is None else f"{utilisation.median:.1%}",
    )


def _ratio(report: Report, name: str, way: Way) -> str:
    rival = report.rival(name, way)
    return "-" if rival is None else report.ratio(name, rival, _step_ms).shown(3)


def _sentences(report: Report) -> list[str]:
    lines = ["step: median of a block, with the smallest and largest of the rounds; ratios are of step times"]
    for name, block in report.blocks.items():
        if block.way == "ray" and (loop := report.rival(name, "loop")):
            ratio = report.ratio(name, loop, _step_ms).median
            lines.append(f"{name}: {ratio:.3f} times the loop's step without Ray; {GOAL} is the limit")
        if cpu := report.on_cpu(name):
            lines.append(f"{name}: {report.ratio(name, cpu, _rate).median:.0f} times the images/s of {cpu}")
    lines += _about_cards(report)
    lines += [f"{name}: left out, {reason}" for name, reason in report.left_out.items()]
    shares = [figures.others_share for found in report.rounds for figures in found.values()]
    return lines + circumstances(report, len(report.rounds), shares)


def _about_cards(report: Report) -> list[str]:
    """What MFU is a share of; nothing is said of a CPU, which states no such figure."""
    on_cards = {(block.device, block.number_format, block.peak) for block in report.blocks.values()}
    lines = []
    for card, number_format, peak in sorted(on_cards, key=str):
        if card == "cpu":
            continue
        stated = (
            f"MFU is a share of {peak / 1e12:.1f} TFLOP/s" if peak else "no MFU, its peak is not stated in flops.py"
        )
        lines.append(f"{card}, {number_format}: {stated}")
    return lines or ["Not measured on a GPU: there is none."]


def _step_ms(figures: Figures) -> float:
    return figures.step_ms


def _rate(figures: Figures) -> float:
    return figures.images_per_s
