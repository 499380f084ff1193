"""Decoding on the device against the CPU reader: the same batches, whatever a shard holds. Here the device is the CPU,
so that torchvision's libjpeg stands in for nvJPEG; the last test needs a GPU.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import imaging
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data import gpu_decoding, loading, shards
from pipeline.data.gpu_decoding import Decoder
from pipeline.data.loading import Loader
from pipeline.data.rows import Config as Rows
from pipeline.data.rows import make_shard
from pipeline.data.transforms import classify
from pipeline.data.transforms.classify import Augment, Erase, RandAugment
from pipeline.errors import ConfigError, DataError
from pipeline.types import InputSpec, Record, UInt8Array

SHORT = 32  # of all pictures, so that the crop of 2012 scales none
SPEC = InputSpec(size_hw=(24, 28), resize_short=SHORT)
CPU = loading.Config(batch_size=4, num_tasks=0, reader="local", batches_per_read=2)
GPU = CPU.model_copy(update={"decode": "gpu"})
RANDOM = Augment(crop="random")


def smooth(height: int, width: int, seed: int = 0) -> UInt8Array:
    """Gradients, steep enough to tell one pixel from the next, with a little noise."""
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([x * 255 / width, y * 255 / height, 255 - (x + y) * 255 / (height + width)], axis=2)
    noise = np.random.default_rng(seed).normal(0, 3, planes.shape)
    return (planes + noise).clip(0, 255).astype(np.uint8)


def saved(pixels: UInt8Array, mode: str = "RGB", format: str = "JPEG", **options: Any) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, format, **options)
    return encoded.getvalue()


def turned() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


def ycck(jpeg: bytes) -> bytes:
    """Let Adobe's marker say that what is CMYK is YCCK: other colours, but four bands all the same."""
    transform = jpeg.index(b"Adobe") + 11
    return jpeg[:transform] + b"\2" + jpeg[transform + 1 :]


FOR_DEVICE: dict[str, Callable[[UInt8Array], bytes]] = {
    "plain": imaging.encode_jpeg,
    "progressive": lambda pixels: saved(pixels, progressive=True),
    "full-chroma": lambda pixels: saved(pixels, subsampling=0),
    "grey": lambda pixels: saved(pixels, "L"),
}
FOR_CPU: dict[str, Callable[[UInt8Array], bytes]] = {
    "png": imaging.encode_png,
    "webp": lambda pixels: saved(pixels, format="WEBP"),
    "turned": lambda pixels: saved(pixels, exif=turned()),
    "cmyk": lambda pixels: ycck(saved(pixels, "CMYK")),
    "rgb": lambda pixels: saved(pixels, keep_rgb=True),
}


@pytest.fixture(scope="module")
def photos(stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """Two training shards of 18 pictures in all kinds of files, lying and standing."""
    folder = tmp_path_factory.mktemp("photos")
    made = []
    for number in range(2):
        records = []
        for at, (kind, encode) in enumerate((FOR_DEVICE | FOR_CPU).items()):
            long = SHORT + 3 * at + number
            file = folder / f"{kind}-{number}"
            file.write_bytes(encode(smooth(*((SHORT, long) if at % 2 else (long, SHORT)), seed=at)))
            records.append(Record(file.name, str(file), "train", at % 2))
        one = make_shard(folder / f"train-{number}.parquet", "train", records, Rows(rows_per_group=4))
        assert one.shard
        assert not one.rejects
        made.append(one.shard)
    return shards.Shards(folder, stripes.manifest.model_copy(update={"shards": tuple(made)}))


class Seen:
    """Stands before torchvision's decoder and counts what comes."""

    def __init__(self, fails_on: Callable[[Tensor], bool] = lambda jpeg: False) -> None:
        self.calls: list[int] = []
        self._decode, self._fails_on = gpu_decoding._torchvision_decode, fails_on

    def __call__(self, jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
        self.calls.append(len(jpegs))
        if any(map(self._fails_on, jpegs)):
            raise RuntimeError("nvjpegDecodeBatched failed: 6")
        return self._decode(jpegs, device)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seen], Seen]:
    def put(seen: Seen) -> Seen:
        monkeypatch.setattr(gpu_decoding, "_torchvision_decode", seen)
        return seen

    return put


def check_same(left: list[Batch], right: list[Batch], levels: int) -> None:
    """Everything equal, pixels to some levels."""
    assert [batch.ids for batch in left] == [batch.ids for batch in right]
    for mine, theirs in zip(left, right, strict=True):
        assert mine.frames == theirs.frames
        assert torch.equal(mine.labels, theirs.labels)
        assert (mine.images.dtype, mine.images.shape) == (torch.uint8, theirs.images.shape)
        assert int((mine.images.int() - theirs.images.int()).abs().max()) <= levels


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("crop", "resize_short", "levels"),
    [("random", SHORT, 0), ("none", SHORT, 0), ("random", 30, 1), ("none", None, 1), ("resized", SHORT, 1)],
)
def test_batches_are_those_of_the_cpu_reader(
    photos: shards.Shards, crop: Literal["resized", "random", "none"], resize_short: int, levels: int, flip: bool
) -> None:
    spec, augment = InputSpec(size_hw=(24, 28), resize_short=resize_short), Augment(crop=crop, flip=flip)
    cpu, gpu = (Loader(photos, spec, config, augment=augment, seed=3) for config in (CPU, GPU))
    for epoch in range(2):
        batches = list(gpu.train(epoch))
        assert len(batches) == 4
        check_same(batches, list(cpu.train(epoch)), levels)


def test_a_position_goes_on_with_the_views_of_the_cpu_reader(photos: shards.Shards) -> None:
    cpu, gpu = (
        Loader(photos, SPEC, config, augment=RANDOM, seed=1, rank=1, world_size=2, device="cpu")
        for config in (CPU, GPU)
    )
    check_same(list(gpu.train(2, offset=8)), list(cpu.train(2))[1:], 0)


def test_the_device_is_shown_plain_jpegs_only_and_all_of_a_batch_at_once(
    photos: shards.Shards, watch: Callable[[Seen], Seen]
) -> None:
    loader = Loader(photos, SPEC, GPU.model_copy(update={"batch_size": 18}), augment=RANDOM)
    seen = watch(Seen())
    (batch,) = loader.train(0)
    assert len(batch) == 18
    assert seen.calls == [2 * len(FOR_DEVICE)]


def test_a_picture_that_the_device_refuses_comes_from_the_cpu(
    photos: shards.Shards, watch: Callable[[Seen], Seen]
) -> None:
    cpu, gpu = (
        Loader(photos, SPEC, config.model_copy(update={"batch_size": 18}), augment=RANDOM) for config in (CPU, GPU)
    )
    seen = watch(Seen(lambda jpeg: bytes(jpeg.numpy()).count(b"\xff\xc0\x00\x0b") > 0))  # of one component
    check_same(list(gpu.train(0)), list(cpu.train(0)), 0)
    assert seen.calls[0] == 8
    assert 0 < seen.calls.count(1) <= 4  # it is searched for by halves


def not_asked(place: int) -> UInt8Array:
    pytest.fail(f"picture {place} went past the device")


@pytest.mark.parametrize("hw", [(128, 255), (255, 128), (129, 257), (300, 131), (256, 256), (1040, 260), (127, 200)])
@pytest.mark.parametrize("crop", ["random", "none"])
def test_windows_of_large_photos_lie_where_libjpeg_at_a_fraction_has_them(
    hw: tuple[int, int], crop: Literal["random", "none"]
) -> None:
    augment, data = Augment(crop=crop), imaging.encode_jpeg(smooth(*hw), 95)
    decoder = Decoder(SPEC, augment, imaging.DEFAULT, "cpu")
    for seed in range(8):
        (view,) = decoder.batch([data], [np.random.default_rng(seed)], not_asked).numpy()
        expected = classify.training(data, SPEC, augment, np.random.default_rng(seed))
        assert np.abs(view.astype(int) - expected).mean() < 1  # one row or column further it is more


def test_evaluation_decodes_on_the_cpu(stripes: shards.Shards, watch: Callable[[Seen], Seen]) -> None:
    cpu, gpu = (Loader(stripes, SPEC, config) for config in (CPU, GPU))
    seen = watch(Seen())
    check_same(list(gpu.evaluate("val")), list(cpu.evaluate("val")), 0)
    assert seen.calls == []


def test_decoding_warns_of_nothing(photos: shards.Shards) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(Loader(photos, SPEC, GPU).train(0))
    assert [str(warning.message) for warning in caught] == []


def test_an_image_that_does_not_decode_is_named(photos: shards.Shards) -> None:
    manifest = photos.manifest.model_copy(update={"decoding": imaging.Decoding(formats=("JPEG", "PNG"))})
    loader = Loader(shards.Shards(photos.path, manifest), SPEC, GPU)
    with pytest.raises(DataError, match=r"image 'webp-[01]' does not decode: WEBP images are not .*; run jobs.verify"):
        list(loader.train(0))


def test_augmentation_beyond_crop_and_flip_is_refused_before_anything_starts(photos: shards.Shards) -> None:
    augment = Augment(contrast=0.2, rand_augment=RandAugment(), erase=Erase())
    expected = "knows no augment.contrast, augment.rand_augment, augment.erase; leave"
    with pytest.raises(ConfigError, match=expected):
        Loader(photos, SPEC, GPU, augment=augment)
    with pytest.raises(ConfigError, match="RGB images of 3 channels, but the model takes 1; set loading"):
        gpu_decoding.check(RANDOM, InputSpec(size_hw=(8, 8), num_channels=1, mean=(0.5,), std=(0.5,)))


def test_another_reader_than_the_local_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode: gpu decodes in the process that trains; set reader to local"):
        parse(loading.Config, {"decode": "gpu"}, "here")
    assert parse(loading.Config, {"decode": "gpu", "reader": "local"}, "here").decode == "gpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_torch_does_not_have_is_one_sentence(photos: shards.Shards) -> None:
    with pytest.raises(ConfigError, match=r"^loading.decode: gpu .* on 'cuda:1', but torch \S+ finds no GPU that .*$"):
        Loader(photos, SPEC, GPU, device="cuda:1")


def test_a_torchvision_without_nvjpeg_is_one_sentence(
    photos: shards.Shards, monkeypatch: pytest.MonkeyPatch, watch: Callable[[Seen], Seen]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    watch(Seen(lambda jpeg: True))
    said = r"^loading.decode: gpu needs a torchvision that .* on 'cuda' \(nvJPEG\), .*: nvjpegDecodeBatched failed: 6; "
    with pytest.raises(ConfigError, match=said):
        Loader(photos, SPEC, GPU, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("crop", ["resized", "random", "none"])
def test_on_a_gpu_the_views_are_those_of_the_cpu(
    photos: shards.Shards, crop: Literal["resized", "random", "none"]
) -> None:
    """To some levels only: chroma differs, see `gpu_decoding`. A mirrored view is what a wrong one may look like."""
    cpu, gpu = (Loader(photos, SPEC, config, augment=Augment(crop=crop), device="cuda") for config in (CPU, GPU))
    for mine, theirs in zip(gpu.train(0), cpu.train(0), strict=True):
        assert (mine.ids, mine.images.device.type) == (theirs.ids, "cuda")
        images, expected = mine.images.cpu().float(), theirs.images.float()
        wrong = (images - expected.flip(3)).abs().mean(dim=(1, 2, 3))
        assert bool(((images - expected).abs().mean(dim=(1, 2, 3)) < wrong / 4).all())
