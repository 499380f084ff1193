"""Training batches whose JPEGs are decoded on the device that trains: nvJPEG, by way of torchvision.

`loading` reads the encoded bytes and calls `Decoder.batch` in the thread that prepares the next batch. Each picture
shows what it shows on the CPU way: the same window and flip, drawn by `transforms.classify` from the same stream. What
nvJPEG is not asked for comes from `imaging.decode` and is moved: other formats, pictures to be turned (EXIF), CMYK and
RGB that is not YCbCr, files with damage.

Nothing here was measured, or has run at all, on a GPU: none was at hand. On device `cpu` torchvision's libjpeg takes
nvJPEG's place and all else is the same code; there the pictures equal those of the CPU way, to one level where they are
scaled, which happens in fp32. Further away are JPEGs at least four times as large as they are shown with `crop: random`
or `none`: libjpeg decodes them at a fraction. By what its users report, nvJPEG as torchvision calls it also repeats
chroma where libjpeg interpolates it (sglang pull request 34163). So evaluation always decodes on the CPU.

Left out: augmentation of colours, erasing, scaled decoding, TorchCodec (to which torchvision's decoders are moving).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import image_headers, imaging
from pipeline.data.transforms import classify
from pipeline.errors import ConfigError, ImageError
from pipeline.types import InputSpec, UInt8Array

_FACTORS = (8, 4, 2)  # by which libjpeg decodes smaller


def check(augment: classify.Augment, spec: InputSpec) -> None:
    """Refuse what is not done on the device, before anything starts.

    Raises:
        ConfigError: naming the keys of `augment`, or the number of channels.
    """
    keys = ("brightness", "contrast", "saturation", "rand_augment", "erase")
    asked = [key for key in keys if getattr(augment, key)]
    if asked:
        raise ConfigError(
            f"loading.decode: gpu crops and flips, but knows no augment.{', augment.'.join(asked)}; "
            "leave that out, or set loading.decode to cpu"
        )
    if spec.num_channels != 3:
        raise ConfigError(
            f"loading.decode: gpu gives RGB images of 3 channels, but the model takes {spec.num_channels}; "
            "set loading.decode to cpu"
        )


class Decoder:
    """Decodes and varies the pictures of training batches on one device.

    Args:
        spec: what the model expects of an image.
        augment: how images are varied: crop and flip.
        decoding: what is accepted as an image.
        device: where pictures are decoded and batches lie; `cpu` is for tests.

    Raises:
        ConfigError: another augmentation, no RGB, or a device that torch or torchvision cannot decode on.
    """

    def __init__(
        self, spec: InputSpec, augment: classify.Augment, decoding: imaging.Decoding, device: torch.device | str
    ) -> None:
        check(augment, spec)
        self.device = torch.device(device)
        _require(self.device)
        self._spec, self._augment, self._decoding = spec, augment, decoding
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def batch(
        self, encoded: Sequence[bytes], rngs: Iterable[np.random.Generator], on_cpu: Callable[[int], UInt8Array]
    ) -> Tensor:
        """The views of some pictures: uint8 [B, 3, H, W] on the device, all of its work done.

        Args:
            encoded: B pictures.
            rngs: for each picture in turn what its view is drawn from; asked for no earlier than it is used.
            on_cpu: decodes the picture of a number, with `min_short`; called for those that the device is not to see.
        """
        with self._own_stream():
            images = torch.empty((len(encoded), 3, *self._spec.size_hw), dtype=torch.uint8, device=self.device)
            for image, picture, rng in zip(images, self._decode(encoded, on_cpu), rngs, strict=True):
                view = classify.draw(picture.seen_hw, self._spec, self._augment, rng)
                image.copy_(_show(picture.pixels, view, self._spec.size_hw))
            if self._stream is not None:
                self._stream.synchronize()
        return images

    @property
    def min_short(self) -> int | None:
        """The `min_short` of `imaging.decode` on the CPU way."""
        return classify.least_short(self._spec, self._augment)

    def _decode(self, encoded: Sequence[bytes], on_cpu: Callable[[int], UInt8Array]) -> list[_Picture]:
        plain = [_plain_jpeg(data, self._decoding) for data in encoded]
        decoded = iter(self._decode_jpegs([jpeg for jpeg in plain if jpeg is not None]))
        pictures = []
        for place, jpeg in enumerate(plain):
            pixels = None if jpeg is None else next(decoded)
            if pixels is None:
                image = on_cpu(place)
                pixels, seen_hw = torch.from_numpy(image).permute(2, 0, 1).to(self.device), image.shape[:2]
            else:
                seen_hw = _reduced(pixels.shape[1:], self.min_short)
            pictures.append(_Picture(pixels, (seen_hw[0], seen_hw[1])))
        return pictures

    def _decode_jpegs(self, jpegs: list[Tensor]) -> Sequence[Tensor | None]:
        """Decode together; one that fails takes all with it, so it is searched for by halves, and becomes None."""
        if not jpegs:
            return []
        try:
            return _torchvision_decode(jpegs, self.device)
        except RuntimeError:
            if self._stream is not None:  # what failed may still write to memory that it has given back
                torch.cuda.synchronize(self.device)
            half = len(jpegs) // 2
            return [*self._decode_jpegs(jpegs[:half]), *self._decode_jpegs(jpegs[half:])] if half else [None]

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Work and memory of our own: nvJPEG's hardware writes to memory without waiting for its stream.

        Memory that was freed while another stream still reads it could be given to us and written over (torchcodec pull
        request 1634, torchvision 9606). On this stream none of it is: a batch is waited for, and `loading` tells torch
        which stream reads it next.
        """
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Picture(NamedTuple):
    """A decoded picture, uint8 [3, H, W] on the device, and the size that it has on the CPU way."""

    pixels: Tensor
    seen_hw: tuple[int, int]


def _require(device: torch.device) -> None:
    """Try the decoder once, on the device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"loading.decode: gpu was told to decode on '{device}', but torch {torch.__version__} finds no GPU that it "
            "can use; set loading.decode to cpu"
        )
    grey = imaging.encode_jpeg(np.full((16, 16, 3), 128, np.uint8))
    try:
        _torchvision_decode([torch.frombuffer(bytearray(grey), dtype=torch.uint8)], device)
    except (ImportError, AttributeError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"loading.decode: gpu needs a torchvision that decodes JPEGs on '{device}' (nvJPEG), this one does not: "
            f"{said}; set loading.decode to cpu"
        ) from error


def _torchvision_decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode encoded bytes to uint8 [3, H, W] each, on the device.

    The operators behind `torchvision.io.decode_jpeg`: that warns of its end at each call, since 0.29, and warnings can
    only be silenced for all threads.
    """
    import torchvision.io  # noqa: PLC0415  (loads the operators; takes seconds, so only where they are used)

    rgb = torchvision.io.ImageReadMode.RGB.value
    if device.type == "cuda":
        decoded: list[Tensor] = torch.ops.image.decode_jpegs_cuda(jpegs, rgb, device)
        return decoded
    return [torch.ops.image.decode_jpeg(jpeg, rgb, False).to(device) for jpeg in jpegs]


def _plain_jpeg(data: bytes, policy: imaging.Decoding) -> Tensor | None:
    """The bytes of a JPEG that any decoder reads alike, without its metadata; None for all else."""
    try:
        imaging.probe(data, policy)
    except ImageError:
        return None  # the CPU way says what is wrong with it
    if image_headers.sniff(data) != "JPEG":
        return None
    header = image_headers.parse(data, "JPEG")
    if header.orientation != 1 or header.num_bands not in {1, 3} or _is_stored_as_rgb(data, header):
        return None
    view = memoryview(data)
    plain = bytearray().join(view[start:end] for start, end in header.parts)
    return torch.frombuffer(plain, dtype=torch.uint8)


def _is_stored_as_rgb(data: bytes, header: image_headers.Header) -> bool:
    """Whether libjpeg would find RGB instead of YCbCr: by Adobe's marker or the names of the components."""
    return any(
        (data[start + 1] == 0xEE and data[start + 4 : start + 9] == b"Adobe" and data[start + 15 : start + 16] == b"\0")
        or (0xC0 <= data[start + 1] <= 0xCF and data[start + 10 : start + 17 : 3] == b"RGB")
        for start, _ in header.parts
    )


def _reduced(hw: Sequence[int], min_short: int | None) -> tuple[int, int]:
    """The size of a JPEG as `imaging.decode` gives it with `min_short`, by the rule that it states."""
    short = min(hw)
    fits = (factor for factor in _FACTORS if short >= 8 and -(-short // factor) >= 2 * (min_short or short))
    factor = next(fits, 1)
    return -(-hw[0] // factor), -(-hw[1] // factor)


def _show(pixels: Tensor, view: classify.View, size_hw: tuple[int, int]) -> Tensor:
    """The pixels of a view of uint8 [3, H, W]: whole numbers [3, h, w], uint8 or fp32."""
    if view.window is not None:
        top, left, height, width = view.window
        pixels = pixels[:, top : top + height, left : left + width]
    if tuple(pixels.shape[1:]) != view.scaled_hw:
        # On CUDA torch scales no uint8. The weights are positive and add up to one: nothing leaves 0..255.
        scaled = F.interpolate(pixels[None].float(), view.scaled_hw, mode="bilinear", antialias=True)
        pixels = scaled[0].round_()
    top, left = view.corner
    pixels = pixels[:, top : top + size_hw[0], left : left + size_hw[1]]
    return pixels.flip(2) if view.flipped else pixels
