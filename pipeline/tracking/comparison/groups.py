"""Runs that differ in nothing but their seed are one group: its mean says what a recipe gives.

Its spread says how far a single run of it is to be trusted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from pipeline.tracking.comparison.evidence import TOP, Metric, Trial

ADMINISTRATIVE = (
    *("tracking", "register_as", "resume", "storage", "data_root", "report"),
    *("checkpoints", "cluster.max_failures", "evaluate"),
)
"""Parts of a configuration that say where results go and what is kept, not what they are."""
COMMIT = "mlflow.source.git.commit"
NONE = "\u2013"


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, ordered by seed."""

    name: str
    trials: tuple[Trial, ...]

    def values(self, metric: Metric) -> list[float]:
        """The metric of each run."""
        return [trial.value(metric) for trial in self.trials]

    def mean(self, metric: Metric) -> float:
        """Over the seeds."""
        return float(np.mean(self.values(metric)))

    def std(self, metric: Metric) -> float | None:
        """Over the seeds, of the sample; None for a single one."""
        return spread(self.values(metric))

    def typical(self, metric: Metric) -> Trial:
        """The run that stands in the middle by the metric (of two, the lower): it speaks for the group."""
        ranked = sorted(self.trials, key=lambda trial: trial.value(metric))
        return ranked[(len(ranked) - 1) // 2]

    def best(self, metric: Metric) -> Trial:
        """The run of the highest value."""
        return max(self.trials, key=lambda trial: trial.value(metric))

    def shares(self, metric: Metric) -> npt.NDArray[np.float64] | None:
        """For each image the share of seeds that are right, float64 [N]; None where no run logged predictions."""
        said = [trial.predictions for trial in self.trials if trial.predictions is not None]
        return np.mean([each.right(TOP[metric]) for each in said], axis=0) if said else None

    def logged(self, key: str) -> list[float]:
        """What the runs logged under a name; those without it are left out."""
        return [trial.metrics[key] for trial in self.trials if key in trial.metrics]

    def averaged(self, key: str) -> list[float]:
        """The mean over all epochs of what the runs logged in each; those without it are left out."""
        curves = [trial.curves.get(key, ()) for trial in self.trials]
        return [float(np.mean([value for _, value in curve])) for curve in curves if curve]


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same everywhere, with its value in each group."""

    key: str
    values: tuple[str, ...]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def by_recipe(trials: Iterable[Trial]) -> tuple[list[Group], list[str]]:
    """Group runs, in the order in which each recipe first came.

    Returns:
        The groups, and a sentence for each run that was left out because the same recipe and seed ran again later.
    """
    found: dict[object, dict[str, Trial]] = defaultdict(dict)
    notes = []
    for trial in sorted(trials, key=lambda trial: trial.start_ms):
        seeds = found[recipe(trial)]
        if seed(trial) in seeds:
            earlier = seeds[seed(trial)]
            notes.append(f"Run {earlier.name} ({earlier.id[:8]}) is left out: {trial.name} is a later one of its seed.")
        seeds[seed(trial)] = trial
    members = [tuple(seeds[key] for key in sorted(seeds, key=_natural)) for seeds in found.values()]
    return [Group(name, runs) for name, runs in zip(_names(members), members, strict=True)], notes


def recipe(trial: Trial) -> object:
    """What two runs must share to be of one group. A run without a seed (an evaluation) shares it with none."""
    if not _seeds(trial.params):
        return trial.id
    return frozenset((key, value) for key, value in params(trial).items() if _decides(key))


def params(trial: Trial) -> dict[str, str]:
    """The parameters of a run; of one that was resumed with another value both: `0.1, then 0.01`."""
    later = {key: trial.tags.get(f"resumed.{key}", value) for key, value in trial.params.items()}
    return {key: value if later[key] == value else f"{value}, then {later[key]}" for key, value in trial.params.items()}


def seed(trial: Trial) -> str:
    """The seed or seeds of a run, as text; "" where it has none."""
    return ", ".join(trial.params[key] for key in _seeds(trial.params))


def differences(groups: Sequence[Group]) -> list[Difference]:
    """The parameters, and the commit, that differ between groups; those of the seed and of bookkeeping are left out."""
    told = [_described(group) for group in groups]
    keys = sorted({key for described in told for key in described})
    rows = [Difference(key, tuple(described.get(key, NONE) for described in told)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _described(group: Group) -> dict[str, str]:
    first = params(group.trials[0])
    commits = sorted({trial.tags.get(COMMIT, "unknown")[:8] for trial in group.trials})
    return {key: value for key, value in first.items() if _decides(key)} | {"commit": ", ".join(commits)}


def _decides(key: str) -> bool:
    """Whether a parameter can change a result."""
    is_administrative = any(key == part or key.startswith(f"{part}.") for part in ADMINISTRATIVE)
    return not is_administrative and key.rsplit(".", maxsplit=1)[-1] != "seed"


def _seeds(params: Mapping[str, str]) -> list[str]:
    return sorted(key for key in params if key.split(".")[-1] == "seed")


def _natural(text: str) -> list[tuple[int, str]]:
    """Order numbers within text by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _names(members: Sequence[Sequence[Trial]]) -> list[str]:
    """What the names of a group's runs have in common; letters where that is nothing or not unique."""
    common = [_common([trial.version or trial.name for trial in runs]) for runs in members]
    if all(common) and len(set(common)) == len(common):
        return common
    return [f"{name} ({_letter(place)})" if name else _letter(place) for place, name in enumerate(common)]


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = "".join(letters[0] for letters in same)
    return start if start in names else re.sub(r"([\W_]+(seed|s)?|seed)?[\W_]*$", "", start.rstrip("0123456789"))


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"group {place + 1}"
