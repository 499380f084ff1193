"""What an image file tells before it is decoded: format, size, how it is to be turned, where its pixels lie.

Stands below `pipeline.imaging`, its only user, which holds what is found here against a policy and then decodes. All
of it parses hostile bytes and allocates no more than a small multiple of them; besides `ImageError` it raises
`struct.error`, `IndexError` and `ValueError`, which imaging turns into one.

- `parse` walks JPEG, PNG, WebP and GIF itself, BMP and TIFF are read by Pillow.
- `plain_tiff` cuts a TIFF's directory down to what describes samples; `tiff_bands` and `npy_array` tell how samples
  lie in files whose bands are no colours: TIFF 6.0 (sections 2, 8, 14, 15) and NumPy's format 1.0 and 2.0.

Left out: decoding, limits of size.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ImageFile, TiffTags
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.errors import ImageError

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "NPY"]

# How a file begins.
_MAGIC: dict[Format, re.Pattern[bytes]] = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "BMP": re.compile(rb"BM"),
    "NPY": re.compile(rb"\x93NUMPY"),
}
# Pillow's class for it: `Image.open` would warn about sizes and try more formats.
PILLOW: dict[Format, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
}
_MAX_PARTS = 65_536  # segments or chunks, each of which is looked at; the pixels of a large PNG come in 8 KiB
_MAX_SCANS = 200  # a progressive JPEG has about 10; each costs a pass over all pixels, however few its bytes
_PNG_BANDS = {b"\0": 1, b"\4": 2, b"\6": 4}  # by colour type: grey, grey with alpha, RGBA; RGB and palettes have 3
# TIFF 6.0 and its supplements: what describes samples. Everything else is metadata.
_TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332}
_TIFF_TAGS |= {338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}
_TIFF_CODECS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
_MAX_TILE = 1024  # pixels a side, of tiles larger than their image
_MAX_NPY_HEADER = 1024  # NumPy writes 118 bytes for a plain array
_NPY_HEADER = re.compile(
    rb"\{\s*'descr'\s*:\s*'([^']{1,16})'\s*,\s*'fortran_order'\s*:\s*(True|False)\s*,"
    rb"\s*'shape'\s*:\s*\(([\d,\s]{0,99})\)\s*,?\s*\}\s*"
)


class Header(NamedTuple):
    """What is known before decoding.

    Attributes:
        format: by content.
        height, width: as stored, in pixels.
        orientation: EXIF 1..8 that decoding does not apply by itself.
        parts: the byte ranges that describe pixels.
        num_bands: samples per pixel as stored (3 for palettes); None where the header does not tell.
    """

    format: Format
    height: int
    width: int
    orientation: int = 1
    parts: tuple[tuple[int, int], ...] = ()
    num_bands: int | None = None


def sniff(raw: bytes) -> Format:
    """The format of encoded bytes, by their first ones.

    Raises:
        ImageError: reason `empty` or `format`.
    """
    if not raw:
        raise ImageError("empty", "Expected an encoded image, got no bytes at all.")
    for name, magic in _MAGIC.items():
        if magic.match(raw):
            return name
    raise ImageError("format", f"Expected one of {', '.join(_MAGIC)}, got bytes that begin with {raw[:8]!r}.")


def parse(raw: bytes, name: Format, *, bands: bool = False) -> Header:
    """The header of a file of format `name`; with `bands`, of a TIFF that Pillow may have no mode for."""
    if name in _PARSERS:
        return _PARSERS[name](raw)
    if name == "TIFF" and bands:
        return _tiff_header(_Directory(raw))
    width, height = PILLOW[name](io.BytesIO(plain_tiff(raw) if name == "TIFF" else raw)).size
    return Header(name, height, width)


def _jpeg_header(raw: bytes) -> Header:
    """Walk the segments up to the first scan: size and components (SOF), orientation (EXIF), what is no metadata."""
    at, orientation, parts = 2, 1, [(0, 2)]
    size: tuple[int, int, int] | None = None
    progressive = False
    for _ in range(_MAX_PARTS):
        at = raw.index(b"\xff", at) + 1
        marker = raw[at]
        if marker in {0x00, 0x01, 0xFF} or 0xD0 <= marker <= 0xD8:  # padding, and markers without a length
            continue
        if marker in {0xD9, 0xDA}:
            break
        (length,) = struct.unpack_from(">H", raw, at + 1)
        end = at + 1 + length
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC} and size is None:
            size = struct.unpack_from(">HHB", raw, at + 4)
            progressive = marker in {0xC2, 0xCA}
        if marker == 0xE1 and orientation == 1 and raw.startswith(b"Exif\0\0", at + 3):
            orientation = _orientation(raw[at + 9 : end])
        # Of the application segments only JFIF (0) and Adobe (14) tell how to read colours; 0xFE is a comment.
        if marker in {0xE0, 0xEE} or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append((at - 1, end))
        at = end
    else:
        raise _too_many_parts("JPEG")
    if size is None:
        raise ImageError("corrupt", "The JPEG image has no frame header before its pixels.")
    if progressive and raw.count(b"\xff\xda", at) > _MAX_SCANS:
        raise ImageError("corrupt", f"The JPEG image has more than {_MAX_SCANS} scans, no encoder writes that.")
    return Header("JPEG", size[0], size[1], orientation, (*parts, (at - 1, len(raw))), size[2])


def _png_header(raw: bytes) -> Header:
    """Walk the chunks: size (IHDR), orientation (eXIf), and the critical ones with the transparent colour (tRNS)."""
    first, width, height = struct.unpack_from(">4sII", raw, 12)
    if first != b"IHDR":
        raise ImageError("corrupt", "The PNG image does not begin with an IHDR chunk.")
    at, orientation, parts = 8, 1, [(0, 8)]
    for _ in range(_MAX_PARTS):
        if at + 12 > len(raw):
            break
        length, kind = struct.unpack_from(">I4s", raw, at)
        end = at + 12 + length
        if kind == b"eXIf":
            orientation = _orientation(raw[at + 8 : end - 4])
        if kind == b"tRNS" or not kind[0] & 0x20:
            parts.append((at, end))
        if kind == b"IEND":
            break
        at = end
    else:
        raise _too_many_parts("PNG")
    return Header("PNG", height, width, orientation, tuple(parts), _PNG_BANDS.get(raw[25:26], 3))


def _webp_header(raw: bytes) -> Header:
    """Size from the first chunk (VP8, VP8L or the canvas of VP8X), orientation from EXIF."""
    first, body = raw[12:16], 20
    if 8 + struct.unpack_from("<I", raw, 4)[0] > len(raw):
        raise ImageError("truncated", f"The WEBP image says that it is longer than the {len(raw)} bytes there are.")
    if first == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", raw, body + 4)
        return Header("WEBP", (high_h << 16 | low_h) + 1, (high_w << 16 | low_w) + 1, _webp_orientation(raw))
    if first == b"VP8L":
        (bits,) = struct.unpack_from("<I", raw, body + 1)
        return Header("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    width, height = struct.unpack_from("<HH", raw, body + 6)
    return Header("WEBP", height & 0x3FFF, width & 0x3FFF)


def _webp_orientation(raw: bytes) -> int:
    at = 12
    for _ in range(_MAX_PARTS):
        if at + 8 > len(raw):
            return 1
        kind, length = struct.unpack_from("<4sI", raw, at)
        if kind == b"EXIF":
            return _orientation(raw[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    raise _too_many_parts("WEBP")


def _too_many_parts(name: Format) -> ImageError:
    return ImageError("corrupt", f"The {name} image has {_MAX_PARTS} parts or more, no encoder writes that.")


def _gif_header(raw: bytes) -> Header:
    """Size of the screen, or of the first frame where that reaches further (as Pillow allocates it)."""
    width, height, flags = struct.unpack_from("<HHB", raw, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while raw[at] == 0x21:  # extensions: two bytes, then blocks that begin with their length, the last of 0
        at += 2
        while raw[at]:
            at += raw[at] + 1
        at += 1
    if raw[at] != 0x2C:
        raise ImageError("corrupt", "The GIF image has no frame where its first frame should be.")
    left, top, frame_w, frame_h = struct.unpack_from("<4H", raw, at + 1)
    return Header("GIF", max(height, top + frame_h), max(width, left + frame_w))


def _orientation(exif: bytes) -> int:
    """The EXIF orientation 1..8 of a TIFF-like block; 1 where it is missing or the block is damaged."""
    order = _order(exif)
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at)
            if (tag, kind) == (0x0112, 3):
                return _upright(value)
    except struct.error:
        pass
    return 1


def plain_tiff(raw: bytes) -> bytes:
    """The file with its first directory cut down to what describes samples, and no second one.

    Raises:
        ImageError: a tag reaches outside the file or has more values than it may: Pillow would warn and guess.
    """
    order = _order(raw)
    (start,) = struct.unpack_from(order + "I", raw, 4)
    (count,) = struct.unpack_from(order + "H", raw, start)
    kept, outside = [], 0
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, offset = struct.unpack_from(order + "HHII", raw, at)
        if tag not in _TIFF_TAGS or kind not in _TIFF_TYPE_BYTES:
            continue
        size = number * _TIFF_TYPE_BYTES[kind]
        outside += size if size > 4 else 0
        if (size > 4 and offset + size > len(raw)) or outside > len(raw):
            raise ImageError("truncated", f"The TIFF image ends before the values of its tag {tag}.")
        if number > 1 and kind not in {1, 2, 7} and TiffTags.lookup(tag).length == 1:
            raise ImageError("corrupt", f"The TIFF image has {number} values in its tag {tag}, expected 1.")
        kept.append(raw[at : at + 12])
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return raw[:start] + directory + raw[start + len(directory) :]


class TiffBands(NamedTuple):
    """How the samples of a TIFF lie, all of them unsigned, all of 8 or all of 16 bits.

    Attributes:
        header: size, orientation and bands.
        dtype: NumPy's name of the samples as stored, such as `>u2`.
        num_planes: 1 where the bands of a pixel lie together, otherwise the number of bands.
        row_bytes: of one row in one plane.
        difference_width: pixels after which the sums of horizontal differences (predictor 2) begin anew; 0 without.
        white_is_zero: samples are stored the other way round.
        raw: the file, its directory cut down.
        tags: (tag, value) of the directory of a plane.
        segments: (tag, type, values of one plane, where they lie) of the strips or tiles.
    """

    header: Header
    dtype: str
    num_planes: int
    row_bytes: int
    difference_width: int
    white_is_zero: bool
    raw: bytes
    tags: tuple[tuple[int, int], ...]
    segments: tuple[tuple[int, int, int, int], ...]

    def plane(self, index: int) -> bytes:
        """The file as a grey TIFF of 8 bits, its pixels [H, row_bytes] the bytes of one plane, for any reader."""
        order = _order(self.raw)
        entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in self.tags]
        for tag, kind, count, where in self.segments:
            size = count * _TIFF_TYPE_BYTES[kind]
            start = where + index * size
            field = self.raw[start : start + size].ljust(4, b"\0") if size <= 4 else struct.pack(order + "I", start)
            entries.append(struct.pack(order + "HHI", tag, kind, count) + field)
        entries.sort(key=lambda entry: struct.unpack_from(order + "H", entry))
        directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
        padding = bytes(len(self.raw) % 2)
        head = self.raw[:4] + struct.pack(order + "I", len(self.raw) + len(padding))
        return b"".join((head, memoryview(self.raw)[8:], padding, directory))


class _Directory:
    """The whole numbers of a TIFF's first directory."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.order = plain_tiff(raw), _order(raw)
        self.entries: dict[int, tuple[int, int, int]] = {}
        (start,) = struct.unpack_from(self.order + "I", self.raw, 4)
        (count,) = struct.unpack_from(self.order + "H", self.raw, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, offset = struct.unpack_from(self.order + "HHII", self.raw, at)
            self.entries[tag] = (kind, number, at + 8 if number * _TIFF_TYPE_BYTES[kind] <= 4 else offset)

    def first(self, tag: int, default: int | None = None) -> int:
        """The first value of a tag."""
        return self.some(tag, default)[0]

    def some(self, tag: int, default: int | None = None) -> tuple[int, ...]:
        """The values of a tag, the first 64 at most."""
        kind, number, where = self.entries.get(tag, (3, 0, 0))
        if number == 0 and default is not None:
            return (default,)
        if number == 0 or kind not in _TIFF_INTEGERS:
            raise ImageError("corrupt", f"The TIFF image has no whole number in its tag {tag}.")
        return struct.unpack_from(f"{self.order}{min(number, 64)}{_TIFF_INTEGERS[kind]}", self.raw, where)

    def all(self, tag: int) -> npt.NDArray[np.int64]:
        """All values of a tag that `segments` has checked."""
        kind, number, where = self.entries[tag]
        return np.frombuffer(self.raw, f"{self.order}u{_TIFF_TYPE_BYTES[kind]}", number, where).astype(np.int64)

    def segments(self, tag: int, num_planes: int, count: int) -> tuple[int, int, int, int]:
        """Where the `count` values of each plane lie."""
        kind, number, where = self.entries.get(tag, (0, 0, 0))
        expected = num_planes * count
        if number != expected or kind not in {3, 4}:
            raise ImageError("corrupt", f"The TIFF image has {number} values in its tag {tag}, expected {expected}.")
        return tag, kind, count, where


def tiff_bands(raw: bytes) -> TiffBands:
    """How the samples of a TIFF lie.

    Raises:
        ImageError: reason `mode` (samples that are no unsigned integers of 8 or 16 bits), `codec` (a compression that
            is for pictures, or rare), `corrupt` or `truncated`.
    """
    directory = _Directory(raw)
    header = _tiff_header(directory)
    height, width, num_samples = header.height, header.width, directory.first(277, 1)
    sample_bytes, codec = _tiff_sample_bytes(directory), _tiff_codec(directory)
    is_planar = directory.first(284, 1) == 2
    num_planes, pixel_bytes = (num_samples, sample_bytes) if is_planar else (1, num_samples * sample_bytes)
    tags = {256: width * pixel_bytes, 257: height, 258: 8, 259: codec, 262: 1, 266: directory.first(266, 1), 277: 1}
    if 322 in directory.entries:
        across, down, places = _tiff_tile(directory, 322, width), _tiff_tile(directory, 323, height), (324, 325)
        tags |= {322: across * pixel_bytes, 323: down}
    else:
        across, down, places = width, max(min(directory.first(278, height), height), 1), (273, 279)
        tags |= {278: down}
    count = -(-width // across) * -(-height // down)
    segments = tuple(directory.segments(tag, num_planes, count) for tag in places)
    rows_of_last = down if 322 in directory.entries else height - (count - 1) * down
    least = across * pixel_bytes if codec == 1 else 0
    _check_segments(directory, places, num_planes, (least * down, least * rows_of_last))
    return TiffBands(
        header,
        f"{directory.order}u{sample_bytes}",
        num_planes,
        width * pixel_bytes,
        across if directory.first(317, 1) == 2 and codec not in {1, 32773} else 0,
        directory.first(262, 1) == 0,
        directory.raw,
        tuple(tags.items()),
        segments,
    )


def _tiff_header(directory: _Directory) -> Header:
    orientation, num_samples = directory.first(274, 1), directory.first(277, 1)
    is_palette = directory.first(262, 1) == 3  # its one sample stands for three
    num_bands = 3 if is_palette else num_samples
    return Header("TIFF", directory.first(257), directory.first(256), _upright(orientation), (), num_bands)


def _check_segments(
    directory: _Directory, places: tuple[int, int], num_planes: int, least_bytes: tuple[int, int]
) -> None:
    """Strips or tiles lie within the file, and where they are not compressed they are whole: Pillow reads on.

    `least_bytes` are those of every one but the last of a plane, and of that.
    """
    offsets, sizes = (directory.all(tag) for tag in places)
    if (offsets + sizes).max() > len(directory.raw):
        raise ImageError("truncated", "The TIFF image ends before its last strip or tile does.")
    sizes = sizes.reshape(num_planes, -1)
    if (sizes[:, :-1] < least_bytes[0]).any() or (sizes[:, -1] < least_bytes[1]).any():
        raise ImageError("corrupt", "The TIFF image has a strip or tile with fewer bytes than samples.")


def _tiff_sample_bytes(directory: _Directory) -> int:
    bits, kinds = set(directory.some(258, 1)), set(directory.some(339, 1))
    if bits not in ({8}, {16}) or kinds != {1}:
        said = f"{'/'.join(map(str, sorted(bits)))} bits in sample format {'/'.join(map(str, sorted(kinds)))}"
        raise ImageError("mode", f"TIFF bands need unsigned samples of 8 or 16 bits, got {said}; convert them.")
    return bits.pop() // 8


def _tiff_codec(directory: _Directory) -> int:
    codec, predictor = directory.first(259, 1), directory.first(317, 1)
    if codec not in _TIFF_CODECS or predictor not in {1, 2}:
        known = ", ".join(dict.fromkeys(_TIFF_CODECS.values()))
        got = f"compression {codec} with predictor {predictor}"
        raise ImageError("codec", f"TIFF bands are read with compression {known} only, got {got}; store them so.")
    return codec


def _tiff_tile(directory: _Directory, tag: int, side: int) -> int:
    """Width or height of the tiles: a reader allocates whole ones, however small the image is."""
    tile = directory.first(tag)
    if not 1 <= tile <= max(_MAX_TILE, side + 15):
        raise ImageError("corrupt", f"The TIFF image has tiles of {tile} pixels a side for {side} pixels.")
    return tile


class NpyArray(NamedTuple):
    """How the samples of a `.npy` file lie: `dtype` from the byte `offset` on, columns first with `is_fortran`."""

    header: Header
    dtype: str
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int


def npy_array(raw: bytes) -> NpyArray:
    """How the samples of a NumPy array [H, W] or [H, W, C] of uint8 or uint16 lie.

    Nothing is evaluated: a pattern reads what NumPy writes for a plain array, so objects and records cannot pass.

    Raises:
        ImageError: reason `mode` (another type), `channels` (another number of axes), `corrupt` or `truncated`.
    """
    major = raw[6]
    size, begin = (int.from_bytes(raw[8:10], "little"), 10) if major == 1 else (int.from_bytes(raw[8:12], "little"), 12)
    text = raw[begin : begin + min(size, _MAX_NPY_HEADER)]
    found = _NPY_HEADER.fullmatch(text) if major in {1, 2} else None
    if major in {1, 2} and len(raw) < begin + size:
        raise ImageError("truncated", f"The NPY image ends within its header, after {len(raw)} bytes.")
    if found is None:
        raise ImageError("corrupt", f"The NPY header is none of a plain array in format 1 or 2: {text[:80]!r}.")
    dtype = found[1].decode("latin-1")
    if dtype not in {"|u1", "<u1", ">u1", "=u1", "<u2", ">u2"}:
        raise ImageError("mode", f"NPY bands need samples of type uint8 or uint16, got {dtype!r}; convert them.")
    shape = tuple(int(side) for side in found[3].split(b",") if side.strip())
    if len(shape) not in {2, 3}:
        raise ImageError("channels", f"NPY bands need the shape [H, W] or [H, W, C], got {list(shape)}.")
    header = Header("NPY", shape[0], shape[1], num_bands=(*shape, 1)[2])
    return NpyArray(header, dtype, shape, found[2] == b"True", begin + size)


def _order(raw: bytes) -> str:
    """The byte order of a TIFF, or of EXIF, which is one."""
    return "<" if raw[:2] == b"II" else ">"


def _upright(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


_PARSERS: dict[Format, Callable[[bytes], Header]] = {
    "JPEG": _jpeg_header,
    "PNG": _png_header,
    "WEBP": _webp_header,
    "GIF": _gif_header,
    "NPY": lambda raw: npy_array(raw).header,
}
