"""The elements of lists in a large JSON file, one after the other, so that memory does not grow with the file.

A scan in NumPy finds brackets and commas outside strings, and so where a list's elements begin and end; `json` parses
them some thousand at a time. That is several times as fast as an event parser (45 MB of COCO on one core: 2.6 s; ijson
with its C backend 10.4 s), and nothing but the wanted lists is built. What lies between those lists is not checked,
except that the file must be whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline import storage
from pipeline.errors import DataError
from pipeline.types import Int64Array

MAX_DEPTH = 64  # lists in lists: COCO has 5; the parser would recurse
MAX_ELEMENT_BYTES = 256 * 2**20  # of one element with what stands before it
CHUNK_BYTES = 256 * 2**10


def elements(
    uri: str, keys: Sequence[str], max_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[str, Any]]:
    """Every element of the lists under `keys` of the JSON object in a file, with its key, in the order of the file.

    Nothing is read beyond the last of these lists. Keys that are missing, or hold no list, give nothing.

    Raises:
        DataError: the file cannot be read, is larger than `max_bytes`, is cut off or is not JSON.
    """
    try:
        with storage.open_input(uri) as file:
            size_bytes = file.seek(0, os.SEEK_END)
            if size_bytes > max_bytes:
                raise DataError(
                    f"{uri}: expected a JSON file of at most {max_bytes} bytes, got {size_bytes}; split it, or raise "
                    "dataset.max_json_bytes"
                )
            file.seek(0)
            yield from _elements(_pieces(file, chunk_bytes), keys)
    except OSError as error:
        raise DataError(f"{uri}: cannot be read: {storage.reason(error)}") from None
    except ValueError as error:
        raise DataError(f"{uri}: expected a whole JSON file, got one that is cut off or damaged: {error}") from None


class _Piece(NamedTuple):
    """A part of the file.

    Attributes:
        text: its bytes.
        marks: positions of brackets and commas outside strings.
        steps: +1 for an opening bracket, -1 for a closing one, 0 for a comma.
        depths: how many brackets are open after each.
    """

    text: bytes
    marks: Int64Array
    steps: Int64Array
    depths: Int64Array


def _pieces(file: BinaryIO, chunk_bytes: int) -> Iterator[_Piece]:
    depth, in_string, rest, first = 0, 0, b"", True
    while chunk := file.read(chunk_bytes):
        text = rest + (chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk)
        cut = len(text) - (len(text) - len(text.rstrip(b"\\"))) % 2  # what a last backslash escapes comes next
        text, rest = text[:cut], text[cut:]
        plain = text.replace(rb"\\", b"..").replace(rb"\"", b"..") if b"\\" in text else text
        codes = np.frombuffer(plain, np.uint8)
        quoted = np.cumsum(codes == ord('"'), dtype=np.uint8) + np.uint8(in_string) & 1  # only whether odd: may wrap
        marks = np.flatnonzero(_IS_MARK[codes] & (quoted == 0))
        steps = _STEP[codes[marks]]
        depths = depth + np.cumsum(steps)
        if first and text.strip():
            if not text.lstrip().startswith(b"{"):
                raise ValueError("it does not begin with '{'")
            first = False
        if len(depths):
            depth = int(depths[-1])
            if not 0 <= int(depths.min()) <= int(depths.max()) <= MAX_DEPTH:
                raise ValueError(f"its brackets do not match, or nest deeper than {MAX_DEPTH}")
        in_string = int(quoted[-1]) if len(quoted) else in_string
        yield _Piece(text, marks, steps, depths)
    if depth or in_string or rest or first:
        raise ValueError("it ends too early")


def _elements(pieces: Iterator[_Piece], keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Follow the pieces; `key` is that of the open list, `kept` its text, or what stands before the next one."""
    left, key, kept, begun = set(keys), "", b"", False
    for piece in pieces:
        text, before, start = kept + piece.text, len(kept), 0
        outer = ((piece.depths == 2) & (piece.steps > 0)) | ((piece.depths == 1) & (piece.steps < 0))
        for mark, opens in zip(piece.marks[outer] + before, piece.steps[outer] > 0, strict=True):
            if opens:
                key, begun = (_key(text[start:mark]) if text[mark : mark + 1] == b"[" else "{"), False
            else:
                if key in left:
                    yield from ((key, each) for each in _parsed(text[start:mark], may_be_empty=not begun))
                    left.remove(key)
                key = ""
                if not left:
                    return
            start = mark + 1
        commas = piece.marks[(piece.depths == 2) & (piece.steps == 0)]
        if key in left and len(commas) and commas[-1] + before >= start:
            yield from ((key, each) for each in _parsed(text[start : commas[-1] + before], may_be_empty=False))
            start, begun = commas[-1] + before + 1, True
        kept = text[start:] if key in left or not key else b""
        if len(kept) > MAX_ELEMENT_BYTES:
            raise ValueError(f"one element of '{key}' is larger than {MAX_ELEMENT_BYTES >> 20} MiB")


def _parsed(text: bytes, *, may_be_empty: bool) -> list[Any]:
    if not may_be_empty and not text.strip():
        raise ValueError("a list has a comma without an element")
    found: list[Any] = json.loads(f"[{text.decode()}]")
    return found


def _key(text: bytes) -> str:
    """The key at the end of `..., "key": `; a key with a backslash is none that is looked for."""
    before, _, key = text.rstrip().removesuffix(b":").rstrip().removesuffix(b'"').rpartition(b'"')
    return "{" if before.endswith(b"\\") else key.decode(errors="replace")


_STEP = np.zeros(256, np.int64)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_IS_MARK = _STEP != 0
_IS_MARK[ord(",")] = True
