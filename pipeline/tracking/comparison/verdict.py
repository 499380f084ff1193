"""Which group should be champion, and how sure we are: every other group against the one in the lead.

A difference counts as real where both questions of `significance` say so: over images (the weaker of McNemar's test
between the typical runs and the bootstrap over all seeds) and, where both sides have several, over seeds. Each asks
whether the first group is better: a test that favours the other group has p = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import DataError
from pipeline.tracking.comparison import significance
from pipeline.tracking.comparison.evidence import TOP, Metric, Trial
from pipeline.tracking.comparison.groups import Group
from pipeline.tracking.predictions import Predictions
from pipeline.types import Int64Array

ALPHA = 0.05
NAMES: dict[Metric, str] = {"top1": "top-1", "top5": "top-5"}


@dataclass(frozen=True)
class Changes:
    """The images on which two runs disagree, as rows of their predictions, the surest errors first.

    Attributes:
        lost: the earlier run was right, the later one is wrong.
        won: the reverse.
    """

    lost: Int64Array
    won: Int64Array


@dataclass(frozen=True)
class Contrast:
    """A group against the better one.

    Attributes:
        difference: how far the better one is ahead, by the metric.
        images: the same with its interval over images; None without predictions of both.
        mcnemar_p: of their typical runs.
        seeds_p: None where a side has a single seed, which cannot be tested.
        p: the weakest of all, raised for the number of contrasts made; None where images cannot testify.
    """

    better: Group
    other: Group
    difference: float
    images: significance.Interval | None = None
    mcnemar_p: float | None = None
    seeds_p: float | None = None
    p: float | None = None

    @property
    def images_p(self) -> float | None:
        """The weaker of both tests over images."""
        if self.images is None or self.mcnemar_p is None:
            return None
        return max(self.images.p, self.mcnemar_p)

    @property
    def weakest(self) -> float | None:
        """The weaker of images and seeds, of this contrast alone."""
        return None if self.images_p is None else max(self.images_p, self.seeds_p or 0.0)

    def holds(self, alpha: float) -> bool:
        """Whether the difference is shown to be real."""
        return self.p is not None and self.p < alpha and self.difference > 0


@dataclass(frozen=True)
class Verdict:
    """What the comparison says.

    Attributes:
        ranked: all groups, best first.
        contrasts: of each other group with the first, in that order.
        comparable: whether all were evaluated on the same data, and say so.
    """

    metric: Metric
    alpha: float
    ranked: tuple[Group, ...]
    contrasts: tuple[Contrast, ...]
    comparable: bool = True

    @property
    def leader(self) -> Group:
        """The group of the highest mean."""
        return self.ranked[0]

    @property
    def champion(self) -> Trial | None:
        """The best run of the leader, if that is shown to be better than every other group."""
        sure = self.contrasts and all(contrast.holds(self.alpha) for contrast in self.contrasts)
        return self.leader.best(self.metric) if sure else None

    def sentence(self) -> str:
        """Which should be champion and how sure we are, for people."""
        name, leader = NAMES[self.metric], self.leader
        value = f"mean {name} {percent(leader.mean(self.metric))}"
        if not self.contrasts:
            return f"Only {leader.name} is here ({value}): there is nothing to choose between."
        if not self.comparable:
            return (
                f"Nothing can be said about a champion: the groups were evaluated on different or unknown data, so "
                f"that {leader.name}'s {value} and the others' values may answer different questions."
            )
        closest = max(self.contrasts, key=lambda each: (each.p is None, each.p or 0.0))
        gap = f"{points(closest.difference)} above {closest.other.name}{_interval(closest)}"
        if closest.p is None:
            return (
                f"{leader.name} leads with {value}, {gap}, but how sure that is cannot be told: predictions of single "
                "images were not logged; evaluate again."
            )
        if self.champion is not None:
            return (
                f"{leader.name} should be champion (its best run: {self.champion.name}): {value}, {gap}, and the "
                f"difference is real by the weaker of its tests, p = {probability(closest.p)} where less than "
                f"{self.alpha:g} is asked; {_seeds(closest)}."
            )
        open_ones = [contrast.other.name for contrast in self.contrasts if not contrast.holds(self.alpha)]
        return (
            f"No champion is shown: {leader.name} leads with {value}, {gap}, but {_listed(open_ones)} may be as good, "
            f"p = {probability(closest.p)} where less than {self.alpha:g} is asked; {_seeds(closest)}."
        )


def judge(groups: Sequence[Group], metric: Metric = "top1", alpha: float = ALPHA, *, mixed: bool = False) -> Verdict:
    """Rank the groups and test the best against each other one.

    Args:
        groups: at least one.
        metric: that decides.
        alpha: share of false alarms that is accepted among all contrasts together.
        mixed: go on where groups were evaluated on different or unknown data or by other views; nothing is tested then.

    Raises:
        DataError: the data differ or are unknown, and `mixed` is not set.
    """
    comparable = _check_data([trial for group in groups for trial in group.trials], mixed=mixed)
    ranked = sorted(groups, key=lambda group: -group.mean(metric))
    made = [
        contrast(ranked[0], other, metric)
        if comparable
        else Contrast(ranked[0], other, ranked[0].mean(metric) - other.mean(metric))
        for other in ranked[1:]
    ]
    tested = [each for each in made if each.weakest is not None]
    raised = iter(significance.holm([each.weakest for each in tested if each.weakest is not None]))
    final = [each if each.weakest is None else replace(each, p=next(raised)) for each in made]
    return Verdict(metric, alpha, tuple(ranked), tuple(final), comparable)


def contrast(
    better: Group, other: Group, metric: Metric, seeds: tuple[Sequence[float], Sequence[float]] | None = None
) -> Contrast:
    """Test one group against another.

    Args:
        better: the one that is expected to be ahead.
        other: evaluated on the same data.
        metric: whose difference is tested.
        seeds: values of runs of both recipes, where they are others than the groups' own.

    Raises:
        DataError: the predictions are not of the same images.
    """
    values = seeds or (better.values(metric), other.values(metric))
    found = Contrast(better, other, better.mean(metric) - other.mean(metric), seeds_p=significance.welch(*values))
    said = better.typical(metric).predictions, other.typical(metric).predictions
    shares = better.shares(metric), other.shares(metric)
    if said[0] is None or said[1] is None or shares[0] is None or shares[1] is None:
        return found
    check_same_images(said[0], said[1])
    top = TOP[metric]
    found = replace(
        found,
        images=significance.bootstrap(shares[0] - shares[1]),
        mcnemar_p=significance.mcnemar(said[0].right(top), said[1].right(top)),
    )
    return replace(found, p=found.weakest)


def changes(earlier: Predictions, later: Predictions, metric: Metric = "top1") -> Changes:
    """The images that changed from right to wrong, and from wrong to right.

    Raises:
        DataError: the predictions are not of the same images.
    """
    check_same_images(earlier, later)
    before, after = earlier.right(TOP[metric]), later.right(TOP[metric])
    lost, won = np.flatnonzero(before & ~after), np.flatnonzero(~before & after)
    return Changes(
        lost[np.argsort(-later.confidence[lost], kind="stable")],
        won[np.argsort(-earlier.confidence[won], kind="stable")],
    )


def check_same_images(first: Predictions, second: Predictions) -> None:
    """Make sure that two tables speak of the same images, with the same truth.

    Raises:
        DataError: they do not.
    """
    same = np.array_equal(first.ids, second.ids) and np.array_equal(first.labels, second.labels)
    if not same or first.origin.classes != second.origin.classes:
        raise DataError(
            f"the predictions to be compared are of {len(first)} and {len(second)} images that are not the same ones, "
            f"though both name the dataset {first.origin.dataset_digest[:12]}; evaluate both models again"
        )


def percent(value: float) -> str:
    """A share as people read it."""
    return f"{100 * value:.2f} %"


def points(difference: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * difference:.2f} points"


def probability(p: float) -> str:
    """A p-value with two digits; what the tests cannot resolve is given as a bound."""
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"


def _check_data(trials: Sequence[Trial], *, mixed: bool) -> bool:
    by_data: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        by_data.setdefault((trial.digest, trial.measured_on), []).append(trial.name)
    are_known = all(digest for digest, _ in by_data)
    if len(trials) == 1 or (len(by_data) == 1 and are_known):
        return True
    if not mixed:
        told = "; ".join(f"{data}: {_listed(names)}" for (_, data), names in by_data.items())
        several = "unknown data" if len(by_data) == 1 else f"{len(by_data)} different datasets or views"
        raise DataError(
            f"the runs were evaluated on {several} ({told}), so that their metrics may answer different questions; "
            "compare runs of one known dataset and one kind of views, or set mixed=true to see them side by side "
            "untested"
        )
    return False


def _interval(contrast: Contrast) -> str:
    if contrast.images is None:
        return ""
    return f" (95 % interval {100 * contrast.images.low:+.2f} to {100 * contrast.images.high:+.2f})"


def _seeds(contrast: Contrast) -> str:
    sides = len(contrast.better.trials), len(contrast.other.trials)
    if contrast.seeds_p is None:
        return "another seed might say otherwise, for there is only one on a side"
    weaker = "seeds" if contrast.seeds_p >= (contrast.images_p or 0.0) else "images"
    return f"{sides[0]} and {sides[1]} seeds testify, and the {weaker} are the weaker witness"


def _listed(names: Sequence[str]) -> str:
    if len(names) <= 1:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
