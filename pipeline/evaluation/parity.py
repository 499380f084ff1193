"""Does the endpoint say what the evaluation measured? The same images both ways, compared by score and by box."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data import lookup, shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import ImageError, ModelError
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client, Ranked
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import MOST_CANDIDATES, DetectorConfig
from pipeline.types import Answer, Classification, Detections, Float32Array, Int64Array, Split

TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.1
MIN_SCORE = 0.05
"""Of a detection that must be found again; of those it is looked for among, half of it: what hardly clears a threshold
may clear it on one side only."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How many images were compared, and the largest difference of a score."""

    num_images: int
    max_difference: float


def compare(client: Client, name: str, bundle: Bundle, source: shards.Shards, split: Split, num_images: int) -> Parity:
    """Send the first images of a split to the endpoint and compare with the offline evaluation of the same bundle.

    Raises:
        ModelError: a label differs, a score by more than `TOLERANCE`, or a box by more than `BOX_TOLERANCE_PX`.
        ClusterError: the endpoint does not answer.
    """
    worst, compared, classes = 0.0, 0, bundle.card.classes
    images = lookup.in_order(source, split)
    for offline, (image_id, image) in zip(_offline(bundle, source, split), images, strict=False):
        if compared == num_images:
            break
        if isinstance(offline, Detections):
            found = client.detect(name, image, score_threshold=MIN_SCORE / 2, max_detections=_most(bundle))
            difference = _compare_boxes(image_id, offline, found.detections, classes)
        else:
            difference = _compare_ranks(image_id, offline, client.predict(name, image, min(5, len(classes))), classes)
        worst, compared = max(worst, difference), compared + 1
    return Parity(compared, worst)


def _compare_ranks(image_id: str, offline: Classification, served: Ranked, classes: tuple[str, ...]) -> float:
    """The largest difference of a score."""
    expected = offline.scores[: len(served.scores)]
    difference = float(np.abs(expected - np.array(served.scores)).max())
    if served.labels[0] != offline.labels[0] or difference > TOLERANCE:
        raise ModelError(
            f"{image_id}: the endpoint answers {served.class_names[0]} with {served.scores[0]:.6f}, the evaluation "
            f"{classes[offline.labels[0]]} with {expected[0]:.6f}; they must agree within {TOLERANCE}"
        )
    return difference


def _compare_boxes(image_id: str, offline: Detections, served: Detections, classes: tuple[str, ...]) -> float:
    """The largest difference of a score, both ways round; the order of detections of one score is free."""
    pairs = ((offline, served, "the evaluation", "the endpoint"), (served, offline, "the endpoint", "the evaluation"))
    differences = [0.0]
    for mine, others, who, other in pairs:
        for box, label, score in zip(*_columns(mine.best(MIN_SCORE)), strict=True):
            apart = np.abs(others.boxes_xyxy - box).max(axis=1, initial=0) + np.where(others.labels == label, 0, np.inf)
            same = np.flatnonzero(apart <= BOX_TOLERANCE_PX)
            off = np.abs(others.scores[same] - score).min(initial=np.inf)
            if off > TOLERANCE:
                raise ModelError(
                    f"{image_id}: {who} finds {classes[label]} with {score:.6f} at {np.round(box, 1).tolist()}, "
                    f"{other} does not; they must agree within {TOLERANCE} and {BOX_TOLERANCE_PX} pixels"
                )
            differences.append(float(off))
    return max(differences)


def _most(bundle: Bundle) -> int:
    """As many detections as an evaluation keeps of an image."""
    model = bundle.card.model
    return model.select.max_detections if isinstance(model, DetectorConfig) else MOST_CANDIDATES


def _columns(found: Detections) -> tuple[Float32Array, Int64Array, Float32Array]:
    return found.boxes_xyxy, found.labels, found.scores


def _offline(bundle: Bundle, source: shards.Shards, split: Split) -> Iterator[Answer]:
    """What evaluation computes, image by image, in the order of the rows; regions are proposed as at the endpoint."""
    predictor = Predictor(bundle)
    model = predictor.model
    if bundle.card.model.needs_proposals:
        for _, image in lookup.in_order(source, split):
            (answer,) = predictor.predict([image])
            assert not isinstance(answer, ImageError)
            yield answer
        return
    loader = Loader(source, model.spec, Loading(batch_size=predictor.batch_size, num_tasks=0))
    for batch in loader.evaluate(split):
        yield from predictor.predict_batch(batch)
