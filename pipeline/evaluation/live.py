"""A model in memory against labelled batches: used after every epoch by training, and by `run` on a stored bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batch import Batch
from pipeline.data.transforms import classify
from pipeline.evaluation.classify import Counts
from pipeline.models._contract import Classifier
from pipeline.types import Float32Array, Views

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Watch = Callable[[Batch, Float32Array], None]
"""Is shown every batch and its scores, float32 [B, num_classes]."""


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


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """The context of a forward pass and its loss: matrix products and convolutions in 16 bits, but for `fp32`."""
    return torch.autocast(torch.device(device).type, dtype=DTYPES[precision], enabled=precision != "fp32")
