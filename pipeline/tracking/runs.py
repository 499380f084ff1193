"""Runs: what a training, an evaluation or an import writes down in MLflow, and how it ended.

`start` opens a run in the process that drives a job and closes it truthfully; `attach` gives a worker process the same
handle from an address and an id. Every call goes out at once and waits for the server; journalling through an outage
is not done here.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline import provenance
from pipeline.config import Strict
from pipeline.errors import TrackingError
from pipeline.tracking import connection

PARAMS_PER_CALL = 100  # the server's limits
PARAM_CHARS = 6000
TAG_CHARS = 8000
DIGEST_CHARS = 36
ERROR_TAG = "error"


class Config(Strict):
    """Where a job's run is written down.

    Attributes:
        experiment: name of the MLflow experiment; created when it is new.
        run_name: None lets MLflow invent one.
        system_metrics: also log processor, memory, disk, network and GPU load of the driving process's machine.
    """

    experiment: str
    run_name: str | None = None
    system_metrics: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """The handle of one MLflow run; it can be sent to another process.

    Every method raises `TrackingError` when the server does not answer or refuses.

    Attributes:
        uri: address of the server.
        id: of the run.
        experiment_id: of its experiment.
    """

    uri: str
    id: str
    experiment_id: str

    @property
    def url(self) -> str:
        """The run's page, for a person."""
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.id}"

    def log_params(self, flat: Mapping[str, str]) -> None:
        """Write down parameters (`config.flatten`), 100 per call; longer values than MLflow takes are cut."""
        params = [Param(key, value[:PARAM_CHARS]) for key, value in flat.items()]
        with connection.answers(self.uri) as client:
            for at in range(0, len(params), PARAMS_PER_CALL):
                client.log_batch(self.id, params=params[at : at + PARAMS_PER_CALL])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write down an epoch's metrics in one call.

        MLflow stores infinity as 1.8e308, so what is not finite becomes a tag `nonfinite.<key>` instead.
        """
        now_ms = time.time_ns() // 1_000_000
        metrics = [Metric(key, float(value), now_ms, step) for key, value in values.items() if math.isfinite(value)]
        tags = [
            RunTag(f"nonfinite.{key}", f"{float(value)} at step {step}")
            for key, value in values.items()
            if not math.isfinite(value)
        ]
        with connection.answers(self.uri) as client:
            client.log_batch(self.id, metrics=metrics, tags=tags)

    def log_figure(self, path: str, figure: Figure) -> None:
        """Store a figure under `path` (`confusion.png`); the suffix chooses the format."""
        with connection.answers(self.uri) as client:
            client.log_figure(self.id, figure, path)

    def log_text(self, path: str, text: str) -> None:
        """Store text under `path`."""
        with connection.answers(self.uri) as client:
            client.log_text(self.id, text, path)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Store a file under its own name, in `folder`."""
        with connection.answers(self.uri) as client:
            client.log_artifact(self.id, str(file), folder)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset as an input of the run, `<name>/<context>` in MLflow; no data is read.

        MLflow takes each pair of name and digest once per run: without the context in the name, a dataset that was
        trained and validated on would show only the first.

        Args:
            name: of the dataset.
            digest: the manifest's content digest. MLflow keeps 36 characters of it; the whole one is in the input's tag
                `digest`.
            source: where the shards are.
            context: what it was used for: `train`, `val`, `test`.
        """
        made = MetaDataset(CodeDatasetSource({"uri": source}), name=f"{name}/{context}", digest=digest[:DIGEST_CHARS])
        tags = [InputTag("mlflow.data.context", context), InputTag("digest", digest)]
        with connection.answers(self.uri) as client:
            client.log_inputs(self.id, [DatasetInput(Dataset(**made.to_dict()), tags)])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags in one call; longer values than MLflow takes are cut."""
        with connection.answers(self.uri) as client:
            client.log_batch(self.id, tags=[RunTag(key, value[:TAG_CHARS]) for key, value in tags.items()])

    def end(self, status: str) -> None:
        """Close the run as `FINISHED`, `FAILED` or `KILLED`."""
        with connection.answers(self.uri) as client:
            client.set_terminated(self.id, status)


@contextmanager
def start(uri: str, config: Config, *, params: Mapping[str, str], tags: Mapping[str, str]) -> Iterator[Run]:
    """Open a run, and close it as what happened: FINISHED, FAILED after an error, KILLED after an interruption.

    Interruptions are what is no `Exception`: `KeyboardInterrupt`, `SystemExit`, and what a job makes of SIGTERM. The
    first line of an error becomes the run's tag `error`. While the run is open, the process waits for MLflow no longer
    than `connection.patience` says.

    Args:
        uri: address of the server.
        config: experiment and name.
        params: the resolved configuration, flat.
        tags: more tags; they win over those found here (commit, versions, host, command line).

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    connection.check(uri)
    with connection.patience():
        run = _create(uri, config, {**_facts(), **tags})
        try:
            run.log_params(params)
            with _system_metrics(run, config.system_metrics):
                yield run
        except BaseException as error:
            # The server may be what failed: the error on its way matters more than its record.
            with suppress(TrackingError):
                run.set_tags({ERROR_TAG: _first_line(error)})
                run.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.end("FINISHED")


def attach(uri: str, run_id: str) -> Run:
    """The handle of a run that exists already; for worker processes, which never create one.

    Raises:
        TrackingError: the server does not answer, or has no such run.
    """
    connection.check(uri)
    with connection.answers(uri) as client:
        return Run(uri, run_id, client.get_run(run_id).info.experiment_id)


def _create(uri: str, config: Config, tags: Mapping[str, str]) -> Run:
    with connection.answers(uri) as client:
        experiment = _experiment(client, config.experiment)
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"{uri}: the experiment '{config.experiment}' was deleted; restore it there or choose another name"
            )
        cut = {key: value[:TAG_CHARS] for key, value in tags.items()}
        made = client.create_run(experiment.experiment_id, tags=cut, run_name=config.run_name)
    return Run(uri, made.info.run_id, experiment.experiment_id)


def _experiment(client: MlflowClient, name: str) -> Experiment:
    """The experiment called `name`, created if it is new; many jobs may ask at the same moment."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    return found


@contextmanager
def _system_metrics(run: Run, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    monitor = SystemMetricsMonitor(run.id, tracking_uri=run.uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _facts() -> dict[str, str]:
    """Where and with what this process runs, as tags."""
    commit = provenance.commit()
    return {
        "mlflow.source.git.commit": commit.rstrip("+"),
        "git.changed": str(commit.endswith("+")).lower(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": shlex.join(sys.orig_argv),
        "host": provenance.hostname(),
        **{f"version.{name}": version for name, version in provenance.versions().items()},
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
