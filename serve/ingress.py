"""HTTP in, HTTP out: takes the images of a request, asks a model about them, and says what it answered.

It holds no model and decodes nothing: its gate knows the versions that are served and a way to ask them, so
`application` stands on any ASGI server. What Ray Serve makes of it is `serve.endpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from serve import bodies, docs, invocations, oip, openapi, pages, problems
from serve.agreement import Agreement
from serve.gate import Gate, told_of, wanted_of
from serve.keys import Guard, Ring
from serve.pacing import Paced
from serve.problems import Problem, ProblemOut
from serve.roster import Standing
from serve.schemas import (
    Answer,
    Answers,
    Asked,
    ChallengerState,
    DetectedObject,
    ModelList,
    ModelOut,
    ModelState,
    Prediction,
    Result,
    Served,
    Timing,
    Told,
    VersionOut,
)
from serve.watching import UNWATCHED, Watch, Watched

PICTURE, JSON = "image/png", "application/json"
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


def application(gate: Gate, watch: Watch = UNWATCHED, ring: Ring | None = None, **options: Any) -> FastAPI:
    """The endpoint's ASGI application; with a ring of keys it asks for them. `options` go to FastAPI."""
    ingress = Ingress(gate)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ProblemOut} for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)
    }
    app = FastAPI(title="Ventral", docs_url=None, redoc_url=None, redirect_slashes=False, responses=refusals, **options)
    watch.meter.watch(gate.readings)
    app.add_middleware(Paced, gate=gate)
    if ring is not None:
        app.add_middleware(Guard, ring=ring)
    app.add_middleware(Watched, watch=watch)  # around the keys: refusals are counted too
    problems.install(app)
    app.get("/healthz", response_class=PlainTextResponse)(ingress.healthz)
    app.get("/readyz")(ingress.readyz)
    app.get("/models")(ingress.models)
    body = {"requestBody": {"required": True, "content": bodies.CONTENT}}
    app.post("/predict/{model}", response_model=Answer | Answers, openapi_extra=body)(ingress.predict)
    versions = "/predict/{model}/versions/{version}"
    app.post(versions, response_model=Answer | Answers, openapi_extra=body)(ingress.predict_version)
    oip.install(app, gate)
    invocations.install(app, gate)
    pages.install(app)
    openapi.install(app, gate, has_keys=ring is not None)
    docs.install(app)
    return app


class Ingress:
    """The house's own routes."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def healthz(self) -> str:
        """Answer while the process lives."""
        return "ok"

    async def readyz(self) -> JSONResponse:
        """Answer 200 once every model is loaded, 503 with the names of the others until then."""
        waiting = await self.gate.waiting_for()
        answer = {"ready": not waiting, "waiting_for": waiting}
        return JSONResponse(answer, 503, problems.RETRY_AFTER) if waiting else JSONResponse(answer)

    async def models(self) -> ModelList:
        """List what is served, and why what should be is not."""
        return ModelList(models=list(map(self._state, self.gate.standings.values())))

    async def predict(self, request: Request, model: str, asked: Annotated[Asked, Query()]) -> Response:
        """Rank the classes of encoded images (JPEG, PNG or WebP), or find their objects.

        The body is one image as it is, or several: files of multipart/form-data, or `{"images": ["<base64>", ...]}`.
        `model` may name the alias too, as in `digits@champion`. A detector that is asked for `image/png` draws its
        boxes. Where a challenger answers a share of the requests, equal `x-request-id`s get the same version.
        """
        return await self._predict(request, self.gate.find(model, key=problems.request_id(request)), asked)

    async def predict_version(
        self, request: Request, model: str, version: str, asked: Annotated[Asked, Query()]
    ) -> Response:
        """The same, of the version that is named or of none."""
        return await self._predict(request, self.gate.find(model, version), asked)

    async def _predict(self, request: Request, found: Served, asked: Asked) -> Response:
        gate, wanted = self.gate, wanted_of(found, asked, picture=_accepts_picture(request))
        with gate.room():
            images = await bodies.images(request, gate.limits)
            if wanted.picture and len(images.data) > 1:
                raise Problem(406, "picture", f"Expected one image to draw boxes on, got {len(images.data)}.")
            with gate.room(len(images.data) - 1):
                answers = await gate.ask(found, images.data, wanted, key=problems.request_id(request))
        told = told_of(answers, is_plain=images.is_plain)
        if wanted.picture:
            return Response(told[0].picture, media_type=PICTURE)
        shown = _shown(found, problems.request_id(request), told, images.is_plain)
        return Response(shown.model_dump_json(), media_type=JSON)

    def _state(self, standing: Standing) -> ModelState:
        live = standing.live
        return ModelState(
            name=standing.name,
            version=live and live.version,
            alias=live and live.alias,
            versions=list(map(_version_out, standing.versions)),
            challenger=self._challenger(standing),
            troubles=dict(standing.troubles),
        )

    def _challenger(self, standing: Standing) -> ChallengerState | None:
        served = standing.challenger
        if served is None:
            return None
        both = self.gate.agreement(standing.live, served) if standing.live else Agreement()
        return ChallengerState(
            version=served.version,
            alias=served.alias or "",
            share=standing.share,
            shadow=standing.shadow,
            compared=both.compared,
            agreed=both.agreed,
        )


def _accepts_picture(request: Request) -> bool:
    """Whether a picture is named as wanted, and no JSON as much, nor anything at all more (RFC 9110, section 12.5)."""
    weights = dict(map(_weighed, request.headers.get("accept", "").lower().split(",")))
    picture, anything = weights.get(PICTURE, 0.0), weights.get("application/*", weights.get("*/*", 0.0))
    return picture > weights[JSON] if JSON in weights else picture > 0 and picture >= anything


def _weighed(kind: str) -> tuple[str, float]:
    """A media type of `Accept` and its weight, 1 where none is said; one that is no number counts as none."""
    name, *parameters = (part.strip() for part in kind.split(";"))
    said = next((text.removeprefix("q=") for text in parameters if text.startswith("q=")), "1")
    return name, float(said) if _WEIGHT.fullmatch(said) else 0.0


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


def _version_out(served: Served) -> VersionOut:
    return VersionOut(
        **dict(_model_out(served)),
        task=served.task,
        num_classes=served.num_classes,
        engine=served.engine,
        run_url=served.run_url,
    )
