"""A typed client of the endpoint: encoded image in, ranked classes or boxes out. Needs neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import requests

from pipeline.errors import ClusterError, DataError
from pipeline.types import Detections

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the endpoint answered about one image: class names and scores in [0, 1], best first."""

    model: str
    version: str
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: tuple[float, ...]
    request_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a detector's endpoint answered about one image: boxes in pixels of the upright original, best first."""

    model: str
    version: str
    detections: Detections
    class_names: tuple[str, ...]
    request_id: str


class Client:
    """One endpoint; its connection is kept between calls, so a client belongs to one thread."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.session = requests.Session()

    def predict(self, model: str, image: bytes, top_k: int = 5) -> Ranked:
        """Ask a classifier about one encoded image.

        Raises:
            DataError: the endpoint refuses the request; the message is its own.
            ClusterError: it does not answer, or fails.
        """
        return self._ask(model, image, {"top_k": top_k}, _ranked)

    def detect(self, model: str, image: bytes, *, score_threshold: float = 0.25, max_detections: int = 100) -> Found:
        """Ask a detector about one encoded image.

        Raises:
            DataError: the endpoint refuses the request; the message is its own.
            ClusterError: it does not answer, or fails.
        """
        asked = {"score_threshold": score_threshold, "max_detections": max_detections}
        return self._ask(model, image, asked, _found)

    def _ask(
        self, model: str, image: bytes, asked: Mapping[str, float], read: Callable[[dict[str, Any]], AnswerT]
    ) -> AnswerT:
        try:
            response = self.session.post(
                f"{self.url}/predict/{model}", params=asked, data=image, timeout=self.timeout_s
            )
        except requests.RequestException as error:
            raise ClusterError(f"{self.url}: the endpoint does not answer ({type(error).__name__})") from None
        answer = _json(response)
        if not response.ok:
            kind = DataError if response.status_code < 500 else ClusterError
            raise kind(
                f"{self.url}: {response.status_code}: {answer.get('error') or response.text[:200] or 'no reason'}"
            )
        try:
            return read(answer)
        except (KeyError, TypeError, ValueError):
            raise ClusterError(f"{self.url}: the answer is not one of Ventral's; check the address") from None


def _json(response: requests.Response) -> dict[str, Any]:
    """The body, or nothing where it is no JSON object: what refuses in front of the application says so in text."""
    try:
        answer = response.json()
    except requests.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _ranked(answer: dict[str, Any]) -> Ranked:
    rows = answer["predictions"]
    return Ranked(
        model=answer["model"]["name"],
        version=answer["model"]["version"],
        labels=tuple(row["label"] for row in rows),
        class_names=tuple(row["class_name"] for row in rows),
        scores=tuple(row["score"] for row in rows),
        request_id=answer["request_id"],
    )


def _found(answer: dict[str, Any]) -> Found:
    rows = answer["predictions"]
    return Found(
        model=answer["model"]["name"],
        version=answer["model"]["version"],
        detections=Detections(
            np.array([row["box"] for row in rows], np.float32).reshape(-1, 4),
            np.array([row["label"] for row in rows], np.int64),
            np.array([row["score"] for row in rows], np.float32),
        ),
        class_names=tuple(row["class_name"] for row in rows),
        request_id=answer["request_id"],
    )
