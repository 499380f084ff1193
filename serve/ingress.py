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
from serve.schemas import Answer, Limits, ModelList, ModelOut, Prediction, Ranked, Refused, Served, Timing

READY_S = 2.0
DEFAULT_TOP_K = 5


class Ask(Protocol):
    """How a model is reached."""

    def predict(self, name: str, data: bytes, top_k: int) -> Awaitable[Ranked | Refused]:
        """The best `top_k` classes of an encoded image."""

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

    async def predict(self, name: str, data: bytes, top_k: int) -> Ranked | Refused:
        """Ask a replica of the model."""
        return cast(Ranked | Refused, await self.handles[name].predict.remote(data, top_k))

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

    async def predict(self, request: Request, model: str, top_k: Annotated[int | None, Query(ge=1)] = None) -> Response:
        """Rank the classes of one encoded image (JPEG, PNG or WebP; the content type does not matter)."""
        found = self._find(model)
        if top_k is not None and top_k > found.num_classes:
            raise Problem(422, "query", f"query.top_k: {model} has {found.num_classes} classes, got {top_k}.")
        with self._room():
            data = await self._body(request)
            answer = await self._ask(model, data, top_k or min(DEFAULT_TOP_K, found.num_classes))
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

    async def _ask(self, name: str, data: bytes, top_k: int) -> Ranked | Refused:
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return await self.ask.predict(name, data, top_k)
        except Exception as error:
            raise problems.of_exception(error) from error

    async def _is_ready(self, name: str) -> bool:
        try:
            async with asyncio.timeout(READY_S):
                return await self.ask.ready(name)
        except Exception as error:
            return problems.of_exception(error).code == "overloaded"  # too busy to say so is ready enough


def _answer(found: Served, request_id: str, ranked: Ranked) -> Answer:
    rows = zip(ranked.labels, ranked.class_names, ranked.scores, strict=True)
    return Answer(
        model=_model_out(found),
        request_id=request_id,
        predictions=[Prediction(label=label, class_name=name, score=score) for label, name, score in rows],
        timing_ms=Timing(decode=ranked.decode_ms, queue=ranked.queue_ms, infer=ranked.infer_ms),
    )


def _model_out(model: Served) -> ModelOut:
    return ModelOut(name=model.name, version=model.version, alias=model.alias)
