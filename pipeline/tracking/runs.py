"""Runs: what a training, an evaluation or an import writes down in MLflow, and how it ended.

`start` opens a run in the process that drives a job and closes it truthfully. Given the folder of a training, it keeps
the run's journal there and ships it: from then on a server that is down costs neither time nor figures, and a job that
goes on later, on whatever node, goes on with the same run. Without a folder every call goes out at once and waits.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from pipeline import provenance
from pipeline.config import Strict
from pipeline.errors import TrackingError
from pipeline.tracking import connection, journal
from pipeline.tracking.connection import RefusedError
from pipeline.tracking.delivery import TAG_CHARS, Destination
from pipeline.tracking.journal import Entry, Writer
from pipeline.tracking.shipping import Shipper, log

ERROR_TAG = "error"
DRAIN_S = 60.0  # for which a job waits at its end for what its journal still holds
DRAIN_STOPPED_S = 10.0  # the same for one that failed or was stopped, which may have little time
LATER = "python -m jobs.replay run=%s brings them there, and so does resuming the run"

PARENT_TAG = "mlflow.parentRunId"  # of a child run


class Config(Strict):
    """Where a job's run is written down.

    Attributes:
        experiment: name of the MLflow experiment; created when it is new.
        run_name: None lets MLflow invent one.
        system_metrics: of a training, also log processor, memory, disk, network and GPU load of each node.
    """

    experiment: str
    run_name: str | None = None
    system_metrics: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """The handle of one MLflow run; it can be sent to another process.

    Where it has a journal, its methods write there and return at once. Else they raise `TrackingError` when the server
    does not answer or refuses.

    Attributes:
        uri: address of the server.
        id: of the run.
        experiment_id: of its experiment.
        writer: of the journal.
    """

    uri: str
    id: str
    experiment_id: str
    writer: Writer | None = field(default=None, compare=False, repr=False)

    @property
    def url(self) -> str:
        """The run's page, for a person."""
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.id}"

    def log_params(self, flat: Mapping[str, str]) -> None:
        """Write down parameters (`config.flatten`); longer values than MLflow takes are cut.

        MLflow never changes a parameter. In a journal another value becomes a tag `resumed.<key>`.
        """
        self._put(journal.Params(dict(flat)))

    def log_metrics(
        self,
        values: Mapping[str, float],
        step: int,
        *,
        checkpoint: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Write down metrics at a step, as `journal.Writer.metrics` does; without a journal in one call.

        MLflow stores infinity as 1.8e308, so what is not finite becomes a tag `nonfinite.<key>` instead.
        """
        plain = {key: float(value) for key, value in values.items()}
        self._put(journal.Metrics(_now_ms(), step, plain, checkpoint, dataset))

    def log_figure(self, path: str, figure: Figure) -> None:
        """Store a figure under `path` (`confusion.png`); the suffix chooses the format."""
        with self.artifact(path) as file:
            figure.savefig(file)

    def log_text(self, path: str, text: str) -> None:
        """Store text under `path`."""
        with self.artifact(path) as file:
            file.write_text(text, encoding="utf-8")

    @contextmanager
    def artifact(self, path: str) -> Iterator[Path]:
        """A file to write in the block, stored under `path` when it ends (`predictions/val.parquet`)."""
        to = PurePosixPath(path)
        with self._room() as room:
            file = room / to
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".partial-{to.name}")  # an earlier file of this name may be on its way
            yield partial
            partial.replace(file)
            self.log_file(file, None if to.parent == PurePosixPath() else str(to.parent))

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Store a file under its own name, in `folder`. With a journal it must stay where it is until then."""
        path = file.absolute()
        if self.writer is not None and path.is_relative_to(self.writer.folder.parent.absolute()):
            path = path.relative_to(self.writer.folder.parent.absolute())  # the run's folder may be moved
        self._put(journal.File(str(path), folder))

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a dataset as an input of the run, `<name>/<context>` in MLflow; no data is read.

        MLflow takes each pair of name and digest once per run: without the context in the name, a dataset that was
        trained and validated on would show only the first.

        Args:
            name: of the dataset.
            digest: the manifest's content digest. MLflow keeps 36 characters of it; the whole one is in the input's tag
                `digest`.
            source: where the shards are, and their version.
            context: what it was used for: `train`, `val`, `test`.
        """
        self._put(journal.Dataset(name, digest, source, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags in one call; longer values than MLflow takes are cut."""
        self._put(journal.Tags(dict(tags)))

    def end(self, status: str) -> None:
        """Close the run as `FINISHED`, `FAILED` or `KILLED`."""
        self._put(journal.Status(_now_ms(), status))

    def _put(self, entry: Entry) -> None:
        if self.writer is None:
            Destination(self.uri, self.id, self.experiment_id).deliver([entry], _raise)
        else:
            self.writer.append(entry)

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """A folder for files that are made to be stored."""
        if self.writer is not None:
            yield self.writer.folder / journal.ARTIFACTS
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


@contextmanager
def start(
    uri: str,
    config: Config,
    *,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    folder: Path | None = None,
    resume_id: str | None = None,
) -> Iterator[Run]:
    """Open a run, and close it as what happened: FINISHED, FAILED after an error, KILLED after an interruption.

    Interruptions are what is no `Exception`: `KeyboardInterrupt`, `SystemExit`, and what a job makes of SIGTERM. The
    first line of an error becomes the run's tag `error`. While the run is open, the process waits for MLflow no longer
    than `connection.patience` says.

    With a folder the server must answer once, for a new run. What it misses later is shipped when it answers again: by
    this job, by the next that resumes the run, or by `shipping.replay`. The job itself does not fail for it.

    Args:
        uri: address of the server.
        config: experiment and name; not looked at for a run that is resumed.
        params: the resolved configuration, flat.
        tags: more tags; they win over those found here (commit, versions, host, command line).
        folder: of a training's files; its journal is kept there.
        resume_id: the run to go on with; `known` tells that of a folder.

    Raises:
        TrackingError: the server does not answer, or refuses; the folder's journal is of another run, or in use.
    """
    with connection.patience():
        opened = _new(uri, config, tags, folder) if resume_id is None else _resumed(uri, resume_id, folder)
        with _shipped(opened, folder) as run, _closed_truthfully(run):
            if resume_id is not None:
                _note_resumption(run, tags)
            run.log_params(params)
            yield run


def known(folder: Path) -> str | None:
    """The id of the run whose journal lies in the folder of a training, or None."""
    found = journal.origin(folder / journal.FOLDER)
    return found.run_id if found else None


def attach(uri: str, run_id: str) -> Run:
    """The handle of a run that exists already; for worker processes, which never create one.

    Raises:
        TrackingError: the server does not answer, or has no such run.
    """
    connection.check(uri)
    with connection.answers(uri) as client:
        return Run(uri, run_id, client.get_run(run_id).info.experiment_id)


def _new(uri: str, config: Config, tags: Mapping[str, str], folder: Path | None) -> Run:
    if folder is not None and (old := known(folder)):
        raise TrackingError(f"{folder}: holds the journal of run {old}; resume that run, or take another folder")
    connection.check(uri)
    run = _create(uri, config, {**_facts(), **tags})
    _remember(run, folder)
    return run


def _resumed(uri: str, run_id: str, folder: Path | None) -> Run:
    """A run that exists; the server need not answer where the journal knows all about it."""
    found = journal.origin(folder / journal.FOLDER) if folder is not None else None
    if found is None:
        run = attach(uri, run_id)
        _remember(run, folder)
        return run
    if found.run_id != run_id:
        raise TrackingError(f"{folder}: expected the journal of run {run_id}, found that of run {found.run_id}")
    try:
        attach(uri, run_id)
    except RefusedError:
        raise
    except TrackingError as error:
        log.warning("tracking waits: %s; the run goes on in its journal", error)
    return Run(uri, run_id, found.experiment_id)


def _remember(run: Run, folder: Path | None) -> None:
    if folder is not None:
        journal.remember(folder / journal.FOLDER, journal.Origin(run.uri, run.id, run.experiment_id, _now_ms()))


def _note_resumption(run: Run, tags: Mapping[str, str]) -> None:
    """Say that the run goes on, where and with what; what the first start found stays."""
    facts = {"resumed.host": provenance.hostname(), "resumed.git.commit": provenance.commit()}
    run._put(journal.Status(_now_ms(), "RUNNING"))
    run.set_tags({ERROR_TAG: "", **facts, **tags})


@contextmanager
def _shipped(run: Run, folder: Path | None) -> Iterator[Run]:
    """The run with a journal in `folder` (None: as it is), which is shipped meanwhile."""
    if folder is None:
        yield run
        return
    shipper = Shipper(Destination(run.uri, run.id, run.experiment_id, folder))
    writer, drain_s = Writer(folder / journal.FOLDER, "driver"), DRAIN_STOPPED_S
    try:
        yield replace(run, writer=writer)
        drain_s = DRAIN_S
    finally:
        writer.close()
        if left := shipper.close(drain_s):
            log.warning("%s: %d entries of the journal are not in MLflow yet; %s", folder, left, LATER % folder.name)


@contextmanager
def _closed_truthfully(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The server may be what failed: the error on its way matters more than its record.
        with suppress(TrackingError):
            run.set_tags({ERROR_TAG: _first_line(error)})
            run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.end("FINISHED")


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


def _raise(_: str, error: TrackingError) -> NoReturn:
    raise error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
