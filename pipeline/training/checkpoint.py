"""Checkpoints of a run: one file per epoch, written whole or not at all, the newest few kept.

A checkpoint holds the model, the optimiser and the number of finished epochs. The random state needs no storing: every
epoch seeds it anew from (seed, epoch, rank). Files are read with `weights_only=True`: nothing is executed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DataError

NAME = re.compile(r"epoch-(\d{4,})\.pt")


def save(folder: Path, epoch: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write the state after `epoch` finished epochs, then delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch-{epoch:04d}.pt"
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)
    for old in _all(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        DataError: it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch's reader raises whatever damaged bytes make of it
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: not a readable checkpoint ({reason}); delete it to continue from the one before"
        ) from None
    return state


def _all(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("epoch-*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
