"""Which configurations a sweep tries: decided, named and checked before anything starts. No Ray.

Cases are named sets of changes, such as the ablations of a paper. The space is crossed with them: every value of a
`grid`, and `num_samples` draws from what is not one. Every case and point of the grid gets the same draws, so that
they are compared on equal terms; the draws follow from the seed alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Strict, changed, parse
from pipeline.errors import ConfigError
from pipeline.training import experiment

Changes = dict[str, Any]
"""Values by the path of their key, as on the command line: `{"training.recipe.optim.lr": 0.01}`."""


class Values(Strict):
    """What one key takes; one of these.

    Attributes:
        grid: each of these.
        choice: one of these, drawn.
        uniform: a number from the first to the second.
        log_uniform: the same, its logarithm being uniform.
        int_uniform: a whole number from the first to the second, both included.
    """

    grid: tuple[Any, ...] | None = Field(default=None, min_length=1)
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(given := self.model_fields_set) != 1:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}, got {sorted(given) or 'none'}")
        for least, most in filter(None, (self.uniform, self.log_uniform, self.int_uniform)):
            if not least < most:
                raise ValueError(f"expected the smaller end first, got {least} and {most}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: expected ends above 0, got {self.log_uniform[0]}")
        return self

    def draw(self, rng: np.random.Generator) -> Any:
        """One value; of a grid there is nothing to draw."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        if self.int_uniform is not None:
            return int(rng.integers(self.int_uniform[0], self.int_uniform[1], endpoint=True))
        if self.log_uniform is not None:
            least, most = self.log_uniform
            return math.exp(rng.uniform(math.log(least), math.log(most)))
        assert self.uniform is not None
        return float(rng.uniform(*self.uniform))


class EarlyStopping(Strict):
    """ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2).

    Attributes:
        grace_epochs: every trial has so many.
        reduction_factor: after 1, f, f^2, ... times as many, the best 1/f of those that came so far go on.
    """

    grace_epochs: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=3, ge=2)


class Config(Strict):
    """What is tried.

    Attributes:
        cases: changes by name; none: the training as it is.
        space: what each key takes.
        num_samples: draws of what is drawn.
        seed: of the draws.
        concurrent: trials that run at the same time.
        early_stopping: of trials that look bad beside the others; None: all run to their end.
    """

    cases: dict[str, Changes] = Field(default_factory=dict)
    space: dict[str, Values] = Field(default_factory=dict)
    num_samples: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    concurrent: int = Field(default=1, ge=1)
    early_stopping: EarlyStopping | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that some trial changes."""
        return tuple(dict.fromkeys([*itertools.chain(*self.cases.values()), *self.space]))


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of a sweep.

    Attributes:
        name: of its run.
        changes: what sets it apart.
        training: the whole configuration.
    """

    name: str
    changes: Changes = field(hash=False)
    training: experiment.Config = field(hash=False)


def expand(name: str, training: experiment.Config, config: Config) -> tuple[Trial, ...]:
    """All trials of the sweep called `name`, the same each time.

    Raises:
        ConfigError: with every trial that cannot be run, and why.
    """
    found, mistakes = list[Trial](), list[str]()
    base = {"training": training.model_dump(mode="json", exclude_unset=True)}
    for number, (case, changes) in enumerate(_changes(config)):
        parts = (name, case, f"{number:03d}" if config.space or not case else "")
        trial = "-".join(filter(None, parts))
        try:
            raw = changed(base, changes)
            if raw.keys() - base.keys():
                raise ConfigError(f"expected keys of the training, such as training.recipe.seed, got {sorted(changes)}")
            found.append(Trial(trial, changes, parse(experiment.Config, raw["training"], f"trial {trial}: training")))
        except ConfigError as error:
            mistakes.append(str(error))
    if len({(trial.training.recipe.watch.metric, trial.training.recipe.watch.mode) for trial in found}) > 1:
        mistakes.append("expected one watched metric for all trials, got several; leave training.recipe.watch out")
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return tuple(found)


def _changes(config: Config) -> Iterator[tuple[str, Changes]]:
    """The name of the case, and what is changed, of each trial."""
    grids = {key: values.grid for key, values in config.space.items() if values.grid is not None}
    drawn = {key: values for key, values in config.space.items() if values.grid is None}
    rng = np.random.default_rng(config.seed)
    draws = [{key: values.draw(rng) for key, values in drawn.items()} for _ in range(config.num_samples)]
    for case, changes in (config.cases or {"": {}}).items():
        for point in itertools.product(*grids.values()):
            for sample in draws if drawn else [{}]:
                yield case, {**changes, **dict(zip(grids, point, strict=True)), **sample}
