"""What a model gets to see: evaluation against torchvision's reference, training views against their rules."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from pipeline import imaging
from pipeline.config import parse
from pipeline.data.transforms.classify import (
    Augment,
    Erase,
    RandAugment,
    check,
    cut,
    evaluation,
    shown,
    training,
)
from pipeline.data.transforms.resizing import resize, resize_interleaved, resize_mask, shrink_short
from pipeline.errors import ConfigError, ImageError
from pipeline.types import InputSpec, UInt8Array, Views

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


@given(height=st.integers(1, 120), width=st.integers(1, 120), short=st.integers(1, 130))
@settings(max_examples=80, deadline=None)
def test_shrink_short_keeps_aspect_and_never_enlarges(height: int, width: int, short: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    small = shrink_short(image, short)
    if min(height, width) <= short:
        assert small is image
    else:
        assert min(small.shape[:2]) == short
        assert max(small.shape[:2]) == int(max(height, width) * short / min(height, width) + 1e-9)


def test_shrink_short_of_a_photo_is_within_a_level_of_pillows() -> None:
    image = photo(333, 500)
    pillow = np.array(Image.fromarray(image).resize((384, 256), Image.Resampling.BILINEAR))
    assert np.abs(shrink_short(image, 256).astype(int) - pillow).max() <= 1


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size_hw", [(20, 31), (64, 80), (90, 100), (1, 1)])
def test_resize_interleaved_equals_resize(num_channels: int, size_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 80, num_channels), np.uint8)[:, ::-1]
    np.testing.assert_array_equal(resize_interleaved(image, size_hw), resize(image, size_hw).transpose(1, 2, 0))


@pytest.mark.parametrize("hw", [(9, 1), (1, 9), (1, 1)])
@pytest.mark.parametrize("to_hw", [(9, 1), (1, 9), (1, 1), (6, 6)])
def test_mirrored_picture_of_one_pixel_is_resized_as_any_other(hw: tuple[int, int], to_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8)
    for mirrored in (image[:, ::-1], image[::-1]):
        for change in (resize, resize_interleaved):
            resized = torch.from_numpy(change(mirrored, to_hw))  # which takes no negative stride, even of one pixel
            np.testing.assert_array_equal(resized, change(mirrored.copy(), to_hw))


def test_resize_interleaved_gives_the_mean_of_what_it_covers() -> None:
    halves = np.zeros((8, 8, 1), np.uint8)
    halves[:, 4:] = 200
    assert resize_interleaved(halves, (1, 2)).tolist() == [[[29], [171]]]  # the triangle takes 0.5 / 3.5 from the other


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
def test_strip_that_would_be_scaled_to_gigabytes_is_refused(crop: str) -> None:
    """1 x 16,384 pixels pass every other limit, and would be 256 x 4,194,304 before the crop."""
    data = imaging.encode_png(np.zeros((1, 16_384, 3), np.uint8))
    augment = parse(Augment, {"crop": crop}, "here")
    said = "1 x 16384 pixels; the limit is a long side of 100 times"
    with pytest.raises(ImageError, match=said) as error:
        evaluation(data, IMAGENET)
    assert error.value.reason == "aspect"
    with pytest.raises(ImageError, match=said):
        training(data, IMAGENET, augment, np.random.default_rng(0))
    longest, _ = evaluation(imaging.encode_png(np.zeros((2, 200, 3), np.uint8)), IMAGENET)
    assert longest.shape == (3, 224, 224)


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


DRAWN_IN_VERSION_0_1 = {  # pixels and the generator's next number, from before RandAugment and erasing
    "random": (Augment(crop="random"), "e5e2f22816d3bf26", 620936792),
    "none": (Augment(crop="none"), "0e26feedc994692a", 734632613),
    "jitter": (Augment(crop="random", brightness=0.4, contrast=0.4, saturation=0.4), "358dee7619fe8663", 306088397),
}


@pytest.mark.parametrize("name", DRAWN_IN_VERSION_0_1)
def test_training_view_without_new_augmentations_is_what_it_was(name: str) -> None:
    """Pictures of the right short side, which torch need not resize: to the last bit."""
    augment, digest, following = DRAWN_IN_VERSION_0_1[name]
    spec, rng = InputSpec(size_hw=(24, 32), resize_short=40), np.random.default_rng(7)
    view = training(imaging.encode_png(photo(40, 52)), spec, augment, rng)
    assert hashlib.sha256(view.tobytes()).hexdigest()[:16] == digest
    assert rng.integers(1 << 30) == following


def test_resized_training_view_without_new_augmentations_is_what_it_was() -> None:
    """The mean red of 4 x 4 fields, to a level: torch's kernel may round otherwise on another processor."""
    rng = np.random.default_rng(7)
    view = training(imaging.encode_png(photo(40, 52)), InputSpec(size_hw=(24, 32)), Augment(), rng)
    was = [[229.8, 191.8, 152.6, 112.4], [229.7, 190.4, 151.9, 112.5], [231.3, 191.5, 151.7, 112.2]]
    np.testing.assert_allclose(view.reshape(3, 4, 6, 4, 8).mean((2, 4))[0, :3], was, atol=1)
    assert rng.integers(1 << 30) == 59626577


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 7]))
def test_resize_equals_torchvisions_for_any_number_of_channels(
    height: int, width: int, to_height: int, to_width: int, channels: int
) -> None:
    assume((to_height, to_width, channels) != (1, 1, 3))  # torch 2.14 fails an assertion of its own, on planes only
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    expected = v2.functional.resize(planes, [to_height, to_width], antialias=True).numpy()
    resized = resize(image, (to_height, to_width))
    assert resized.flags.c_contiguous
    assert np.abs(resized.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resize_to_one_pixel_takes_the_mean(channels: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (2, 2, channels), np.uint8)
    np.testing.assert_allclose(resize(image, (1, 1))[:, 0, 0], image.mean((0, 1)), atol=1)


def test_resized_mask_takes_the_class_at_each_pixels_centre() -> None:
    mask = np.array([[0, 1, 2, 3], [4, 5, 6, 255]], np.uint8)
    np.testing.assert_array_equal(resize_mask(mask, (4, 8)), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(resize_mask(mask, (2, 2)), [[1, 3], [5, 255]])
    assert resize_mask(mask, (2, 4)) is mask


def views_of(data: bytes, spec: InputSpec, views: Views) -> UInt8Array:
    pixels, _ = evaluation(data, shown(spec, views))
    return np.concatenate([view.numpy() for view in cut(torch.from_numpy(pixels[None]), spec, views)])


def test_views_of_centre_and_flip_are_the_evaluation_view_and_its_mirror_image() -> None:
    data, spec = imaging.encode_png(photo(60, 90)), InputSpec(size_hw=(24, 32), resize_short=40)
    (whole, _) = evaluation(data, spec)
    np.testing.assert_array_equal(views_of(data, spec, "centre"), whole[None])
    np.testing.assert_array_equal(views_of(data, spec, "flip"), np.stack([whole, whole[:, :, ::-1]]))


@pytest.mark.parametrize("hw", [(60, 90), (91, 60), (40, 40), (41, 50)])
def test_ten_crop_equals_torchvisions_of_the_centre_square(hw: tuple[int, int]) -> None:
    """Torchvision cuts the mirrored picture, so that its sixth view is the mirror image of its second."""
    image, spec = photo(*hw), InputSpec(size_hw=(24, 32), resize_short=40)
    pipeline = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(40), v2.TenCrop((24, 32))])
    cropped = torch.stack(pipeline(torch.from_numpy(image).permute(2, 0, 1))).numpy()
    expected = cropped[[0, 1, 2, 3, 4, 6, 5, 8, 7, 9]]
    views = views_of(imaging.encode_png(image), spec, "ten_crop")
    assert (views.shape, str(views.dtype)) == ((10, 3, 24, 32), "uint8")
    assert np.abs(views.astype(int) - expected).max() <= 1


def test_ten_crop_of_a_stretched_picture_is_the_whole_of_it_and_its_mirror() -> None:
    data, spec = imaging.encode_png(photo(30, 40)), InputSpec(size_hw=(24, 24))
    views, (whole, _) = views_of(data, spec, "ten_crop"), evaluation(data, spec)
    assert all(np.array_equal(view, whole) for view in views[:5])
    assert all(np.array_equal(view, whole[:, :, ::-1]) for view in views[5:])


def test_rand_augment_makes_what_torchvisions_makes_and_nothing_else() -> None:
    """One operation of one strength has 23 results (14 operations, 9 of them with two signs): both find all of them."""
    image = photo(40, 48)
    data, spec = imaging.encode_png(image), InputSpec(size_hw=(40, 48))
    augment = Augment(crop="none", flip=False, rand_augment=RandAugment(num_ops=1, magnitude=12))
    ours = {training(data, spec, augment, np.random.default_rng(seed)).tobytes() for seed in range(400)}
    reference = v2.RandAugment(num_ops=1, magnitude=12, fill=128)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = {reference(pixels).numpy().tobytes() for _ in range(400)}
    first, second = (np.array([np.frombuffer(view, np.uint8) for view in views], np.int64) for views in (ours, theirs))
    # Products rounded otherwise make a level, a coordinate just between two pixels the one or the other of them.
    same = (np.abs(first[:, None] - second[None]) > 1).mean(axis=2) < 0.01
    assert same.shape == (23, 23)
    assert (same.sum(axis=0) == 1).all()
    assert (same.sum(axis=1) == 1).all()


def test_rand_augment_of_no_strength_and_many_operations_leaves_a_valid_picture() -> None:
    data, spec = imaging.encode_png(photo(20, 24)), InputSpec(size_hw=(20, 24))
    for magnitude in (0, 30):
        augment = Augment(rand_augment=RandAugment(num_ops=8, magnitude=magnitude))
        view = training(data, spec, augment, np.random.default_rng(0))
        assert (view.shape, str(view.dtype), view.flags.c_contiguous) == ((3, 20, 24), "uint8", True)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 50), st.integers(8, 50), st.integers(0, 10_000))
def test_erase_paints_one_rectangle_of_the_asked_area_and_aspect(height: int, width: int, seed: int) -> None:
    data = imaging.encode_png(np.full((height, width, 3), 7, np.uint8))
    spec = InputSpec(size_hw=(height, width), mean=(0.2, 0.4, 0.6), std=(1, 1, 1))
    erase = Erase(probability=1.0, area=(0.1, 0.3), aspect=(0.5, 2.0), fill="mean")
    augment = Augment(crop="none", flip=False, erase=erase)
    view = training(data, spec, augment, np.random.default_rng(seed))
    rows, columns = np.nonzero(view[0] != 7)
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == h * w
    assert (view[:, rows, columns] == np.array([[51], [102], [153]])).all()
    assert (h - 0.5) * (w - 0.5) <= 0.3 * height * width
    assert (h + 0.5) * (w + 0.5) >= 0.1 * height * width
    assert (h - 0.5) / (w + 0.5) <= 2
    assert (h + 0.5) / (w - 0.5) >= 0.5


def test_erase_with_noise_draws_every_pixel_and_happens_as_often_as_asked() -> None:
    data, spec = imaging.encode_png(np.zeros((32, 32, 3), np.uint8)), InputSpec(size_hw=(32, 32))
    augment = Augment(crop="none", flip=False, erase=Erase(probability=0.25, area=(0.3, 0.3)))
    views = [training(data, spec, augment, np.random.default_rng(seed)) for seed in range(200)]
    erased = [view for view in views if view.any()]
    assert 30 <= len(erased) <= 70
    values = np.concatenate([view[:, view.any(axis=0)].ravel() for view in erased])
    assert values.mean() == pytest.approx(127.5, abs=2)
    assert set(np.unique(values)) == set(range(256))


def test_erase_that_fits_nowhere_leaves_the_picture() -> None:
    data, spec = imaging.encode_png(photo(8, 8)), InputSpec(size_hw=(8, 8))
    augment = Augment(crop="none", flip=False, erase=Erase(probability=1.0, area=(0.9, 0.9), aspect=(9.0, 9.0)))
    view = training(data, spec, augment, np.random.default_rng(0))
    np.testing.assert_array_equal(view, evaluation(data, spec)[0])


def test_new_augmentations_are_functions_of_the_generator_alone() -> None:
    augment = parse(Augment, {"rand_augment": {"num_ops": 3}, "erase": {"probability": 1.0}}, "here")
    data, spec = imaging.encode_jpeg(photo(60, 90)), InputSpec(size_hw=(24, 32))
    torch.manual_seed(1)
    first = training(data, spec, augment, np.random.default_rng(5))
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, training(data, spec, augment, np.random.default_rng(5)))
    assert not np.array_equal(first, training(data, spec, augment, np.random.default_rng(6)))


@pytest.mark.parametrize("keys", [{"brightness": 0.1}, {"contrast": 0.1}, {"saturation": 0.1}, {"rand_augment": {}}])
def test_colour_augmentation_of_pictures_without_rgb_is_a_config_error(keys: dict[str, Any]) -> None:
    augment = parse(Augment, keys, "here")
    check(augment, InputSpec((8, 8)))
    with pytest.raises(ConfigError, match=next(iter(keys))):
        check(augment, InputSpec((8, 8), mean=(0.5,), std=(0.5,), num_channels=5))
    check(parse(Augment, {"erase": {}}, "here"), InputSpec((8, 8), mean=(0.5,), std=(0.5,), num_channels=5))


@pytest.mark.parametrize(
    "keys",
    [
        {"rand_augment": {"num_ops": 0}},
        {"rand_augment": {"magnitude": 31}},
        {"erase": {"probability": 1.5}},
        {"erase": {"area": [0.4, 0.1]}},
        {"erase": {"aspect": [0, 1]}},
        {"erase": {"fill": "black"}},
    ],
)
def test_new_augmentations_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    outer, inner = next(iter(keys.items()))
    with pytest.raises(ConfigError, match=rf"{outer}\.{next(iter(inner))}"):
        parse(Augment, keys, "here")


def test_evaluation_and_training_of_grey_and_of_many_bands_keep_their_channels() -> None:
    grey = InputSpec((8, 8), resize_short=10, mean=(0.5,), std=(0.5,), num_channels=1)
    data = imaging.encode_png(photo(20, 24)[..., 0])
    assert evaluation(data, grey)[0].shape == (1, 8, 8)
    assert views_of(data, grey, "ten_crop").shape == (10, 1, 8, 8)
    augment = Augment(erase=Erase(probability=1.0))
    assert training(data, grey, augment, np.random.default_rng(0)).shape == (1, 8, 8)
    with pytest.raises(ImageError):
        evaluation(imaging.encode_png(photo(20, 24)), grey)
