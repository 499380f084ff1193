"""[MLflow] What runs left behind: the evidence that a comparison rests on, fetched once and then looked at offline."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient

from pipeline.config import nearest
from pipeline.errors import TrackingError
from pipeline.tracking import connection, predictions, registry, runs
from pipeline.tracking.predictions import Predictions
from pipeline.types import Split

Metric = Literal["top1", "top5"]
"""Shares of images that are right, so that every image can testify for or against a difference."""
TOP: dict[Metric, int] = {"top1": 1, "top5": 5}

CURVES = ("train/loss", "val/loss", "val/top1")
SPEED = ("images_per_s", "data_wait_share")
SECONDS = "epoch_s"
PAGE = 1000  # runs in one answer of the server
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MODEL = re.compile(r"models:/.*|[^/@]+@[^/@]+|[^/@]+/\d+")

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Trial:
    """One run, as far as a comparison is concerned.

    Attributes:
        url: its page, for people.
        seconds: of training, summed over its epochs, so without the time that it lay still before it was resumed; from
            its start to its end where it did not log them.
        digest: of the dataset that it was evaluated on, "" where the run does not say.
        views: of each image, that were averaged there.
        source: where that dataset's shards were, "" where unknown.
        curves: (step, value) by metric, for those of `CURVES`, `SPEED` and `SECONDS` that it has.
        predictions: what it said of every image, where it logged that.
        version: the registered version that it was asked for as, for example `digits/3`.
    """

    id: str
    name: str
    url: str
    experiment_id: str
    split: Split
    start_ms: int
    seconds: float
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    digest: str
    source: str
    curves: Mapping[str, Points] = field(default_factory=dict)
    predictions: Predictions | None = None
    version: str = ""
    views: str = "centre"

    @property
    def measured_on(self) -> str:
        """The data and the views, for people: figures of others answer another question."""
        data = self.digest[:12] or "unknown data"
        return data if self.views == "centre" else f"{data} ({self.views})"

    def value(self, metric: Metric) -> float:
        """The metric on the split: counted again from the predictions, or as logged.

        Raises:
            TrackingError: it has neither.
        """
        if self.predictions is not None:
            return float(self.predictions.right(TOP[metric]).mean())
        key = f"final/{self.split}/{metric}"
        if key not in self.metrics:
            raise TrackingError(
                f"run {self.id} ({self.name}) has neither predictions nor the metric {key}; name '{self.split}' in "
                "training.evaluate, or evaluate its model with jobs.evaluate, or choose another split"
            )
        return self.metrics[key]


def gather(uri: str, references: Sequence[str], split: Split) -> list[Trial]:
    """The runs that are meant, each once, with all their evidence.

    Args:
        uri: address of the server.
        references: run ids, names of experiments (their finished runs that were evaluated on `split`), or registered
            models (`name@alias`, `name/3`, with or without `models:/`).
        split: whose predictions are fetched.

    Raises:
        TrackingError: the server does not answer or knows no such thing.
    """
    connection.check(uri)
    found: dict[str, Trial] = {}
    for reference in references:
        for trial in _of_reference(uri, reference, split):
            found.setdefault(trial.id, trial)
    return [complete(uri, trial) for trial in found.values()]


def of_version(uri: str, version: registry.Version, split: Split) -> list[Trial]:
    """The runs that speak of a registered version, newest first: those that evaluated it, and its own.

    Predictions are not fetched yet.
    """
    with connection.answers(uri) as client:
        found = []
        if version.identity:
            tag = f"tags.`{predictions.model_tag(split)}` = '{version.identity}'"
            found = _search(client, [each.experiment_id for each in _experiments(client)], tag)
        if version.run_id and version.run_id not in {run.info.run_id for run in found}:
            found.append(client.get_run(version.run_id))
    trials = [_trial(uri, run, split, f"{version.name}/{version.version}") for run in found]
    return sorted(trials, key=lambda trial: -trial.start_ms)


def finished(uri: str, experiment_id: str, split: Split) -> list[Trial]:
    """The finished runs of an experiment that were evaluated on `split`, oldest first, without their predictions."""
    with connection.answers(uri) as client:
        found = _search(client, [experiment_id], "attributes.status = 'FINISHED'")
    key = f"final/{split}/top1"
    trials = [_trial(uri, run, split) for run in found if key in run.data.metrics]
    return sorted(trials, key=lambda trial: trial.start_ms)


def complete(uri: str, trial: Trial) -> Trial:
    """The same with its curves and predictions."""
    with connection.answers(uri) as client:
        curves = {key: _curve(client, trial.id, key) for key in (*CURVES, *SPEED, SECONDS) if key in trial.metrics}
        said = _predictions(client, trial.id, trial.split)
    digest = trial.digest if said is None else said.origin.dataset_digest
    trained_s = sum(value for _, value in curves.get(SECONDS, ()))
    return replace(trial, curves=curves, predictions=said, digest=digest, seconds=trained_s or trial.seconds)


def _of_reference(uri: str, reference: str, split: Split) -> list[Trial]:
    if _MODEL.fullmatch(reference):
        return [_of_model(uri, reference, split)]
    with connection.answers(uri) as client:
        if _RUN_ID.fullmatch(reference):
            return [_trial(uri, client.get_run(reference), split)]
        experiment = client.get_experiment_by_name(reference)
        if experiment is None:
            known = sorted(each.name for each in _experiments(client))
            raise TrackingError(
                f"{uri}: '{reference}' is neither a run id (32 hex digits) nor a model (name@alias, name/3), and no "
                f"experiment has this name; {nearest(reference, known)}"
            )
    trials = finished(uri, experiment.experiment_id, split)
    if not trials:
        raise TrackingError(
            f"{uri}: experiment '{reference}' has no finished run that was evaluated on '{split}'; name the split in "
            "training.evaluate, or choose another"
        )
    return trials


def _of_model(uri: str, reference: str, split: Split) -> Trial:
    """The run that trained a version, if it was evaluated too (it knows parameters and curves); else the newest."""
    version = registry.resolve(uri, reference)
    trials = of_version(uri, version, split)
    tag, metric = predictions.model_tag(split), f"final/{split}/top1"
    told = [trial for trial in trials if trial.tags.get(tag) == version.identity or metric in trial.metrics]
    if not told:
        raise TrackingError(
            f"{version.name}/{version.version} was never evaluated on '{split}'; run python -m jobs.evaluate "
            f"model={version.name}/{version.version} split={split} shards=... first"
        )
    return next((trial for trial in told if trial.id == version.run_id), told[0])


def _trial(uri: str, run: Any, split: Split, version: str = "") -> Trial:
    info, data = run.info, run.data
    inputs = {item.dataset.name.rpartition("/")[2]: item for item in run.inputs.dataset_inputs}
    dataset = inputs.get(split)
    tags = {tag.key: tag.value for tag in dataset.tags} if dataset else {}
    source = ""
    with suppress(ValueError, KeyError, TypeError):
        source = str(json.loads(dataset.dataset.source)["tags"]["uri"]) if dataset else ""
    return Trial(
        id=info.run_id,
        name=info.run_name or info.run_id[:8],
        url=runs.Run(uri, info.run_id, info.experiment_id).url,
        experiment_id=info.experiment_id,
        split=split,
        start_ms=info.start_time,
        seconds=((info.end_time or info.start_time) - info.start_time) / 1000,
        params=data.params,
        metrics=data.metrics,
        tags=data.tags,
        digest=tags.get("digest", data.tags.get("dataset_digest", "")),
        source=source,
        version=version,
        views=data.tags.get(predictions.views_tag(split), "centre"),
    )


def _curve(client: MlflowClient, run_id: str, key: str) -> Points:
    """The last value at each step: a run that went on after a fault may have told a step twice."""
    history = sorted(client.get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp))
    return tuple({point.step: point.value for point in history}.items())


def _predictions(client: MlflowClient, run_id: str, split: Split) -> Predictions | None:
    name = predictions.file_name(split)
    if name not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return predictions.read(Path(client.download_artifacts(run_id, name, folder)))


def _experiments(client: MlflowClient) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _search(client: MlflowClient, experiment_ids: list[str], wanted: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_runs(experiment_ids, wanted, max_results=PAGE, page_token=token)
        found += page
        if not (token := page.token):
            return found
