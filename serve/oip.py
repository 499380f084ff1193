"""The Open Inference Protocol v2, as KServe and Triton speak it, for clients that know nothing of this project.

Spoken are health, metadata, inference with tensors in JSON or binary, a body that is an image alone
(`Inference-Header-Content-Length: 0`), the classification extension, the index of the repository, and statistics.

The input is `image`: BYTES [N], encoded images, or their pixels, UINT8 or FP32 with values 0 to 255, [N, H, W, 3] or
[N, 3, H, W] (the first where both fit; FP32 is rounded). A classifier's outputs are
`probabilities` FP32 [N, C] and the best of them `top_k_indices` INT64, `top_k_labels` BYTES and `top_k_scores` FP32
[N, k]; a detector's `num_detections` INT32 [N, 1], and padded with zeros to M, the most of an image,
`detection_boxes` FP32 [N, M, 4] (x_min, y_min, x_max, y_max in pixels of the upright original), `detection_scores`
FP32, `detection_classes` INT32 and `detection_labels` BYTES [N, M]. Parameters are those of `POST /predict/{model}`,
and `timeout` in microseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, FailFast, Field, StrictInt, ValidationError

from pipeline import imaging
from serve import bodies, problems, tensors
from serve.gate import Gate, asked_of, told_of, wanted_of
from serve.problems import MAX_ECHO, Problem
from serve.schemas import Asked, Limits, Served, Told
from serve.tensors import Tensor

HEADER = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "statistics")
INPUT = "image"
PLATFORMS = {
    "eager": "pytorch_eager",
    "compile": "pytorch_compile",
    "onnxruntime": "onnxruntime_onnx",
    "openvino": "openvino_onnx",
}
"""What the protocol calls a runtime."""
OUTPUTS: Mapping[str, Mapping[str, tuple[str, list[int]]]] = {
    "classification": {
        "probabilities": ("FP32", [-1, -1]),
        "top_k_indices": ("INT64", [-1, -1]),
        "top_k_labels": ("BYTES", [-1, -1]),
        "top_k_scores": ("FP32", [-1, -1]),
    },
    "detection": {
        "num_detections": ("INT32", [-1, 1]),
        "detection_boxes": ("FP32", [-1, -1, 4]),
        "detection_scores": ("FP32", [-1, -1]),
        "detection_classes": ("INT32", [-1, -1]),
        "detection_labels": ("BYTES", [-1, -1]),
    },
}
"""Names of the outputs of each task, their datatypes and shapes; -1 for any size."""
_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
_NS = 1_000_000  # nanoseconds of a millisecond
_LONGEST_US = 10**12
_MOST_TENSORS = 16


Side = Annotated[StrictInt, Field(le=tensors.MAX_ELEMENTS)]


class InputIn(BaseModel):
    """One tensor of a request; unknown keys are for other servers."""

    name: str
    shape: Annotated[list[Side], FailFast()] = Field(max_length=8)
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class OutputIn(BaseModel):
    """One tensor that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferIn(BaseModel):
    """The JSON of a request."""

    id: str | None = Field(default=None, max_length=256)
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[InputIn], FailFast()] = Field(max_length=_MOST_TENSORS)
    outputs: Annotated[list[OutputIn], FailFast()] = Field(default=[], max_length=_MOST_TENSORS)


_TEXT = {"type": "string"}
_NAMED: dict[str, Any] = {"name": _TEXT, "parameters": {"type": "object"}}
_SHAPE = {"type": "array", "items": {"type": "integer"}}
_TENSOR = _NAMED | {"shape": _SHAPE, "datatype": _TEXT, "data": {"type": "array"}}
_REQUEST = {
    "id": {"type": "string", "maxLength": 256},
    "parameters": {"type": "object"},
    "inputs": {
        "type": "array",
        "items": {"type": "object", "properties": _TENSOR, "required": ["name", "shape", "datatype"]},
    },
    "outputs": {"type": "array", "items": {"type": "object", "properties": _NAMED, "required": ["name"]}},
}
CONTENT = {
    "application/json": {"schema": {"type": "object", "properties": _REQUEST, "required": ["inputs"]}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}
"""The bodies of a request as OpenAPI has them."""


class Inference(NamedTuple):
    """A request: what it says, its one tensor, and whether the whole body was that."""

    said: InferIn
    image: Tensor
    is_plain: bool = False


def install(app: FastAPI, gate: Gate) -> None:
    """Add the protocol's routes."""
    routes = Oip(gate)

    def add(method: str, path: str, handler: Callable[..., Any]) -> None:
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        body = {"requestBody": {"required": True, "content": CONTENT}} if path.endswith("infer") else {}
        extra: dict[str, Any] = {"parameters": parameters} | body
        app.add_api_route(path, handler, methods=[method], openapi_extra=extra, tags=["Open Inference Protocol"])

    add("GET", "/v2", routes.server)
    app.get("/v2/", include_in_schema=False)(routes.server)
    add("GET", "/v2/health/live", routes.live)
    add("GET", "/v2/health/ready", routes.ready)
    add("GET", "/v2/models", routes.models)
    add("GET", "/v2/models/stats", routes.statistics)  # before a model of this name
    add("POST", "/v2/repository/index", routes.index)
    for verb in ("load", "unload"):
        add("POST", f"/v2/repository/models/{{model}}/{verb}", routes.load)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add("GET", model, routes.metadata)
        add("GET", f"{model}/ready", routes.model_ready)
        add("GET", f"{model}/stats", routes.statistics)
        add("POST", f"{model}/infer", routes.infer)


class Oip:
    """The protocol's routes."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def server(self) -> dict[str, Any]:
        """Name the server and the protocol's extensions that it speaks."""
        return {"name": "ventral", "version": "2", "extensions": EXTENSIONS}

    async def live(self) -> dict[str, bool]:
        """Answer while the process lives."""
        return {"live": True}

    async def ready(self) -> JSONResponse:
        """Answer 200 once every model is loaded."""
        waiting = await self.gate.waiting_for()
        if waiting:
            raise problems.waiting_for(waiting)
        return JSONResponse({"ready": True, "live": True})

    async def models(self) -> dict[str, list[str]]:
        """Names of the models."""
        return {"models": [*self.gate.standings]}

    async def metadata(self, request: Request) -> dict[str, Any]:
        """A model's inputs and outputs."""
        found = self._find(request)
        properties = {"task": found.task, "alias": found.alias or "", "num_classes": str(found.num_classes)}
        return {
            "name": found.name,
            "versions": [served.version for served in self.gate.standings[found.name].versions],
            "platform": PLATFORMS[found.engine.partition("-")[0]],
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": shape}
                for name, (datatype, shape) in OUTPUTS[found.task].items()
            ],
            "properties": properties,
        }

    async def model_ready(self, request: Request) -> dict[str, Any]:
        """Answer 200 once the model, or the version that is named, is loaded."""
        found = self._find(request)
        if not await self.gate.is_ready(found):
            raise problems.waiting_for([f"{found.name} version {found.version}"])
        return {"name": found.name, "ready": True}

    async def index(self, request: Request) -> list[dict[str, str]]:
        """The models, and whether they are loaded; with `{"ready": true}` those that are."""
        body = await bodies.read(request, self.gate.limits)
        only_ready = bool(body.strip()) and bodies.json_object(body).get("ready") is True
        listed = [(one, served) for one in self.gate.standings.values() for served in one.versions or [None]]
        ready = await asyncio.gather(*(self.gate.is_ready(served) for _, served in listed))
        return [
            {
                "name": standing.name,
                "version": served.version if served else "",
                "state": "READY" if is_ready else "UNAVAILABLE",
                "reason": "" if is_ready else "loading",
            }
            for (standing, served), is_ready in zip(listed, ready, strict=True)
            if is_ready or not only_ready
        ]

    async def load(self) -> None:
        """Refuse: what is served is what an alias of the registry names."""
        raise Problem(400, "unsupported", "Models are not loaded or unloaded here; deploy what is to be served.")

    async def statistics(self, request: Request) -> dict[str, Any]:
        """What this process has answered, since it began; nanoseconds, as Triton has them."""
        models = [self._find(request)] if "model" in request.path_params else self.gate.roster.versions
        return {"model_stats": [self._statistics(found) for found in models]}

    async def infer(self, request: Request) -> Response:
        """Answer about the tensor `image`, or about a body that is an image."""
        gate, key = self.gate, problems.request_id(request)
        found = self._find(request, key)
        with gate.room():
            body = await bodies.read(request, gate.limits)
            asked = await asyncio.to_thread(parse, body, request.headers.get(HEADER), gate.limits)
            del body  # the images stay, as they are sent on
            parameters = asked.said.parameters
            if (version := _version(parameters.get("model_version"))) is not None:
                found = self._agreed(request, version)
            _check_outputs(asked.said.outputs, found)
            pixels = asked.image.datatype != "BYTES"
            wanted = wanted_of(found, _asked(parameters), where="parameters", pixels=pixels)
            images = _encoded(asked.image)
            with gate.room(len(images) - 1):
                every = replace(wanted, top_k=found.num_classes)  # of a classifier: for all probabilities
                answers = await gate.ask(found, images, every, _timeout_s(parameters), key)
                told = told_of(answers, is_plain=False)
                made = _detected(told) if found.task == "detection" else _ranked(told, found.num_classes, wanted.top_k)
                return _response(found, asked, told, made)

    def _find(self, request: Request, key: str = "") -> Served:
        return self.gate.find(request.path_params["model"], request.path_params.get("version"), key)

    def _agreed(self, request: Request, version: str) -> Served:
        """The version of a request's parameters, which its path must not contradict, by number or alias."""
        address = request.path_params["model"]
        said = self.gate.find(address.partition("@")[0], version)
        by_number = request.path_params.get("version") in {None, version}
        by_alias = "@" not in address or self.gate.find(address) == said
        if not (by_number and by_alias):
            raise Problem(400, "version", f"The path says another version than model_version {said.version}; say one.")
        return said

    def _statistics(self, found: Served) -> dict[str, Any]:
        tally = self.gate.tally(found)

        def spent(count: int, ms: float) -> dict[str, int]:
            return {"count": count, "ns": round(ms * _NS)}

        return {
            "name": found.name,
            "version": found.version,
            "last_inference": tally.last_ms,
            "inference_count": tally.images,
            "execution_count": tally.requests,  # of requests: batches are the replicas' affair
            "inference_stats": {
                "success": spent(tally.requests, tally.total_ms),
                "fail": spent(tally.failed, tally.failed_ms),
                "queue": spent(tally.images, tally.queue_ms),
                "compute_input": spent(tally.images, tally.decode_ms),
                "compute_infer": spent(tally.images, tally.infer_ms),
                "compute_output": spent(tally.images, 0.0),
            },
            "batch_stats": [],
        }


def parse(body: bytes, header: str | None, limits: Limits) -> Inference:
    """Read a request.

    Args:
        body: decompressed.
        header: the length of its JSON, if tensors follow; 0: all of it is one image.
        limits: of images.

    Raises:
        Problem: it is not what the protocol asks for.
    """
    try:
        length = len(body) if header is None else _length(header, len(body))
        if header is not None and length == 0:
            image = InputIn(name=INPUT, shape=[1], datatype="BYTES")
            return Inference(InferIn(inputs=[image]), Tensor(INPUT, "BYTES", (1,), (body,)), True)
        bodies.check_json(body[:length])
        said = InferIn.model_validate_json(body[:length])
        image = _only_image(said.inputs)
        tensor = _tensor(image, body[length:], limits)
        image.data = None  # what was parsed is larger than what it says
        return Inference(said, tensor)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Problem(400, "infer", f"{where[:MAX_ECHO]}: {first['msg']}.") from None
    except ValueError as error:
        raise Problem(400, "infer", f"{error}.") from None


def _length(header: str, most: int) -> int:
    if not header.isascii() or not header.isdigit() or int(header) > most:
        raise ValueError(f"{HEADER}: expected the bytes of the JSON, 0 to {most}, got {header[:20]!r}")
    return int(header)


def _only_image(inputs: Sequence[InputIn]) -> InputIn:
    if [one.name for one in inputs] != [INPUT]:
        raise ValueError(f"inputs: expected one, '{INPUT}', got {[one.name[:40] for one in inputs][:4]}")
    return inputs[0]


def _tensor(image: InputIn, rest: bytes, limits: Limits) -> Tensor:
    datatype, shape = image.datatype, tuple(image.shape)
    is_encoded = datatype == "BYTES" and (len(shape) == 1 or shape[1:] == (1,))
    if not is_encoded and not (datatype in {"UINT8", "FP32"} and len(shape) == 4 and 3 in {shape[1], shape[3]}):
        expected = "expected BYTES [N], or UINT8 or FP32 as [N, H, W, 3] or [N, 3, H, W]"
        raise ValueError(f"inputs.{INPUT}: {expected}, got {datatype[:20]} {[*shape]}")
    if shape[0] > limits.most_images:
        raise bodies.too_many(shape[0], limits)
    size = image.parameters.get("binary_data_size")
    if "shared_memory_region" in image.parameters:
        raise ValueError(f"inputs.{INPUT}: shared memory is not spoken here")
    if size is None:
        if rest:
            raise ValueError(f"expected no bytes behind the JSON, got {len(rest)}; say binary_data_size of {INPUT}")
        is_base64 = image.parameters.get("content_type", "base64") == "base64"
        return _pixels(tensors.from_json(INPUT, datatype, shape, image.data, base64_texts=is_base64))
    if image.data is not None:
        raise ValueError(f"inputs.{INPUT}: expected data or binary_data_size, got both")
    if size != len(rest) or isinstance(size, bool):
        raise ValueError(f"inputs.{INPUT}: binary_data_size: {len(rest)} bytes follow the JSON, got {str(size)[:20]}")
    return _pixels(tensors.from_binary(INPUT, datatype, shape, rest))


def _pixels(image: Tensor) -> Tensor:
    if image.datatype == "BYTES":
        return image
    pixels = tensors.as_pixels(image)
    return Tensor(image.name, "UINT8", pixels.shape, pixels)


def _encoded(image: Tensor) -> tuple[bytes, ...]:
    """Each image as bytes; of pixels as a NumPy file, which loses nothing."""
    if isinstance(image.data, tuple):
        return image.data
    return tuple(imaging.encode_npy(pixels) for pixels in image.data)


def _asked(parameters: Mapping[str, Any]) -> Asked:
    wrong = [name for name in _SEQUENCES if parameters.get(name)]
    if wrong:
        raise Problem(400, "parameters", f"parameters.{wrong[0]}: the models have no state, leave it out.")
    return asked_of({key: parameters[key] for key in Asked.model_fields if key in parameters}, "parameters")


def _version(version: Any) -> str | None:
    """The version that is meant, if any; what is none is never served, and may be too long to be written out."""
    if version is None:
        return None
    return str(version) or None if isinstance(version, str | int) else type(version).__name__


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    timeout = parameters.get("timeout")
    if timeout is None or timeout == 0:
        return None
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise Problem(400, "parameters", f"parameters.timeout: expected microseconds, got {str(timeout)[:20]}.")
    return min(timeout, _LONGEST_US) / 1e6


def _ranked(told: Sequence[Told], num_classes: int, top_k: int) -> dict[str, Tensor]:
    labels = np.array([one.labels for one in told], np.int64)
    scores = np.array([one.scores for one in told], np.float32)
    probabilities = np.zeros((len(told), num_classes), np.float32)
    np.put_along_axis(probabilities, labels, scores, axis=1)
    best = [one.class_names[:top_k] for one in told]
    made = (
        tensors.of_array("probabilities", probabilities),
        tensors.of_array("top_k_indices", labels[:, :top_k]),
        tensors.of_texts("top_k_labels", best),
        tensors.of_array("top_k_scores", scores[:, :top_k]),
    )
    return {one.name: one for one in made}


def _detected(told: Sequence[Told]) -> dict[str, Tensor]:
    counts = [len(one.labels) for one in told]
    shape = len(told), max(*counts, 1)
    boxes, scores = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
    classes, names = np.zeros(shape, np.int32), [[""] * shape[1] for _ in told]
    for row, (one, count) in enumerate(zip(told, counts, strict=True)):
        boxes[row, :count] = np.array(one.boxes, np.float32).reshape(-1, 4)
        scores[row, :count], classes[row, :count], names[row][:count] = one.scores, one.labels, one.class_names
    made = (
        tensors.of_array("num_detections", np.array(counts, np.int32)[:, None]),
        tensors.of_array("detection_boxes", boxes),
        tensors.of_array("detection_scores", scores),
        tensors.of_array("detection_classes", classes),
        tensors.of_texts("detection_labels", names),
    )
    return {one.name: one for one in made}


def _response(found: Served, asked: Inference, told: Sequence[Told], made: Mapping[str, Tensor]) -> Response:
    said, shown, raw = asked.said, list[dict[str, Any]](), list[bytes]()
    by_default = asked.is_plain or bool(said.parameters.get("binary_data_output"))
    for output in said.outputs or [OutputIn(name=name) for name in made]:
        tensor = _best(output, told) if "classification" in output.parameters else made[output.name]
        one: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]}
        if output.parameters.get("binary_data", by_default):
            raw.append(tensors.to_binary(tensor))
            one["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            one["data"] = tensors.to_json(tensor)
        shown.append(one)
    answer: dict[str, Any] = {"model_name": found.name, "model_version": found.version}
    answer |= {} if said.id is None else {"id": said.id}
    head = JSONResponse(answer | {"outputs": shown})
    if not raw:
        return head
    length = {HEADER: str(len(head.body))}
    return Response(bytes(head.body) + b"".join(raw), media_type="application/octet-stream", headers=length)


def _check_outputs(outputs: Sequence[OutputIn], found: Served) -> None:
    """Refuse, before anything is computed, what there is not, and what is asked for twice."""
    known, names = OUTPUTS[found.task], set[str]()
    for output in outputs:
        name = output.name[:MAX_ECHO]
        if output.name not in known or name in names:
            raise Problem(400, "infer", f"outputs: expected each once of {', '.join(known)}, got {name!r}.")
        if "shared_memory_region" in output.parameters:
            raise Problem(400, "infer", f"outputs.{name}: shared memory is not spoken here.")
        count = output.parameters.get("classification", 1)
        if not _is_count(count) or ("classification" in output.parameters and name != "probabilities"):
            raise Problem(400, "infer", f"outputs.{name}: classification: expected a number, and for probabilities.")
        names.add(name)


def _is_count(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1


def _best(output: OutputIn, told: Sequence[Told]) -> Tensor:
    """The classification extension: the best classes as texts "score:index:label"."""
    count = min(output.parameters["classification"], len(told[0].labels))
    rows = (zip(one.scores, one.labels, one.class_names, strict=True) for one in told)
    texts = [[f"{score:f}:{label}:{name}" for score, label, name in islice(row, count)] for row in rows]
    return tensors.of_texts(output.name, texts)
