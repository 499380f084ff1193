"""Tensors of the Open Inference Protocol: there and back, and everything that is not one."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serve import tensors
from serve.tensors import NUMBERS, Tensor

SHAPES = arrays.array_shapes(max_dims=4, max_side=4)


def _arrays(kind: tuple[str, np.dtype[Any]]) -> st.SearchStrategy[tuple[str, Any]]:
    datatype, dtype = kind
    elements = {"allow_nan": False} if dtype.kind == "f" else None
    return st.tuples(st.just(datatype), arrays.arrays(dtype, SHAPES, elements=elements))


NUMBER = st.sampled_from([*NUMBERS.items()]).flatmap(_arrays)


@given(NUMBER)
def test_numbers_come_back_from_bytes(kind: tuple[str, Any]) -> None:
    datatype, array = kind
    tensor = tensors.of_array("t", array)
    assert (tensor.datatype, tensor.shape) == (datatype, array.shape)
    found = tensors.from_binary("t", datatype, array.shape, tensors.to_binary(tensor))
    np.testing.assert_array_equal(found.data, array)


@given(arrays.arrays(np.uint8, SHAPES))
def test_pixels_come_back_from_json_nested_or_flat(array: Any) -> None:
    for data in (tensors.to_json(tensors.of_array("t", array)), array.tolist()):
        found = tensors.from_json("t", "UINT8", array.shape, json.loads(json.dumps(data)))
        np.testing.assert_array_equal(found.data, array)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_bytes_come_back_from_bytes_and_from_base64(elements: list[bytes]) -> None:
    raw = tensors.to_binary(Tensor("t", "BYTES", (len(elements),), tuple(elements)))
    assert raw == b"".join(struct.pack("<I", len(one)) + one for one in elements)
    assert tensors.from_binary("t", "BYTES", [len(elements)], raw).data == tuple(elements)
    texts = [base64.b64encode(one).decode() for one in elements]
    assert tensors.from_json("t", "BYTES", [len(elements)], texts).data == tuple(elements)
    assert tensors.from_json("t", "BYTES", [len(elements)], texts, base64_texts=False).data == tuple(
        text.encode() for text in texts
    )


def test_texts_are_elements_row_by_row() -> None:
    tensor = tensors.of_texts("t", [["a", "ß"], ["", "d"]])
    assert (tensor.shape, tensor.data) == ((2, 2), (b"a", "ß".encode(), b"", b"d"))
    assert tensors.to_json(tensor) == ["a", "ß", "", "d"]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "words"),
    [
        ("STRING", [1], b"", "datatype: expected one of UINT8"),
        ("FP32", [], b"", "sides of 1 and more"),
        ("FP32", [0], b"", "sides of 1 and more"),
        ("FP32", [-1, 4], b"", "sides of 1 and more"),
        ("FP32", [2**40, 2**40], b"", "2147483648 elements at most"),
        ("FP32", [2], bytes(7), "takes 8 bytes, got 7"),
        ("FP32", [2], bytes(9), "takes 8 bytes, got 9"),
        ("BYTES", [1], b"", "element 0 of 1 ends behind"),
        ("BYTES", [1], b"\x02\0\0\0a", "element 0 of 1 ends behind"),
        ("BYTES", [2], b"\x01\0\0\0a\xff\xff\xff\xffb", "element 1 of 2 ends behind"),
        ("BYTES", [2], b"\x01\0\0\0a\x01\0\0", "element 1 of 2 ends behind"),
        ("BYTES", [1], b"\x01\0\0\0ab", "1 elements take 5 bytes, got 6"),
    ],
)
def test_bytes_that_are_no_tensor_are_refused(datatype: str, shape: list[int], raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=f"^inputs.t: .*{words}"):
        tensors.from_binary("t", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("UINT8", [2], [1], "expected 2 elements as of its shape, got 1"),
        ("UINT8", [2, 2], [[1, 2], [3]], "rows of one length"),
        ("UINT8", [2], [1, [2]], "element 1: expected 0 to 255, got"),
        ("UINT8", [1], ["1"], "element 0: expected 0 to 255, got 1"),
        ("UINT8", [1], None, "element 0: expected 0 to 255, got None"),
        ("UINT8", [1], [True], "element 0: expected 0 to 255, got True"),
        ("UINT8", [2], [255, 256], "element 1: expected 0 to 255, got 256"),
        ("UINT8", [1], [-1], "element 0: expected 0 to 255, got -1"),
        ("UINT8", [1], [1.5], "element 0: expected 0 to 255, got 1.5"),
        ("BYTES", [1], [7], "element 0: expected BYTES as a string, got int"),
        ("BYTES", [2], ["YQ==", "Y"], "element 1: expected base64"),
    ],
)
def test_json_that_is_no_tensor_is_refused(datatype: str, shape: list[int], data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^inputs.t.*{words}"):
        tensors.from_json("t", datatype, shape, data)
