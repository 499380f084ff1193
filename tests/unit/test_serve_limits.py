"""What one request may ask for, in every protocol, and what of a hostile one must not take long."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline import imaging
from serve import bodies, tensors
from serve.oip import HEADER
from tests.asgi import Client, ranked

JSON = {"content-type": "application/json"}
Packed = tuple[str, bytes, dict[str, str]]


def square(side: int) -> bytes:
    return imaging.encode_png(np.zeros((side, side, 3), np.uint8))


def as_json(images: list[bytes]) -> Packed:
    texts = [base64.b64encode(one).decode() for one in images]
    return "/predict/digits", json.dumps({"images": texts}).encode(), JSON


def as_form(images: list[bytes]) -> Packed:
    head = b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n'
    body = b"".join(head + one + b"\r\n" for one in images) + b"--b--\r\n"
    return "/predict/digits", body, {"content-type": "multipart/form-data; boundary=b"}


def as_instances(images: list[bytes]) -> Packed:
    texts = [base64.b64encode(one).decode() for one in images]
    return "/invocations?model=digits", json.dumps({"instances": texts}).encode(), JSON


def as_tensor(images: list[bytes]) -> Packed:
    raw = b"".join(struct.pack("<I", len(one)) + one for one in images)
    sizes = {"binary_data_size": len(raw)}
    image = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "parameters": sizes}
    head = json.dumps({"inputs": [image]}).encode()
    return "/v2/models/digits/infer", head + raw, {HEADER: str(len(head))}


def ask(packed: Packed, **limits: Any) -> tuple[int, Any, Client]:
    path, body, headers = packed
    client = Client(ranked(10), **limits)
    status, said, _ = asyncio.run(client.post(path, [body], headers=headers))
    return status, said, client


@pytest.mark.parametrize("pack", [as_json, as_form, as_instances, as_tensor])
def test_pixels_of_all_images_are_counted_before_any_is_decoded(pack: Callable[[list[bytes]], Packed]) -> None:
    small = [square(100), b"no image", square(50)]  # 12,500 pixels; what is no image is for the model to refuse
    assert ask(pack(small), max_pixels=12_500)[0] == 200
    status, said, client = ask(pack(small), max_pixels=12_499)
    assert (status, said["code"]) == (413, "too_many_pixels")
    assert said["error"] == "The 3 images have 12500 pixels; the limit of a request is 12499."
    assert not client.models.asked
    assert ask(pack([square(200)]), max_pixels=12_499)[0] == 200  # of one alone the model's own limit holds


@pytest.mark.parametrize("path", ["/predict/digits", "/invocations?model=digits", "/v2/models/digits/infer"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"images": [' + b"[]," * 400_000 + b"0]}", 413, "json_size"),
        (b'{"images": {' + b'"":0,' * 400_000 + b'"":0}}', 413, "json_size"),
        (b'{"instances": [' + b"{}," * 400_000 + b"0]}", 413, "json_size"),
        (b"[" * 1000, 400, None),
        (b'{"inputs":' * 1000, 400, None),
        (b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ' + b"[" * 300, 400, None),
    ],
    ids=["lists", "keys", "objects", "deep lists", "deep objects", "deep data"],
)
def test_json_of_many_parts_or_levels_is_refused(path: str, body: bytes, status: int, code: str | None) -> None:
    found, said, client = ask((path, body, JSON))
    assert found == status
    assert said["code"] == (code or said["code"])
    assert not client.models.asked


def test_picture_of_640_by_480_pixels_in_nested_lists_is_within_the_limit() -> None:
    bodies.check_json(json.dumps({"data": np.zeros((1, 480, 640, 3), np.uint8).tolist()}).encode())


# Pixels as numbers


def infer(datatype: str, shape: list[int], data: Any, raw: bytes = b"") -> tuple[int, Any, Client]:
    image: dict[str, Any] = {"name": "image", "datatype": datatype, "shape": shape}
    image |= {"parameters": {"binary_data_size": len(raw)}} if raw else {"data": data}
    head = json.dumps({"inputs": [image]}).encode()
    return ask(("/v2/models/digits/infer", head + raw, {HEADER: str(len(head))} if raw else {}))


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("is_planar", [True, False])
def test_pixels_of_either_type_and_layout_reach_the_model_as_bytes(
    datatype: str, is_binary: bool, is_planar: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    sent = (pixels.transpose(0, 3, 1, 2) if is_planar else pixels).astype(tensors.NUMBERS[datatype])
    status, _, client = infer(datatype, [*sent.shape], sent.tolist(), sent.tobytes() if is_binary else b"")
    assert status == 200
    _, images, wanted = client.models.asked[0]
    assert wanted.pixels
    found = [imaging.decode(one, imaging.Decoding(formats=("NPY",))) for one in images]
    np.testing.assert_array_equal(found, pixels)


def test_fp32_of_three_rows_and_three_channels_is_read_as_channels_last_and_rounded() -> None:
    sent = np.array([[0.4, 0.6, 254.5]], np.float32).repeat(3, axis=0).reshape(1, 3, 1, 3)
    client = infer("FP32", [1, 3, 1, 3], sent.tolist())[2]
    found = imaging.decode(client.models.asked[0][1][0], imaging.Decoding(formats=("NPY",)))
    assert found.tolist() == [[[0, 1, 254]]] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "expected pixel values 0 to 255, got nan"),
        (float("inf"), "expected pixel values 0 to 255, got 0 to inf"),
        (1e300, "expected pixel values 0 to 255, got 0 to inf"),
        (-0.5, "expected pixel values 0 to 255, got -0.5 to 0"),
        (255.5, "expected pixel values 0 to 255, got 0 to 255.5"),
        (0.5, "got fractions of 0 to 1; multiply by 255"),
        (10**400, "element 2: expected a number, got 1000"),
        ("1", "element 2: expected a number, got 1"),
        (True, "element 2: expected a number, got True"),
        (None, "element 2: expected a number, got None"),
    ],
)
def test_fp32_that_is_no_pixel_is_refused(value: Any, words: str) -> None:
    status, said, client = infer("FP32", [1, 1, 1, 3], [0, 0, value])
    assert (status, said["code"]) == (400, "infer")
    assert words in said["error"]
    assert not client.models.asked


def test_sides_without_end_are_refused_in_a_short_sentence() -> None:
    status, said, _ = infer("UINT8", [1, 10**4000, 10**4000, 3], [1, 2, 3])
    assert (status, said["error"]) == (400, "inputs.0.shape.1: Input should be less than or equal to 2147483648.")


# Addresses and headers


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/predict/digits", {"content-length": "abc"}, 400, "content_length"),
        ("/predict/digits", {"content-length": "-1"}, 400, "content_length"),
        ("/predict/digits", {"content-length": "\xb2"}, 400, "content_length"),
        ("/predict/digits", {"content-length": "9" * 5000}, 413, "too_large"),
        ("/predict/digits", {"content-type": "multipart/form-data; boundary=b; charset=a\0b"}, 400, "multipart"),
        ("/predict/digits/", {}, 404, "not_found"),  # neither is it redirected to what a Host header says
        ("/nothing", {"host": "["}, 404, "not_found"),
        ("/" + "x" * 9000, {}, 404, "not_found"),
        ("/predict/" + "x" * 9000, {}, 404, "unknown_model"),
        ("/predict/digits?" + "x" * 9000, {}, 422, "query"),
        ("/predict/digits?top_k=" + "x" * 9000, {}, 422, "query"),
        ("/predict/digits?top_k=" + "9" * 4000, {}, 422, "query"),
    ],
)
def test_address_or_header_that_is_none_is_refused_in_a_short_sentence(
    path: str, headers: dict[str, str], status: int, code: str
) -> None:
    found, said, client = ask((path, b"x", headers))
    assert (found, said["code"]) == (status, code)
    assert len(said["error"]) <= 500
    assert not client.models.asked
