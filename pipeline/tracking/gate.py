"""The gate before an alias: a version is promoted only if it is better than the one that holds the alias, and provably.

Both must have been evaluated on the same data, image by image; the difference must be large enough and real by the
weaker of its tests (`comparison.significance`). Why an alias moved, also past a gate, is written to the version.

MLflow cannot compare and set: of two promotions in one moment both may pass, and the later one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from pipeline.config import Strict
from pipeline.errors import DataError, ModelError
from pipeline.tracking import registry
from pipeline.tracking.comparison import evidence, groups
from pipeline.tracking.comparison.evidence import Metric, Trial
from pipeline.tracking.comparison.groups import Group
from pipeline.tracking.comparison.verdict import ALPHA, NAMES, Contrast, contrast, percent, points, probability
from pipeline.tracking.predictions import model_tag
from pipeline.tracking.registry import Version
from pipeline.types import Split


class Gate(Strict):
    """What is asked of a version before it takes an alias from another.

    Attributes:
        metric: in which it must be better.
        split: on whose images.
        min_improvement: by how much at least; 0.005 is half a percentage point.
        alpha: how small the p-value of the difference must be.
    """

    metric: Metric = "top1"
    split: Split = "val"
    min_improvement: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=ALPHA, gt=0, le=1)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the gate holds, and the figures."""

    holds: bool
    reason: str


def promote(
    uri: str, name: str, version: str, alias: str = registry.CHAMPION, *, gate: Gate, force: bool = False
) -> tuple[Version, str]:
    """Move an alias if the gate holds, or anyway where that is forced, and write the reason to the version.

    Args:
        uri: address of the server.
        name: of the registered model.
        version: that is to be promoted.
        alias: that moves.
        gate: what is asked.
        force: promote also where the gate does not hold; the version's tag says so.

    Returns:
        The promoted version and the reason.

    Raises:
        ConfigError: the alias could be mistaken for a version.
        ModelError: the gate does not hold.
        TrackingError: there is no such version, or the server does not answer.
    """
    decision = decide(uri, registry.resolve(uri, f"{name}/{version}"), registry.holder(uri, name, alias), gate)
    if not (decision.holds or force):
        raise ModelError(
            f"{name}/{version} does not become {alias}: {decision.reason}; force=true promotes it all the same"
        )
    reason = decision.reason if decision.holds else f"forced, though the gate does not hold: {decision.reason}"
    return registry.promote(uri, name, version, alias, reason), reason


def decide(uri: str, candidate: Version, holder: Version | None, gate: Gate) -> Decision:
    """Judge a version against the present holder of an alias.

    Raises:
        TrackingError: the server does not answer.
    """
    if holder is None:
        return Decision(True, "nobody held the alias")
    if holder.version == candidate.version:
        return Decision(True, "it holds the alias already")
    mine, theirs = (evidence.of_version(uri, each, gate.split) for each in (candidate, holder))
    said = [_image_by_image(*each, gate.split) for each in ((candidate, mine), (holder, theirs))]
    pair = next(((ours, other) for ours in said[0] for other in said[1] if _measured_alike(ours, other)), None)
    if pair is None:
        return Decision(False, _no_pair((candidate, holder), said, gate.split))
    ours, other = (evidence.complete(uri, trial) for trial in pair)
    if ours.predictions is None or other.predictions is None:
        return Decision(False, f"the predictions of {_name(candidate)} or {_name(holder)} were deleted; evaluate again")
    seeds = _seeds(uri, _own_run(candidate, mine), _own_run(holder, theirs), gate, ours)
    try:
        sides = Group(_name(candidate), (ours,)), Group(_name(holder), (other,))
        found = contrast(*sides, gate.metric, seeds or ([], []))
    except DataError as error:
        return Decision(False, str(error))
    return Decision(_holds(found, gate), _figures(found, gate, ours, seeds))


def _holds(found: Contrast, gate: Gate) -> bool:
    enough = found.difference > 0 and found.difference >= gate.min_improvement - 1e-12
    return enough and found.weakest is not None and found.weakest < gate.alpha


def _figures(found: Contrast, gate: Gate, ours: Trial, seeds: tuple[list[float], list[float]] | None) -> str:
    better, other = found.better, found.other
    assert found.images is not None
    assert found.mcnemar_p is not None
    assert found.weakest is not None
    assert ours.predictions is not None
    witnesses = f"McNemar {probability(found.mcnemar_p)}, bootstrap {probability(found.images.p)}"
    if seeds and found.seeds_p is not None:
        witnesses += f", {len(seeds[0])} against {len(seeds[1])} seeds {probability(found.seeds_p)}"
        means = [sum(side) / len(side) for side in seeds]
        if means[0] < means[1]:
            witnesses += f", for their means, {percent(means[0])} and {percent(means[1])}, say the opposite"
    return (
        f"{NAMES[gate.metric]} on {gate.split} is {percent(better.mean(gate.metric))} against "
        f"{percent(other.mean(gate.metric))} of {other.name}, {points(found.difference)} better where at least "
        f"{points(gate.min_improvement)} is asked, and p = {probability(found.weakest)} where less than {gate.alpha:g} "
        f"is asked ({witnesses}), on {len(ours.predictions):,} images of data {ours.measured_on}"
    )


def _image_by_image(version: Version, trials: Sequence[Trial], split: Split) -> list[Trial]:
    """The runs that evaluated just this model and kept what was said of every image, newest first."""
    return [trial for trial in trials if trial.tags.get(model_tag(split)) == version.identity]


def _no_pair(versions: tuple[Version, Version], said: Sequence[Sequence[Trial]], split: Split) -> str:
    """Why two versions cannot be compared."""
    for version, trials in zip(versions, said, strict=True):
        if not trials:
            return (
                f"{_name(version)} was never evaluated image by image on '{split}'; run python -m jobs.evaluate "
                f"model={_name(version)} split={split} shards=... first"
            )
    data = [", ".join(sorted({trial.measured_on for trial in trials})) for trials in said]
    return (
        f"it was evaluated on data {data[0]}, but {_name(versions[1])} on {data[1]}; evaluate both on the same shards "
        "and views with jobs.evaluate"
    )


def _measured_alike(ours: Trial, other: Trial) -> bool:
    return ours.digest == other.digest != "" and ours.views == other.views


def _own_run(version: Version, trials: Sequence[Trial]) -> Trial | None:
    """The run that trained a version."""
    return next((trial for trial in trials if trial.id == version.run_id), None)


def _seeds(
    uri: str, ours: Trial | None, other: Trial | None, gate: Gate, judged: Trial
) -> tuple[list[float], list[float]] | None:
    """The metric of all seeds of both recipes, measured as `judged` was; None where that is one recipe, or has no seed.

    Two seeds of one recipe are two models: the images alone say which is better.
    """
    if ours is None or other is None or groups.recipe(ours) == groups.recipe(other):
        return None
    mine, theirs = (_siblings(uri, trial, gate, judged) for trial in (ours, other))
    return (mine, theirs)


def _siblings(uri: str, trial: Trial, gate: Gate, judged: Trial) -> list[float]:
    """The metric of the finished runs in a run's experiment that differ from it in their seed only, itself included."""
    key = f"final/{gate.split}/{gate.metric}"
    runs = [
        each
        for each in evidence.finished(uri, trial.experiment_id, gate.split)
        if groups.recipe(each) == groups.recipe(trial) and _measured_alike(each, judged)
    ]
    latest = {groups.seed(each): each.metrics[key] for each in runs if key in each.metrics}
    return list(latest.values())


def _name(version: Version) -> str:
    return f"{version.name}/{version.version}"
