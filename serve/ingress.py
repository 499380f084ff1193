"""HTTP in, HTTP out: takes the images of a request, asks a model about them, and says what it answered.

It holds no model and decodes nothing: it knows the names and versions that are served and a way to ask them, so
`application` stands on any ASGI server, and `Endpoint` is what Ray Serve makes of it. Neither imports torch. The
replicas that are asked are in `serve.deployments`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Protocol, cast

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from pipeline.config import nearest
from serve import bodies, problems
from serve.problems import Problem, ProblemOut
from serve.schemas import (
    Answer,
    Answers,
    Asked,
    DetectedObject,
    Limits,
    ModelList,
    ModelOut,
    Prediction,
    Refused,
    Result,
    Served,
    Timing,
    Told,
    Wanted,
)

READY_S = 2.0
PICTURE = "image/png"


class Ask(Protocol):
    """How a model is reached."""

    def predict(self, name: str, images: tuple[bytes, ...], wanted: Wanted) -> Awaitable[list[Told | Refused]]:
        """What a model says of each encoded image."""

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
    body = {"requestBody": {"required": True, "content": bodies.CONTENT}}
    app.post("/predict/{model}", response_model=Answer | Answers, openapi_extra=body)(ingress.predict)
    versions = "/predict/{model}/versions/{version}"
    app.post(versions, response_model=Answer | Answers, openapi_extra=body)(ingress.predict_version)
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

    async def predict(self, name: str, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        """Ask a replica of the model."""
        return cast(list[Told | Refused], await self.handles[name].predict.remote(images, wanted))

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

    async def predict(self, request: Request, model: str, asked: Annotated[Asked, Query()]) -> Response:
        """Rank the classes of encoded images (JPEG, PNG or WebP), or find their objects.

        The body is one image as it is, or several: files of multipart/form-data, or `{"images": ["<base64>", ...]}`.
        `model` may name the alias too, as in `digits@champion`. A detector that is asked for `image/png` draws its
        boxes.
        """
        return await self._predict(request, self._find(model), asked)

    async def predict_version(
        self, request: Request, model: str, version: str, asked: Annotated[Asked, Query()]
    ) -> Response:
        """The same, of the version that is named or of none."""
        return await self._predict(request, self._find(model, version), asked)

    async def _predict(self, request: Request, found: Served, asked: Asked) -> Response:
        wanted = _wanted(found, asked, _accepts_picture(request))
        with self._room():
            images = await bodies.images(request, self.limits)
            if wanted.picture and len(images.data) > 1:
                raise Problem(406, "picture", f"Expected one image to draw boxes on, got {len(images.data)}.")
            with self._room(len(images.data) - 1):
                answers = await self._ask(found.name, images.data, wanted)
        told = _told(answers, images.is_plain)
        if wanted.picture:
            return Response(told[0].picture, media_type=PICTURE)
        shown = _shown(found, problems.request_id(request), told, images.is_plain)
        return Response(shown.model_dump_json(), media_type="application/json")

    def _find(self, address: str, version: str | None = None) -> Served:
        """The model of a path `name` or `name@alias`, and perhaps a version."""
        name, _, alias = address.partition("@")
        if name not in self.served:
            raise Problem(404, "unknown_model", f"no model is called '{name}'; {nearest(name, list(self.served))}")
        found = self.served[name]
        if (alias and alias != found.alias) or version not in {None, found.version}:
            wanted = f"version {version}" if version else f"alias {alias}"
            here = f"version {found.version}" + (f" ({found.alias})" if found.alias else "")
            raise Problem(404, "unknown_version", f"{name}: {wanted} is not served, {here} is.")
        return found

    @contextmanager
    def _room(self, count: int = 1) -> Iterator[None]:
        """Count images in, and out."""
        if self.inflight + count > self.limits.max_inflight:
            raise problems.overloaded()
        self.inflight += count
        try:
            yield
        finally:
            self.inflight -= count

    async def _ask(self, name: str, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return await self.ask.predict(name, images, wanted)
        except Exception as error:
            raise problems.of_exception(error) from error

    async def _is_ready(self, name: str) -> bool:
        try:
            async with asyncio.timeout(READY_S):
                return await self.ask.ready(name)
        except Exception as error:
            return problems.of_exception(error).code == "overloaded"  # too busy to say so is ready enough


def _wanted(found: Served, asked: Asked, picture: bool) -> Wanted:
    """What a request asks of a model, each key being one of its task."""
    plain, given = Wanted(), asked.model_dump(exclude_none=True)
    for key in given:
        if (key == "top_k") != (found.task == "classification"):
            raise Problem(422, "query", f"query.{key}: {found.name} is for {found.task}, leave it out.")
    if asked.top_k is not None and asked.top_k > found.num_classes:
        raise Problem(422, "query", f"query.top_k: {found.name} has {found.num_classes} classes, got {asked.top_k}.")
    if picture and found.task != "detection":
        raise Problem(406, "picture", f"{found.name} is for {found.task} and has no boxes to draw; accept JSON.")
    return replace(plain, **{"top_k": min(plain.top_k, found.num_classes)} | given, picture=picture)


def _accepts_picture(request: Request) -> bool:
    """Whether a picture is wanted rather than JSON: it is named, and JSON is not."""
    accepted = [kind.partition(";")[0].strip() for kind in request.headers.get("accept", "").lower().split(",")]
    return PICTURE in accepted and "application/json" not in accepted


def _told(answers: Sequence[Told | Refused], is_plain: bool) -> list[Told]:
    """What was answered, if it is about every image."""
    for at, answer in enumerate(answers):
        if isinstance(answer, Refused):
            raise problems.of_image(answer, "" if is_plain else f"images.{at}: ")
    return [answer for answer in answers if isinstance(answer, Told)]


def _shown(found: Served, request_id: str, told: Sequence[Told], is_plain: bool) -> Answer | Answers:
    model, results = _model_out(found), list(map(_result, told))
    if is_plain:
        return Answer(model=model, request_id=request_id, **dict(results[0]))
    return Answers(model=model, request_id=request_id, results=results)


def _result(told: Told) -> Result:
    rows = zip(told.labels, told.class_names, told.scores, strict=True)
    predictions: list[DetectedObject] | list[Prediction]
    if told.boxes is None:
        predictions = [Prediction(label=label, class_name=name, score=score) for label, name, score in rows]
    else:
        predictions = [
            DetectedObject(label=label, class_name=name, score=score, box=box)
            for (label, name, score), box in zip(rows, told.boxes, strict=True)
        ]
    timing = Timing(decode=told.decode_ms, queue=told.queue_ms, infer=told.infer_ms)
    return Result(predictions=predictions, timing_ms=timing)


def _model_out(model: Served) -> ModelOut:
    return ModelOut(name=model.name, version=model.version, alias=model.alias)
