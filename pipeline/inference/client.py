"""A typed client of the endpoint: encoded image in, ranked classes out. Needs neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import requests

from pipeline.errors import ClusterError, DataError


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the endpoint answered about one image: class names and scores in [0, 1], best first."""

    model: str
    version: str
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: tuple[float, ...]
    request_id: str


class Client:
    """One endpoint; its connection is kept between calls, so a client belongs to one thread."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.session = requests.Session()

    def predict(self, model: str, image: bytes, top_k: int = 5) -> Ranked:
        """Ask about one encoded image.

        Raises:
            DataError: the endpoint refuses the request; the message is its own.
            ClusterError: it does not answer, or fails.
        """
        try:
            response = self.session.post(
                f"{self.url}/predict/{model}", params={"top_k": top_k}, data=image, timeout=self.timeout_s
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
            return _ranked(answer)
        except (KeyError, TypeError):
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
