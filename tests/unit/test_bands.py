"""Bands and masks: files with known samples, written by other hands where there are any (NumPy, Pillow, tifffile)."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from pipeline import imaging
from pipeline.data.transforms.resizing import shrink_short
from pipeline.errors import ImageError
from pipeline.imaging import Decoding, decode, decode_mask, encode_mask, encode_npy, probe
from pipeline.types import UInt8Array

Samples = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "NPY")
REASONS = {"empty", "format", "pixels", "aspect", "truncated", "corrupt", "mode", "channels", "codec", "memory"}


def bands(number: int, **limits: Any) -> Decoding:
    return Decoding(formats=FORMATS, num_channels=number, **limits)


def noise(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def in_8_bits(samples: Samples) -> npt.NDArray[Any]:
    return samples if samples.dtype == np.uint8 else np.floor(samples / 257 + 0.5)


def saved(image: Image.Image | UInt8Array, format: str, **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(encoded, format, **options)
    return encoded.getvalue()


def npy(array: npt.NDArray[Any]) -> bytes:
    encoded = io.BytesIO()
    np.save(encoded, array)
    return encoded.getvalue()


def npy_header(text: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode() + body


def tiff(samples: npt.NDArray[Any], **options: Any) -> bytes:
    encoded = io.BytesIO()
    options = {"photometric": "minisblack", "metadata": None} | options
    tifffile.imwrite(encoded, samples, **options)
    return encoded.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join((chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(samples: npt.NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits; each row holds differences to the pixel on its left (filter 1), where the distance matters."""
    height, width, num_bands = samples.shape
    stored = samples.astype(">u2").view(np.uint8).reshape(height, width, 2 * num_bands)
    rows = np.diff(stored, axis=1, prepend=np.zeros((height, 1, 2 * num_bands), np.uint8))
    filtered = b"".join(b"\1" + row.astype(np.uint8).tobytes() for row in rows)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[num_bands], filtered)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def refusal(data: bytes, policy: Decoding) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, policy)
    assert caught.value.reason in REASONS
    return caught.value.reason, str(caught.value)


def mask_refusal(data: bytes, policy: Decoding = imaging.DEFAULT) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode_mask(data, policy)
    return caught.value.reason, str(caught.value)


# Policy


@pytest.mark.parametrize("number", [0, 17, -1])
def test_decoding_impossible_number_of_channels_is_refused(number: int) -> None:
    with pytest.raises(ValidationError):
        Decoding(num_channels=number)


def test_decoding_for_another_spec_is_a_copy_with_its_channels() -> None:
    policy = imaging.DEFAULT.model_copy(update={"num_channels": 4})
    assert decode(saved(noise(5, 6, 4), "PNG"), policy).shape == (5, 6, 4)


def test_decode_npy_not_on_the_list_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match="NPY images are not accepted here, only JPEG, PNG, WEBP"):
        decode(npy(noise(4, 5, 3)))


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_decode_result_is_contiguous_writable_uint8(number: int) -> None:
    deep = noise(4, 5, number, dtype=np.uint16)
    written = tiff(deep[:, :, 0]) if number == 1 else tiff(deep, planarconfig="contig")
    for data in (npy(noise(4, 5, number)), written):
        pixels = decode(data, bands(number))
        assert (pixels.dtype.name, pixels.shape) == ("uint8", (4, 5, number))
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


# NPY


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    number=st.integers(1, 16),
    dtype=st.sampled_from(["u1", "<u2", ">u2"]),
    columns_first=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_decode_npy_gives_the_bands_back(
    height: int, width: int, number: int, dtype: str, columns_first: bool, seed: int
) -> None:
    samples = noise(height, width, number, dtype=np.dtype(dtype).newbyteorder("="), seed=seed)
    stored = np.asarray(samples.astype(dtype), order="F" if columns_first else "C")
    data = npy(stored)
    assert probe(data, bands(number)) == (height, width)
    np.testing.assert_array_equal(decode(data, bands(number)), in_8_bits(samples))


def test_decode_npy_without_a_band_axis_is_one_band() -> None:
    samples = noise(6, 7)
    np.testing.assert_array_equal(decode(npy(samples), bands(1))[:, :, 0], samples)
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(samples)), bands(1))[:, :, 0], samples)


def test_decode_npy_of_three_bands_is_rgb_and_of_one_is_not() -> None:
    samples = noise(6, 7, 3)
    np.testing.assert_array_equal(decode(npy(samples), bands(3)), samples)
    assert refusal(npy(samples[:, :, :1]), bands(3))[0] == "channels"


def test_decode_npy_format_2_is_read() -> None:
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }\n"
    assert decode(npy_header(text, b"\7\x09", b"\2\0"), bands(1)).tolist() == [[[7], [9]]]


@pytest.mark.parametrize("dtype", ["f4", "f2", "i2", "u4", "?", "M8[s]", "S2"])
def test_decode_npy_of_other_samples_is_refused(dtype: str) -> None:
    reason, message = refusal(npy(np.zeros((4, 5, 4), dtype)), bands(4))
    assert reason == "mode"
    assert "uint8 or uint16" in message


def test_decode_npy_of_objects_or_records_is_refused_without_unpickling() -> None:
    assert refusal(npy(np.zeros((4, 4), [("depth", "u1")])), bands(1))[0] == "corrupt"
    encoded = io.BytesIO()
    np.save(encoded, np.full((2, 2), None), allow_pickle=True)
    assert refusal(encoded.getvalue(), bands(1))[0] == "mode"


@pytest.mark.parametrize("shape", [(), (9,), (2, 3, 4, 5)])
def test_decode_npy_of_other_axes_is_refused(shape: tuple[int, ...]) -> None:
    reason, message = refusal(npy(np.zeros(shape, np.uint8)), bands(4))
    assert reason == "channels"
    assert str(list(shape)) in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 4), }", "pixels"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 5, 4), }", "corrupt"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (5, 5, 0), }", "channels"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 5, 4), }", "corrupt"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (5 5, 5, 4), }", "corrupt"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (5, 5, 4), }", "truncated"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os').getcwd(), }", "corrupt"),
        ("(" * 900, "corrupt"),
        (" " * 60_000, "corrupt"),
    ],
)
def test_decode_npy_hostile_header_says_why(text: str, reason: str) -> None:
    assert refusal(npy_header(text), bands(4))[0] == reason


def test_decode_npy_version_3_or_cut_anywhere_is_refused() -> None:
    data = npy(noise(4, 5, 4))
    assert refusal(data[:6] + b"\3" + data[7:], bands(4))[0] == "corrupt"
    assert {refusal(data[:end], bands(4))[0] for end in range(6, len(data))} == {"truncated"}


# TIFF


@given(
    hw=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    number=st.sampled_from([1, 2, 4, 5, 6, 8, 13, 16]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    byteorder=st.sampled_from("<>"),
    layout=st.sampled_from(["contig", "separate"]),
    packing=st.sampled_from([{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}]),
    cut=st.sampled_from([{}, {"rowsperstrip": 1}, {"rowsperstrip": 7}, {"tile": (16, 32)}]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_decode_tiff_gives_the_bands_back_however_they_lie(
    hw: tuple[int, int],
    number: int,
    dtype: Any,
    byteorder: str,
    layout: str,
    packing: dict[str, Any],
    cut: dict[str, Any],
    seed: int,
) -> None:
    samples = noise(*hw, number, dtype=dtype, seed=seed)
    options = cut | packing | {"byteorder": byteorder}
    if number > 1:
        options["planarconfig"] = layout
    stored = samples.transpose(2, 0, 1) if number > 1 and layout == "separate" else samples
    data = tiff(stored[:, :, 0] if number == 1 else stored, **options)
    assert probe(data, bands(number)) == hw
    np.testing.assert_array_equal(decode(data, bands(number)), in_8_bits(samples))


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", None])
@pytest.mark.parametrize("predictor", [1, 2])
def test_decode_tiff_of_pillow_gives_the_bands_back(compression: str | None, predictor: int) -> None:
    samples = noise(70, 50, 4)
    options = {"tiffinfo": {317: predictor}} if compression not in {None, "packbits"} else {}
    data = saved(samples, "TIFF", compression=compression, **options)
    np.testing.assert_array_equal(decode(data, bands(4)), samples)


def test_decode_tiff_white_as_zero_is_turned() -> None:
    samples = noise(9, 8)
    np.testing.assert_array_equal(decode(tiff(samples, photometric="miniswhite"), bands(1))[:, :, 0], 255 - samples)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint32])
def test_decode_tiff_without_a_known_range_is_refused(dtype: Any) -> None:
    data = tiff(np.ones((5, 6, 7), dtype), planarconfig="contig")
    reason, message = refusal(data, bands(7))
    assert reason == "mode"
    assert "8 or 16 bits" in message


def test_decode_tiff_compressed_for_pictures_is_refused_with_what_is_read() -> None:
    reason, message = refusal(saved(Image.new("L", (32, 32), 9), "TIFF", compression="jpeg"), bands(1))
    assert reason == "codec"
    assert "none, LZW, deflate, PackBits, Zstandard only, got compression 7" in message


def test_decode_tiff_palette_counts_as_three_bands() -> None:
    data = saved(Image.new("P", (8, 8), 3), "TIFF")
    assert refusal(data, bands(1)) == ("channels", "Expected 1 band, found 3 in the TIFF image.")


@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_decode_tiff_cut_anywhere_is_refused(layout: str, compression: str | None) -> None:
    samples = noise(12, 11, 6) if layout == "contig" else noise(6, 12, 11)
    data = tiff(samples, planarconfig=layout, compression=compression)
    found = {refusal(data[:end], bands(6))[0] for end in range(4, len(data) - 1, 5)}
    assert found <= {"truncated", "corrupt"}
    assert "truncated" in found


def set_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another first value of a tag."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, at) == (tag,):
            return data[: at + 2] + struct.pack("<HII", 4, 1, value) + data[at + 12 :]
    raise AssertionError(tag)


@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [
        (256, 2**31, "pixels"),
        (257, 2**32 - 1, "pixels"),
        (256, 0, "corrupt"),
        (277, 65535, "channels"),
        (277, 0, "channels"),
        (278, 0, "corrupt"),  # rows per strip
        (278, 1, "corrupt"),  # more strips than offsets: Pillow would leave the rest black
        (273, 2**31, "truncated"),
        (284, 2, "corrupt"),  # planes: five of six have no strip
    ],
)
def test_decode_tiff_lying_tag_says_why(tag: int, value: int, reason: str) -> None:
    data = tiff(noise(12, 11, 6), planarconfig="contig", byteorder="<")
    assert refusal(set_tag(data, tag, value), bands(6))[0] == reason


def test_decode_tiff_huge_tile_is_refused_before_it_is_allocated() -> None:
    data = tiff(noise(20, 20, 6), planarconfig="contig", byteorder="<", tile=(32, 32))
    assert refusal(set_tag(data, 322, 2**20), bands(6)) == (
        "corrupt",
        "The TIFF image has tiles of 1048576 pixels a side for 20 pixels.",
    )


# PNG and pictures of one band


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_decode_png_gives_all_bits_of_its_bands(number: int, dtype: Any) -> None:
    samples = noise(21, 17, number, dtype=dtype)
    data = saved(samples[:, :, 0] if number == 1 else samples, "PNG") if dtype == np.uint8 else deep_png(samples)
    if number == 3:
        assert refusal(data, bands(4)) == ("channels", "Expected 4 bands, found 3 in the PNG image.")
    else:
        np.testing.assert_array_equal(decode(data, bands(number)), in_8_bits(samples))


def test_decode_png_colours_under_transparent_pixels_are_kept() -> None:
    samples = np.dstack((noise(4, 5, 3), np.zeros((4, 5, 1), np.uint8)))
    np.testing.assert_array_equal(decode(saved(samples, "PNG"), bands(4)), samples)


def test_decode_grey_picture_of_one_band_equals_each_of_three() -> None:
    grey = noise(40, 50)
    key = chunk(b"tRNS", struct.pack(">H", 1))
    pictures = [saved(grey, "PNG"), saved(grey, "JPEG"), saved(Image.fromarray(grey > 99), "PNG")]
    pictures += [saved(grey, "TIFF"), saved(grey, "JPEG", progressive=True), saved(grey, "GIF")]
    pictures += [png(4, 1, 2, 0, b"\0\x1b"), png(2, 1, 4, 0, b"\0\x3c")]
    for data in pictures:
        np.testing.assert_array_equal(decode(data, bands(1))[:, :, 0], decode(data, bands(3))[:, :, 1])
    assert decode(png(4, 1, 2, 0, b"\0\x1b", key), bands(1))[0, :, 0].tolist() == [0, 85, 170, 255]  # no transparency
    assert decode(saved(grey, "JPEG"), bands(1), min_short=10).shape == (20, 25, 1)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (saved(noise(8, 8, 3), "JPEG"), "found 3"),
        (saved(noise(8, 8, 3), "WEBP"), "found 3"),
        (saved(noise(8, 8, 3), "BMP"), "found 3"),
        (saved(Image.new("P", (8, 8)), "PNG"), "found 3"),
        (saved(Image.new("CMYK", (8, 8)), "JPEG"), "found colours of Pillow mode CMYK"),
        (saved(noise(8, 8), "PNG"), "found 1"),
        (saved(noise(8, 8), "TIFF"), "found 1"),
        (npy(noise(8, 8, 5)), "found 5"),
    ],
)
def test_decode_another_number_of_bands_says_both(data: bytes, found: str) -> None:
    reason, message = refusal(data, bands(4))
    assert reason == "channels"
    assert message.startswith("Expected 4 ")
    assert found in message


@pytest.mark.parametrize("format", ["PNG", "TIFF", "MASK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_bands_and_masks_are_upright(format: str, orientation: int) -> None:
    stored = noise(5, 7, 4)
    picture = stored[:, :, 0] if format == "MASK" else stored
    data = saved(picture, "PNG" if format == "MASK" else format, exif=exif(orientation))
    # With 3 channels the same turn is known to be right (test_imaging).
    shown = decode(saved(stored[:, :, :3].copy(), "PNG", exif=exif(orientation)))
    if format == "MASK":
        np.testing.assert_array_equal(decode_mask(data), shown[:, :, 0])
    else:
        np.testing.assert_array_equal(decode(data, bands(4))[:, :, :3], shown)
        assert probe(data, bands(4)) == shown.shape[:2]


@pytest.mark.parametrize("limits", [{"max_pixels": 11}, {"max_side": 3}])
def test_decode_limits_hold_for_bands_and_masks(limits: dict[str, int]) -> None:
    for data in (npy(noise(3, 4, 6)), tiff(noise(3, 4, 6), planarconfig="contig")):
        assert refusal(data, bands(6, **limits))[0] == "pixels"
    assert mask_refusal(encode_mask(noise(3, 4)), Decoding(**limits))[0] == "pixels"


# Storing and resizing


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 16)),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_encode_npy_round_trip_is_exact(shape: tuple[int, int, int], seed: int) -> None:
    image = noise(*shape, seed=seed)
    np.testing.assert_array_equal(decode(encode_npy(image), bands(shape[2])), image)
    np.testing.assert_array_equal(decode(encode_npy(image[::-1, ::-1]), bands(shape[2])), image[::-1, ::-1])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint16)])
def test_encode_npy_wrong_array_is_a_mistake_of_the_caller(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        encode_npy(wrong)


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_resize_treats_every_band_alike(number: int) -> None:
    image = noise(40, 60, number)
    image[:, :, -1] = 0  # as alpha this would make all else black
    resized = shrink_short(image, 20)
    assert resized.shape == (20, 30, number)
    for band in range(number):
        np.testing.assert_array_equal(resized[:, :, band], shrink_short(image[:, :, band, None], 20)[:, :, 0])


# Masks


@pytest.mark.parametrize(
    ("depth", "row", "values"),
    [(1, b"\0\x40", [0, 1]), (2, b"\0\xb0", [2, 3]), (4, b"\0\x5e", [5, 14]), (8, b"\0\x05\xff", [5, 255])],
)
@pytest.mark.parametrize("colour", [0, 3])
def test_decode_mask_gives_indices_as_stored(depth: int, row: bytes, values: list[int], colour: int) -> None:
    palette = (chunk(b"PLTE", bytes(range(3 * 2**depth % 256 or 255))),) if colour == 3 else ()
    key = (chunk(b"tRNS", b"\0\1" if colour == 0 else b"\0"),)
    for data in (png(2, 1, depth, colour, row, *palette), png(2, 1, depth, colour, row, *palette, *key)):
        mask = decode_mask(data)
        assert mask.tolist() == [values]
        assert (mask.dtype.name, mask.flags.c_contiguous, mask.flags.writeable) == ("uint8", True, True)


@given(hw=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_encode_mask_round_trip_is_exact(hw: tuple[int, int], seed: int) -> None:
    mask = noise(*hw, seed=seed)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask[:, ::-1])), mask[:, ::-1])


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (saved(noise(4, 4, 3), "PNG"), "8 bits of RGB"),
        (saved(noise(4, 4, 4), "PNG"), "8 bits of RGBA"),
        (saved(noise(4, 4, 2), "PNG"), "8 bits of grey with alpha"),
        (saved(Image.fromarray(noise(4, 4, dtype=np.uint16)), "PNG"), "16 bits of grey"),
        (saved(noise(4, 4), "JPEG"), "JPEG"),
        (saved(noise(4, 4), "TIFF"), "TIFF"),
        (npy(noise(4, 4)), "NPY"),
    ],
)
def test_decode_mask_of_anything_else_is_refused_with_what_came(data: bytes, got: str) -> None:
    reason, message = mask_refusal(data)
    assert reason == "mask"
    assert message.endswith(f"got {got}.")


def test_decode_mask_damaged_bytes_say_why() -> None:
    data = encode_mask(noise(30, 30))
    assert mask_refusal(b"")[0] == "empty"
    assert mask_refusal(b"P6 2 2")[0] == "format"
    assert {mask_refusal(data[:end])[0] for end in range(8, len(data) - 1, 9)} == {"truncated"}
    assert mask_refusal(data[:200] + b"\0\0" + data[202:])[0] == "corrupt"


def test_decode_mask_is_not_bound_to_the_formats_of_images() -> None:
    assert decode_mask(encode_mask(noise(3, 3)), Decoding(formats=("JPEG",), num_channels=7)).shape == (3, 3)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int64)])
def test_encode_mask_wrong_array_is_a_mistake_of_the_caller(wrong: Any) -> None:
    with pytest.raises(ValueError, match="as a mask"):
        encode_mask(wrong)


# Hostile bytes

SEEDS = [
    npy(noise(9, 8, 6)),
    npy(np.asfortranarray(noise(9, 8, 6, dtype=np.uint16))),
    tiff(noise(9, 8, 6), planarconfig="contig"),
    tiff(noise(6, 9, 8, dtype=np.uint16), planarconfig="separate", byteorder=">"),
    tiff(noise(9, 8, 6), planarconfig="contig", compression="zlib", predictor=True, tile=(16, 16)),
    saved(noise(9, 8), "TIFF", compression="tiff_lzw"),
    deep_png(noise(9, 8, 4, dtype=np.uint16)),
    encode_mask(noise(9, 8)),
    saved(Image.fromarray(noise(9, 8) % 16).convert("P"), "PNG"),
]


def outcome(read: Any, data: bytes, policy: Decoding) -> str:
    """Why there is no array, or nothing where there is one of the size that `probe` says."""
    try:
        pixels = read(data, policy)
    except ImageError as error:
        return error.reason
    if read is decode:
        assert pixels.shape == (*probe(data, policy), policy.num_channels)
    return "" if pixels.dtype == np.uint8 and pixels.shape[2:] in {(), (policy.num_channels,)} else "no uint8 array"


@given(
    seed=st.sampled_from(SEEDS),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    number=st.sampled_from([1, 4, 6]),
)
@settings(max_examples=600, deadline=None)
def test_decode_damaged_bands_and_masks_raise_nothing_but_image_errors(
    seed: bytes, flips: list[tuple[float, int]], keep: float, number: int
) -> None:
    data = bytearray(seed)
    for where, bits in flips:
        data[int(where * len(data))] ^= bits
    damaged = bytes(data[: int(keep * len(data))])
    policy = bands(number, max_pixels=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(decode, damaged, policy) in {"", *REASONS}
        assert outcome(decode_mask, damaged, policy) in {"", "mask", *REASONS}


@given(
    head=st.sampled_from([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"\x93NUMPY\1\0", b"\x93NUMPY\2\0"]),
    tail=st.binary(max_size=300),
)
@settings(max_examples=300, deadline=None)
def test_decode_random_bands_raise_nothing_but_image_errors(head: bytes, tail: bytes) -> None:
    assert refusal(head + tail, bands(5))[0] in REASONS


BOMB = """
import resource, struct, sys, zlib
from pipeline import imaging
from pipeline.errors import ImageError
policy = imaging.Decoding(formats=("TIFF", "NPY"), num_channels=6)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print(imaging.decode(open(path, "rb").read(), policy).shape)
    except ImageError as error:
        print(error.reason)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_decode_deflated_bomb_in_a_strip_is_not_inflated(tmp_path: Path) -> None:
    data = tiff(np.zeros((12, 11, 6), np.uint8), planarconfig="contig", byteorder="<", compression="zlib")
    bomb = zlib.compress(bytes(400_000_000), 9)
    swollen = set_tag(set_tag(data, 273, len(data)), 279, len(bomb)) + bomb
    (tmp_path / "bomb.tif").write_bytes(swollen)
    command = [sys.executable, "-c", BOMB, str(tmp_path / "bomb.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcome, grown_mib = done.stdout.splitlines()
    assert outcome in {"(12, 11, 6)", "corrupt"}
    assert int(grown_mib) < 100


# The odd files

WALK = """
import collections, pathlib, resource, sys
from pipeline import imaging
from pipeline.errors import ImageError
formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "NPY")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = collections.Counter()
policies = {name: imaging.Decoding(formats=formats, num_channels=name or 3) for name in (0, 1, 2, 4)}
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*")):
    data = path.read_bytes() if path.is_file() else b""
    for name, policy in policies.items():
        try:
            pixels = imaging.decode(data, policy) if name else imaging.decode_mask(data, policy)
        except ImageError as error:
            assert str(error).endswith("."), error
        else:
            if name:
                assert pixels.shape == (*imaging.probe(data, policy), name), path
            outcomes[name] += 1
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(outcomes[0], outcomes[1], outcomes[2], outcomes[4], grown)
"""


def test_decode_every_odd_file_as_bands_and_mask_is_an_array_or_a_typed_error(odd: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WALK, str(odd)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    masks, one, two, four, grown_mib = (int(word) for word in done.stdout.split())
    assert min(masks, one, four) >= 30, done.stdout
    assert two >= 5, done.stdout
    assert grown_mib < 1024


def test_decode_pngsuite_rgba_equals_pillow(odd: Path) -> None:
    for path in (odd / "pngsuite").glob("bas*6a08.png"):
        with Image.open(path) as stored:
            np.testing.assert_array_equal(decode(path.read_bytes(), bands(4)), np.asarray(stored), err_msg=path.name)


def test_decode_pngsuite_interlaced_deep_bands_equal_the_others(odd: Path) -> None:
    for kind, number in (("6a16", 4), ("4a16", 2), ("0g16", 1)):
        plain, interlaced = (next((odd / "pngsuite").rglob(f"{head}{kind}.png")) for head in ("basn", "basi"))
        pixels = decode(plain.read_bytes(), bands(number))
        np.testing.assert_array_equal(pixels, decode(interlaced.read_bytes(), bands(number)), err_msg=kind)
        with Image.open(plain) as stored:
            high = np.asarray(stored.convert("RGBA"))[:, :, 3] if number > 1 else np.asarray(stored) >> 8
        assert np.abs(pixels[:, :, -1].astype(int) - high).max() <= 1
