"""[Ray Train] Starts the workers of a run and waits for their result."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Self

import ray.train
import ray.train.torch
from pydantic import Field, model_validator

from pipeline.config import Strict, parse
from pipeline.data import loading, shards
from pipeline.errors import ConfigError, ModelError, VentralError, own_cause
from pipeline.inference.bundle import Bundle, load
from pipeline.models._contract import ModelConfig
from pipeline.tracking import journal
from pipeline.training import checkpoint
from pipeline.training.recipe import Recipe
from pipeline.training.worker import Assignment, work

RECORD = "run.json"


class Cluster(Strict):
    """How many workers train, and what each is given.

    Attributes:
        min_workers: train on as few as this many while there are no resources for `num_workers`, and on more as soon as
            there are; None waits for all. The batch of a step grows and shrinks with the workers.
        gpu: one GPU for each worker (nccl); without, CPUs only (gloo).
        max_failures: how often the workers are started anew after a failure of any kind; training then goes on from
            the newest checkpoint.
    """

    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpu: bool = False
    max_failures: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _min_is_least(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than num_workers, {self.num_workers}")
        return self


def train(
    folder: Path,
    source: shards.Shards,
    recipe: Recipe,
    cluster: Cluster,
    *,
    checkpoints: checkpoint.Config | None = None,
    provenance: dict[str, str] | None = None,
    is_tracked: bool = False,
    system_metrics: bool = False,
) -> Bundle:
    """Train on an initialised Ray, from the newest checkpoint of `folder` if there is one, and return the bundle.

    Args:
        folder: of this run, on storage that every worker reaches: bundle, and checkpoints where they are not elsewhere.
        is_tracked: `folder` holds the journal of an MLflow run, to which the workers write.
        system_metrics: each node tells how busy it is.

    Raises:
        VentralError: what a worker raised.
    """
    assignment = Assignment(
        folder.absolute(),
        replace(source, path=source.path.absolute()),
        recipe,
        fitted(recipe.model, source),
        provenance or {},
        store_of(folder, checkpoints),
        is_tracked,
        system_metrics,
    )
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"assignment": assignment},
        scaling_config=scaling(cluster),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.absolute() / "ray"),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    loading.warm_up(recipe.loading, cluster.num_workers)  # while the workers start
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        shutil.rmtree(folder / "ray", ignore_errors=True)  # Ray's own bookkeeping; ours is in checkpoints
    if result.return_value is not None:
        raise result.return_value
    return load(folder / "bundle")


def scaling(cluster: Cluster) -> ray.train.ScalingConfig:
    """What Ray Train is asked for: so many workers, each with its CPUs and perhaps a GPU."""
    few, all_of_them = cluster.min_workers, cluster.num_workers
    return ray.train.ScalingConfig(
        num_workers=all_of_them if few is None else (few, all_of_them),
        use_gpu=cluster.gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.gpu else {}),
    )


def store_of(folder: Path, checkpoints: checkpoint.Config | None = None) -> checkpoint.Store:
    """The checkpoints of the run in a folder, which gives the run its name."""
    return (checkpoints or checkpoint.Config()).store(str(folder.absolute()), folder.name)


def check_folder(folder: Path, checkpoints: checkpoint.Config | None = None, *, resume: bool) -> None:
    """Refuse to continue by accident, and to continue what is not there.

    Raises:
        ConfigError: there is a run and `resume` is not set, or the reverse.
        DataError: the storage of the checkpoints cannot be listed.
    """
    begun = where_begun(folder, checkpoints)
    if resume and begun is None:
        raise ConfigError(f"{folder}: holds no run to resume; leave resume out to start anew")
    if not resume and begun is not None:
        raise ConfigError(f"{begun}: holds an earlier run; choose another name, delete it, or set resume=true")


def where_begun(folder: Path, checkpoints: checkpoint.Config | None = None) -> Path | str | None:
    """The folder that holds something of a run already, of the run itself or of its checkpoints; or None.

    Raises:
        DataError: the storage of the checkpoints cannot be listed.
    """
    if any((folder / name).exists() for name in (RECORD, "bundle", journal.FOLDER)):
        return folder
    store = store_of(folder, checkpoints)
    return store.folder if store.positions() else None


def fitted(model: ModelConfig, source: shards.Shards) -> ModelConfig:
    """The model's configuration with the number of classes of the shards.

    Raises:
        ConfigError: it names another number.
    """
    num_classes = len(source.manifest.classes)
    if "num_classes" in model.model_fields_set and model.num_classes != num_classes:
        raise ConfigError(
            f"model.num_classes is {model.num_classes}, but {source.path} holds {num_classes} classes; leave it out"
        )
    return parse(type(model), model.model_dump(mode="json") | {"num_classes": num_classes}, f"model for {source.path}")


def _cause(error: BaseException) -> VentralError:
    """The first error that our code raised in a worker; of an unknown one, its type and message."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(cause := own_cause(failure), VentralError):
            return cause
    first = next(iter(failures.values()), error)
    return ModelError(f"training failed: {type(first).__name__}: {first}")
