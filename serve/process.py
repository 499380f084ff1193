"""What every process that serves does about itself before anything else: it unpickles no model."""

from __future__ import annotations

import os

NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
"""MLflow unpickles what a model holds unless it is told not to."""


def load_no_code() -> None:
    """Have MLflow, whoever imports it in this process, unpickle nothing: a pickle is code."""
    os.environ.update(NO_PICKLE)
