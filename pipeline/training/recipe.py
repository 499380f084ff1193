"""How a model is trained: what a run's YAML holds under `recipe`, for every task."""

from __future__ import annotations

from typing import Annotated, Any, Self, cast

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from pipeline import models
from pipeline.config import Chooser, Strict, validate
from pipeline.data.loading import Config as Loading
from pipeline.data.transforms import classify, detect
from pipeline.data.transforms.mixing import Mixing
from pipeline.evaluation.live import Precision
from pipeline.training.ema import Config as Averaging
from pipeline.training.linear import Config as Solving
from pipeline.training.optim import Config as Optim
from pipeline.training.start import Config as Start
from pipeline.training.stopping import Config as Watch
from pipeline.training.targets import ClassWeights

WATCHED = {"classification": "val/top1", "detection": "val/coco_map50"}
"""The metric that is watched, unless a recipe names another one."""


class _OfModel(Chooser):
    """Takes the augmentation of the task of the model that was named before it."""

    def __call__(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Strict):
            return value
        model = info.data.get("model")  # absent where it is wrong itself, which is told
        return validate(self._augment_of("alexnet" if model is None else model.name), value or {})

    def schema(self, node: Any, beside: Any) -> type[Strict] | None:
        try:
            return self._augment_of(beside["model"]["name"])
        except (KeyError, TypeError):
            return None

    def _augment_of(self, name: str) -> type[classify.Augment] | type[detect.Augment]:
        return detect.Augment if models.config_of(name).task == "detection" else classify.Augment


class Recipe(Strict):
    """How a model is trained.

    Attributes:
        augment: how single pictures are varied, by the task of the model: `transforms.classify.Augment` or
            `transforms.detect.Augment`.
        mixing: what is mixed within a batch, on the device; for classifiers, as are the next two.
        label_smoothing: share of each target spread evenly over all classes (Szegedy et al. 2016, section 7).
        class_weights: how much the images of each class count; `balanced`: all classes alike.
        start: the weights that training starts from, and which of them stay; None: initialised anew.
        ema: average the weights over the steps; it is the average that is measured and kept.
        watch: the metric that tells the best epoch, stops a run early and lowers the rate on a plateau.
        accumulate: parts in which a batch is trained, for batches that do not fit into memory; gradients add up to
            those of the whole, only batch normalisation sees the parts, and a detector divides by what it finds in one.
        precision: of the network under training; `bf16` and `fp16` run it under autocast.
        channels_last: keep images as [B, H, W, C] in memory, which convolutions of many channels like better.
        sync_batch_norm: on GPUs, normalise over the images of all workers.
        compile: let torch compile the network when it is first called.
        solve: how the last layers are found, for models that have that stage.
        keep_best: end with the weights of the best epoch, not with the last ones.
    """

    model: models.AnyModel
    loading: Loading = Loading()
    augment: Annotated[classify.Augment | detect.Augment, BeforeValidator(_OfModel())] = Field(
        default=cast(Any, None), validate_default=True
    )
    mixing: Mixing = Mixing()
    start: Start | None = None
    optim: Optim = Optim()
    ema: Averaging | None = None
    watch: Watch = Watch()
    epochs: int = Field(default=10, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: ClassWeights = "none"
    accumulate: int = Field(default=1, ge=1)
    precision: Precision = "fp32"
    channels_last: bool = False
    sync_batch_norm: bool = False
    compile: bool = False
    keep_best: bool = False
    solve: Solving = Solving()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _of_one_task(self) -> Self:
        task = self.model.task
        if "metric" not in self.watch.model_fields_set:
            object.__setattr__(self, "watch", self.watch.model_copy(update={"metric": WATCHED[task]}))
        plain: dict[str, object] = {"mixing": Mixing(), "label_smoothing": 0.0, "class_weights": "none"}
        wrong = [key for key, value in plain.items() if getattr(self, key) != value]
        if task == "detection" and wrong:
            raise ValueError(f"{', '.join(wrong)} are for classifiers only; leave them out for {self.model.name}")
        return self

    @model_validator(mode="after")
    def _of_its_stages(self) -> Self:
        if self.model.is_solved:
            raise ValueError(f"model: this {self.model.name} is what solve makes; name the one it begins with")
        if "solve" not in self.model.stages and self.solve != Solving():
            raise ValueError(f"solve: the last layers of {self.model.name} are trained like the others; leave it out")
        return self
