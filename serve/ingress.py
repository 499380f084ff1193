"""HTTP in, HTTP out: reads one image per request under limits, asks a model, and says what it answered.

It holds no model and decodes nothing: it knows the names and versions that are served and a way to ask them, so
`application` stands on any ASGI server, and `Endpoint` is what Ray Serve makes of it. Neither imports torch. The
replicas that are asked are in `serve.deployments`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol, cast

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.requests import ClientDisconnect

from pipeline.config import nearest
from serve import problems
from serve.problems import Problem, ProblemOut
from serve.schemas import (
    Answer,
    DetectedObject,
    Limits,
    ModelList,
    ModelOut,
    Prediction,
    Refused,
    Served,
    Timing,
    Told,
    Wanted,
)

READY_S = 2.0
MAX_DETECTIONS = 1000  # of one image, that a request may ask for


class Ask(Protocol):
    """How a model is reached."""

    def predict(self, name: str, data: bytes, wanted: Wanted) -> Awaitable[Told | Refused]:
        """What a model says of an encoded image."""

    def ready(self, name: str) -> Awaitable[bool]:
        """True as soon as a replica of the model is loaded."""


def application(served: Sequence[Served], limits: Limits, ask: Ask) -> FastAPI:
    """The endpoint's ASGI application."""
    ingress = Ingress(served, limits, ask)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ProblemOut} for status in (400, 404, 408, 413, 415, 422, 429, 503, 504)
    }
    app = FastAPI(title="Ventral", docs_url=None, redoc_url=None, responses=refusals)
    problems.install(app)
    app.get("/healthz", response_class=PlainTextResponse)(ingress.healthz)
    app.get("/readyz")(ingress.readyz)
    app.get("/models")(ingress.models)
    body = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string"}}}}}
    app.post("/predict/{model}", response_model=Answer, openapi_extra=body)(ingress.predict)
    return app


class Endpoint:
    """The ingress deployment: the application over Ray's handles."""

    def __init__(self, served: Sequence[Served], limits: Limits, handles: Mapping[str, Any]) -> None:
        self.served = served
        self.limits = limits
        self.handles = handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, made where it runs."""
        return application(self.served, self.limits, self)

    async def predict(self, name: str, data: bytes, wanted: Wanted) -> Told | Refused:
        """Ask a replica of the model."""
        return cast(Told | Refused, await self.handles[name].predict.remote(data, wanted))

    async def ready(self, name: str) -> bool:
        """Whether a replica of the model answers."""
        return cast(bool, await self.handles[name].ready.remote())


class Ingress:
    """The routes, over one set of served models."""

    def __init__(self, served: Sequence[Served], limits: Limits, ask: Ask) -> None:
        self.served: Mapping[str, Served] = {model.name: model for model in served}
        self.limits = limits
        self.ask = ask
        self.inflight = 0

    async def healthz(self) -> str:
        """Answer while the process lives."""
        return "ok"

    async def readyz(self) -> JSONResponse:
        """Answer 200 once every model is loaded, 503 with the names of the others until then."""
        names = list(self.served)
        ready = await asyncio.gather(*map(self._is_ready, names))
        waiting = [name for name, loaded in zip(names, ready, strict=True) if not loaded]
        return JSONResponse({"ready": not waiting, "waiting_for": waiting}, 503 if waiting else 200)

    async def models(self) -> ModelList:
        """List what is served."""
        return ModelList(models=[_model_out(model) for model in self.served.values()])

    async def predict(
        self,
        request: Request,
        model: str,
        top_k: Annotated[int | None, Query(ge=1)] = None,
        score_threshold: Annotated[float | None, Query(ge=0, le=1)] = None,
        max_detections: Annotated[int | None, Query(ge=1, le=MAX_DETECTIONS)] = None,
    ) -> Response:
        """Rank the classes of one encoded image, or find its objects (JPEG, PNG or WebP, whatever the content type).

        `top_k` is for classifiers, `score_threshold` (0.25) and `max_detections` (100) are for detectors.
        """
        found = self._find(model)
        wanted = _wanted(found, top_k, score_threshold, max_detections)
        with self._room():
            answer = await self._ask(model, await self._body(request), wanted)
        if isinstance(answer, Refused):
            raise problems.of_image(answer)
        told = _answer(found, problems.request_id(request), answer)
        return Response(told.model_dump_json(), media_type="application/json")

    def _find(self, name: str) -> Served:
        if name not in self.served:
            raise Problem(404, "unknown_model", f"no model is called '{name}'; {nearest(name, list(self.served))}")
        return self.served[name]

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Count a request in, before its body is read, and out."""
        if self.inflight >= self.limits.max_inflight:
            raise problems.overloaded()
        self.inflight += 1
        try:
            yield
        finally:
            self.inflight -= 1

    async def _body(self, request: Request) -> bytes:
        if int(request.headers.get("content-length") or 0) > self.limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_s):
                return await self._read(request)
        except TimeoutError:
            raise Problem(408, "slow_body", f"The body did not arrive within {self.limits.body_s:g} s.") from None
        except ClientDisconnect:
            raise Problem(400, "disconnected", "The client went away before its body had arrived.") from None

    async def _read(self, request: Request) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.limits.max_body_bytes:
                raise self._too_large()
            chunks.append(chunk)
        if not size:
            raise Problem(400, "image_empty", "Expected an encoded image as the request's body, got no bytes at all.")
        return b"".join(chunks)

    def _too_large(self) -> Problem:
        limit = self.limits.max_body_bytes
        # What is left of the body is not read: the connection cannot be used again.
        return Problem(413, "too_large", f"The body is larger than {limit} bytes.", {"Connection": "close"})

    async def _ask(self, name: str, data: bytes, wanted: Wanted) -> Told | Refused:
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return await self.ask.predict(name, data, wanted)
        except Exception as error:
            raise problems.of_exception(error) from error

    async def _is_ready(self, name: str) -> bool:
        try:
            async with asyncio.timeout(READY_S):
                return await self.ask.ready(name)
        except Exception as error:
            return problems.of_exception(error).code == "overloaded"  # too busy to say so is ready enough


def _wanted(found: Served, top_k: int | None, score_threshold: float | None, max_detections: int | None) -> Wanted:
    """What a request asks of a model, each key being one of its task."""
    plain = Wanted()
    if found.task == "classification":
        wrong = {"score_threshold": score_threshold, "max_detections": max_detections}
    else:
        wrong = {"top_k": top_k}
    for key, value in wrong.items():
        if value is not None:
            raise Problem(422, "query", f"query.{key}: {found.name} is for {found.task}, leave it out.")
    if top_k is not None and top_k > found.num_classes:
        raise Problem(422, "query", f"query.top_k: {found.name} has {found.num_classes} classes, got {top_k}.")
    return Wanted(
        top_k or min(plain.top_k, found.num_classes),
        plain.score_threshold if score_threshold is None else score_threshold,
        plain.max_detections if max_detections is None else max_detections,
    )


def _answer(found: Served, request_id: str, told: Told) -> Answer:
    rows = zip(told.labels, told.class_names, told.scores, strict=True)
    predictions: list[DetectedObject] | list[Prediction]
    if told.boxes is None:
        predictions = [Prediction(label=label, class_name=name, score=score) for label, name, score in rows]
    else:
        predictions = [
            DetectedObject(label=label, class_name=name, score=score, box=box)
            for (label, name, score), box in zip(rows, told.boxes, strict=True)
        ]
    return Answer(
        model=_model_out(found),
        request_id=request_id,
        predictions=predictions,
        timing_ms=Timing(decode=told.decode_ms, queue=told.queue_ms, infer=told.infer_ms),
    )


def _model_out(model: Served) -> ModelOut:
    return ModelOut(name=model.name, version=model.version, alias=model.alias)
