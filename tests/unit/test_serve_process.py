"""What a process that serves is told before anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION as ALLOWED

from pipeline.errors import VentralError
from serve import app, deployments, endpoint
from serve.keys import Access
from serve.schemas import AppArgs, ModelArgs, Served

NONE = Path("/nowhere")
MODEL: dict[str, Any] = {"name": "digits", "bundle": NONE}


@pytest.mark.parametrize("process", ["build", "replica", "ingress"])
def test_mlflow_unpickles_nothing_in_a_process_that_serves(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED.name, "true")
    if process == "build":
        with pytest.raises(VentralError):  # there is no such bundle
            app.build({"models": [MODEL], "allow_anyone": True})
    elif process == "replica":
        with pytest.raises(VentralError):
            deployments.Replica(Served("digits", "1", None, NONE, 10), ModelArgs(**MODEL))
    else:
        endpoint.Endpoint(AppArgs(models=(ModelArgs(**MODEL),)), Access(allow_anyone=True), minder=None)
    assert ALLOWED.get() is False
