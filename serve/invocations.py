"""`/ping` and `/invocations` as MLflow's scoring server and SageMaker have them, so that their callers need no change.

A body is an image, or several as `POST /predict/{model}` takes them, or MLflow's JSON with images as base64: one of
`dataframe_records`, `dataframe_split`, `instances` and `inputs`, with a column `image`, and `params`. The answer is
MLflow's: `{"predictions": [{"labels": [...], "scores": [...], "boxes": [...]}]}`, boxes for detectors only. Where
several models are served the query says which, `?model=<name>`, or SageMaker's header `X-Amzn-SageMaker-Target-Model`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from serve import bodies
from serve.gate import Gate, told_of, wanted_of
from serve.problems import Problem
from serve.schemas import Asked, Served, Told

TARGET = "X-Amzn-SageMaker-Target-Model"
COLUMN = "image"
_FORMS = ("dataframe_records", "dataframe_split", "instances", "inputs")


class Split(BaseModel):
    """A table as its columns' names and its rows."""

    model_config = ConfigDict(extra="ignore")  # pandas sends its index too

    columns: list[str]
    data: list[list[Any]]


class Invocation(BaseModel):
    """MLflow's JSON; one form of it is given."""

    model_config = ConfigDict(extra="forbid")

    dataframe_records: list[dict[str, Any]] | None = None
    dataframe_split: Split | None = None
    instances: list[Any] | None = None
    inputs: list[Any] | dict[str, list[Any]] | None = None
    params: dict[str, Any] = {}


def install(app: FastAPI, gate: Gate) -> None:
    """Add the two routes."""
    routes = Invocations(gate)
    app.get("/ping", tags=["MLflow and SageMaker"])(routes.ping)
    app.post("/invocations", tags=["MLflow and SageMaker"])(routes.invoke)


class Invocations:
    """The routes."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def ping(self) -> Response:
        """Answer 200 once every model is loaded, 503 until then; nothing is said."""
        return Response(status_code=503 if await self.gate.waiting_for() else 200)

    async def invoke(self, request: Request, model: str | None = None) -> JSONResponse:
        """Answer about one image, or about those of MLflow's JSON."""
        gate = self.gate
        found = self._find(model or request.headers.get(TARGET))
        with gate.room():
            images, params = await self._read(request)
            wanted = wanted_of(found, _asked(params))
            with gate.room(len(images) - 1):
                told = told_of(await gate.ask(found, images, wanted), is_plain=False)
        return JSONResponse({"predictions": list(map(_prediction, told))})

    def _find(self, name: str | None) -> Served:
        served = self.gate.served
        if name is None and len(served) > 1:
            raise Problem(400, "which_model", f"Say which model as ?model=, one of {', '.join(served)}.")
        return self.gate.find(next(iter(served)) if name is None else name)

    async def _read(self, request: Request) -> tuple[tuple[bytes, ...], dict[str, Any]]:
        limits = self.gate.limits
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return (await bodies.images(request, limits)).data, {}
        said = _parsed(await bodies.read(request, limits))
        texts = _texts(said)
        if len(texts) > limits.max_images:
            raise bodies.too_many(len(texts), limits)
        return tuple(bodies.from_base64(text, at) for at, text in enumerate(texts)), said.params


def _parsed(body: bytes) -> Invocation:
    try:
        said = Invocation.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Problem(400, "json", f"{where}: {first['msg']}.") from None
    if sum(getattr(said, form) is not None for form in _FORMS) != 1:
        raise Problem(400, "json", f"Expected one of {', '.join(_FORMS)}.")
    return said


def _texts(said: Invocation) -> list[Any]:
    """The elements of the column `image`, in any form."""
    if said.dataframe_split is not None:
        if said.dataframe_split.columns != [COLUMN]:
            raise Problem(400, "json", f"dataframe_split.columns: expected [{COLUMN!r}] alone.")
        rows: list[Any] = [one for row in said.dataframe_split.data for one in row[:1] or [None]]
    elif isinstance(said.inputs, dict):
        rows = said.inputs.get(COLUMN, []) if said.inputs.keys() == {COLUMN} else [None]
    else:
        rows = said.dataframe_records or said.instances or said.inputs or []
    if not rows:
        raise Problem(400, "image_empty", "Expected at least one image, got none.")
    return [row.get(COLUMN) if isinstance(row, dict) else row for row in rows]


def _asked(params: dict[str, Any]) -> Asked:
    try:
        return Asked.model_validate(params)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Problem(400, "json", f"params.{first['loc'][0]}: {first['msg']}.") from None


def _prediction(told: Told) -> dict[str, Any]:
    found: dict[str, Any] = {"labels": told.class_names, "scores": told.scores}
    return found if told.boxes is None else found | {"boxes": told.boxes}
