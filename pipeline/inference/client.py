"""A typed client of the endpoint: encoded images in, ranked classes or boxes out. Needs neither torch nor Ray.

`Client` waits for an answer, `AsyncClient` is the same for asyncio. Threads, or tasks, may share one. An endpoint that
asks for a key gets the argument `key`, else the environment's VENTRAL_KEY.

Predictions change nothing, so a question that got lost is asked once more: where a process of the endpoint dies, its
connections end, or the proxy says 5xx in its place. What the endpoint itself answered, and silence, stand.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx
import numpy as np

from pipeline.errors import ClusterError, DataError
from pipeline.types import Detections

AnswerT = TypeVar("AnswerT")
TIMEOUT_S = 60.0
KEY = "VENTRAL_KEY"
TOP_K = 5
SCORE_THRESHOLD = 0.25
MAX_DETECTIONS = 100
AGAIN_S = 0.2
"""Until a lost question is asked again: the proxy has to see that a process is gone, not only its connections."""
PROXY = "proxy"
"""The code of what is said in the endpoint's place (`jobs/_haproxy.py`); elsewhere that is no JSON, and has none."""
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the endpoint answered about one image: class names and scores in [0, 1], best first.

    Attributes:
        alias: by which the version is served, if by any.
        timing_ms: milliseconds of `decode`, `queue` and `infer`.
    """

    model: str
    version: str
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: tuple[float, ...]
    request_id: str
    alias: str | None = None
    timing_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """What a detector's endpoint answered about one image: boxes in pixels of the upright original, best first.

    Attributes:
        alias: by which the version is served, if by any.
        timing_ms: milliseconds of `decode`, `queue` and `infer`.
    """

    model: str
    version: str
    detections: Detections
    class_names: tuple[str, ...]
    request_id: str
    alias: str | None = None
    timing_ms: Mapping[str, float] = field(default_factory=dict)


class Client:
    """One endpoint.

    Every question raises DataError where the endpoint refuses it, in its own words, and ClusterError where it fails or
    does not answer.
    """

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, *, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=timeout_s, headers=_headers(key))

    def predict(self, model: str, image: bytes, top_k: int = TOP_K) -> Ranked:
        """Ask a classifier about one encoded image; `model` may be `name@alias` or `name/versions/3`."""
        return self._ask(_about(model, image, top_k=top_k), _ranked)[0]

    def predict_many(self, model: str, images: Sequence[bytes], top_k: int = TOP_K) -> list[Ranked]:
        """Ask a classifier about several images in one request; in their order."""
        return self._ask(_about_many(model, images, top_k=top_k), _ranked)

    def detect(
        self,
        model: str,
        image: bytes,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        iou_threshold: float | None = None,
    ) -> Found:
        """Ask a detector about one encoded image."""
        asked = _detection(score_threshold, max_detections, iou_threshold)
        return self._ask(_about(model, image, **asked), _found)[0]

    def detect_many(
        self,
        model: str,
        images: Sequence[bytes],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        iou_threshold: float | None = None,
    ) -> list[Found]:
        """Ask a detector about several images in one request; in their order."""
        asked = _detection(score_threshold, max_detections, iou_threshold)
        return self._ask(_about_many(model, images, **asked), _found)

    def task(self, model: str) -> str:
        """Whether a model is for `classification` or for `detection`."""
        return _read(self.url, self._send("GET", f"/v2/models/{model}"), _task)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, question: _Question, read: Callable[[dict[str, Any]], AnswerT]) -> list[AnswerT]:
        response = self._send("POST", question.path, params=question.params, **question.body)
        return _answers(self.url, response, read)

    def _send(self, method: str, path: str, **what: Any) -> httpx.Response:
        with _failures(self.url):
            with suppress(*BROKEN):
                response = self._http.request(method, self.url + path, **what)
                if not _is_lost(response):
                    return response
            time.sleep(AGAIN_S)
            return self._http.request(method, self.url + path, **what)


class AsyncClient:
    """One endpoint, for asyncio; otherwise as `Client`."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, *, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(timeout=timeout_s, headers=_headers(key))

    async def predict(self, model: str, image: bytes, top_k: int = TOP_K) -> Ranked:
        """Ask a classifier about one encoded image."""
        return (await self._ask(_about(model, image, top_k=top_k), _ranked))[0]

    async def predict_many(self, model: str, images: Sequence[bytes], top_k: int = TOP_K) -> list[Ranked]:
        """Ask a classifier about several images in one request; in their order."""
        return await self._ask(_about_many(model, images, top_k=top_k), _ranked)

    async def detect(
        self,
        model: str,
        image: bytes,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        iou_threshold: float | None = None,
    ) -> Found:
        """Ask a detector about one encoded image."""
        asked = _detection(score_threshold, max_detections, iou_threshold)
        return (await self._ask(_about(model, image, **asked), _found))[0]

    async def detect_many(
        self,
        model: str,
        images: Sequence[bytes],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        iou_threshold: float | None = None,
    ) -> list[Found]:
        """Ask a detector about several images in one request; in their order."""
        asked = _detection(score_threshold, max_detections, iou_threshold)
        return await self._ask(_about_many(model, images, **asked), _found)

    async def task(self, model: str) -> str:
        """Whether a model is for `classification` or for `detection`."""
        return _read(self.url, await self._send("GET", f"/v2/models/{model}"), _task)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, question: _Question, read: Callable[[dict[str, Any]], AnswerT]) -> list[AnswerT]:
        response = await self._send("POST", question.path, params=question.params, **question.body)
        return _answers(self.url, response, read)

    async def _send(self, method: str, path: str, **what: Any) -> httpx.Response:
        with _failures(self.url):
            with suppress(*BROKEN):
                response = await self._http.request(method, self.url + path, **what)
                if not _is_lost(response):
                    return response
            await asyncio.sleep(AGAIN_S)
            return await self._http.request(method, self.url + path, **what)


class _Question(NamedTuple):
    """A request: where to, its query, and its body as httpx takes it."""

    path: str
    params: Mapping[str, float]
    body: Mapping[str, Any]


def _about(model: str, image: bytes, **asked: float) -> _Question:
    return _Question(f"/predict/{model}", asked, {"content": image})


def _about_many(model: str, images: Sequence[bytes], **asked: float) -> _Question:
    files = [("images", (str(number), image)) for number, image in enumerate(images)]
    if not files:
        raise DataError("expected at least one image, got none")
    return _Question(f"/predict/{model}", asked, {"files": files})


def _detection(score_threshold: float, max_detections: int, iou_threshold: float | None) -> dict[str, float]:
    asked: dict[str, float] = {"score_threshold": score_threshold, "max_detections": max_detections}
    return asked if iou_threshold is None else asked | {"iou_threshold": iou_threshold}


def _headers(key: str | None) -> dict[str, str]:
    key = os.environ.get(KEY, "") if key is None else key
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise DataError(f"key (or {KEY}): expected vk_..., as python -m jobs.keys add prints it, got other characters")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def _failures(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise ClusterError(f"{url}: the endpoint does not answer ({type(error).__name__})") from None
    except httpx.InvalidURL as error:
        raise DataError(f"{url}: is no address of an endpoint ({error})") from None


def _is_lost(response: httpx.Response) -> bool:
    """Whether it is the proxy that says that the endpoint failed, and not by silence."""
    return response.is_server_error and response.status_code != 504 and _json(response).get("code", PROXY) == PROXY


def _answers(url: str, response: httpx.Response, read: Callable[[dict[str, Any]], AnswerT]) -> list[AnswerT]:
    """One for each image; what is said of the whole request is said of each."""

    def each(answer: dict[str, Any]) -> list[AnswerT]:
        whole = {"model": answer["model"], "request_id": answer["request_id"]}
        return [read(result | whole) for result in answer.get("results", [answer])]

    return _read(url, response, each)


def _read(url: str, response: httpx.Response, read: Callable[[dict[str, Any]], AnswerT]) -> AnswerT:
    answer = _json(response)
    if not response.is_success:
        kind = DataError if response.status_code < 500 else ClusterError
        reason = answer.get("error") or response.text[:200] or "no reason"
        raise kind(f"{url}: {response.status_code}: {reason}{_advice(response)}")
    try:
        return read(answer)
    except (KeyError, TypeError, ValueError):
        raise ClusterError(f"{url}: the answer is not one of Ventral's; check the address") from None


def _advice(response: httpx.Response) -> str:
    """What helps where it is not the images that are refused."""
    if response.status_code == 401:
        sent = "Authorization" in response.request.headers
        return f" ({'another' if sent else 'a'} key goes into the argument 'key' or the environment's {KEY})"
    wait_s = response.headers.get("Retry-After", "")
    return f" (again after {wait_s} s)" if wait_s.isdigit() else ""


def _json(response: httpx.Response) -> dict[str, Any]:
    """The body, or nothing where it is no JSON object: what refuses in front of the application says so in text."""
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _task(answer: dict[str, Any]) -> str:
    return str(answer["properties"]["task"])


def _of_any_task(answer: dict[str, Any]) -> dict[str, Any]:
    """What is said of an image whatever the model is for."""
    model = answer["model"]
    return {
        "model": model["name"],
        "version": model["version"],
        "class_names": tuple(row["class_name"] for row in answer["predictions"]),
        "request_id": answer["request_id"],
        "alias": model["alias"],
        "timing_ms": answer["timing_ms"],
    }


def _ranked(answer: dict[str, Any]) -> Ranked:
    rows = answer["predictions"]
    return Ranked(
        labels=tuple(row["label"] for row in rows),
        scores=tuple(row["score"] for row in rows),
        **_of_any_task(answer),
    )


def _found(answer: dict[str, Any]) -> Found:
    rows = answer["predictions"]
    return Found(
        detections=Detections(
            np.array([row["box"] for row in rows], np.float32).reshape(-1, 4),
            np.array([row["label"] for row in rows], np.int64),
            np.array([row["score"] for row in rows], np.float32),
        ),
        **_of_any_task(answer),
    )
