"""Golden images: a few pictures that a bundle holds with what its model said of them when it was made.

Whoever is about to put the model before users lets it answer them on the machine, in the precision and through the road
that users will meet, and compares. Small differences are allowed, for precisions and processors round differently;
other weights, classes or preprocessing make larger ones. They are files beside the card, so the registry's checksum
covers them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline import boxes as geometry
from pipeline import imaging, storage
from pipeline.config import Strict
from pipeline.data.datasets.image_folder import walk
from pipeline.errors import BundleError, DataError, ImageError, ModelError
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Answer, Classification, Detections

FOLDER = "golden"
ANSWERS = "answers.json"
MOST_IMAGES = 16
"""Of a folder: a version is asked all of them whenever it is loaded anew."""
MOST_CLASSES = 5
MIN_SCORE = 0.25
"""Of a detection that is kept."""
TOLERANCE = 0.1
"""Of a score; a detection that is within it of `MIN_SCORE` need not be found."""
MIN_IOU = 0.7
SELECTED: dict[str, Any] = {"score_threshold": MIN_SCORE, "max_detections": 100}
"""Of a detector's candidates, whatever its own rule is: then and now the same is asked."""


class Golden(Strict):
    """One picture and what was said of it.

    Attributes:
        file: its name in the folder.
        labels, scores: best first: of a classifier the first few, of a detector all of at least `MIN_SCORE`.
        boxes: of a detector, xyxy in pixels of the upright original.
    """

    file: str
    labels: tuple[int, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, float, float, float], ...] | None = None

    @property
    def answer(self) -> Answer:
        """What was said, as a predictor says it."""
        return answer_of(self.labels, self.scores, self.boxes)


def answer_of(
    labels: Sequence[int], scores: Sequence[float], boxes: Sequence[tuple[float, float, float, float]] | None
) -> Answer:
    """An answer of plain numbers, as a predictor gives it; without boxes it is a classification."""
    ranked, rated = np.array(labels, np.int64), np.array(scores, np.float32)
    if boxes is None:
        return Classification(ranked, rated)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), ranked, rated)


def in_folder(folder: Path) -> list[bytes]:
    """The images below a folder that somebody has chosen to be kept, by path; hidden files are left out.

    Raises:
        DataError: there is no such folder, or it holds none, or too many.
        ImageError: a file is no image; the message names it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds a few images")
    files = list(walk(str(folder)))
    if not 1 <= len(files) <= MOST_IMAGES:
        raise DataError(f"{folder}: expected 1 to {MOST_IMAGES} golden images, found {len(files)} files")
    return [_image(file) for file in files]


def keep(made: Bundle, images: Sequence[bytes]) -> None:
    """Have a bundle's model answer encoded images, and keep both in the bundle; there whole or not at all.

    Raises:
        ImageError: one is no image.
    """
    answers = Predictor(made).predict(images, SELECTED)
    rows = [_golden(f"{at}.image", answer) for at, answer in enumerate(answers)]
    folder = made.path / FOLDER
    partial = folder.with_name(f".{FOLDER}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for row, image in zip(rows, images, strict=True):
        (partial / row.file).write_bytes(image)
    (partial / ANSWERS).write_bytes(_ROWS.dump_json(rows, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(path: Path) -> Iterator[tuple[bytes, Golden]]:
    """The golden images of the bundle in a folder; one made without them has none.

    Raises:
        BundleError: they are damaged.
    """
    folder = path / FOLDER
    if not folder.is_dir():
        return
    try:
        rows = _ROWS.validate_json((folder / ANSWERS).read_bytes())
        yield from [((folder / row.file).read_bytes(), row) for row in rows]
    except (OSError, ValidationError) as error:
        raise BundleError(f"{folder}: golden images that cannot be read ({error}); make the bundle again") from None


def check(expected: Golden, found: Answer) -> None:
    """Compare what is said of a golden image now with what was said then.

    Raises:
        ModelError: it is something else.
    """
    then = expected.answer
    if isinstance(then, Detections) and isinstance(found, Detections):
        _check_found(expected.file, then, found)
        _check_found(expected.file, found, then)
        return
    before, now = (dict(zip(one.labels.tolist(), one.scores.tolist(), strict=True)) for one in (then, found))
    best = [*then.labels[:1].tolist(), *found.labels[:1].tolist()]
    clear = [label for label, score in (before | now).items() if not score <= 2 * TOLERANCE]  # nan is, too
    for label in dict.fromkeys([*best, *clear]):
        if not abs(now.get(label, 0.0) - before.get(label, 0.0)) <= TOLERANCE:
            raise ModelError(
                f"golden image {expected.file}: class {label} had the score {before.get(label, 0.0):.3f} when the "
                f"bundle was made, now it has {now.get(label, 0.0):.3f}; they may differ by {TOLERANCE}"
            )


def _image(file: storage.File) -> bytes:
    try:
        data = storage.read(file.uri)
        imaging.decode(data)
    except OSError as error:
        raise DataError(f"{file.uri}: cannot be read: {storage.reason(error)}") from None
    except ImageError as error:
        raise ImageError(error.reason, f"{file.uri}: {error}") from None
    return data


def _check_found(file: str, some: Detections, others: Detections) -> None:
    """Every one of some detections that is clear enough is among the others."""
    clear = some.best(MIN_SCORE + TOLERANCE)
    overlaps = geometry.iou(clear.boxes_xyxy, others.boxes_xyxy)
    for row, (label, score, box) in enumerate(zip(clear.labels, clear.scores, clear.boxes_xyxy, strict=True)):
        close = (others.labels == label) & (np.abs(others.scores - score) <= TOLERANCE)
        if not (close & (overlaps[row] >= MIN_IOU)).any():
            raise ModelError(
                f"golden image {file}: an object of class {label} with the score {score:.3f} at "
                f"{np.round(box).tolist()} is in one of two answers only, that of now and that of when it was made"
            )


def _golden(file: str, answer: Answer | ImageError) -> Golden:
    if isinstance(answer, ImageError):
        raise answer
    if isinstance(answer, Detections):
        kept = answer.best(MIN_SCORE)
        boxes = tuple(map(tuple, kept.boxes_xyxy.tolist()))
        return Golden(file=file, labels=tuple(kept.labels.tolist()), scores=tuple(kept.scores.tolist()), boxes=boxes)
    labels, scores = answer.labels[:MOST_CLASSES].tolist(), answer.scores[:MOST_CLASSES].tolist()
    return Golden(file=file, labels=tuple(labels), scores=tuple(scores))


_ROWS = TypeAdapter(list[Golden])
