"""Which of these runs should be champion, and how sure are we? Runs, experiments or models, compared on one page.

The parts are in `pipeline.tracking.comparison`: evidence is fetched, runs that differ in their seed only are grouped,
groups are tested against the best, and the answer is told as text and as a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from pipeline.config import Strict, nearest
from pipeline.errors import ConfigError
from pipeline.tracking.comparison import evidence, groups, page, table
from pipeline.tracking.comparison.evidence import Metric, Trial
from pipeline.tracking.comparison.groups import Group
from pipeline.tracking.comparison.page import Pair
from pipeline.tracking.comparison.thumbnails import thumbnails
from pipeline.tracking.comparison.verdict import ALPHA, Verdict, changes, judge
from pipeline.types import Split


class Config(Strict):
    """How runs are compared.

    Attributes:
        metric: that decides: a share of images, so that images can testify.
        split: whose images testify.
        alpha: how rarely a false alarm may happen, among all groups together.
        baseline: group or run that the best one is held against class by class and image by image; the second best by
            default.
        mixed: show runs that were evaluated on different or unknown data side by side, without any test.
        max_pictures: of each kind of change.
    """

    metric: Metric = "top1"
    split: Split = "val"
    alpha: float = Field(default=ALPHA, gt=0, lt=1)
    baseline: str | None = None
    mixed: bool = False
    max_pictures: int = Field(default=24, ge=0)


@dataclass(frozen=True)
class Comparison:
    """What was found: `text()` for a terminal, `html()` for a browser."""

    uri: str
    verdict: Verdict
    pair: Pair | None
    notes: tuple[str, ...]
    config: Config

    def text(self) -> str:
        """The answer, the groups, the tests and what differs."""
        return table.text(self.verdict, self.notes)

    def html(self) -> str:
        """A page that needs no other file."""
        return page.html(self.verdict, self.pair, self.notes, server=self.uri, max_pictures=self.config.max_pictures)


def compare(uri: str, references: Sequence[str], config: Config | None = None) -> Comparison:
    """Compare runs.

    Args:
        uri: address of the MLflow server.
        references: run ids, names of experiments, or registered models (`name@alias`, `name/3`).
        config: the metric, the split and the level of significance.

    Raises:
        ConfigError: nothing was named, or an unknown baseline.
        DataError: the runs were evaluated on different data.
        TrackingError: the server does not answer, or knows no such run, experiment or model.
    """
    if not references:
        raise ConfigError("expected runs, experiments or models to compare, got none; name at least one")
    config = config or Config()
    return conclude(uri, evidence.gather(uri, references, config.split), config)


def conclude(uri: str, trials: Sequence[Trial], config: Config) -> Comparison:
    """Compare runs whose evidence is at hand; nothing is asked of the server any more.

    Raises:
        ConfigError: an unknown baseline.
        DataError: the runs were evaluated on different data.
    """
    grouped, notes = groups.by_recipe(trials)
    verdict = judge(grouped, config.metric, config.alpha, mixed=config.mixed)
    return Comparison(uri, verdict, _pair(verdict, config), tuple(notes), config)


def _pair(verdict: Verdict, config: Config) -> Pair | None:
    """The best group and the one that it is held against, where both saw the same images."""
    chosen = _baseline(verdict, config.baseline)
    if len(verdict.ranked) < 2 or not verdict.comparable:
        return None
    earlier = verdict.ranked[1] if chosen in (None, verdict.leader) else chosen
    assert earlier is not None
    before, after = earlier.typical(config.metric), verdict.leader.typical(config.metric)
    if before.predictions is None or after.predictions is None:
        return Pair(earlier, verdict.leader)
    found = changes(before.predictions, after.predictions, config.metric)
    rows = [*found.lost[: config.max_pictures], *found.won[: config.max_pictures]]
    pictures = thumbnails(after, [str(after.predictions.ids[row]) for row in rows])
    return Pair(earlier, verdict.leader, found, pictures)


def _baseline(verdict: Verdict, name: str | None) -> Group | None:
    if name is None:
        return None
    for group in verdict.ranked:
        if name == group.name or any(name in (trial.id, trial.name, trial.version) for trial in group.trials):
            return group
    known = [group.name for group in verdict.ranked]
    raise ConfigError(f"baseline: there is no group or run '{name}'; {nearest(name, known)}")
