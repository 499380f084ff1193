"""`run.json` in a run's folder: what the job that resumes the run must know beside its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.tracking import registry
from pipeline.training.launch import RECORD
from pipeline.training.recipe import Recipe


class Record(Strict):
    """What it says.

    Attributes:
        run_id: of the run in MLflow, which goes on.
        recipe: that it was begun with.
        version: that it was registered as.
        is_finished: whether nothing is left to do.
    """

    run_id: str
    run_url: str
    recipe: dict[str, Any]
    version: registry.Version | None = None
    is_finished: bool = False

    @classmethod
    def of(cls, folder: Path) -> Record | None:
        """That of a run, if there is one.

        Raises:
            DataError: it is not readable.
        """
        try:
            return cls.model_validate_json((folder / RECORD).read_bytes(), strict=True)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise DataError(f"{folder / RECORD}: not readable; delete it to go on as a new run in MLflow") from None

    def began_with(self, recipe: Recipe) -> bool:
        """Whether that is its recipe; keys that did not exist yet had what is their default now."""
        try:
            return Recipe.model_validate_json(json.dumps(self.recipe)) == recipe
        except ValidationError:
            return False

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        try:
            storage.write(str(folder / RECORD), self.model_dump_json(indent=2).encode())
        except OSError as error:
            raise DataError(f"{folder / RECORD}: cannot be written: {storage.reason(error)}") from None
