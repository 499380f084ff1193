"""The detectors of a comparison: trained here, or taken, and each evaluated in a child run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from jobs._run import Job, bundle_of
from jobs.train import Train
from pipeline import config
from pipeline.benchmark.detector_table import Row
from pipeline.benchmark.detectors import Speed
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.errors import ConfigError
from pipeline.evaluation.run import evaluate_detector
from pipeline.inference.bundle import Bundle
from pipeline.tracking import journal, registry, runs
from pipeline.training import experiment, launch
from pipeline.types import Split


class Entry(Strict):
    """One detector of the table.

    Attributes:
        name: in the table.
        model: one to take: `name@alias` or `name/3` in the registry, or the folder of a bundle.
        train: or the YAML of a training; what was finished is not done again, what was begun goes on.
        proposals: that it judges, as `jobs.propose` has called them; for Fast R-CNN.
    """

    name: str = Field(pattern=registry.NAME)
    model: str | None = None
    train: Path | None = None
    proposals: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.train is None):
            raise ValueError("expected exactly one of model and train")
        return self


@dataclass(frozen=True)
class Compared:
    """A detector with its accuracy; where it was trained here, the seconds of its epochs and solving."""

    bundle: Bundle
    metrics: dict[str, float]
    train_s: float | None

    def row(self, name: str, speed: Speed) -> Row:
        """Its line in the table."""
        model = self.bundle.card.model.name
        return Row(name=name, model=model, metrics=self.metrics, speed=speed, train_s=self.train_s)


@dataclass(frozen=True)
class Place:
    """Where a comparison works: its job's folders, the dataset and split it judges on, its run and reports."""

    job: Job
    source: shards.Shards
    split: Split
    parent: runs.Run
    experiment: str
    reports: Path


def trainings(asked: Sequence[Entry], judged_on: Path) -> dict[str, Train]:
    """The trainings of all entries that name one, checked before anything starts.

    Raises:
        ConfigError: a YAML is wrong, trains a classifier or on other shards; two entries have one name.
    """
    names = [entry.name for entry in asked]
    if len(set(names)) < len(names):
        raise ConfigError(f"models: expected each name once, got {', '.join(names)}")
    found = {entry.name: config.load(Train, entry.train) for entry in asked if entry.train is not None}
    for name, train in found.items():
        if train.training.recipe.model.task != "detection":
            raise ConfigError(f"models: '{name}' trains {train.training.recipe.model.name}, which is no detector")
        if train.training.shards != judged_on:
            raise ConfigError(
                f"models: '{name}' trains on {train.training.shards}, but all are judged on {judged_on}, whose images "
                "it may have seen; train it on those"
            )
    return found


def entries(asked: Sequence[Entry], trains: Mapping[str, Train], place: Place) -> dict[str, Compared]:
    """Train or take every detector and evaluate it, on an initialised Ray, each in a child run of the parent.

    Raises:
        VentralError: whatever went wrong; what is finished is kept.
    """
    return {entry.name: _entry(entry, trains.get(entry.name), place) for entry in asked}


def _entry(entry: Entry, train: Train | None, place: Place) -> Compared:
    print(f"{entry.name}: {entry.train or entry.model}", flush=True)
    made, train_s = _taken(entry, place) if train is None else _trained(train, place)
    if made.card.task != "detection":
        raise ConfigError(f"models: '{entry.name}' is for {made.card.task}, not a detector; leave it out")
    proposals = entry.proposals or (train.training.recipe.loading.proposals if train else None)
    tracking = runs.Config(experiment=place.experiment, run_name=f"evaluate-{entry.name}")
    with runs.start(place.parent.uri, tracking, params={}, tags={runs.PARENT_TAG: place.parent.id}) as child:
        report = evaluate_detector(made, place.source, place.split, proposals=proposals)
        report.record(child, place.reports / entry.name / f"report-{place.split}.json")
    return Compared(made, report.metrics, train_s)


def _taken(entry: Entry, place: Place) -> tuple[Bundle, float | None]:
    assert entry.model is not None
    return bundle_of(entry.model, place.parent.uri, place.job.store), None


def _trained(asked: Train, place: Place) -> tuple[Bundle, float | None]:
    store = place.job.store
    folder = store / "runs" / asked.name
    begun = launch.where_begun(folder, asked.training.checkpoints) is not None
    training = asked.training.model_copy(update={"resume": begun})
    done = experiment.finished(asked.name, training, folder)
    outcome = done or experiment.conduct(
        asked.name,
        training,
        storage=store,
        uri=place.parent.uri,
        roots=(place.job.data_folder,),
        tags={runs.PARENT_TAG: place.parent.id},
    )
    said = (journal.curve(folder / journal.FOLDER, key).values() for key in ("epoch_s", "solve_s"))
    return outcome.bundle, sum(map(sum, said))
