"""Imaging: hand-made files with known pixels, hostile bytes, and the odd files of VENTRAL_DATA where it is set."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from pipeline import imaging
from pipeline.data.transforms.resizing import resize_interleaved
from pipeline.errors import ImageError
from pipeline.imaging import MAX_ASPECT, Decoding, decode, probe, sniff
from pipeline.types import UInt8Array

ALL = Decoding(formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
WHITE = (255, 255, 255)


def photo(height: int = 48, width: int = 64) -> UInt8Array:
    """A smooth picture without symmetry: every turn and flip of it is another one."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / (width - 1), y * 255 / (height - 1), (x + 2 * y) * 80 / (height + width))
    return np.stack(planes, axis=2).astype(np.uint8)


def saved(image: Image.Image | UInt8Array, format: str, **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(encoded, format, **options)
    return encoded.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand: `rows` are filter byte and packed samples of each row, `extra` chunks come before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join((chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def reason_of(data: bytes, policy: Decoding = ALL) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, policy)
    assert str(caught.value).endswith(".")
    return caught.value.reason


# Formats and containers


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_decode_lossless_format_gives_the_pixels_back(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(photo(), format, **options)
    assert sniff(data) == format
    np.testing.assert_array_equal(decode(data, ALL), photo())


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, pa.py_buffer, lambda raw: np.frombuffer(raw, np.uint8)])
def test_decode_any_buffer_gives_the_same_pixels(wrap: Any) -> None:
    data = saved(photo(), "JPEG")
    assert sniff(wrap(data)) == "JPEG"
    assert probe(wrap(data)) == (48, 64)
    np.testing.assert_array_equal(decode(wrap(data)), decode(data))


def test_decode_png_named_jpg_is_read_by_content(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(photo(), "PNG"))
    np.testing.assert_array_equal(decode(path.read_bytes()), photo())


def test_decode_result_is_contiguous_writable_uint8() -> None:
    for data in (saved(photo(), "JPEG", exif=exif(6)), saved(photo(), "PNG"), saved(photo(), "WEBP")):
        pixels = decode(data)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


def test_decode_format_that_is_not_allowed_is_refused_by_name() -> None:
    data = saved(photo(), "GIF")
    with pytest.raises(ImageError, match="GIF images are not accepted here, only JPEG, PNG, WEBP") as caught:
        decode(data)
    assert caught.value.reason == "format"
    assert decode(data, ALL).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 100, "format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "format"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"RIFF\x04\0\0\0WEBP", "truncated"),
        (b"GIF89a", "truncated"),
        (b"BM", "truncated"),
        (b"II*\0", "truncated"),
    ],
)
def test_decode_bytes_that_are_no_image_say_why(data: bytes, reason: str) -> None:
    assert reason_of(data) == reason


# JPEG


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}],
)
@pytest.mark.parametrize("min_short", [None, 1, 12, 20])
def test_decode_jpeg_equals_pillow_to_the_last_bit(options: dict[str, Any], min_short: int | None) -> None:
    data = saved(photo(99, 131), "JPEG", **options)
    pixels = decode(data, min_short=min_short)
    with Image.open(io.BytesIO(data)) as reference:
        factor = {None: 1, 1: 8, 12: 4, 20: 2}[min_short]
        reference.draft("RGB", (131 // factor, 99 // factor))
        np.testing.assert_array_equal(pixels, np.asarray(reference.convert("RGB")))


def test_decode_grey_jpeg_has_three_equal_channels() -> None:
    grey = photo()[:, :, 0]
    pixels = decode(saved(grey, "JPEG", quality=95))
    assert (pixels == pixels[:, :, :1]).all()
    assert np.abs(pixels[:, :, 0].astype(int) - grey).max() <= 4


@pytest.mark.parametrize("min_short", [None, 4])
def test_decode_cmyk_jpeg_gives_its_colours(min_short: int | None) -> None:
    # Ink in percent -> light: (1 - cyan)(1 - black) and so on.
    for cmyk, rgb in [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 255, 51), (204, 204, 0)), ((0, 0, 0, 255), (0, 0, 0))]:
        pixels = decode(saved(Image.new("CMYK", (32, 40), cmyk), "JPEG", quality=100), min_short=min_short)
        assert pixels.shape[0] == (40 if min_short is None else 10)
        assert np.abs(pixels.astype(int) - rgb).max() <= 4


def test_decode_adobe_ycck_jpeg_equals_its_cmyk_original(odd: Path) -> None:
    pixels = decode((odd / "pillow" / "pil_sample_cmyk.jpg").read_bytes()).astype(int)
    original = decode((odd / "pillow" / "pil_sample_rgb.jpg").read_bytes()).astype(int)
    assert pixels.shape == original.shape
    assert np.abs(pixels - original).mean() < 20  # inverted ink would be 100 away


def test_decode_jpeg_with_zip_behind_it_ignores_the_rest() -> None:
    data = saved(photo(), "JPEG")
    np.testing.assert_array_equal(decode(data + b"PK\3\4" + os.urandom(1000)), decode(data))


def test_decode_jpeg_with_damaged_metadata_is_not_disturbed() -> None:
    data = saved(photo(), "JPEG")
    for marker, body in [
        (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        (0xE2, b"ICC_PROFILE\0\xff\x01bad"),
        (0xFE, b"note"),
    ]:
        segment = bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(decode(data[:2] + segment + data[2:]), decode(data))


def test_decode_jpeg_with_a_thousand_scans_is_refused() -> None:
    data = saved(photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert reason_of(data[:-2] + data[last:-2] * 1000 + data[-2:]) == "corrupt"


def test_decode_of_more_parts_than_an_encoder_writes_is_refused_by_its_header() -> None:
    png, webp = saved(photo(), "PNG"), saved(photo(), "WEBP", exif=b"Exif\0\0" + bytes(20))
    empty = struct.pack(">I4sI", 0, b"aaAa", zlib.crc32(b"aaAa"))
    parts = 70_000
    for data in (
        png[:33] + empty * parts + png[33:],
        b"\xff\xd8" + b"\xff\xe1\0\2" * parts + saved(photo(), "JPEG")[2:],
        b"\xff\xd8" + b"\xff\0" * parts + saved(photo(), "JPEG")[2:],
        webp[:4] + struct.pack("<I", len(webp) - 8 + 8 * parts) + webp[8:30] + (b"aaaa" + bytes(4)) * parts + webp[30:],
    ):
        with pytest.raises(ImageError, match="65536 parts or more") as caught:
            probe(data)
        assert caught.value.reason == "corrupt"
    assert decode(png[:33] + empty * 60_000 + png[33:]).shape == (48, 64, 3)


# Scaled decoding


@given(height=st.integers(1, 700), width=st.integers(1, 700), min_short=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_decode_min_short_is_the_largest_safe_reduction(height: int, width: int, min_short: int) -> None:
    assume(max(height, width) <= MAX_ASPECT * min(height, width))
    data = imaging.encode_jpeg(np.full((height, width, 3), 90, np.uint8))
    pixels = decode(data, min_short=min_short)
    allowed = [k for k in (1, 2, 4, 8) if min(height, width) >= 8 and -(-min(height, width) // k) >= 2 * min_short]
    factor = max(allowed, default=1)
    assert pixels.shape == (-(-height // factor), -(-width // factor), 3)
    assert min(pixels.shape[:2]) >= min(2 * min_short, height, width)
    np.testing.assert_array_equal(pixels, decode(data, min_short=min_short))


def test_decode_min_short_keeps_the_picture() -> None:
    data = saved(photo(400, 600), "JPEG", quality=95)
    small, whole = decode(data, min_short=50), decode(data)
    assert small.shape == (100, 150, 3)
    difference = np.abs(resize_interleaved(small, (50, 75)).astype(int) - resize_interleaved(whole, (50, 75)))
    assert difference.max() <= 4


def test_decode_min_short_leaves_other_formats_whole() -> None:
    assert decode(saved(photo(), "PNG"), min_short=2).shape == (48, 64, 3)


def test_decode_min_short_below_one_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        decode(saved(photo(), "JPEG"), min_short=0)


# Grey, palettes, alpha, depth


def test_decode_alpha_is_composited_on_the_background() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (10, 20, 30, 255)
    rgba[1] = (0, 0, 0, 51)  # 20 % black
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        data = saved(rgba, format, **options)
        assert decode(data, ALL)[:, 0].tolist() == [[10, 20, 30], [204, 204, 204]]
        green = Decoding(formats=ALL.formats, background=(0, 200, 0))
        assert decode(data, green)[1, 0].tolist() == [0, 160, 0]


def test_decode_grey_alpha_is_composited() -> None:
    data = saved(Image.new("LA", (2, 2), (0, 128)), "PNG")
    assert (decode(data) == 127).all()


def test_decode_palette_with_alpha_is_composited() -> None:
    palette = chunk(b"PLTE", bytes((200, 0, 0, 0, 100, 0, 0, 0, 50)))
    data = png(3, 1, 8, 3, b"\0\0\1\2", palette, chunk(b"tRNS", bytes((255, 0, 128))))
    pixels = decode(data)[0]
    assert pixels[:2].tolist() == [[200, 0, 0], [255, 255, 255]]
    assert np.abs(pixels[2].astype(int) - (127, 127, 152)).max() <= 1


@pytest.mark.parametrize(
    ("depth", "rows", "levels"),
    [
        (1, b"\0\x40", [0, 255]),
        (2, b"\0\x10", [0, 85]),
        (4, b"\0\x05", [0, 85]),
        (8, b"\0\x00\x55", [0, 85]),
        (16, b"\0\x00\x00\x55\x55", [0, 85]),
    ],
)
def test_decode_grey_png_colour_key_makes_its_level_transparent(depth: int, rows: bytes, levels: list[int]) -> None:
    assert decode(png(2, 1, depth, 0, rows))[0, :, 0].tolist() == levels
    key = {1: 1, 2: 1, 4: 5, 8: 0x55, 16: 0x5555}[depth]
    with_key = png(2, 1, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", key)))
    red = Decoding(background=(255, 0, 9))
    assert decode(with_key, red)[0].tolist() == [[levels[0]] * 3, [255, 0, 9]]


def test_decode_16_bit_rgb_png_colour_key_is_transparent() -> None:
    rows = b"\0" + struct.pack(">6H", 0xFFFF, 0, 0x1234, 0x8000, 0x8000, 0x8000)
    data = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 0x8000, 0x8000, 0x8000)))
    assert decode(data)[0].tolist() == [[255, 0, 0x12], [255, 255, 255]]


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_decode_16_bit_grey_is_scaled_not_saturated(values: list[int]) -> None:
    grey = np.array([values], np.uint16)
    expected = np.floor(grey / 257 + 0.5)
    for pixels in (decode(saved(Image.fromarray(grey), "PNG")), decode(saved(Image.fromarray(grey), "TIFF"), ALL)):
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, np.newaxis], 3, axis=2))


def test_decode_16_bit_colour_is_within_one_level() -> None:
    values = np.arange(0, 65536, 257 // 3, dtype=np.uint16)[: 255 * 3]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2").reshape(5, -1))
    data = png(51, 5, 16, 2, rows)
    assert np.abs(decode(data).reshape(-1) - values / 257).max() <= 1


def test_decode_one_bit_image_is_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for format in ("PNG", "BMP", "TIFF", "GIF"):
        assert decode(saved(bits, format), ALL)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_decode_tiff_without_a_known_range_is_refused(mode: str) -> None:
    assert reason_of(saved(Image.new(mode, (4, 4), 1), "TIFF")) == "mode"


# Animations and metadata


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG", "TIFF"])
def test_decode_animation_gives_the_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (16, 12), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(red, format, save_all=True, append_images=[blue, red], **options)
    assert (decode(data, ALL) == (255, 0, 0)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_exif_orientation_gives_an_upright_picture(format: str, orientation: int) -> None:
    upright = photo()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exact: dict[str, dict[str, Any]] = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = exact.get(format, {})
    data = saved(np.ascontiguousarray(stored), format, exif=exif(orientation), **options)
    pixels = decode(data, ALL)
    assert probe(data, ALL) == pixels.shape[:2] == upright.shape[:2]
    assert np.abs(pixels.astype(int) - upright).max() <= (6 if format == "JPEG" else 0)


# Limits


@pytest.mark.parametrize("side", [50_000, 2**31 - 1])
def test_decode_huge_header_is_refused_before_decoding(side: int) -> None:
    data = png(side, side, 8, 2, b"\0")
    begin = time.perf_counter()
    assert reason_of(data) == "pixels"
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_limits_hold_for_every_format(format: str) -> None:
    data = saved(photo(), format)
    assert decode(data, Decoding(formats=ALL.formats, max_pixels=48 * 64, max_side=64)).shape == (48, 64, 3)
    assert reason_of(data, Decoding(formats=ALL.formats, max_pixels=48 * 64 - 1)) == "pixels"
    assert reason_of(data, Decoding(formats=ALL.formats, max_side=63)) == "pixels"


@pytest.mark.parametrize("turned", [False, True])
def test_decode_image_much_longer_than_wide_is_refused(turned: bool) -> None:
    strip = np.zeros((2, 2 * MAX_ASPECT + 1, 3), np.uint8)
    strip = strip.swapaxes(0, 1) if turned else strip
    assert reason_of(saved(strip, "PNG")) == "aspect"
    assert decode(saved(strip[:200, :200], "PNG")).shape == strip[:200, :200].shape


def test_decode_large_image_under_the_limit_does_not_warn() -> None:
    rows = zlib.compress(bytes(10_001 * 1_250), 9)  # 100 megapixels of 1 bit
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(data) == "pixels"
    gif = b"GIF89a" + struct.pack("<HHBBB", 10_000, 10_000, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(gif) == "pixels"


def test_decode_jpeg_that_states_two_sizes_allocates_neither() -> None:
    data = saved(photo(), "JPEG")
    at = data.index(b"\xff\xc0")
    second = data[at : at + 5] + struct.pack(">HH", 60_000, 60_000) + data[at + 9 : at + 19]
    assert reason_of(data[: at + 19] + second + data[at + 19 :]) == "corrupt"


@pytest.mark.parametrize(
    "wrong",
    [{"formats": ()}, {"formats": ("PSD",)}, {"max_pixels": 0}, {"max_side": 0}, {"background": (0, 0, 256)}, {"x": 1}],
)
def test_decoding_impossible_policy_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Decoding(**wrong)


# Hostile bytes


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_truncated_image_is_refused_wherever_it_ends(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    data = saved(noise, format)
    ends = [*range(12, 60), *range(60, len(data) - 2, 7), len(data) - 3]  # the first 12 bytes make the format
    assert {reason_of(data[:end]) for end in ends} == {"truncated"}


def test_decode_truncated_jpeg_with_an_end_marker_is_refused() -> None:
    data = saved(photo(200, 200), "JPEG")
    assert reason_of(data[: len(data) // 2] + b"\xff\xd9") == "truncated"


def test_decode_png_with_a_flipped_byte_is_refused() -> None:
    data = bytearray(saved(photo(), "PNG"))
    data[len(data) // 2] ^= 1
    assert reason_of(bytes(data)) == "corrupt"


def outcome_is_typed(data: bytes) -> None:
    """An image of the size that `probe` says, or an ImageError; no warning, nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(data, ALL)
        except ImageError as error:
            reason = error.reason
        else:
            reason = "" if probe(data, ALL) == pixels.shape[:2] else "probe disagrees"
    assert reason in {"", "empty", "format", "pixels", "aspect", "truncated", "corrupt", "mode", "memory"}


HEADS = (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08")


@given(head=st.sampled_from(HEADS), tail=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_decode_random_bytes_raise_nothing_but_image_errors(head: bytes, tail: bytes) -> None:
    outcome_is_typed(head + tail)


@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "CMYK"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    header_only=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_decode_flipped_bits_raise_nothing_but_image_errors(
    format: str, flips: list[tuple[float, int]], header_only: bool
) -> None:
    picture = Image.fromarray(photo(24, 20))
    options = {} if format in {"GIF", "BMP", "TIFF"} else {"exif": exif(6)}
    data = bytearray(
        saved(picture.convert("CMYK"), "JPEG", **options) if format == "CMYK" else saved(picture, format, **options)
    )
    reach = min(len(data), 200) if header_only else len(data)
    for where, bits in flips:
        data[int(where * reach)] ^= bits
    outcome_is_typed(bytes(data))


# Threads


def test_decode_from_eight_threads_gives_the_same_pixels() -> None:
    files = [saved(photo(300, 400), name, exif=exif(6)) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    files += [saved(Image.new("CMYK", (300, 200), (9, 99, 0, 30)), "JPEG"), saved(photo(), "GIF")]
    alone = [decode(data, ALL) for data in files]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, ALL), files * 16))
    for index, pixels in enumerate(together):
        np.testing.assert_array_equal(pixels, alone[index % len(files)])
    assert warnings.filters == filters


# Resizing and encoding


def test_encode_png_round_trip_is_exact() -> None:
    np.testing.assert_array_equal(decode(imaging.encode_png(photo())), photo())
    grey = photo()[:, :, 0]
    np.testing.assert_array_equal(decode(imaging.encode_png(grey))[:, :, 1], grey)


def test_encode_jpeg_round_trip_is_close_and_quality_counts() -> None:
    view = photo(64, 80)[::-1, ::2]  # not contiguous
    fine, coarse = imaging.encode_jpeg(view, 95), imaging.encode_jpeg(view, 20)
    assert sniff(fine) == "JPEG"
    assert len(coarse) < len(fine)
    assert np.abs(decode(fine).astype(int) - view).mean() < 2


@pytest.mark.parametrize("shape", [(4,), (4, 4, 4), (4, 4, 1)])
def test_encode_wrong_shape_is_a_mistake_of_the_caller(shape: tuple[int, ...]) -> None:
    for encode in (imaging.encode_jpeg, imaging.encode_png):
        with pytest.raises(ValueError, match="expected uint8"):
            encode(np.zeros(shape, np.uint8))


# The odd files


def files_in(folder: Path, pattern: str = "*") -> Iterator[Path]:
    return (path for path in sorted(folder.rglob(pattern)) if path.is_file())


WALK = """
import collections, pathlib, resource, sys
from pipeline import imaging
from pipeline.errors import ImageError
policy = imaging.Decoding(formats=tuple(sys.argv[2].split(",")))
paths = [path for path in sorted(pathlib.Path(sys.argv[1]).rglob("*")) if path.is_file()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = collections.Counter()
for path in paths:
    data = path.read_bytes()
    try:
        pixels = imaging.decode(data, policy)
    except ImageError as error:
        outcomes[error.reason] += 1
    else:
        assert imaging.probe(data, policy) == pixels.shape[:2], path
        outcomes["image"] += 1
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(len(paths), outcomes["image"], grown, dict(outcomes))
"""


@pytest.mark.parametrize("policy", [imaging.DEFAULT, ALL], ids=["default", "all"])
def test_decode_every_odd_file_is_an_image_or_a_typed_error(odd: Path, policy: Decoding) -> None:
    command = [sys.executable, "-W", "error", "-c", WALK, str(odd), ",".join(policy.formats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    num_files, num_images, grown_mib = (int(word) for word in done.stdout.split()[:3])
    assert num_files >= 997
    assert num_images >= (770 if policy is ALL else 630), done.stdout
    assert grown_mib < 1024


def test_decode_exif_files_give_one_upright_picture(odd: Path) -> None:
    for name in ("Landscape", "Portrait"):
        pictures = [decode((odd / "exif_orientation" / f"{name}_{n}.jpg").read_bytes()) for n in range(9)]
        small = [resize_interleaved(picture, (60, 90)).astype(int) for picture in pictures]
        assert len({picture.shape for picture in pictures}) == 1
        for picture in small[1:]:
            assert np.abs(picture - small[0]).mean() < 8  # they differ by the number drawn on them


def test_decode_pngsuite_refuses_the_broken_files_only(odd: Path) -> None:
    for path in files_in(odd / "pngsuite", "*.png"):
        if path.name.startswith("x"):
            assert reason_of(path.read_bytes(), imaging.DEFAULT) in {"format", "corrupt", "truncated"}, path.name
        else:
            assert decode(path.read_bytes()).shape[2] == 3, path.name


def test_decode_pngsuite_interlaced_files_equal_the_others(odd: Path) -> None:
    for path in files_in(odd / "pngsuite", "basi*.png"):
        plain = path.with_name(path.name.replace("basi", "basn"))
        np.testing.assert_array_equal(decode(path.read_bytes()), decode(plain.read_bytes()), err_msg=path.name)


def test_decode_pngsuite_16_bit_grey_equals_its_values(odd: Path) -> None:
    for path in files_in(odd / "pngsuite", "*0g16.png"):
        if path.name.startswith("t"):
            continue
        with Image.open(path) as stored:
            values = np.asarray(stored).astype(np.float64)
        assert values.max() > 255
        np.testing.assert_array_equal(decode(path.read_bytes())[:, :, 0], np.floor(values / 257 + 0.5), path.name)
