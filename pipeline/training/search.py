"""A training on one process, begun only to find out what to give it: a learning rate, the largest batch. No Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.models import Model
from pipeline.training import experiment, launch, loop, start
from pipeline.training.finder import Curve, RangeTest
from pipeline.training.recipe import Recipe


@dataclass(frozen=True)
class Search:
    """Model, batches and recipe of a training; nothing that is tried here changes the model.

    Attributes:
        recipe: read by a thread or processes beside this one; nothing is averaged, kept or compiled.
        device: one GPU for a training on GPUs.
    """

    model: Model
    loader: Loader
    recipe: Recipe
    device: str

    @classmethod
    def of(cls, training: experiment.Config, source: shards.Shards, roots: Sequence[Path], uri: str) -> Self:
        """That of a run's configuration.

        Args:
            source: the dataset.
            roots: folders that initial weights may lie in; below the last one, registered models are kept.
            uri: of the MLflow server, for those.

        Raises:
            VentralError: there are no such weights, or the images do not fit the model.
        """
        given, device = training.recipe, "cuda" if training.cluster.gpu else "cpu"
        loading = given.loading.model_copy(update={"reader": "local"})
        recipe = given.model_copy(update={"loading": loading, "ema": None, "keep_best": False, "compile": False})
        with tempfile.TemporaryDirectory() as room:
            experiment.prepare(recipe, source, Path(room), roots, uri)
            model = start.build(launch.fitted(recipe.model, source), recipe.seed, recipe.start, Path(room))
        loader = Loader(source, model.spec, loading, augment=recipe.augment, seed=recipe.seed, device=device)
        return cls(model, loader, recipe, device)

    def rates(self, config: RangeTest) -> Curve:
        """What the loss does at rising rates, for one worker's batch.

        Raises:
            ModelError: there is no finite loss.
        """
        return loop.find_rate(self.model, self.loader, self.recipe, config, device=self.device)

    def batch(self, limit_bytes: int) -> int:
        """The largest batch that fits into the GPU, or into so many bytes where there is none.

        Raises:
            ConfigError: not even one image fits.
        """
        limit = None if self.device == "cuda" else limit_bytes
        return loop.find_batch(self.model, self.loader, self.recipe, device=self.device, limit_bytes=limit)
