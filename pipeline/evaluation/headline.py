"""The one figure of a task that people ask for first. Light: training workers import it to say how an epoch went."""

from __future__ import annotations

from collections.abc import Mapping

_HEADLINES = {"top1": "top-1", "coco_map50": "coco_map50"}


def headline(metrics: Mapping[str, float], prefix: str = "") -> str:
    """That figure with its name."""
    return next(f"{text} {metrics[prefix + name]:.4f}" for name, text in _HEADLINES.items() if prefix + name in metrics)
