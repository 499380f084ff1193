"""`/ping` and `/invocations` as MLflow's scoring server and SageMaker have them, so that their callers need no change.

A body is an image, or several as `POST /predict/{model}` takes them, or MLflow's JSON with images as base64: one of
`dataframe_records`, `dataframe_split`, `instances` and `inputs`, with a column `image`, and `params`. The answer is
MLflow's: `{"predictions": [{"labels": [...], "scores": [...], "boxes": [...]}]}`, boxes for detectors only. Where
several models are served the query says which, `?model=<name>`, or SageMaker's header `X-Amzn-SageMaker-Target-Model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from serve import bodies, problems
from serve.gate import Gate, asked_of, told_of, wanted_of
from serve.problems import Problem
from serve.schemas import Served, Told

TARGET = "X-Amzn-SageMaker-Target-Model"
COLUMN = "image"


def install(app: FastAPI, gate: Gate) -> None:
    """Add the two routes."""
    routes = Invocations(gate)
    app.get("/ping", tags=["MLflow and SageMaker"])(routes.ping)
    app.post("/invocations", tags=["MLflow and SageMaker"])(routes.invoke)


class Which(BaseModel):
    """The query of `/invocations`; a model's name may have an alias behind it, as in `digits@champion`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None


class Invocations:
    """The routes."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def ping(self) -> Response:
        """Answer 200 once every model is loaded, 503 until then; nothing is said."""
        waiting = await self.gate.waiting_for()
        return Response(status_code=503, headers=problems.RETRY_AFTER) if waiting else Response()

    async def invoke(self, request: Request, asked: Annotated[Which, Query()]) -> JSONResponse:
        """Answer about one image, or about those of MLflow's JSON."""
        gate, key = self.gate, problems.request_id(request)
        found = self._find(asked.model or request.headers.get(TARGET), key)
        with gate.room():
            images, params = await self._read(request)
            wanted = wanted_of(found, asked_of(params, "params"), where="params")
            with gate.room(len(images) - 1):
                told = told_of(await gate.ask(found, images, wanted, key=key), is_plain=False)
        return JSONResponse({"predictions": list(map(_prediction, told))})

    def _find(self, name: str | None, key: str) -> Served:
        names = [*self.gate.standings]
        if name is None and len(names) > 1:
            raise Problem(400, "which_model", f"Say which model as ?model=, one of {', '.join(names)}.")
        return self.gate.find(names[0] if name is None else name, key=key)

    async def _read(self, request: Request) -> tuple[tuple[bytes, ...], dict[str, Any]]:
        limits = self.gate.limits
        if bodies.kind_of(request) != "application/json":
            return (await bodies.images(request, limits)).data, {}
        said = bodies.json_object(await bodies.read(request, limits))
        params = {} if said.get("params") is None else said["params"]
        said.pop("params", None)
        if len(said) != 1 or not said.keys() <= _FORMS.keys() or not isinstance(params, dict):
            raise Problem(400, "json", f"Expected one of {', '.join(_FORMS)}, and params as an object.")
        ((form, value),) = said.items()
        texts = _FORMS[form](value)
        if not isinstance(texts, list) or not texts:
            raise Problem(400, "json", f"{form}: expected images in a column '{COLUMN}', at least one.")
        if len(texts) > limits.most_images:
            raise bodies.too_many(len(texts), limits)
        return tuple(bodies.from_base64(text, at) for at, text in enumerate(texts)), params


def _rows(value: Any) -> Any:
    """The elements of a list; of objects their image."""
    if not isinstance(value, list):
        return None
    return [row.get(COLUMN) if isinstance(row, dict) else row for row in value]


def _columns(value: Any) -> Any:
    """The image's column of an object, or the elements of a list."""
    return value.get(COLUMN) if isinstance(value, dict) else _rows(value)


def _split(value: Any) -> Any:
    """The first column of a table, which is to be the image's; pandas' index is left out."""
    if not isinstance(value, dict) or value.get("columns") != [COLUMN] or not isinstance(value.get("data"), list):
        return None
    return [row[0] if isinstance(row, list) and row else None for row in value["data"]]


_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "dataframe_records": _rows,
    "dataframe_split": _split,
    "instances": _rows,
    "inputs": _columns,
}


def _prediction(told: Told) -> dict[str, Any]:
    found: dict[str, Any] = {"labels": told.class_names, "scores": told.scores}
    return found if told.boxes is None else found | {"boxes": told.boxes}
