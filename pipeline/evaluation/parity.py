"""Does the endpoint say what the evaluation measured? The same images both ways, compared score by score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import ModelError
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client
from pipeline.types import Classification, Split

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Parity:
    """How many images were compared, and the largest difference of a score."""

    num_images: int
    max_difference: float


def compare(client: Client, name: str, bundle: Bundle, source: shards.Shards, split: Split, num_images: int) -> Parity:
    """Send the first images of a split to the endpoint and compare with the offline evaluation of the same bundle.

    Raises:
        ModelError: a label differs, or a score by more than `TOLERANCE`.
        ClusterError: the endpoint does not answer.
    """
    worst, compared = 0.0, 0
    for offline, (image_id, image) in zip(_offline(bundle, source, split), _images(source, split), strict=False):
        if compared == num_images:
            break
        served = client.predict(name, image, top_k=min(5, len(bundle.card.classes)))
        expected = offline.scores[: len(served.scores)]
        difference = float(np.abs(expected - np.array(served.scores)).max())
        if served.labels[0] != offline.labels[0] or difference > TOLERANCE:
            raise ModelError(
                f"{image_id}: the endpoint answers {served.class_names[0]} with {served.scores[0]:.6f}, the evaluation "
                f"{bundle.card.classes[offline.labels[0]]} with {expected[0]:.6f}; they must agree within {TOLERANCE}"
            )
        worst, compared = max(worst, difference), compared + 1
    return Parity(compared, worst)


def _offline(bundle: Bundle, source: shards.Shards, split: Split) -> Iterator[Classification]:
    """What evaluation computes, image by image, in the order of the rows."""
    model = bundle.build()
    loader = Loader(source, model.spec, Loading(batch_size=32, num_tasks=0))
    with torch.inference_mode():
        for batch in loader.evaluate(split):
            yield from model.postprocess(model(batch), batch.frames)


def _images(source: shards.Shards, split: Split) -> Iterator[tuple[str, bytes]]:
    for shard in source.manifest.of(split):
        table = shards.read(source.path / shard.name, range(len(shard.row_groups)), ["image_id", "image"])
        for image_id, image in zip(table.column("image_id"), table.column("image"), strict=True):
            yield image_id.as_py(), image.as_py()
