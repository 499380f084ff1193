"""A model in memory against labelled batches: used after every epoch by training, and by `run` on a stored bundle.

Two tasks, the same in shape: what `evaluate` counts of a classifier is summed over ranks, what `evaluate_detector`
judges of a detector is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batch import Batch, of_equal_size
from pipeline.data.transforms import classify
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.detect import Judged, judge, merge
from pipeline.models._contract import Classifier
from pipeline.models._detector import Detector
from pipeline.types import Detections, Float32Array, Views

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Watch = Callable[[Batch, Float32Array], None]
"""Is shown every batch and its scores, float32 [B, num_classes]."""
WatchFound = Callable[[Batch, list[Detections]], None]
"""Is shown every batch and what was found in its images."""
SEED = 0
"""Of the regions that a two-stage detector draws for its validation loss: the same after every epoch."""


@dataclass(frozen=True)
class Found:
    """What a detector found in some images, judged, and the sum over them of its loss."""

    judged: Judged
    loss: float

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """All together; no two may speak of one image."""
        parts = list(parts)
        return cls(merge([part.judged for part in parts]), sum(part.loss for part in parts))

    def metrics(self) -> dict[str, float]:
        """Average precisions and recalls by the names of their rules, and the mean loss of an image.

        Raises:
            DataError: there is no object to be found.
        """
        return self.judged.metrics() | {"loss": self.loss / len(self.judged.ids)}


def evaluate(
    model: Classifier,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    watch: Watch | None = None,
    views: Views = "centre",
) -> Counts:
    """Count how `model`, left in evaluation mode, does on the labelled batches of this rank.

    Args:
        batches: pictures as `transforms.classify.shown` asks for them.
        watch: is shown every batch with its scores; nothing else of single images is kept.
        views: of each picture, whose scores are averaged.
    """
    model.eval()
    counts = Counts.empty(num_classes)
    with torch.inference_mode():
        for batch in batches:
            moved = batch.to(device)
            with autocast(precision, device):
                outputs = _outputs(model, moved, views)
                loss = torch.stack(list(model.loss(outputs, moved.labels).values())).sum()
            scores = model.scores(outputs).cpu().numpy()
            counts += Counts.of(scores, moved.labels.cpu().numpy(), float(loss) * len(batch))
            if watch is not None:
                watch(batch, scores)
    return counts


def evaluate_detector(
    model: Detector,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    watch: WatchFound | None = None,
) -> Found:
    """Judge what `model`, left in evaluation mode, finds in the annotated batches of this rank.

    Args:
        batches: pictures as evaluation fits them, with the objects in their originals; those of one size are looked at
            together.
        watch: is shown every such part of a batch with what was found.
    """
    model.eval()
    parts = [Found(Judged.empty(num_classes), 0.0)]
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        for batch in (part for whole in batches for _, part in of_equal_size(whole)):
            moved = batch.to(device)
            with autocast(precision, device):
                outputs = model(moved)
                loss = torch.stack(list(model.loss(outputs, moved.boxes).values())).sum()
            found = model.postprocess(outputs, batch.frames)
            images = zip(found, batch.objects, batch.ids, strict=True)
            judged = merge([judge(*image, num_classes) for image in images])
            parts.append(Found(judged, float(loss) * len(batch)))
            if watch is not None:
                watch(batch, found)
    return Found.merged(parts)


def _outputs(model: Classifier, batch: Batch, views: Views) -> Tensor:
    """What the model says of a batch; of several views, the logarithm of their mean scores, which has those scores."""
    cut = classify.cut(batch.images, model.spec, views)
    if len(cut) == 1:
        return cast(Tensor, model(batch))
    scores = torch.stack([model.scores(model(replace(batch, images=images))) for images in cut]).mean(dim=0)
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


def all_reduce(counts: Counts) -> Counts:
    """The sum over all ranks of the initialised process group; the counts themselves where there is none."""
    if not dist.is_initialized():
        return counts
    vector = torch.from_numpy(counts.to_vector())
    vector = vector.to("cuda") if dist.get_backend() == "nccl" else vector
    dist.all_reduce(vector)
    return Counts.from_vector(vector.cpu().numpy())


def all_gather(found: Found) -> Found:
    """What all ranks of the initialised process group found; what this one did where there is none."""
    if not dist.is_initialized():
        return found
    every: list[Found | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return Found.merged(part for part in every if part is not None)


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """The context of a forward pass and its loss: matrix products and convolutions in 16 bits, but for `fp32`."""
    return torch.autocast(torch.device(device).type, dtype=DTYPES[precision], enabled=precision != "fp32")
