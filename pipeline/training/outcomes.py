"""What became of the trials of a sweep, where that is kept, and the table of it. No Ray.

`storage/sweeps/<name>/` holds `sweep.json`, what is tried; `trials/<trial>.json`, an outcome each, written when a trial
has come to an end; and the journal of the sweep's MLflow run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.training import experiment, stopping, trials
from pipeline.training.trials import Trial

State = Literal["finished", "stopped", "diverged", "failed"]


class Outcome(Strict):
    """What became of a trial.

    Attributes:
        state: `stopped`: early, for it looked bad beside the others; `diverged`: the loss was no number any more, which
            in a sweep is an answer; `failed`: anything else, to be mended and run again.
        epochs: that it was trained for.
        value: of the watched metric, of the weights that are kept; None before the first epoch.
        error: of one that failed or diverged.
        run_id: of its MLflow run, if there is one.
    """

    state: State
    epochs: int
    value: float | None
    error: str = ""
    run_id: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a sweep keeps what it knows, and its trainings their runs.

    Attributes:
        name: of the sweep.
        storage: reachable from every node.
        uri: of the MLflow server.
        roots: further folders that initial weights may lie in.
    """

    name: str
    storage: Path
    uri: str
    roots: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """Of the sweep itself."""
        return self.storage / "sweeps" / self.name

    def run(self, trial: Trial) -> Path:
        """The folder of a trial's training."""
        return self.storage / "runs" / trial.name

    @property
    def is_begun(self) -> bool:
        """Whether there is a sweep already."""
        return self._plan.exists()

    def is_of(self, found: Iterable[Trial]) -> bool:
        """Whether the sweep that was begun here has these trials."""
        return self._plan.read_text() == _as_json(found)

    def begin(self, found: Iterable[Trial]) -> None:
        """Write down what this sweep is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.write(str(self._plan), _as_json(found).encode())

    def outcome(self, trial: Trial) -> Outcome | None:
        """What became of a trial, if that is known.

        Raises:
            DataError: it is not readable.
        """
        path = self._file(trial)
        try:
            return Outcome.model_validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise DataError(f"{path}: not readable; delete it to run this trial again") from None

    def note(self, trial: Trial, outcome: Outcome) -> None:
        """Keep what became of a trial."""
        self._file(trial).parent.mkdir(parents=True, exist_ok=True)
        storage.write(str(self._file(trial)), outcome.model_dump_json(indent=2).encode())

    @property
    def _plan(self) -> Path:
        return self.folder / "sweep.json"

    def _file(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"{trial.name}.json"


def best_of(outcomes: Mapping[Trial, Outcome], base: experiment.Config) -> Trial | None:
    """The finished trial with the best value of the watched metric, of equal ones the first."""
    finished = [trial for trial, outcome in outcomes.items() if outcome.state == "finished"]
    values = [value for trial in finished if (value := outcomes[trial].value) is not None]
    if len(values) != len(finished) or not finished:
        return None
    return finished[stopping.best_epoch(base.recipe.watch, values)]


def rows(outcomes: Mapping[Trial, Outcome], config: trials.Config) -> list[list[str]]:
    """A table for people: name, what was changed, state, epochs, value; the first row names the columns."""
    head = ["trial", *(key.removeprefix("training.recipe.") for key in config.keys), "state", "epochs", "value"]
    body = [
        [
            trial.name,
            *(_text(trial.changes.get(key)) for key in config.keys),
            outcome.state,
            str(outcome.epochs),
            "" if outcome.value is None else f"{outcome.value:.4f}",
        ]
        for trial, outcome in outcomes.items()
    ]
    return [head, *body]


def as_csv(outcomes: Mapping[Trial, Outcome], config: trials.Config) -> str:
    """The same as CSV, with the id of each trial's MLflow run."""
    head, *body = rows(outcomes, config)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([*head, "run_id", "error"])
    for row, outcome in zip(body, outcomes.values(), strict=True):
        table.writerow([*row, outcome.run_id or "", outcome.error])
    return text.getvalue()


def _as_json(found: Iterable[Trial]) -> str:
    return json.dumps({trial.name: trial.changes for trial in found}, indent=2)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
