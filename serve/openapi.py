"""The document of the endpoint, `/openapi.json`, with examples that work: a client may send them as they stand.

FastAPI writes the document from the routes; here it is told what only some of them answer with, and every operation
gets the example of a request, about a model that is served, and of what is said to it. With keys on it says how one is
sent, and which scope each operation asks for, as `serve.keys` decides. `serve.docs` shows it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipeline import imaging
from serve.gate import Gate
from serve.keys import required
from serve.schemas import Served

JSON, BINARY = "application/json", "application/octet-stream"
NONE_YET = Served("digits", "1", "champion", Path(), 10)
"""In examples, while nothing is loaded."""
_SIDE = 8
_INFER, _PREDICT = "/v2/models/{model}", "/predict/{model}"
_VERSION = "/versions/{version}"
_ID = "0af7651916cd43dd8448eb211c80319c"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_KEY_SENT: Mapping[str, Mapping[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""The ways to send a key, of which one is enough; by the names they have in the document."""
_PROBLEM = {"$ref": "#/components/schemas/ProblemOut"}


class Example(NamedTuple):
    """An operation's request, None where it has no body, and the answer."""

    answer: Any
    request: Any = None


def install(app: FastAPI, gate: Gate, *, has_keys: bool = False) -> None:
    """Make `app` give this document; `has_keys`: it asks for them."""
    last: dict[str, dict[str, Any]] = {}

    def document() -> dict[str, Any]:
        roster = gate.roster
        if roster.token not in last:
            last.clear()
            last[roster.token] = made(app, next(iter(roster.versions), NONE_YET), has_keys=has_keys)
        return last[roster.token]

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def made(app: FastAPI, served: Served, *, has_keys: bool = False) -> dict[str, Any]:
    """The document; its examples ask this version."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    paths, examples = document["paths"], examples_of(served)
    _say_what_is_answered(paths)
    for path, operations in paths.items():
        for method, operation in operations.items():
            _give(operation, examples[path], served, "200" if "200" in operation["responses"] else "400")
            operation["operationId"] = f"{method} {path}"
    if has_keys:
        _say_which_keys(app, document)
    return document


def _say_which_keys(app: FastAPI, document: dict[str, Any]) -> None:
    """As the layer in front judges each operation; its address with the names in braces is one that its route takes."""
    document["components"]["securitySchemes"] = _KEY_SENT
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            scope = required({"type": "http", "method": method.upper(), "path": path, "app": app})
            operation["security"] = [] if scope is None else [{way: [scope]} for way in _KEY_SENT]
            asks = "Asks for no key." if scope is None else f"Asks for a key of scope {scope}."
            operation["description"] = f"{operation['description']}\n\n{asks}"


def _say_what_is_answered(paths: Mapping[str, Any]) -> None:
    """What the routes do not say of themselves."""
    ready = {"type": "object", "required": ["ready", "waiting_for"]}
    paths["/readyz"]["get"]["responses"]["503"]["content"] = {JSON: {"schema": ready}}
    for status in ("200", "503"):
        paths["/ping"]["get"]["responses"][status].pop("content")
    for path, operations in paths.items():
        content = next(iter(operations.values()))["responses"]["200"].get("content", {})
        if path.endswith("/infer"):
            content[BINARY] = _BYTES
        if path.startswith("/predict"):
            content["image/png"] = _BYTES
        if path.endswith("load"):
            operations["post"]["responses"].pop("200")
        for operation in operations.values():
            refused = {"description": "Not Acceptable", "content": {JSON: {"schema": _PROBLEM}}}
            operation["responses"] |= {"406": refused} if path.startswith("/predict") else {}


def _give(operation: dict[str, Any], example: Example, model: Served, status: str) -> None:
    values = {"model": model.name, "version": model.version} | _keys(model)
    operation["parameters"] = [
        one | ({"example": values[one["name"]]} if one["name"] in values else {})
        for one in operation.get("parameters", [])
    ]
    if example.request is not None:
        operation.setdefault("requestBody", {"content": {}})["content"].setdefault(JSON, {"schema": {}})
        operation["requestBody"]["content"][JSON]["example"] = example.request
    if example.answer is not None:
        kinds = operation["responses"][status]["content"]
        kinds[JSON if JSON in kinds else next(iter(kinds))]["example"] = example.answer


def _keys(model: Served) -> dict[str, Any]:
    """Of the query."""
    if model.task == "classification":
        return {"top_k": min(3, model.num_classes)}
    return {"score_threshold": 0.25, "iou_threshold": 0.5, "max_detections": 100}


def picture() -> str:
    """A small PNG as base64."""
    ramp = np.arange(_SIDE * _SIDE * 3, dtype=np.uint8).reshape(_SIDE, _SIDE, 3)
    return base64.b64encode(imaging.encode_png(ramp)).decode()


def examples_of(model: Served) -> dict[str, Example]:
    """By path."""
    known = {"name": model.name, "version": model.version}
    ready: dict[str, Any] = known | {"state": "READY", "reason": ""}
    found = _protocol(model, known)
    for path in list(found):
        if path.startswith(_INFER):
            found[path.replace(_INFER, _INFER + _VERSION)] = found[path]
    labels = {"labels": ["0"], "scores": [0.93]}
    told = labels if model.task == "classification" else labels | {"boxes": [[1.0, 2.0, 6.5, 7.0]]}
    predicted = _predicted(model)
    return found | {
        "/healthz": Example("ok"),
        "/readyz": Example({"ready": True, "waiting_for": []}),
        "/ping": Example(None),
        "/models": Example({"models": [_listed(model)]}),
        _PREDICT: predicted,
        _PREDICT + _VERSION: predicted,
        "/v2/repository/index": Example([ready], {"ready": True}),
        "/invocations": Example({"predictions": [told]}, {"instances": [picture()], "params": _keys(model)}),
    }


def _listed(model: Served) -> dict[str, Any]:
    named: dict[str, Any] = {"name": model.name, "version": model.version, "alias": model.alias}
    also = {"task": model.task, "num_classes": model.num_classes, "engine": model.engine, "run_url": model.run_url}
    return named | {"versions": [named | also], "challenger": None, "troubles": {}}


def _predicted(model: Served) -> Example:
    row: dict[str, Any] = {"label": 0, "class_name": "0", "score": 0.93}
    if model.task == "detection":
        row["box"] = [1.0, 2.0, 6.5, 7.0]
    result = {"predictions": [row], "timing_ms": {"decode": 0.4, "queue": 1.1, "infer": 2.3}}
    named = {"name": model.name, "version": model.version, "alias": model.alias}
    return Example({"model": named, "request_id": _ID, "results": [result]}, {"images": [picture()]})


def _protocol(model: Served, known: Mapping[str, str]) -> dict[str, Example]:
    """Of the Open Inference Protocol."""
    refusal = {"error": "Models are not loaded or unloaded here; deploy what is to be served.", "code": "unsupported"}
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [picture()]}
    out = {"name": "num_detections", "datatype": "INT32", "shape": [1, 1], "data": [0]}
    if model.task == "classification":
        out = {"name": "top_k_scores", "datatype": "FP32", "shape": [1, 1], "data": [0.93]}
    asked = {"id": "7", "inputs": [tensor], "outputs": [{"name": out["name"]}], "parameters": _keys(model)}
    answer = {"model_name": model.name, "model_version": model.version, "id": "7", "outputs": [out]}
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    spent = {"model_stats": [{**known, "inference_count": 12, "execution_count": 9}]}
    loading = Example(refusal | {"request_id": _ID}, {})
    return {
        "/v2": Example({"name": "ventral", "version": "2", "extensions": ["binary_tensor_data"]}),
        "/v2/health/live": Example({"live": True}),
        "/v2/health/ready": Example({"ready": True, "live": True}),
        "/v2/models": Example({"models": [model.name]}),
        "/v2/models/stats": Example(spent),
        "/v2/repository/models/{model}/load": loading,
        "/v2/repository/models/{model}/unload": loading,
        _INFER: Example({"name": model.name, "versions": [model.version], "inputs": inputs}),
        f"{_INFER}/ready": Example({"name": model.name, "ready": True}),
        f"{_INFER}/stats": Example(spent),
        f"{_INFER}/infer": Example(answer, asked),
    }
