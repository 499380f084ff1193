"""The road to an MLflow server: is it there, how long to wait for it, and how its failures read.

Everything in `pipeline.tracking` that talks to a server does so through here, by address: MLflow's global tracking URI
and active run are neither read nor set. Starting and stopping a server is a job's business.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from pipeline.errors import TrackingError

HEALTH_TIMEOUT_S = 5.0
WAIT_PAUSE_S = 1.0

# MLflow's own policy (7 retries of 120 s, also after HTTP 500) stalls the caller for minutes when a server has died.
# Waiting must still outlast SQLite under several writers, where one call was seen to take 11 s.
SWITCHES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""How MLflow behaves inside `patience`. It reads these from the environment at each call, and from nowhere else."""

PASSING = {401, 403, 408, 429}
"""Refusals that are not about what was asked: another password, another host name or another time may help."""

_lock = threading.Lock()
_depth = 0
_added: list[str] = []


class RefusedError(TrackingError):
    """The server answers, and will refuse this very request however often it is made."""


@contextmanager
def patience() -> Iterator[None]:
    """Bound how long MLflow waits for a dead server, about 3 s when it refuses and 90 s when it hangs; keep it quiet.

    The environment holds `SWITCHES` while at least one caller, in any thread, is inside, and gets it back as it was;
    variables that were set by hand win.
    """
    global _depth  # noqa: PLW0603  (the environment is one per process, so its guard is)
    with _lock:
        if _depth == 0:
            _added[:] = [key for key in SWITCHES if key not in os.environ]
            os.environ.update({key: SWITCHES[key] for key in _added})
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for key in _added:
                    os.environ.pop(key, None)


@contextmanager
def answers(uri: str) -> Iterator[MlflowClient]:
    """A client of the server at `uri`; what goes wrong inside is raised as one clear sentence.

    Raises:
        RefusedError: the server refused.
        TrackingError: it did not answer, failed, or refused for another reason than what was asked.
    """
    with patience():
        try:
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
        except (MlflowException, requests.RequestException) as error:
            code = _status_code(error)
            kind = RefusedError if 400 <= code < 500 and code not in PASSING else TrackingError
            raise kind(_sentence(uri, error)) from None


def check(uri: str) -> None:
    """Make sure that an MLflow server answers at `uri`, within `HEALTH_TIMEOUT_S` per question.

    Raises:
        TrackingError: nothing answers there, or something that is not MLflow.
    """
    if not uri.startswith(("http://", "https://")):
        raise TrackingError(
            f"tracking URI '{uri}': expected the address of an MLflow server, for example http://127.0.0.1:5000; "
            "files and databases cannot be reached from other nodes"
        )
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S)
    except requests.RequestException as error:
        raise TrackingError(_sentence(uri, error)) from None
    if answer.status_code != requests.codes.ok or answer.text.strip() != "OK":
        raise TrackingError(
            f"{uri}: expected an MLflow server, but GET /health answered {answer.status_code} "
            f"{answer.text.strip()[:40]!r}; check the address and the port"
        )


def wait(uri: str, timeout_s: float) -> None:
    """Wait until an MLflow server answers at `uri`, asking again and again for `timeout_s`.

    Raises:
        TrackingError: it has not answered by then.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            check(uri)
        except TrackingError:
            if time.monotonic() + WAIT_PAUSE_S > deadline:
                raise
            time.sleep(WAIT_PAUSE_S)
        else:
            return


def _status_code(error: MlflowException | requests.RequestException) -> int:
    """The HTTP status behind an error, 500 where there is none."""
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    return 500 if error.response is None else error.response.status_code


def _sentence(uri: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, RestException):
        if "Invalid Host header" in reason:
            return f"{uri}: the MLflow server refuses this host name; start it with --allowed-hosts naming it"
        return f"{uri}: the MLflow server refused: {reason[:500]}"
    if "Error: 500" in reason or "error responses" in reason:
        return f"{uri}: the MLflow server fails on its side; look at its log ({reason[:200]})"
    if "timed out" in reason or "timeout" in reason:
        return f"{uri}: the MLflow server does not answer in time; look at its log, or correct the address"
    if "Connection" in reason or "Max retries" in reason:
        return f"{uri}: no MLflow server answers there; start one (make up) or correct the address"
    return f"{uri}: the call to the MLflow server failed: {reason[:500]}"
