"""Encoded bytes to uint8 pixels and back: the only place in the house where an image file is opened.

Ingest, loading, evaluation, the predictor and the endpoint all call `decode`, so that equal bytes and an equal
`min_short` give equal pixels. Whatever the bytes are, it returns an upright [H, W, 3] array or raises `ImageError`.

- The format is sniffed, names never matter. Sizes are read and checked before anything is decoded.
- Metadata never reaches a decoder: EXIF orientation (JPEG, PNG, WebP; TIFF's own tag) is read here and applied, the
  rest (ICC, XMP, text, later frames) is cut off first, so that a damaged profile can neither warn nor fail.
- Alpha, also of palettes and colour keys, is composited on `Decoding.background`. Animations give their first frame,
  APNG its default image.
- 16-bit grey becomes `round(value / 257)`; of 16-bit colour Pillow keeps the high byte, at most one level away. Grey
  TIFF with 12, 32 or floating bits has no known range and is refused.
- CMYK and YCCK JPEGs are read inverted, as Adobe and everyone after it writes them, and converted without a profile.
- JPEGs of 1 or 3 components take libjpeg-turbo through simplejpeg, all else Pillow; the two agree to the last bit.
- Where `Decoding.num_channels` is not 3, bands are no colours: they come as stored, without compositing or conversion
  ([H, W, num_channels]), 16 bits always as `round(value / 257)`; files with another number of bands are refused.
- Masks hold class indices, not colours, and have doors of their own: `decode_mask`, `encode_mask`.

Left out: colour management, tensors, resizing (`pipeline.data.transforms`), cropping, paths; what headers say
(`pipeline.image_headers`). No global state is touched (no warning filter, no limit of Pillow's), so `decode` runs in
threads.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from pydantic import Field

from pipeline import image_headers
from pipeline.config import Strict
from pipeline.errors import ImageError
from pipeline.image_headers import Header
from pipeline.types import UInt8Array

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_ASPECT = 100
"""How many times as long as wide an image may be; a strip one pixel wide, scaled until its short side is that of a
model's input, would take gigabytes. No key of `Decoding`: datasets that are there would be of another configuration."""
Format = image_headers.Format
UInt16Array = npt.NDArray[np.uint16]
Level = Annotated[int, Field(ge=0, le=255)]

# What parsers and decoders say when the bytes run out.
_INCOMPLETE = re.compile(
    r"truncat|premature|not enough|not found|requires a buffer|out of range|no more", re.IGNORECASE
)
_BANDS_OF_MODE = {"1": 1, "L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # no colours of another kind, no palette
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_GREY_OF_16_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


class Decoding(Strict):
    """What is accepted as an image.

    Attributes:
        formats: accepted formats, by content.
        max_pixels: largest height x width, checked before decoding; memory peaks at 17 bytes per pixel (alpha).
        max_side: longest side.
        background: RGB colour under transparent pixels.
        num_channels: 3 for RGB, which every picture becomes; otherwise the number of bands a file must have. NPY must
            have this number in any case. Memory then peaks at 10 bytes per sample, about.
    """

    formats: tuple[Format, ...] = Field(default=("JPEG", "PNG", "WEBP"), min_length=1)
    max_pixels: int = Field(default=25_000_000, ge=1, le=89_000_000)  # above, Pillow's own limits would warn
    max_side: int = Field(default=16_384, ge=1, le=65_535)
    background: tuple[Level, Level, Level] = (255, 255, 255)
    num_channels: int = Field(default=3, ge=1, le=16)


DEFAULT = Decoding()


def sniff(data: Buffer) -> Format:
    """The format of encoded bytes, by their first ones.

    Raises:
        ImageError: reason `empty` or `format`.
    """
    return image_headers.sniff(_as_bytes(data))


def probe(data: Buffer, policy: Decoding = DEFAULT) -> tuple[int, int]:
    """Height and width of the upright image (after EXIF orientation), from the header alone; nothing is decoded.

    Raises:
        ImageError: as `decode`, for what a header can show.
    """
    header = _header(_as_bytes(data), policy)
    return (header.width, header.height) if header.orientation > 4 else (header.height, header.width)


def decode(data: Buffer, policy: Decoding = DEFAULT, *, min_short: int | None = None) -> UInt8Array:
    """Decode one image to uint8 [H, W, 3], RGB, or [H, W, num_channels], upright, contiguous and writable.

    `min_short` lets libjpeg decode a JPEG at 1/2, 1/4 or 1/8 of its size: the largest reduction that keeps the short
    side at 2 * `min_short` or more, so that the antialiased resize that follows still has a factor of 2 to itself. The
    reduction depends on the stored size and `min_short` only. Other formats come at full size.

    CPU time on one core, decoding alone, with `min_short=256` against without: a mosaic of photos of 3000 x 4000 pixels
    43 ms against 62, a photo of 375 x 500 0.9 ms both times (too small to reduce). Best of 15 and of 300 runs.

    Args:
        data: encoded bytes, or any object with the buffer protocol (`pyarrow.Buffer`).
        policy: what is accepted.
        min_short: short side in pixels that the caller is going to resize to, or None for every pixel.

    Raises:
        ImageError: with the reason `empty`, `format` (unknown or not accepted), `pixels` (over a limit), `aspect`
            (more than `MAX_ASPECT` times as long as wide), `truncated`, `corrupt`, `mode` (samples without a known
            range), `channels` (another number of bands than asked for), `codec` (TIFF bands compressed in a way that
            is for pictures, or rare) or `memory`.
    """
    if min_short is not None and min_short < 1:
        raise ValueError(f"min_short must be at least 1 pixel, got {min_short}")
    raw = _as_bytes(data)
    header = _header(raw, policy)
    with _only_image_errors(header.format):
        if header.format == "JPEG":
            pixels = _decode_jpeg(raw, header, policy, min_short)
        elif header.format == "NPY":
            pixels = _decode_npy(raw)
        elif header.format == "TIFF" and policy.num_channels != 3:
            pixels = _decode_tiff_bands(raw)
        else:
            plain = _checked_png(raw, header) if header.format == "PNG" else raw
            pixels = _channels(plain, header, policy)
    return np.ascontiguousarray(_turn(pixels, header.orientation))


def decode_mask(data: Buffer, policy: Decoding = DEFAULT) -> UInt8Array:
    """Decode a mask to uint8 [H, W], upright, contiguous and writable: class indices, one per pixel.

    A mask is a PNG with a palette, whose indices count and whose colours do not, or one of grey up to 8 bits, whose
    values are taken as stored (1 bit gives 0 and 1). It is a mask whatever `policy` says of formats and channels.

    Raises:
        ImageError: reason `mask` (no PNG, or one of colours, alpha or 16 bits), or as `decode`.
    """
    raw = _as_bytes(data)
    name = image_headers.sniff(raw)
    if name != "PNG":
        raise ImageError("mask", f"Expected a mask as PNG with a palette or grey of up to 8 bits, got {name}.")
    header = _within_limits(raw, name, policy)
    with _only_image_errors(name):
        bit_depth, colour_type = raw[24:26]
        if bit_depth > 8 or colour_type not in {0, 3}:
            got = f"{bit_depth} bits of {_PNG_COLOURS.get(colour_type, 'unknown colour type')}"
            raise ImageError("mask", f"Expected a mask as PNG with a palette or grey of up to 8 bits, got {got}.")
        values = np.array(_open(_checked_png(raw, header), header), np.uint8)
        if colour_type == 0 and bit_depth in {2, 4}:
            values //= 255 // (2**bit_depth - 1)  # Pillow has stretched them
    return np.ascontiguousarray(_turn(values, header.orientation))


def encode_jpeg(image: UInt8Array, quality: int = 90) -> bytes:
    """Encode uint8 [H, W, 3] RGB as baseline JPEG with 4:2:0 chroma, the usual choice for photographs."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3] to encode as JPEG, got {image.dtype} {image.shape}")
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")
    return encoded


def encode_png(image: UInt8Array) -> bytes:
    """Encode uint8 [H, W, 3] RGB or [H, W] grey as PNG, without loss."""
    if image.shape[2:] not in ((), (3,)) or image.ndim < 2 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3] or [H, W] to encode as PNG, got {image.dtype} {image.shape}")
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


def encode_mask(mask: UInt8Array) -> bytes:
    """Encode class indices, uint8 [H, W], as grey PNG of 8 bits, without loss."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W] to encode as a mask, got {mask.dtype} {mask.shape}")
    return encode_png(mask)


def encode_npy(image: UInt8Array) -> bytes:
    """Encode uint8 [H, W, C] as a NumPy file, without loss and without compression."""
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, C] to encode as NPY, got {image.dtype} {image.shape}")
    encoded = io.BytesIO()
    np.save(encoded, np.ascontiguousarray(image), allow_pickle=False)
    return encoded.getvalue()


def _as_bytes(data: Buffer) -> bytes:
    return data if isinstance(data, bytes) else bytes(memoryview(data))


@contextmanager
def _only_image_errors(name: str) -> Iterator[None]:
    """Turn whatever a parser of hostile bytes raises into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("memory", f"The {name} image needs more memory than there is.") from error
    except Exception as error:
        reason = "truncated" if _INCOMPLETE.search(str(error)) else "corrupt"
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(reason, f"The {name} image is {reason} ({said}).") from error


def _header(raw: bytes, policy: Decoding) -> Header:
    """Sniff, parse and check a header against the policy."""
    name = image_headers.sniff(raw)
    if name not in policy.formats:
        accepted = ", ".join(policy.formats)
        raise ImageError("format", f"{name} images are not accepted here, only {accepted}.")
    header = _within_limits(raw, name, policy)
    if policy.num_channels != 3 or name == "NPY":
        _check_bands(header.num_bands, header, policy)
    return header


def _within_limits(raw: bytes, name: Format, policy: Decoding) -> Header:
    with _only_image_errors(name):
        header = image_headers.parse(raw, name, bands=policy.num_channels != 3)
    height, width = header.height, header.width
    if min(height, width) < 1:
        raise ImageError("corrupt", f"The {name} image says that it has {height} x {width} pixels.")
    if height * width > policy.max_pixels or max(height, width) > policy.max_side:
        limit = f"{policy.max_pixels} pixels and {policy.max_side} a side"
        raise ImageError("pixels", f"The {name} image has {height} x {width} pixels; the limit is {limit}.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        limit = f"a long side of {MAX_ASPECT} times the short one"
        raise ImageError("aspect", f"The {name} image has {height} x {width} pixels; the limit is {limit}.")
    return header


def _check_bands(found: int | None, header: Header, policy: Decoding) -> None:
    if found not in {None, policy.num_channels}:
        expected = f"{policy.num_channels} band{'s' if policy.num_channels > 1 else ''}"
        raise ImageError("channels", f"Expected {expected}, found {found} in the {header.format} image.")


def _turn(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """Make [H, W, C] or [H, W] upright: EXIF 2.32, section 4.6.4, tag 274."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    return pixels


def _join(raw: bytes, parts: tuple[tuple[int, int], ...]) -> bytes:
    view = memoryview(raw)
    return b"".join(view[start:end] for start, end in parts)


def _decode_jpeg(raw: bytes, header: Header, policy: Decoding, min_short: int | None) -> UInt8Array:
    """The fast path, and Pillow for CMYK and for damage that libjpeg repairs with no more than a warning."""
    plain = _join(raw, header.parts)
    height, width = header.height, header.width
    factor = _reduction(min(height, width), min_short)
    if header.num_bands in {1, 3}:
        try:
            least = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
            colours = "RGB" if policy.num_channels == 3 else "GRAY"
            pixels: UInt8Array = simplejpeg.decode_jpeg(plain, colours, **least)
        except ValueError as error:
            if _INCOMPLETE.search(str(error)):
                raise
        else:
            return pixels
    image = _open(plain, header)
    image.draft(None, (width // factor, height // factor))
    return _rgb(image, policy) if policy.num_channels == 3 else _bands(image, header, policy)


def _reduction(short: int, min_short: int | None) -> int:
    """The scaled decoding to ask of libjpeg: 1, 2, 4 or 8. Below 8 pixels its fractions cannot be told apart."""
    if min_short is None or short < 8:
        return 1
    return next((factor for factor in (8, 4, 2) if -(-short // factor) >= 2 * min_short), 1)


def _checked_png(raw: bytes, header: Header) -> bytes:
    """The chunks that describe pixels, each verified: Pillow does not read the checksums of pixel data."""
    view = memoryview(raw)
    for start, end in header.parts[1:]:
        if end > len(raw):
            break
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ImageError("corrupt", f"The PNG chunk {raw[start + 4 : start + 8]!r} does not match its checksum.")
        if raw[start + 4 : start + 8] == b"IEND":
            return _join(raw, header.parts)
    raise ImageError("truncated", f"The PNG image ends after {len(raw)} bytes, before its last chunk.")


def _open(plain: bytes, header: Header) -> ImageFile.ImageFile:
    """Let Pillow read the header again; it must find what the policy was checked against."""
    plain = image_headers.plain_tiff(plain) if header.format == "TIFF" else plain
    image = image_headers.PILLOW[header.format](io.BytesIO(plain))
    if image.size != (header.width, header.height):
        raise ImageError("corrupt", f"The {header.format} image states two sizes.")
    if header.format == "PNG" and "transparency" in image.info:
        _fix_colour_key(image, bit_depth=plain[24])
    return image


def _fix_colour_key(image: Image.Image, bit_depth: int) -> None:
    """Bring a PNG's transparent colour, which Pillow gives as stored, to the scale of the pixels it gives."""
    key = image.info["transparency"]
    if image.mode == "L" and bit_depth < 8:
        image.info["transparency"] = key * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and bit_depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _rgb(image: Image.Image, policy: Decoding) -> UInt8Array:
    """Decode and convert any mode to uint8 [H, W, 3]."""
    image.load()
    if image.mode.startswith("I;16"):
        return _rgb_of_grey16(image, policy)
    if image.mode in {"I", "F"}:
        raise ImageError(
            "mode", f"Grey samples of Pillow mode {image.mode} have no known range; convert to 8 or 16 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            image = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, policy.background), alpha)
    return np.array(image.convert("RGB"))


def _rgb_of_grey16(image: Image.Image, policy: Decoding) -> UInt8Array:
    """Scale 16-bit grey; Pillow's own conversion saturates it."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(258, 16) not in {16, (16,)} or tags.get(262, 1) != 1:
        raise ImageError("mode", "Grey TIFF of more than 8 bits is read with 16 bits and black as 0, nothing else.")
    values = np.asarray(image)
    pixels = np.repeat(_GREY_OF_16_BITS[values][:, :, np.newaxis], 3, axis=2)
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = policy.background
    return pixels


def _channels(plain: bytes, header: Header, policy: Decoding) -> UInt8Array:
    """Decode what Pillow reads, to colours or to bands."""
    image = _open(plain, header)
    if policy.num_channels == 3:
        return _rgb(image, policy)
    if header.format == "PNG" and plain[24] == 16 and header.num_bands != 1:
        return _eight_bits(_deep_png(plain, header))
    return _bands(image, header, policy)


def _bands(image: Image.Image, header: Header, policy: Decoding) -> UInt8Array:
    """Decode bands as Pillow has them, to uint8 [H, W, num_channels]."""
    if image.mode not in _BANDS_OF_MODE:
        message = (
            f"Expected {policy.num_channels} in number, found colours of Pillow mode {image.mode}, which are no bands."
        )
        raise ImageError("channels", message)
    _check_bands(_BANDS_OF_MODE[image.mode], header, policy)
    samples = np.array(image.convert("L") if image.mode == "1" else image)
    return _eight_bits(samples.reshape(*samples.shape[:2], policy.num_channels))


def _deep_png(plain: bytes, header: Header) -> UInt16Array:
    """All 16 bits of grey with alpha and of RGBA, big-endian [H, W, C]: Pillow gives the high bytes only.

    It unpacks 4 bytes per pixel as they are where told that grey with alpha is RGBA, and either byte of 8.
    """
    if header.num_bands == 2:
        return _unpacked(plain, header, "RGBA").view(">u2")
    return np.stack([_unpacked(plain, header, f"RGBA;16{end}") for end in "BL"], axis=3).view(">u2")[..., 0]


def _unpacked(plain: bytes, header: Header, raw_mode: str) -> UInt8Array:
    """Pixels [H, W, 4] of a PNG that Pillow opens as RGBA, unpacked in another way."""
    image = _open(plain, header)
    image.tile = [image.tile[0]._replace(args=raw_mode)]
    return np.asarray(image)


def _decode_npy(raw: bytes) -> UInt8Array:
    array = image_headers.npy_array(raw)
    needed = math.prod(array.shape) * int(array.dtype[-1])
    if len(raw) - array.offset < needed:
        raise ImageError("truncated", f"The NPY image has {len(raw) - array.offset} of {needed} bytes of samples.")
    samples = np.frombuffer(raw, array.dtype, math.prod(array.shape), array.offset)
    shaped = samples.reshape(array.shape, order="F" if array.is_fortran else "C").reshape(*array.shape[:2], -1)
    return shaped.copy() if shaped.dtype == np.uint8 else _eight_bits(shaped)


def _decode_tiff_bands(raw: bytes) -> UInt8Array:
    """Decode any number of bands; Pillow unpacks and inflates them as bytes, it has no mode for most."""
    layout = image_headers.tiff_bands(raw)
    planes = [_eight_bits(_tiff_plane(layout, index)) for index in range(layout.num_planes)]
    pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    return 255 - pixels if layout.white_is_zero else pixels


def _tiff_plane(layout: image_headers.TiffBands, index: int) -> UInt8Array | UInt16Array:
    """Samples [H, W, C] of one plane."""
    height, width = layout.header.height, layout.header.width
    image = TiffImageFile(io.BytesIO(layout.plane(index)))
    if (image.mode, *image.size) != ("L", layout.row_bytes, height):
        raise ImageError("corrupt", "The TIFF image cannot be laid out as its tags say.")
    samples = np.asarray(image).view(layout.dtype).reshape(height, width, -1)
    if layout.difference_width:
        samples = samples.astype(samples.dtype.newbyteorder("="))
        for left in range(0, width, layout.difference_width):
            part = samples[:, left : left + layout.difference_width]
            np.add.accumulate(part, axis=1, dtype=part.dtype, out=part)
    return samples


def _eight_bits(samples: UInt8Array | UInt16Array) -> UInt8Array:
    """A new uint8 [H, W, C] of 8 or 16 bits, in either byte order, band by band: indices take 8 bytes each."""
    pixels = np.empty(samples.shape, np.uint8)
    for band in range(samples.shape[2]):
        values = samples[:, :, band]
        pixels[:, :, band] = values if values.dtype.itemsize == 1 else _GREY_OF_16_BITS[values]
    return pixels
