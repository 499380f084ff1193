"""Tensors as the Open Inference Protocol v2 sends them, in JSON and in its binary extension.

Numbers are little-endian and row-major, an element of BYTES is its length as 32 bits and then itself. JSON has no
bytes: there an element of BYTES is base64 where it is said to be (`parameters.content_type`), and text otherwise.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_ELEMENTS = 2**31
NUMBERS: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}
DATATYPES = (*NUMBERS, "BYTES")
"""Those that are sent or taken here."""


class Tensor(NamedTuple):
    """A named array.

    Attributes:
        datatype: as the protocol calls it.
        shape: its size in each direction.
        data: an array of this shape, or, of BYTES, its elements row by row.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any] | tuple[bytes, ...]


def of_array(name: str, array: npt.NDArray[Any]) -> Tensor:
    """A tensor of numbers."""
    datatype = next(name for name, dtype in NUMBERS.items() if dtype == array.dtype)
    return Tensor(name, datatype, array.shape, array)


def of_texts(name: str, rows: Sequence[Sequence[str]]) -> Tensor:
    """A tensor [rows, columns] of texts; all rows are equally long."""
    shape = len(rows), len(rows[0]) if rows else 0
    return Tensor(name, "BYTES", shape, tuple(text.encode() for row in rows for text in row))


def from_binary(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """The tensor that these bytes are.

    Raises:
        ValueError: they are more or fewer than the shape asks for, or datatype or shape are impossible.
    """
    count = _count(name, datatype, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, tuple(shape), tuple(_elements(name, raw, count)))
    dtype = NUMBERS[datatype]
    if len(raw) != count * dtype.itemsize:
        raise ValueError(
            f"inputs.{name}: shape {[*shape]} of {datatype} takes {count * dtype.itemsize} bytes, got {len(raw)}"
        )
    return Tensor(name, datatype, tuple(shape), np.frombuffer(raw, dtype).reshape(shape))


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any, *, base64_texts: bool = True) -> Tensor:
    """The tensor of a JSON array, nested or flat, of BYTES, UINT8 or FP32.

    Raises:
        ValueError: it does not fit datatype and shape.
    """
    count = _count(name, datatype, shape)
    flat = _flat(name, data, count)
    if datatype == "BYTES":
        elements = tuple(_bytes(name, at, one, base64_texts) for at, one in enumerate(flat))
        return Tensor(name, datatype, tuple(shape), elements)
    return Tensor(name, datatype, tuple(shape), _numbers(name, datatype, flat).reshape(shape))


def as_pixels(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Pictures uint8 [N, H, W, 3] of [N, H, W, 3] or [N, 3, H, W] (of both, the first) with values 0 to 255.

    FP32 is rounded to whole values. Values that are all in 0 to 1 with fractions among them were scaled for another
    model, and would be black here.

    Raises:
        ValueError: the shape is another, or a value is no pixel's.
    """
    array = np.asarray(tensor.data)
    if array.ndim != 4 or 3 not in (array.shape[3], array.shape[1]):
        raise ValueError(f"inputs.{tensor.name}: expected [N, H, W, 3] or [N, 3, H, W], got {[*array.shape]}")
    if array.shape[3] != 3:
        array = array.transpose(0, 2, 3, 1)
    return array if array.dtype == np.uint8 else _rounded(tensor.name, array)


def _rounded(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    low, high = float(array.min()), float(array.max())  # NaN where one is
    if not (low >= 0 and high <= 255):
        raise ValueError(f"inputs.{name}: expected pixel values 0 to 255, got {low:g} to {high:g}")
    whole: npt.NDArray[Any] = np.rint(array)
    if high <= 1 and (whole != array).any():
        raise ValueError(f"inputs.{name}: expected pixel values 0 to 255, got fractions of 0 to 1; multiply by 255")
    return whole.astype(np.uint8)


def _numbers(name: str, datatype: str, flat: list[Any]) -> npt.NDArray[Any]:
    """All at once: a loop over the millions that a body holds would take seconds from every other request."""
    whole = datatype == "UINT8"
    try:
        if not {*map(type, flat)} <= ({int} if whole else {int, float}):
            raise TypeError
        if whole:
            return np.frombuffer(bytes(flat), np.uint8)
        with np.errstate(over="ignore"):  # infinite is what it then is
            return np.array(flat, np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        at, one = next((at, one) for at, one in enumerate(flat) if not _is_number(one, whole))
        expected = "0 to 255" if whole else "a number"
        raise ValueError(f"inputs.{name}.data: element {at}: expected {expected}, got {str(one)[:20]}") from None


def _is_number(one: Any, whole: bool) -> bool:
    """Whether it is a byte, or one that a double holds."""
    if whole:
        return type(one) is int and 0 <= one <= 255
    return type(one) is float or (type(one) is int and abs(one) <= sys.float_info.max)


def to_binary(tensor: Tensor) -> bytes:
    """Its bytes."""
    if isinstance(tensor.data, tuple):
        return b"".join(struct.pack("<I", len(one)) + one for one in tensor.data)
    return np.ascontiguousarray(tensor.data, NUMBERS[tensor.datatype]).tobytes()


def to_json(tensor: Tensor) -> list[Any]:
    """Its elements row by row; BYTES as text."""
    if isinstance(tensor.data, tuple):
        return [one.decode(errors="replace") for one in tensor.data]
    return list(tensor.data.ravel().tolist())


def _count(name: str, datatype: str, shape: Sequence[int]) -> int:
    if datatype not in DATATYPES:
        raise ValueError(f"inputs.{name}: datatype: expected one of {', '.join(DATATYPES)}, got {datatype!r:.40}")
    if not shape or min(shape) < 1:
        raise ValueError(f"inputs.{name}: shape: expected sides of 1 and more, got {[*shape]}")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise ValueError(f"inputs.{name}: shape: expected {MAX_ELEMENTS} elements at most, got {count}")
    return count


def _elements(name: str, raw: bytes, count: int) -> Iterator[bytes]:
    at = 0
    for number in range(count):
        size = struct.unpack_from("<I", raw, at)[0] if at + 4 <= len(raw) else len(raw)
        if at + 4 + size > len(raw):
            raise ValueError(
                f"inputs.{name}: element {number} of {count} ends behind the {len(raw)} bytes of the tensor"
            )
        yield raw[at + 4 : at + 4 + size]
        at += 4 + size
    if at != len(raw):
        raise ValueError(f"inputs.{name}: {count} elements take {at} bytes, got {len(raw)}")


def _flat(name: str, data: Any, count: int) -> list[Any]:
    level = data if isinstance(data, list) else [data]
    while level and all(isinstance(one, list) for one in level):
        if len({len(one) for one in level}) > 1:
            raise ValueError(f"inputs.{name}.data: expected rows of one length, got several")
        level = [one for row in level for one in row]
    if len(level) != count:
        raise ValueError(f"inputs.{name}.data: expected {count} elements as of its shape, got {len(level)}")
    return level


def _bytes(name: str, at: int, one: Any, is_base64: bool) -> bytes:
    if not isinstance(one, str):
        raise ValueError(f"inputs.{name}.data: element {at}: expected BYTES as a string, got {type(one).__name__}")
    if not is_base64:
        return one.encode()
    try:
        return base64.b64decode(one, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"inputs.{name}.data: element {at}: expected base64 without line breaks") from None
