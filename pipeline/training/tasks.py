"""What the training loop asks of a task: how a batch is varied, what its loss is, how a model is measured.

The loop is the same for all of them and knows none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, BoxTargets
from pipeline.data.loading import Loader
from pipeline.data.transforms import classify, mixing
from pipeline.evaluation import live
from pipeline.evaluation.classify import Counts
from pipeline.models import Model
from pipeline.models._contract import Classifier
from pipeline.models._detector import Detector, check_proposals
from pipeline.training.recipe import Recipe
from pipeline.training.targets import class_weights, weigh

NUM_PROPOSALS = 128  # of an empty picture: more than a detector draws of one


class Task(ABC):
    """What is particular to a task.

    Attributes:
        MEASURED: the names of what `measure` returns.
    """

    MEASURED: ClassVar[tuple[str, ...]]

    @abstractmethod
    def mixed(self, batch: Batch) -> Batch:
        """A training batch on the device as a step gets it; what is random comes from torch's generator."""

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Named scalars that add up to the loss of a batch."""

    @abstractmethod
    def measure(self, model: Model, batches: Iterable[Batch], device: torch.device | str) -> dict[str, float]:
        """How a model does on a split of which this rank is given its part; the same on every rank."""

    @abstractmethod
    def blank(self, num_images: int) -> Batch:
        """As many grey pictures of the model's size, with targets, on the CPU."""


class Classification(Task):
    """One class for each picture."""

    MEASURED = tuple(Counts(np.ones((1, 1), np.int64)).metrics())

    def __init__(self, model: Classifier, recipe: Recipe, loader: Loader, device: torch.device | str) -> None:
        self._model, self._recipe = model, recipe
        manifest = loader.source.manifest
        pixels = manifest.pixels.get("train")
        self._covariance = None if pixels is None else pixels.covariance
        self._num_classes = len(manifest.classes)
        if isinstance(recipe.augment, classify.Augment):
            classify.check(recipe.augment, model.spec)
        mixing.check(recipe.mixing, model.spec.num_channels, self._covariance)
        weights = class_weights(recipe.class_weights, manifest.class_counts["train"])
        self._weights = None if weights is None else weights.to(device)

    def mixed(self, batch: Batch) -> Batch:
        """Mixed as the recipe says."""
        generator = torch.default_generator
        return mixing.mix(batch, self._recipe.mixing, self._num_classes, generator, self._covariance)

    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The model's, of targets that are smoothed and weighed."""
        targets = _smooth(batch.labels, outputs.shape[1], self._recipe.label_smoothing)
        return self._model.loss(outputs, weigh(targets, self._weights))

    def measure(self, model: Model, batches: Iterable[Batch], device: torch.device | str) -> dict[str, float]:
        """Accuracies and loss."""
        assert isinstance(model, Classifier)
        counts = live.evaluate(model, batches, self._num_classes, device, self._recipe.precision)
        return live.all_reduce(counts).metrics()

    def blank(self, num_images: int) -> Batch:
        """Of class 0."""
        spec = self._model.spec
        images = torch.full((num_images, spec.num_channels, *spec.size_hw), 128, dtype=torch.uint8)
        return Batch(images, torch.zeros(num_images, dtype=torch.int64))


class Detection(Task):
    """Any number of boxes in each picture."""

    MEASURED = ("coco_map", "coco_map50", "coco_map75", "voc_map50", "loss")

    def __init__(self, model: Detector, recipe: Recipe, loader: Loader) -> None:
        self._model, self._recipe = model, recipe
        self._num_classes = len(loader.source.manifest.classes)
        check_proposals(recipe.model, recipe.loading.proposals, loader.source.address)

    def mixed(self, batch: Batch) -> Batch:
        """As it is."""
        return batch

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The model's."""
        return self._model.loss(outputs, batch.boxes)

    def measure(self, model: Model, batches: Iterable[Batch], device: torch.device | str) -> dict[str, float]:
        """Average precisions and loss."""
        assert isinstance(model, Detector)
        found = live.evaluate_detector(model, batches, self._num_classes, device, self._recipe.precision)
        metrics = live.all_gather(found).metrics()
        return {name: metrics[name] for name in self.MEASURED}

    def blank(self, num_images: int) -> Batch:
        """Of the largest size that the model is shown, each with one object of class 0, and with proposals of it."""
        spec = self._model.spec
        height, width = spec.largest_hw
        if spec.fit.way == "resize":  # a lying and an upright picture are padded to a square
            height = width
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        images = torch.full((num_images, spec.num_channels, height, width), 128, dtype=torch.uint8)
        numbers = torch.arange(num_images)
        targets = BoxTargets(box.repeat(num_images, 1), torch.zeros_like(numbers), numbers, num_images)
        return Batch(images, targets, proposals=(box.repeat(NUM_PROPOSALS, 1),) * num_images)


def of(model: Model, recipe: Recipe, loader: Loader, device: torch.device | str) -> Task:
    """The task of a model.

    Raises:
        ConfigError: the images do not allow the augmentation, the class weights are not those of the classes, or the
            model needs proposals and the recipe names none.
    """
    if isinstance(model, Detector):
        return Detection(model, recipe, loader)
    return Classification(model, recipe, loader, device)


def _smooth(targets: Tensor, num_classes: int, share: float) -> Tensor:
    """The targets, hard [B] or soft [B, num_classes], with `share` of each spread over all classes."""
    if share == 0:
        return targets
    soft = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
    return soft * (1 - share) + share / num_classes
