"""The road from a dataset to a registered model whose served answers are those of the evaluation, for `quickstart`."""

from __future__ import annotations

from pydantic import Field

from jobs._run import Job, progress, stage
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.data.datasets import AnyDataset
from pipeline.data.ingest import Config as Ingest
from pipeline.data.ingest import ingest
from pipeline.evaluation import parity
from pipeline.inference.client import Client
from pipeline.tracking import registry
from pipeline.training import experiment
from pipeline.types import Split


class Road(Strict):
    """Everything one road needs.

    Attributes:
        name: of the model and, with the time added, of the run.
        num_images: held-out images sent to the endpoint and compared with the offline evaluation.
    """

    name: str = Field(pattern=registry.NAME)
    dataset: AnyDataset
    ingest: Ingest = Ingest()
    training: experiment.Config
    num_images: int = Field(default=32, ge=1)

    @property
    def split(self) -> Split:
        """The images that are held out."""
        return self.training.evaluate[-1]


def walk(
    road: Road, at: str, job: Job, uri: str, seconds: dict[str, float]
) -> tuple[shards.Shards, experiment.Outcome]:
    """Make the shards, train, evaluate and register, on a connected Ray; `at` makes the run's name unique."""
    training = road.training.model_copy(update={"register_as": experiment.Registration(model=road.name)})
    with stage(f"{road.name}: preprocess", seconds):
        dataset = road.dataset.at(job.data_root, job.store)
        source = ingest(dataset, road.ingest, job.store / training.shards, progress("images"))
    with stage(f"{road.name}: train, evaluate, register", seconds):
        outcome = experiment.conduct(f"{road.name}-{at}", training, storage=job.store, uri=uri)
    return source, outcome


def compare(
    road: Road, client: Client, source: shards.Shards, outcome: experiment.Outcome, seconds: dict[str, float]
) -> parity.Parity:
    """Ask the endpoint about held-out images.

    Raises:
        ModelError: an answer is not that of the evaluation.
    """
    with stage(f"{road.name}: compare {road.num_images} served answers with offline ones", seconds):
        return parity.compare(client, road.name, outcome.bundle, source, road.split, road.num_images)
