"""Which epoch was the best, when to stop, when to lower the rate: pure functions of one metric's values so far.

The values of the watched metric, one an epoch, are the whole state. They go into the checkpoint as a list of numbers,
and every answer follows from them, so a resumed run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline.config import Strict, nearest
from pipeline.errors import ConfigError

Mode = Literal["min", "max"]
LESS_IS_BETTER = ("loss", "error", "err", "nll", "brier", "ece", "mae", "mse", "rmse", "perplexity")
MORE_IS_BETTER = (
    *("top1", "top5", "accuracy", "recall", "precision", "f1", "iou", "miou", "auc", "auroc"),
    *("map", "map50", "map75", "ap", "ap50"),
)


class Config(Strict):
    """Which metric decides, and how patiently.

    Attributes:
        metric: as training reports it; the best epoch is that of its best value.
        mode: whether less or more is better; None: follows from the metric's name, where that tells.
        patience: end the run after so many epochs in a row without a better value; None never ends it.
        plateau_patience: lower the rate after so many, with `optim.schedule` `plateau`.
        min_delta: a value must be better by more than this to count for patience.
    """

    metric: str = "val/top1"
    mode: Mode | None = None
    patience: int | None = Field(default=None, ge=1)
    plateau_patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)


def mode_of(config: Config) -> Mode:
    """Whether less or more of the metric is better.

    Raises:
        ConfigError: its name does not tell, and no mode is given.
    """
    if config.mode is not None:
        return config.mode
    words = config.metric.lower().replace("/", "_").replace("-", "_").split("_")
    less, more = (any(word in known for word in words) for known in (LESS_IS_BETTER, MORE_IS_BETTER))
    if less == more:
        raise ConfigError(
            f"watch.metric '{config.metric}': its name does not tell what is better; give mode min or max"
        )
    return "min" if less else "max"


def check(config: Config, reported: Sequence[str]) -> None:
    """Make sure that the metric is one that training reports, and that it is known what is better.

    Raises:
        ConfigError: it is not.
    """
    if config.metric not in reported:
        raise ConfigError(f"watch.metric: training reports no '{config.metric}'; {nearest(config.metric, reported)}")
    mode_of(config)


def best_epoch(config: Config, values: Sequence[float]) -> int:
    """The index of the best value, of equal ones the first; values that are no numbers never are.

    Raises:
        ValueError: there is no value.
    """
    gains = _gains(config, values)
    return max(range(len(gains)), key=lambda index: (gains[index], -index))


def is_best(config: Config, values: Sequence[float]) -> bool:
    """Whether the last value is better than all before it."""
    return best_epoch(config, values) == len(values) - 1


def should_stop(config: Config, values: Sequence[float]) -> bool:
    """Whether patience has run out."""
    return config.patience is not None and _stalled(config, values)[-1] >= config.patience


def num_drops(config: Config, values: Sequence[float]) -> int:
    """How often the rate has been lowered: once for every `plateau_patience` epochs in a row without a better value."""
    return sum(stalled > 0 and stalled % config.plateau_patience == 0 for stalled in _stalled(config, values))


def _gains(config: Config, values: Sequence[float]) -> list[float]:
    """The values with more always better, and the worst there is for one that is no number."""
    sign = 1.0 if mode_of(config) == "max" else -1.0
    return [-math.inf if math.isnan(value) else sign * value for value in values]


def _stalled(config: Config, values: Sequence[float]) -> list[int]:
    """For each epoch, how many in a row, it included, were not better than the reference by more than `min_delta`."""
    reference, counts = -math.inf, [0]
    for gain in _gains(config, values):
        improved = gain > reference + config.min_delta
        reference = gain if improved else reference
        counts.append(0 if improved else counts[-1] + 1)
    return counts
