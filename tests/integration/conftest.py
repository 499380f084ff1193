"""A real MLflow server for the whole session: SQLite and artifacts in a temporary folder, on a free loopback port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs._process import Service, stop
from jobs._stack import mlflow_server as start


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    server = start(tmp_path_factory.mktemp("mlflow-server"), timeout_s=150)  # a cold import on a busy machine is slow
    try:
        yield server
    finally:
        stop(server)
