"""The Open Inference Protocol on no server at all: every malformed request has one sentence, and reaches no model."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import imaging
from pipeline.inference.engine import Runtime
from serve.oip import HEADER, PLATFORMS
from serve.roster import Standing
from serve.schemas import Served, Told, Wanted
from tests.asgi import SERVED, Client, ranked

INFER = "/v2/models/digits/infer"
IMAGE = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(b"x").decode()]}
BINARY = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}
ELEMENT = b"\x01\0\0\0x"


def post(client: Client, said: Any, rest: bytes = b"", headers: dict[str, str] | None = None, path: str = INFER) -> Any:
    head = said if isinstance(said, bytes) else json.dumps(said).encode()
    if rest and headers is None:
        headers = {HEADER: str(len(head))}
    return asyncio.run(client.post(path, [head + rest], headers=headers))


def get(client: Client, path: str) -> Any:
    status, body, _ = asyncio.run(client.send("GET", path, Client._body([b""], 0.0), {}))
    return status, body


def two_versions() -> Client:
    rival = dataclasses.replace(SERVED[0], version="4", alias="challenger")
    return Client(ranked(10), standings=(Standing("digits", SERVED[0], rival),))


def test_json_with_base64_is_answered_in_json() -> None:
    client = Client(ranked(10))
    said = {"id": "7", "inputs": [IMAGE], "parameters": {"top_k": 2}, "model_name": "of kserve's client"}
    status, body, headers = post(client, said)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert client.models.asked == [("digits", (b"x",), Wanted(top_k=10))]
    assert {key: body[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "digits",
        "model_version": "3",
        "id": "7",
    }
    found = {one["name"]: one for one in body["outputs"]}
    assert found["probabilities"]["shape"] == [1, 10]
    assert found["top_k_labels"] == {"name": "top_k_labels", "datatype": "BYTES", "shape": [1, 2], "data": ["0", "1"]}


def test_tensors_behind_the_json_are_read_and_written_binary() -> None:
    client = Client(ranked(10))
    outputs = [{"name": "top_k_indices", "parameters": {"binary_data": True}}, {"name": "top_k_scores"}]
    status, _, headers = post(client, {"inputs": [BINARY], "outputs": outputs}, ELEMENT)
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert client.models.asked[0][1] == (b"x",)


def test_pixels_reach_the_model_as_they_are() -> None:
    client, pixels = Client(ranked(10)), np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    image = {"name": "image", "shape": [*pixels.shape], "datatype": "UINT8"}
    binary = image | {"parameters": {"binary_data_size": pixels.size}}
    for tensor, rest in ((image | {"data": pixels.tolist()}, b""), (binary, pixels.tobytes())):
        assert post(client, {"inputs": [tensor]}, rest)[0] == 200
        _, images, wanted = client.models.asked[-1]
        assert wanted.pixels
        policy = imaging.Decoding(formats=("NPY",))
        np.testing.assert_array_equal([imaging.decode(one, policy) for one in images], pixels)


def test_objects_are_padded_to_the_most_of_an_image() -> None:
    told = Told((2, 0), ("c", "a"), (0.9, 0.5), ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)), 1.0, 2.0, 3.0)
    client = Client(told)
    client.models.by_image = {b"none": dataclasses.replace(told, labels=(), class_names=(), scores=(), boxes=())}
    texts = [base64.b64encode(one).decode() for one in (b"none", b"two")]
    image = IMAGE | {"shape": [2], "data": texts}
    said = {"inputs": [image], "parameters": {"score_threshold": 0.1, "iou_threshold": 0.4}}
    status, body, _ = post(client, said, path="/v2/models/boxes/infer")
    assert status == 200
    assert client.models.asked[0][2] == Wanted(3, 0.1, 0.4)
    found = {one["name"]: (one["shape"], one["data"]) for one in body["outputs"]}
    assert found["num_detections"] == ([2, 1], [0, 2])
    assert found["detection_boxes"] == ([2, 2, 4], [0] * 8 + [1, 2, 3, 4, 5, 6, 7, 8])
    assert found["detection_classes"] == ([2, 2], [0, 0, 2, 0])
    assert found["detection_labels"] == ([2, 2], ["", "", "c", "a"])
    assert found["detection_scores"][1] == pytest.approx([0, 0, 0.9, 0.5])


@pytest.mark.parametrize(
    ("said", "rest", "headers", "words"),
    [
        (b"", b"", None, "body"),
        (b"[" * 100_000, b"", None, "body"),
        (b'{"inputs": "\xff"}', b"", None, "body"),
        ({"inputs": []}, b"", None, "expected one, 'image'"),
        ({"inputs": [IMAGE, IMAGE]}, b"", None, "expected one, 'image'"),
        ({"inputs": [IMAGE | {"name": "x"}]}, b"", None, "expected one, 'image'"),
        ({"inputs": [IMAGE | {"shape": [1.5]}]}, b"", None, "inputs.0.shape.0"),
        ({"inputs": [IMAGE | {"shape": [-1]}]}, b"", None, "sides of 1 and more"),
        ({"inputs": [IMAGE | {"shape": [2]}]}, b"", None, "expected 2 elements"),
        ({"inputs": [IMAGE | {"shape": [1, 3]}]}, b"", None, "BYTES [N]"),
        (
            {"inputs": [IMAGE | {"shape": [1, 8, 8, 4], "datatype": "UINT8"}]},
            b"",
            None,
            "or UINT8 or FP32 as [N, H, W, 3]",
        ),
        ({"inputs": [IMAGE | {"datatype": "FP32"}]}, b"", None, "got FP32"),
        ({"inputs": [IMAGE | {"data": ["&"]}]}, b"", None, "expected base64"),
        ({"inputs": [IMAGE | {"data": None}]}, b"", None, "got NoneType"),
        ({"inputs": [IMAGE]}, b"more", None, "expected no bytes behind the JSON, got 4"),
        ({"inputs": [BINARY]}, b"", None, "0 bytes follow the JSON, got 5"),
        ({"inputs": [BINARY]}, ELEMENT + b"y", None, "6 bytes follow the JSON, got 5"),
        ({"inputs": [BINARY | {"parameters": {"binary_data_size": True}}]}, b"x", None, "follow the JSON, got True"),
        ({"inputs": [BINARY | {"data": ["eA=="]}]}, ELEMENT, None, "got both"),
        ({"inputs": [BINARY]}, b"\xff\0\0\0x", None, "element 0 of 1 ends behind"),
        ({"inputs": [IMAGE]}, b"", {HEADER: "-1"}, "expected the bytes of the JSON"),
        ({"inputs": [IMAGE]}, b"", {HEADER: "1e2"}, "expected the bytes of the JSON"),
        ({"inputs": [IMAGE]}, b"", {HEADER: "99999"}, "expected the bytes of the JSON"),
        ({"inputs": [IMAGE], "parameters": {"top_k": 1.5}}, b"", None, "parameters.top_k"),
        ({"inputs": [IMAGE], "parameters": {"timeout": "1"}}, b"", None, "expected microseconds"),
        ({"inputs": [IMAGE], "parameters": {"timeout": -1}}, b"", None, "expected microseconds"),
        ({"inputs": [IMAGE], "parameters": {"sequence_id": 4}}, b"", None, "have no state"),
        ({"inputs": [IMAGE], "id": "x" * 300}, b"", None, "id"),
        ({"inputs": [IMAGE], "parameters": {"top_k": 11}}, b"", None, "parameters.top_k: digits has 10 classes"),
        ({"inputs": [IMAGE], "parameters": {"iou_threshold": 0.5}}, b"", None, "parameters.iou_threshold"),
        ({"inputs": [IMAGE | {"parameters": {"shared_memory_region": "a"}}]}, b"", None, "shared memory"),
        (b'{"inputs": [' + b"{}," * 60_000 + b"{}]}", b"", None, "inputs.0.name"),
    ],
)
def test_request_that_is_none_is_refused(said: Any, rest: bytes, headers: Any, words: str) -> None:
    client = Client(ranked(10))
    status, body, found = post(client, said, rest, headers)
    assert (status, found["content-type"]) == (400, "application/json")
    assert words in body["error"]
    assert len(body["error"]) < 300
    assert not client.models.asked


@pytest.mark.parametrize(
    "outputs",
    [
        [{"name": "boxes"}],
        [{"name": "probabilities"}] * 2,
        [{"name": "top_k_scores", "parameters": {"classification": 2}}],
        [{"name": "probabilities", "parameters": {"classification": -1}}],
        [{"name": "probabilities", "parameters": {"classification": "2"}}],
        [{"name": "probabilities", "parameters": {"shared_memory_region": "a"}}],
    ],
)
def test_outputs_that_there_are_not_are_refused_before_anything_is_computed(outputs: list[dict[str, Any]]) -> None:
    client = Client(ranked(10))
    status, body, _ = post(client, {"inputs": [IMAGE], "outputs": outputs})
    assert (status, body["code"]) == (400, "infer")
    assert not client.models.asked


@pytest.mark.parametrize("version", [[], {}, 4, "4", "x" * 10_000, True])
def test_version_among_the_parameters_is_one_or_none(version: Any) -> None:
    status, body, _ = post(Client(ranked(10)), {"inputs": [IMAGE], "parameters": {"model_version": version}})
    assert status == 404
    assert len(body["error"]) < 300


def test_version_of_the_parameters_must_not_contradict_the_paths() -> None:
    client, asked = two_versions(), [{"inputs": [IMAGE], "parameters": {"model_version": said}} for said in ("3", "4")]
    for named in ("digits/versions/3", "digits@champion"):
        found = [post(client, body, path=f"/v2/models/{named}/infer") for body in asked]
        assert [(status, body.get("code")) for status, body, _ in found] == [(200, None), (400, "version")]
    assert client.models.versions == ["3", "3"]


@pytest.mark.parametrize("said", [{"parameters": {"timeout": 10**400}}, {"parameters": {"model_version": "3"}}])
def test_parameters_of_any_size_are_taken(said: dict[str, Any]) -> None:
    assert post(Client(ranked(10)), {"inputs": [IMAGE]} | said)[0] == 200
    output = {"name": "probabilities", "parameters": {"classification": 10**30}}
    status, body, _ = post(Client(ranked(10)), {"inputs": [IMAGE], "outputs": [output]})
    assert (status, body["outputs"][0]["shape"]) == (200, [1, 10])


def test_image_that_is_none_is_counted_as_a_failure() -> None:
    client = Client(ranked(10))
    bad = IMAGE | {"data": [base64.b64encode(b"bad").decode()]}
    assert [post(client, {"inputs": [image]})[0] for image in (IMAGE, bad)] == [200, 422]
    (stats,) = get(client, "/v2/models/digits/stats")[1]["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (1, 1)
    assert {key: stats["inference_stats"][key]["count"] for key in ("success", "fail")} == {"success": 1, "fail": 1}


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_loading_is_not_spoken(verb: str) -> None:
    status, body, _ = asyncio.run(Client(ranked(1)).post(f"/v2/repository/models/digits/{verb}", [b"{}"]))
    assert (status, body["code"]) == (400, "unsupported")


def test_deadline_of_the_client_is_kept() -> None:
    said = {"inputs": [IMAGE], "parameters": {"timeout": 50_000}}
    status, body, _ = post(Client(30.0), said)
    assert (status, body["code"]) == (504, "timeout")


FOR_NOISE = Client(ranked(10))


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 60), st.integers(1, 3))
def test_noise_behind_any_header_is_refused_or_read(noise: bytes, at: int, size: int) -> None:
    head = json.dumps({"inputs": [BINARY | {"shape": [size], "parameters": {"binary_data_size": len(noise)}}]}).encode()
    for body, length in ((head + noise, len(head)), (noise, at), (head[:at] + noise + head[at:], len(head))):
        status, *_ = asyncio.run(FOR_NOISE.post(INFER, [body], headers={HEADER: str(length)}))
        assert status in {200, 400, 413}


def test_names_versions_and_states_are_told() -> None:
    client = Client(ranked(10))
    assert get(client, "/v2")[1] == get(client, "/v2/")[1]
    assert get(client, "/v2/health/live") == (200, {"live": True})
    assert get(client, "/v2/health/ready") == (200, {"ready": True, "live": True})
    assert get(client, "/v2/models") == (200, {"models": ["digits", "flowers", "boxes"]})
    assert get(client, "/v2/models/digits/ready") == (200, {"name": "digits", "ready": True})
    status, body = get(client, "/v2/models/boxes/versions/1")
    assert (status, body["versions"], body["properties"]["task"]) == (200, ["1"], "detection")
    assert {one["name"]: one["shape"] for one in body["outputs"]}["detection_boxes"] == [-1, -1, 4]
    assert get(client, "/v2/models/boxes/versions/2")[0] == 404
    assert get(client, "/v2/models/rose")[0] == 404
    assert len(get(client, "/v2/models/stats")[1]["model_stats"]) == 3


def test_a_version_is_ready_or_not_whatever_the_live_one_is() -> None:
    client = two_versions()

    async def ready(served: Served) -> bool:
        if served.version == "4":
            raise TimeoutError
        return True

    client.models.ready = ready  # type: ignore[method-assign]
    found = [get(client, f"/v2/models/digits{version}/ready") for version in ("", "/versions/3", "/versions/4")]
    assert [status for status, _ in found] == [200, 200, 503]
    assert "digits version 4" in found[2][1]["error"]
    _, body, _ = asyncio.run(client.post("/v2/repository/index", [b""]))
    assert [(one["version"], one["state"]) for one in body] == [("3", "READY"), ("4", "UNAVAILABLE")]
    _, body, _ = asyncio.run(client.post("/v2/repository/index", [b'{"ready": true}']))
    assert [one["version"] for one in body] == ["3"]


@pytest.mark.parametrize("path", ["/readyz", "/ping", "/v2/health/ready", "/v2/models/flowers/ready"])
def test_what_is_not_ready_says_when_to_ask_again(path: str) -> None:
    client = Client(TimeoutError())
    status, _, headers = asyncio.run(client.send("GET", path, client._body([b""], 0), {}))
    assert (status, headers["retry-after"]) == (503, "1")


def test_model_that_is_not_loaded_is_not_ready() -> None:
    client = Client(TimeoutError())
    assert get(client, "/v2/health/ready")[0] == 503
    assert get(client, "/v2/models/flowers/ready")[0] == 503
    status, body, _ = asyncio.run(client.post("/v2/repository/index", [b'{"ready": true}']))
    assert (status, [one["name"] for one in body]) == (200, ["digits", "boxes"])
    status, body, _ = asyncio.run(client.post("/v2/repository/index", [b""]))
    assert status == 200
    assert {one["name"]: one["state"] for one in body}["flowers"] == "UNAVAILABLE"


def test_metadata_names_the_runtime_that_computes_a_model() -> None:
    assert set(PLATFORMS) == set(get_args(Runtime))
    quick = dataclasses.replace(SERVED[0], engine="openvino-bf16")
    for served, platform in ((SERVED[0], "pytorch_eager"), (quick, "openvino_onnx")):
        assert get(Client(ranked(1), served=(served,)), "/v2/models/digits")[1]["platform"] == platform
