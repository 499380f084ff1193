"""What a request's body holds: one encoded image as it is, or several as multipart files or as base64 in JSON.

Limits hold while the body arrives, not afterwards: bytes received, bytes they decompress to, seconds. What the images
are is for the replicas to say; nothing is decoded here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import zlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, get_args

from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from pipeline import imaging
from pipeline.errors import ImageError
from serve.problems import MAX_ECHO, Problem
from serve.schemas import Limits

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # as zlib has them; HTTP's deflate is zlib's format
MAX_JSON_PARTS = 400_000
"""Lists, objects and keys: a picture of 640 x 480 pixels in nested lists has 308,000."""
_MAX_DIGITS = 18  # of a length; Python refuses to read thousands of them
_ANY = imaging.Decoding(formats=get_args(imaging.Format), max_pixels=89_000_000, max_side=65_535)
_NO_IMAGE = "Expected an encoded image as the request's body, got no bytes at all."
_SEVERAL = {
    "multipart/form-data": "Expected a file with an encoded image in each part, got no part, or an empty one.",
    "application/json": "Expected the base64 of an encoded image in each of images, got none.",
}
CONTENT = {
    **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/jpeg", "image/png", "image/webp")},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    },
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}},
            "required": ["images"],
            "additionalProperties": False,
        }
    },
}
"""The bodies as OpenAPI has them."""


class Images(NamedTuple):
    """The encoded images of a request; whether the body was a single one as it is."""

    data: tuple[bytes, ...]
    is_plain: bool


async def images(request: Request, limits: Limits) -> Images:
    """The images of a request, in its order.

    Raises:
        Problem: the body is too large, too slow, or not what its content type says; or it holds no image, or too many.
    """
    kind = kind_of(request)
    body = await read(request, limits)
    if kind == "multipart/form-data":
        found = await _files(request, body, limits)
    elif kind == "application/json":
        found = _of_json(body, limits)
    else:
        found = (body,)
    if not found or not all(found):
        raise Problem(400, "image_empty", _SEVERAL.get(kind, _NO_IMAGE))
    if len(found) > limits.most_images:
        raise too_many(len(found), limits)
    return Images(found, kind not in _SEVERAL)


def kind_of(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read(request: Request, limits: Limits) -> bytes:
    """The whole body, decompressed.

    Raises:
        Problem: it is too large, too slow, of an unknown encoding or damaged, or the client went away.
    """
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Problem(400, "content_length", "Content-Length: expected a number of bytes.")
    if len(length) > _MAX_DIGITS or int(length) > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_s):
            return b"".join([chunk async for chunk in _plain(request, limits)])
    except TimeoutError:
        raise Problem(408, "slow_body", f"The body did not arrive within {limits.body_s:g} s.") from None
    except ClientDisconnect:
        raise Problem(400, "disconnected", "The client went away before its body had arrived.") from None
    except zlib.error:
        raise Problem(400, "encoding", "The body is not in its Content-Encoding, or it is cut short.") from None


def too_many(count: int, limits: Limits) -> Problem:
    """The refusal of more images than one request may bring."""
    return Problem(413, "too_many_images", f"Expected at most {limits.most_images} images in a request, got {count}.")


def from_base64(text: Any, at: int) -> bytes:
    """The image that is number `at` of a request.

    Raises:
        Problem: it is no base64, or holds nothing.
    """
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise Problem(422, "base64", f"images.{at}: expected an encoded image as base64 without line breaks.")
    return data


async def _plain(request: Request, limits: Limits) -> AsyncGenerator[bytes]:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", *_WINDOW_BITS}:
        accepted = {"Accept-Encoding": "gzip, deflate"}
        raise Problem(415, "encoding", "Content-Encoding: expected gzip, deflate or a plain body.", accepted)
    packed = None if encoding == "identity" else zlib.decompressobj(_WINDOW_BITS[encoding])
    most, received, size = limits.max_body_bytes, 0, 0
    async for chunk in request.stream():
        received += len(chunk)
        plain = chunk if packed is None else packed.decompress(chunk, most - size + 1)
        size += len(plain)
        if max(received, size) > most:
            raise _too_large(limits)
        yield plain
    if packed is not None and ((received and not packed.eof) or packed.unused_data):
        raise zlib.error


def _too_large(limits: Limits) -> Problem:
    # What is left of the body is not read: the connection cannot be used again.
    return Problem(413, "too_large", f"The body is larger than {limits.max_body_bytes} bytes.", {"Connection": "close"})


class _Parser(MultiPartParser):
    """Knows whether the last boundary has come: without it the last file would be left out."""

    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


async def _files(request: Request, body: bytes, limits: Limits) -> tuple[bytes, ...]:
    async def whole() -> AsyncGenerator[bytes]:
        yield body

    parser = _Parser(request.headers, whole(), max_files=limits.most_images, max_fields=0)
    parser.spool_max_size = len(body) + 1  # in memory, where the body is already
    try:
        form = await parser.parse()
        if not parser.has_ended:
            raise MultiPartException("It is cut short.")
    except ValueError:  # UnicodeError is one, and so is what a charset with a zero byte in its name gives
        raise Problem(
            400, "multipart", "The body's parts have names that are not in the charset it is said to be in."
        ) from None
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise too_many(limits.most_images + 1, limits) from None
        expected = "The body is not multipart/form-data whose parts are all files, with a filename"
        raise Problem(400, "multipart", f"{expected}: {error.message}") from None
    try:
        return tuple([await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)])
    finally:
        await form.close()


def check_json(body: bytes) -> None:
    """Hold JSON against what may be taken of the process's time: lists and objects cost it far more than their bytes.

    Raises:
        Problem: it has too many.
    """
    if sum(body.count(sign) for sign in (b"[", b"{", b":")) > MAX_JSON_PARTS:
        said = f"body: expected at most {MAX_JSON_PARTS} lists, objects and keys; send numbers in one flat list."
        raise Problem(413, "json_size", said)


def check_pixels(images: Sequence[bytes], limits: Limits) -> None:
    """Add up what the headers say; what is no image is for the model to refuse.

    Raises:
        Problem: all together are too large.
    """
    count = sum(map(_pixels, images))
    if count > limits.max_pixels:
        said = f"The {len(images)} images have {count} pixels; the limit of a request is {limits.max_pixels}."
        raise Problem(413, "too_many_pixels", said)


def _pixels(image: bytes) -> int:
    try:
        height, width = imaging.probe(image, _ANY)
    except ImageError:
        return 0
    return height * width


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object, whose values are still to be looked at one by one: of many wrong ones only the first is told.

    Raises:
        Problem: it is none.
    """
    check_json(body)
    try:
        said = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, "json", f"body: {str(error)[:MAX_ECHO]}.") from None
    if not isinstance(said, dict):
        raise Problem(400, "json", "body: expected a JSON object.")
    return said


def _of_json(body: bytes, limits: Limits) -> tuple[bytes, ...]:
    said = json_object(body)
    texts = said.get("images")
    if said.keys() != {"images"} or not isinstance(texts, list):
        raise Problem(400, "json", 'Expected {"images": ["<base64>", ...]}, and no other key.')
    if len(texts) > limits.most_images:
        raise too_many(len(texts), limits)
    return tuple(from_base64(text, at) for at, text in enumerate(texts))
