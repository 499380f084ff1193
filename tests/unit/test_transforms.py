"""What a model gets to see: evaluation against torchvision's reference, training views against their rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from pipeline import imaging
from pipeline.config import parse
from pipeline.data.transforms.classify import Augment, evaluation, training
from pipeline.errors import ConfigError, ImageError
from pipeline.types import InputSpec, UInt8Array

IMAGENET = InputSpec(size_hw=(224, 224), resize_short=256)
PLAIN = Augment(crop="none", flip=False)


def photo(height: int, width: int) -> UInt8Array:
    """Smooth gradients, edges and some noise: as much detail as a photograph has."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[0:height, 0:width]
    edges = 60 * np.sign(np.sin(x / 23) * np.sin(y / 17))
    planes = np.stack([x * 200 / width + edges, y * 200 / height - edges, 100 + 50 * np.sin((x + 2 * y) / 40)], axis=2)
    return (planes + rng.normal(0, 8, planes.shape)).clip(0, 255).astype(np.uint8)


def reference(image: UInt8Array, short: int, side: int) -> UInt8Array:
    pipeline = v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop(side)])
    pixels: UInt8Array = pipeline(torch.from_numpy(image).permute(2, 0, 1)).numpy()
    return pixels


@pytest.mark.parametrize(
    "hw", [(333, 500), (500, 333), (375, 500), (256, 256), (300, 401), (257, 500), (100, 140), (256, 371), (339, 256)]
)
def test_evaluation_equals_torchvisions_resize_and_centre_crop(hw: tuple[int, int]) -> None:
    image = photo(*hw)
    pixels, frame = evaluation(imaging.encode_png(image), IMAGENET)
    assert (pixels.shape, str(pixels.dtype), frame.original_hw) == ((3, 224, 224), "uint8", hw)
    assert np.abs(pixels.astype(int) - reference(image, 256, 224)).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(8, 24), st.integers(0, 8))
def test_evaluation_cuts_where_torchvision_does(height: int, width: int, short: int, margin: int) -> None:
    side = max(short - margin, 1)
    image = photo(height, width)
    pixels, _ = evaluation(imaging.encode_png(image), InputSpec(size_hw=(side, side), resize_short=short))
    assert np.abs(pixels.astype(int) - reference(image, short, side)).max() <= 1


@pytest.mark.parametrize("hw", [(320, 480), (2048, 3072), (3001, 2001)])  # the large ones are decoded at 1/2 or 1/4
def test_frame_maps_the_input_back_to_where_it_was_cut(hw: tuple[int, int]) -> None:
    spec = InputSpec(size_hw=(224, 224), resize_short=256)
    image = np.zeros((*hw, 3), np.uint8)
    top, left, side = hw[0] // 2 - 100, hw[1] // 2 - 50, 150
    image[top : top + side, left : left + side] = 255
    pixels, frame = evaluation(imaging.encode_jpeg(image), spec)
    rows, columns = (np.flatnonzero((pixels[1] > 127).any(axis=axis)) for axis in (1, 0))
    box = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], np.float32)
    pixel = min(hw) / 256  # one of the input's pixels, in the original
    assert frame.original_hw == hw
    np.testing.assert_allclose(frame.to_original(box)[0], [left, top, left + side, top + side], atol=1.5 * pixel)


@pytest.mark.parametrize("hw", [(320, 480), (2048, 3072), (3001, 2001)])
def test_frame_of_a_stretched_picture_maps_corners_to_corners(hw: tuple[int, int]) -> None:
    pixels, frame = evaluation(imaging.encode_jpeg(photo(*hw)), InputSpec(size_hw=(32, 48)))
    assert pixels.shape == (3, 32, 48)
    corners = np.array([[0, 0, 48, 32]], np.float32)
    np.testing.assert_allclose(frame.to_original(corners), [[0, 0, hw[1], hw[0]]], rtol=1e-5)


def test_stretching_a_large_picture_leaves_detail_for_the_longer_side() -> None:
    """The short side of the input must not let libjpeg throw away columns that the long side shows."""
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, 4::8] = image[:, 5::8] = image[:, 6::8] = image[:, 7::8] = 255  # 64 stripes, 7 pixels each in the input
    pixels, _ = evaluation(imaging.encode_jpeg(image), InputSpec(size_hw=(16, 448)))
    assert np.ptp(pixels[0, 8].astype(int)) > 200


def test_evaluation_of_no_image_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        evaluation(b"text", IMAGENET)
    with pytest.raises(ImageError):
        training(b"text", IMAGENET, Augment(), np.random.default_rng(0))


@pytest.mark.parametrize("crop", ["resized", "random", "none"])
def test_training_view_is_a_function_of_the_generator(crop: str) -> None:
    augment = parse(Augment, {"crop": crop, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}, "here")
    data = imaging.encode_jpeg(photo(60, 90))
    spec = InputSpec(size_hw=(24, 32), resize_short=40)
    views = [training(data, spec, augment, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(view.shape == (3, 24, 32) and view.dtype == np.uint8 and view.flags.c_contiguous for view in views)
    np.testing.assert_array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_training_view_without_variation_is_the_evaluation_view() -> None:
    data = imaging.encode_jpeg(photo(300, 401))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(training(data, IMAGENET, PLAIN, rng), evaluation(data, IMAGENET)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 10_000))
def test_resized_crop_is_a_window_of_the_picture_of_the_asked_area_and_aspect(
    height: int, width: int, seed: int
) -> None:
    """Red rises with x and green with y by 4 a pixel, so that a view tells the window it shows."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 4, y * 4, np.zeros_like(x)], axis=2).astype(np.uint8)
    augment = Augment(scale=(0.2, 0.8), flip=False)
    view = training(imaging.encode_png(image), InputSpec(size_hw=(64, 64)), augment, np.random.default_rng(seed))
    spans = [float(np.ptp(view[channel].astype(int))) / 4 + 1 for channel in (0, 1)]  # width and height in pixels
    assert view[0].max() <= 4 * (width - 1)
    assert view[1].max() <= 4 * (height - 1)
    assert spans[0] <= width
    assert spans[1] <= height
    if 0.75 < width / height < 4 / 3:  # else no window may have the area, and the largest allowed one is taken
        assert (spans[0] - 1.5) * (spans[1] - 1.5) <= 0.8 * width * height


def test_resized_crop_without_a_fitting_window_takes_the_largest_in_the_centre() -> None:
    image = np.zeros((10, 400, 3), np.uint8)
    image[:, 193:206] = 255  # 13 = 10 * 4 / 3 columns in the middle
    view = training(
        imaging.encode_png(image), InputSpec(size_hw=(8, 8)), Augment(scale=(0.9, 1.0)), np.random.default_rng(0)
    )
    assert view.min() > 200


def test_random_crop_shows_every_place_and_nothing_else() -> None:
    y, x = np.mgrid[0:10, 0:12]
    image = np.stack([x, y, x], axis=2).astype(np.uint8)
    spec, augment = InputSpec(size_hw=(8, 8), resize_short=10), Augment(crop="random", flip=False)
    data = imaging.encode_png(image)
    views = [training(data, spec, augment, np.random.default_rng(seed)) for seed in range(150)]
    places = {(int(view[1, 0, 0]), int(view[0, 0, 0])) for view in views}
    assert places == {(top, left) for top in range(3) for left in range(5)}
    assert all(view[0, 0, 7] - view[0, 0, 0] == 7 for view in views)


def test_flip_mirrors_left_and_right_half_of_the_time() -> None:
    image = photo(28, 28)
    data, spec = imaging.encode_png(image), InputSpec(size_hw=(28, 28))
    straight = image.transpose(2, 0, 1)
    views = [training(data, spec, Augment(crop="none"), np.random.default_rng(seed)) for seed in range(100)]
    mirrored = [np.array_equal(view, straight[:, :, ::-1]) for view in views]
    assert all(flip or np.array_equal(view, straight) for flip, view in zip(mirrored, views, strict=True))
    assert 35 <= sum(mirrored) <= 65


def test_brightness_scales_and_saturation_keeps_grey() -> None:
    data, spec = imaging.encode_png(np.full((8, 8, 3), 100, np.uint8)), InputSpec(size_hw=(8, 8))
    bright = Augment(crop="none", brightness=0.5)
    levels = {int(training(data, spec, bright, np.random.default_rng(seed))[0, 0, 0]) for seed in range(50)}
    assert min(levels) >= 50
    assert max(levels) <= 150
    assert len(levels) > 20
    for augment in (Augment(crop="none", saturation=1.0), Augment(crop="none", contrast=1.0)):
        assert (training(data, spec, augment, np.random.default_rng(3)) == 100).all()


@pytest.mark.parametrize("keys", [{"scale": [0, 1]}, {"scale": [1, 0.5]}, {"ratio": [-1, 1]}, {"brightness": 1.5}])
def test_ranges_that_no_picture_can_meet_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse(Augment, keys, "here")
