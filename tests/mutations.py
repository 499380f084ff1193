"""Requests that are right, and what a hostile or broken client makes of them: one for every seed, always the same.

A picture is damaged before it is packed, a body after that, then its compression, the headers and the address; so that
each parser behind the others gets its share.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from serve import oip
from serve.invocations import TARGET

Header = tuple[str, str]
JSON, FORM = ("content-type", "application/json"), ("content-type", "multipart/form-data; boundary=b")
MODELS = ("tiny", "boxes")
READS: tuple[str, ...] = (
    *(
        "/healthz",
        "/readyz",
        "/models",
        "/ping",
        "/openapi.json",
        "/docs",
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/models",
    ),
    *("/v2/health/ready", "/v2/models/stats", "/v2/models/tiny", "/v2/models/boxes/ready", "/v2/models/boxes/stats"),
)
QUERIES: tuple[str, ...] = (
    "",
    "",
    "top_k=1",
    "top_k=0",
    "top_k=99999999999999999999",
    "score_threshold=0.1",
    "iou_threshold=nan",
)
QUERIES += (
    "max_detections=1000",
    "model=tiny",
    "model=boxes",
    "model=",
    "a=b&a=c",
    "%",
    "top_k=%ff",
    "=&&=;",
    "x" * 9000,
)
TOKENS: tuple[bytes, ...] = (
    b"NaN",
    b"-1",
    b"1e999",
    b'"\\ud800"',
    b"null",
    b"[" * 300,
    b'{"a":' * 300,
    b"9" * 5000,
    b"\0",
    b"\xff",
    b'"',
)
TOKENS += (
    b"--b\r\n",
    b"--b--\r\n",
    b"\r\n\r\n",
    b"\xff\xd8\xff",
    b"\xff\xda",
    b"IDAT",
    b"IEND",
    b"RIFF",
    b"Exif\0\0",
    b"\x1f\x8b",
)
VALUES: tuple[str, ...] = (
    "",
    "0",
    "-1",
    "abc",
    "9" * 5000,
    "gzip",
    "deflate",
    "br",
    "gzip, gzip",
    "image/png",
    "application/json",
    "*/*",
)
VALUES += ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=b; charset=utf-16")
VALUES += ("[", "\x80\xff", "a" * 9000, "1, 2", "application/json; charset=\x7f", "100-continue", "tiny", "boxes")
NAMES: tuple[str, ...] = (
    "content-type",
    "content-encoding",
    "content-length",
    "accept",
    "host",
    "x-request-id",
    "expect",
    "cookie",
)
NAMES += (
    oip.HEADER.lower(),
    TARGET.lower(),
    "x-request-timeout-seconds",
    "transfer-encoding",
    "range",
    "authorization",
)
PATHS: tuple[str, ...] = (
    "/",
    "//",
    "/predict/",
    "/predict//",
    "/predict/%2e%2e",
    "/v2/models/",
    "/v2/models//infer",
    "/..",
    "/predict/\ud7ff",
)
PATHS += ("/predict/tiny@champion", "/predict/tiny/versions/1", "/v2/models/tiny/versions/0/infer", "/" + "x" * 9000)
METHODS: tuple[str, ...] = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO")


@dataclass(frozen=True)
class Sent:
    """One request."""

    method: str
    path: str
    query: str = ""
    headers: tuple[Header, ...] = ()
    body: bytes = b""


def case(seed: int) -> Sent:
    """The request of this number; one in ten is left as it should be."""
    rng = random.Random(seed)
    is_right = rng.random() < 0.1
    sent = right(rng, damage=0.0 if is_right else 0.5)
    return sent if is_right else _mutated(rng, sent)


def right(rng: random.Random, damage: float = 0.0) -> Sent:
    """A request of any kind; its pictures are damaged with this probability."""
    if rng.random() < 0.1:
        return Sent("GET", rng.choice(READS))
    pictures = [_picture(rng, damage) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    sent: Sent = rng.choice(KINDS)(rng, rng.choice(MODELS), pictures)
    return replace(sent, body=damaged(rng, sent.body)) if rng.random() < damage / 2 else sent


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One to four of the things that happen to files."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(DAMAGES)(rng, data)
    return data[: 2**19]


def _mutated(rng: random.Random, sent: Sent) -> Sent:
    if rng.random() < 0.2:
        encoding, pack = rng.choice((("gzip", gzip.compress), ("deflate", zlib.compress)))
        sent = replace(sent, body=pack(sent.body), headers=(*sent.headers, ("content-encoding", encoding)))
        if rng.random() < 0.3:
            sent = replace(sent, body=damaged(rng, sent.body))
    if rng.random() < 0.2:
        sent = replace(sent, headers=_headers(rng, sent.headers))
    if rng.random() < 0.2:
        sent = replace(sent, query=rng.choice(QUERIES))
    if rng.random() < 0.1:
        path = damaged(rng, sent.path.encode()).decode(errors="ignore") if rng.random() < 0.5 else rng.choice(PATHS)
        sent = replace(sent, path="/" + path.lstrip("/").replace("?", ""))
    return replace(sent, method=rng.choice(METHODS)) if rng.random() < 0.05 else sent


def _headers(rng: random.Random, headers: tuple[Header, ...]) -> tuple[Header, ...]:
    kept = [one for one in headers if rng.random() < 0.7]
    return (*kept, *((rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.choice((0, 1, 2)))))


# What happens to bytes


def _flip(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 3, 20)) if made else 0):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _cut(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[end:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def _swap(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[end:] + data[start:end] + data[:start]


def _length(rng: random.Random, data: bytes) -> bytes:
    """A number where one may stand, most of them near the beginning."""
    value, kind = rng.choice((0, 1, 2, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1)), rng.choice(("<I", ">I", "<H", ">H"))
    packed = struct.pack(kind, value & (0xFFFF if kind[1] == "H" else 2**32 - 1))
    at = rng.randrange(min(len(data), rng.choice((32, 200, 10**6))) + 1)
    return data[:at] + packed + data[at + len(packed) :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    other = pictures()[rng.randrange(len(pictures()))]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at + rng.choice((0, 0, 1, 4)) :]


def _digits(rng: random.Random, data: bytes) -> bytes:
    """Another number in place of one that is written out."""
    places = [at for at, one in enumerate(data[:4000]) if chr(one).isdigit()]
    return data if not places else _put(data, rng.choice(places), rng.choice((b"-1", b"0", b"1.5", b"99999999999")))


def _put(data: bytes, at: int, text: bytes) -> bytes:
    return data[:at] + text + data[at + 1 :]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 64, 1000)))


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...]
DAMAGES = (_flip, _flip, _cut, _repeat, _swap, _length, _splice, _insert, _digits)


# Requests of every kind


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Small ones, of the kinds that have parsers of their own."""
    rng, made = np.random.default_rng(0), list[bytes]()
    for height, width in ((1, 1), (24, 31), (70, 50)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        kinds: list[tuple[str, str, dict[str, Any]]] = [
            ("RGB", "JPEG", {"exif": exif}),
            ("RGB", "JPEG", {"progressive": True}),
            ("CMYK", "JPEG", {}),
            ("RGB", "PNG", {"exif": exif}),
            ("RGBA", "PNG", {}),
            ("P", "PNG", {}),
            ("I;16", "PNG", {}),
            ("RGB", "WEBP", {"exif": exif}),
            ("RGBA", "WEBP", {"lossless": True}),
            ("P", "GIF", {}),
        ]
        made += [_saved(image, *kind) for kind in kinds]
    return tuple(made)


def _saved(image: Image.Image, mode: str, encoding: str, keys: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    grey = image.convert("I") if mode == "I;16" else image  # the only way there
    grey.convert(mode).save(buffer, encoding, **keys)
    return buffer.getvalue()


def _picture(rng: random.Random, damage: float) -> bytes:
    data = rng.choice(pictures())
    return damaged(rng, data) if rng.random() < damage else data


def _plain(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    headers = (("accept", "image/png"),) if rng.random() < 0.3 else ()
    return Sent("POST", f"/predict/{model}", rng.choice(QUERIES[:3]), headers, images[0])


def _form(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    parts = [b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n%b\r\n' % one for one in images]
    return Sent("POST", rng.choice((f"/predict/{model}", "/invocations")), "", (FORM,), b"".join(parts) + b"--b--\r\n")


def _json(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    body = json.dumps({"images": [base64.b64encode(one).decode() for one in images]}).encode()
    return Sent("POST", f"/predict/{model}", "", (JSON,), body)


def _invocations(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    texts: list[Any] = [base64.b64encode(one).decode() for one in images]
    form = rng.choice(("dataframe_records", "dataframe_split", "instances", "inputs"))
    value: Any = {
        "dataframe_records": [{"image": text} for text in texts],
        "dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]},
    }.get(form, texts)
    params: Any = rng.choice(({}, None, {"top_k": 2}, {"score_threshold": 0.5}, {"a": 1}, []))
    return Sent("POST", "/invocations", f"model={model}", (JSON,), json.dumps({form: value, "params": params}).encode())


def _oip_json(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    data = [base64.b64encode(one).decode() for one in images]
    return _infer(rng, model, _asking(rng, "BYTES", [len(images)], data=data))


def _oip_pixels(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    datatype, shape = (
        rng.choice(("UINT8", "FP32")),
        rng.choice(([1, 2, 3, 3], [2, 3, 4, 2], [1, 1, 1, 3], [1, 3, 400, 3])),
    )
    values = [rng.choice((0, 1, 128, 255)) for _ in range(int(np.prod(shape)))]
    if rng.random() < 0.5:
        return _infer(rng, model, _asking(rng, datatype, shape, data=values))
    raw = np.array(values, np.uint8 if datatype == "UINT8" else "<f4").tobytes()
    return _infer(rng, model, _asking(rng, datatype, shape, parameters={"binary_data_size": len(raw)}), raw)


def _oip_binary(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    raw = b"".join(struct.pack("<I", len(one)) + one for one in images)
    return _infer(rng, model, _asking(rng, "BYTES", [len(images)], parameters={"binary_data_size": len(raw)}), raw)


def _oip_raw(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    return Sent("POST", f"/v2/models/{model}/infer", "", ((oip.HEADER.lower(), "0"),), images[0])


def _asking(rng: random.Random, datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": datatype, "shape": shape} | more
    asked: dict[str, Any] = {"inputs": [tensor], "id": "7"}
    if rng.random() < 0.3:
        asked["outputs"] = [{"name": "probabilities", "parameters": {"classification": 2}}]
    if rng.random() < 0.3:
        asked["parameters"] = rng.choice(
            ({"binary_data_output": True}, {"top_k": 3}, {"model_version": [1]}, {"sequence_id": 1})
        )
    return asked


def _infer(rng: random.Random, model: str, asked: dict[str, Any], raw: bytes = b"") -> Sent:
    head = json.dumps(asked).encode()
    length = ((oip.HEADER.lower(), str(len(head))),) if raw or rng.random() < 0.3 else ()
    return Sent("POST", f"/v2/models/{model}/infer", "", length, head + raw)


def _index(rng: random.Random, model: str, images: list[bytes]) -> Sent:
    return Sent("POST", "/v2/repository/index", "", (JSON,), rng.choice((b"", b'{"ready": true}', b"[]")))


KINDS = (_plain, _plain, _form, _json, _invocations, _oip_json, _oip_pixels, _oip_binary, _oip_raw, _index)
