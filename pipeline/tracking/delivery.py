"""Entries of a journal become calls to MLflow. Every call may be made again: nothing is stored twice.

MLflow keeps one row of equal key, value, time and step, one input of equal dataset, one parameter of equal value, and
the last of each tag, file and status. Only checkpoints, which it calls logged models, it would make anew each time; so
they are looked for by name first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities.logged_model_status import LoggedModelStatus

from pipeline.errors import TrackingError
from pipeline.tracking import connection, journal
from pipeline.tracking.connection import RefusedError

PARAM_CHARS = 6000  # the server's limits
TAG_CHARS = 8000
DIGEST_CHARS = 36
CHECKPOINT = "checkpoint"
"""The type of the logged models that stand for checkpoints."""
_NOT_IN_NAMES = re.compile(r"""[/:.%"']""")  # of logged models

Refuse = Callable[[str, TrackingError], None]
"""Told what the server will never take, and why; it may raise."""


@dataclass(frozen=True)
class Destination:
    """One run of one server.

    Attributes:
        folder: of the run, which relative paths of files start from.
    """

    uri: str
    run_id: str
    experiment_id: str
    folder: Path = Path()
    _models: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def deliver(self, entries: Sequence[journal.Entry], refuse: Refuse) -> None:
        """Send entries, in as few calls as MLflow takes; `refuse` is told what it does not take.

        Values that are not finite become tags `nonfinite.<key>`: MLflow stores infinity as 1.8e308.

        Raises:
            TrackingError: the server does not answer, or refuses the run as a whole. Some entries may have arrived.
        """
        atoms = list(_atoms(entries))
        for kind, most, act in _STEPS:
            some = [atom for atom in atoms if isinstance(atom, kind)]
            for at in range(0, len(some), most):
                self._send(some[at : at + most], act, refuse)

    def check(self) -> None:
        """Make sure that the server answers and has this run.

        Raises:
            TrackingError: it does not, or the run was deleted.
        """
        try:
            with connection.answers(self.uri) as client:
                stage = client.get_run(self.run_id).info.lifecycle_stage
        except RefusedError as error:
            raise TrackingError(str(error)) from None
        if stage != "active":
            raise TrackingError(f"{self.uri}: the run {self.run_id} was deleted; restore it there")

    def _send(self, atoms: list[Any], act: _Act, refuse: Refuse) -> None:
        """Make a call; of a refused one each half, until it is known what is to blame."""
        try:
            with connection.answers(self.uri) as client:
                act(client, self, atoms)
        except RefusedError as error:
            self.check()  # if it is the run that is refused, nothing is wrong with what was sent
            if len(atoms) == 1:
                refuse(_name(atoms[0]), error)
                return
            for half in (atoms[: len(atoms) // 2], atoms[len(atoms) // 2 :]):
                self._send(half, act, refuse)

    def _model_id(self, client: MlflowClient, checkpoint: str, step: int) -> str:
        if checkpoint not in self._models:
            self._models[checkpoint] = self._model(client, _NOT_IN_NAMES.sub("-", checkpoint), step).model_id
        return self._models[checkpoint]

    def _model(self, client: MlflowClient, checkpoint: str, step: int) -> LoggedModel:
        """The logged model that stands for a checkpoint: made, tied to the run, ready; each of it once."""
        asked = f"name = '{checkpoint}' AND source_run_id = '{self.run_id}'"
        found = client.search_logged_models([self.experiment_id], filter_string=asked, max_results=1)
        if found and found[0].status == LoggedModelStatus.READY:
            return found[0]
        model = found[0] if found else self._new_model(client, checkpoint)
        outputs = client.get_run(self.run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        return client.finalize_logged_model(model.model_id, "READY")

    def _new_model(self, client: MlflowClient, checkpoint: str) -> LoggedModel:
        return client.create_logged_model(self.experiment_id, checkpoint, self.run_id, model_type=CHECKPOINT)


@dataclass(frozen=True)
class _Point:
    """One value of one entry."""

    key: str
    value: float
    entry: journal.Metrics

    def metric(self, client: MlflowClient, to: Destination) -> Metric:
        entry, known = self.entry, self.entry.dataset
        model_id = to._model_id(client, entry.checkpoint, entry.step) if entry.checkpoint else None
        name, digest = (known[0], known[1][:DIGEST_CHARS]) if known else (None, None)
        return Metric(self.key, self.value, entry.ms, entry.step, model_id, name, digest, to.run_id)


_Act = Callable[[MlflowClient, Destination, list[Any]], None]


def _params(client: MlflowClient, to: Destination, params: list[Param]) -> None:
    client.log_batch(to.run_id, params=params)


def _tags(client: MlflowClient, to: Destination, tags: list[RunTag]) -> None:
    client.log_batch(to.run_id, tags=list({tag.key: tag for tag in tags}.values()))


def _metrics(client: MlflowClient, to: Destination, points: list[_Point]) -> None:
    client.log_batch(to.run_id, metrics=[point.metric(client, to) for point in points])


def _checkpoint(client: MlflowClient, to: Destination, entries: list[journal.Checkpoint]) -> None:
    for entry in entries:
        model_id = to._model_id(client, entry.name, entry.step)
        client.set_logged_model_tags(model_id, {key: value[:TAG_CHARS] for key, value in entry.tags.items()})


def _dataset(client: MlflowClient, to: Destination, entries: list[journal.Dataset]) -> None:
    for entry in entries:
        source = CodeDatasetSource({"uri": entry.source})
        made = MetaDataset(
            source, name=journal.input_name(entry.name, entry.context), digest=entry.digest[:DIGEST_CHARS]
        )
        tags = [InputTag("mlflow.data.context", entry.context), InputTag("digest", entry.digest)]
        client.log_inputs(to.run_id, [DatasetInput(Dataset(**made.to_dict()), tags)])


def _file(client: MlflowClient, to: Destination, entries: list[journal.File]) -> None:
    for entry in entries:
        path = to.folder / entry.path
        if not path.is_file():
            raise RefusedError(f"{path}: it is no longer there")
        client.log_artifact(to.run_id, str(path), entry.folder)


def _status(client: MlflowClient, to: Destination, entries: list[journal.Status]) -> None:
    for entry in entries:
        if entry.status == "RUNNING":
            client.update_run(to.run_id, status=entry.status)
        else:
            client.set_terminated(to.run_id, entry.status, entry.ms)


_STEPS: tuple[tuple[type, int, _Act], ...] = (
    (journal.Checkpoint, 1, _checkpoint),
    (Param, 100, _params),
    (RunTag, 100, _tags),
    (_Point, 1000, _metrics),
    (journal.Dataset, 1, _dataset),
    (journal.File, 1, _file),
    (journal.Status, 1, _status),
)
"""What is sent in which order, and how many of it in one call: the server takes no more."""


def _atoms(entries: Sequence[journal.Entry]) -> Iterator[Any]:
    """Entries, those that hold several things taken apart."""
    for entry in entries:
        if isinstance(entry, journal.Metrics):
            yield from (_Point(key, value, entry) for key, value in entry.values.items() if math.isfinite(value))
            yield from (
                RunTag(f"nonfinite.{key}", f"{value} at step {entry.step}")
                for key, value in entry.values.items()
                if not math.isfinite(value)
            )
        elif isinstance(entry, journal.Params):
            yield from (Param(key, value[:PARAM_CHARS]) for key, value in entry.values.items())
        elif isinstance(entry, journal.Tags):
            yield from (RunTag(key, value[:TAG_CHARS]) for key, value in entry.values.items())
        else:
            yield entry


def _name(atom: Any) -> str:
    """What a person calls it."""
    if isinstance(atom, _Point):
        return f"metric {atom.key} at step {atom.entry.step}"
    if isinstance(atom, Param | RunTag):
        return f"{'parameter' if isinstance(atom, Param) else 'tag'} {atom.key}"
    return f"{atom.kind} {getattr(atom, 'name', None) or getattr(atom, 'path', None) or atom.status}"
