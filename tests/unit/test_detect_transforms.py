"""Boxes and masks that move along: a rectangle painted on each box is where the box says after any transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from pipeline import boxes, imaging
from pipeline.config import Strict, parse
from pipeline.data.transforms.detect import Augment, View, check, evaluation, fitted, num_scenes, read, training
from pipeline.data.transforms.scenes import GREY, UNJUDGED, Scene, crop, flip, iou_crop, mosaic
from pipeline.errors import ConfigError, ImageError
from pipeline.types import BoolArray, Fit, Float32Array, Frame, Objects, UInt8Array, no_objects

PLAIN = Augment(flip=False)
GEOMETRIC = Augment(iou_crop=0.7, scale=0.2, translate=0.2)
EVERYTHING = Augment(
    mosaic=0.5,
    iou_crop=0.5,
    scale=0.2,
    translate=0.2,
    exposure=1.5,
    saturation=1.5,
    hue=0.05,
    brightness=0.125,
    contrast=0.5,
)
FITS = {
    "letterbox": Fit(way="letterbox", size_hw=(96, 128)),
    "resize": Fit(way="resize", short_side=90, long_side=140),
    "stretch": Fit(way="stretch", size_hw=(100, 90)),
}
seeds = st.integers(0, 100_000)
ways = st.sampled_from(sorted(FITS))


def marked(boxes_xyxy: Sequence[Sequence[float]] | Float32Array) -> Objects:
    """Objects numbered 0, 1, ... whose flags follow from their number."""
    numbers = np.arange(len(boxes_xyxy), dtype=np.int64)
    frames = np.array(boxes_xyxy, np.float32).reshape(-1, 4)
    return Objects(frames, numbers, numbers % 2 == 0, numbers < 0, numbers % 3 == 0)


def painted(height: int, width: int, box: tuple[int, int, int, int], channel: int = 0) -> Scene:
    """A black picture, bright on the box in one channel; the mask has class 1 there."""
    left, top, right, bottom = box
    image, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    image[top:bottom, left:right, channel] = 255
    mask[top:bottom, left:right] = 1
    return Scene(image, marked([box]), mask)


@st.composite
def one_box_scenes(draw: st.DrawFn) -> Scene:
    height, width = draw(st.integers(40, 160)), draw(st.integers(40, 160))
    w, h = draw(st.integers(16, width)), draw(st.integers(16, height))
    left, top = draw(st.integers(0, width - w)), draw(st.integers(0, height - h))
    return painted(height, width, (left, top, left + w, top + h))


@st.composite
def crowded_scenes(draw: st.DrawFn, least: int = 0) -> Scene:
    """Noise with up to five boxes, of whole or broken coordinates."""
    height, width, rng = draw(st.integers(30, 120)), draw(st.integers(30, 120)), np.random.default_rng(draw(seeds))
    num = draw(st.integers(least, 5))
    corners = rng.uniform(0, 1, (num, 2)) * (width - 4, height - 4)
    sides = 4 + rng.uniform(0, 1, (num, 2)) * (np.array([width, height]) - 4 - corners)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    mask = rng.integers(0, 5, (height, width), np.uint8)
    return Scene(image, marked(np.concatenate([corners, corners + sides], axis=1).astype(np.float32)), mask)


def extent(bright: BoolArray) -> list[int]:
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def assert_shown_where_the_box_says(view: View) -> None:
    """The one box of the view against red that is bright, and against class 1 of the mask."""
    assert len(view.objects) == 1
    assert view.mask is not None
    box = view.objects.boxes_xyxy[0]
    bright = (view.image[0] >= 128) & (view.image[1] < 64)  # grey has green
    np.testing.assert_allclose(extent(bright), box, atol=1)
    np.testing.assert_allclose(extent(view.mask == 1), box, atol=1)


def assert_sound(view: View) -> None:
    """What holds for every view, whatever was done."""
    height, width = view.frame.input_hw
    assert view.image.shape == (3, height, width)
    assert view.image.dtype == np.uint8
    assert view.image.flags.c_contiguous
    assert view.mask is None or (view.mask.shape == (height, width) and view.mask.flags.c_contiguous)
    found = view.objects.boxes_xyxy
    assert found.dtype == np.float32
    assert (found[:, 2:] > found[:, :2]).all()
    assert (found >= 0).all()
    assert (found <= [width, height, width, height]).all()
    np.testing.assert_array_equal(view.objects.difficult, view.objects.labels % 2 == 0)  # as `marked` numbers them
    np.testing.assert_array_equal(view.objects.crowd, view.objects.labels % 3 == 0)


def assert_same(first: View, second: View) -> None:
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(np.array(first.mask), np.array(second.mask))
    assert first.objects == second.objects
    assert first.frame == second.frame


@settings(max_examples=60, deadline=None)
@given(one_box_scenes(), ways)
def test_evaluation_shows_the_object_where_its_box_says(scene: Scene, way: str) -> None:
    view = fitted(scene, FITS[way])
    assert_sound(view)
    assert_shown_where_the_box_says(view)


@settings(max_examples=60, deadline=None)
@given(crowded_scenes(), ways)
def test_frame_inverts_the_boxes_of_evaluation(scene: Scene, way: str) -> None:
    view = fitted(scene, FITS[way])
    assert_sound(view)
    np.testing.assert_allclose(view.frame.to_original(view.objects.boxes_xyxy), scene.objects.boxes_xyxy, atol=1e-3)
    assert view.objects.labels.tolist() == scene.objects.labels.tolist()
    assert not view.objects.truncated.any()


@settings(max_examples=100, deadline=None)
@given(one_box_scenes(), ways, seeds)
def test_training_shows_the_object_where_its_box_says(scene: Scene, way: str, seed: int) -> None:
    view = training([scene], FITS[way], GEOMETRIC, np.random.default_rng(seed))
    assert_sound(view)
    assert view.frame == Frame(view.frame.input_hw, view.frame.input_hw)
    if len(view.objects) and min(view.objects.boxes_xyxy[0, 2:] - view.objects.boxes_xyxy[0, :2]) >= 3:
        assert_shown_where_the_box_says(view)


@settings(max_examples=60, deadline=None)
@given(st.lists(one_box_scenes(), min_size=4, max_size=4), st.integers(0, 3), seeds)
def test_mosaic_shows_each_object_where_its_box_says(scenes: list[Scene], shown: int, seed: int) -> None:
    """One of the four has its box painted, the others are black and without objects."""
    dark = [Scene(np.zeros_like(scene.image), no_objects(), np.zeros(scene.size_hw, np.uint8)) for scene in scenes]
    dark[shown] = scenes[shown]
    made = mosaic(dark, (120, 160), np.random.default_rng(seed))
    assert made.size_hw == (120, 160)
    assert made.mask is not None
    if len(made.objects) == 0:
        assert not (made.mask == 1).any()  # the box is gone because all of it is out of view
        return
    box = made.objects.boxes_xyxy[0]
    assume(min(box[2:] - box[:2]) >= 3)
    np.testing.assert_allclose(extent((made.image[..., 0] >= 128) & (made.image[..., 1] < 64)), box, atol=1)
    np.testing.assert_allclose(extent(made.mask == 1), box, atol=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(crowded_scenes(), min_size=4, max_size=4), ways, seeds, st.booleans())
def test_training_with_everything_is_sound_and_a_function_of_the_generator(
    scenes: list[Scene], way: str, seed: int, with_masks: bool
) -> None:
    if not with_masks:
        scenes = [Scene(scene.image, scene.objects) for scene in scenes]
    before = [scene.image.copy() for scene in scenes]
    views = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        num = num_scenes(EVERYTHING, rng)
        views.append(training(scenes[:num], FITS[way], EVERYTHING, rng))
    assert_sound(views[0])
    assert (views[0].mask is not None) == with_masks
    assert_same(*views)
    sides = views[0].objects.boxes_xyxy[:, 2:] - views[0].objects.boxes_xyxy[:, :2]
    assert (sides >= 1).all()
    assert all(np.array_equal(scene.image, image) for scene, image in zip(scenes, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(crowded_scenes())
def test_flip_twice_is_the_scene_and_once_mirrors_it(scene: Scene) -> None:
    once = flip(scene)
    np.testing.assert_array_equal(once.image, scene.image[:, ::-1])
    twice = flip(once)
    np.testing.assert_array_equal(twice.image, scene.image)
    np.testing.assert_array_equal(np.array(twice.mask), np.array(scene.mask))
    np.testing.assert_allclose(twice.objects.boxes_xyxy, scene.objects.boxes_xyxy, atol=1e-4)
    assert twice.objects.labels.tolist() == scene.objects.labels.tolist()


def test_flip_of_a_box_at_the_left_edge_lies_at_the_right_edge() -> None:
    assert flip(painted(10, 20, (0, 2, 5, 9))).objects.boxes_xyxy.tolist() == [[15, 2, 20, 9]]


def test_training_without_variation_is_the_evaluation_view_but_for_its_frame() -> None:
    scene = painted(50, 70, (10, 5, 60, 40))
    for fit in FITS.values():
        view, seen = training([scene], fit, PLAIN, np.random.default_rng(0)), fitted(scene, fit)
        np.testing.assert_array_equal(view.image, seen.image)
        assert view.objects == seen.objects


def test_letterbox_of_a_wide_picture_is_centred_in_grey() -> None:
    """20 x 40 into 30 x 30 becomes 15 x 30, with 7 rows of grey above and 8 below."""
    scene = painted(20, 40, (0, 0, 40, 20))
    view = fitted(scene, Fit(size_hw=(30, 30)))
    assert view.frame == Frame((20, 40), (30, 30), (0.75, 0.75), (0.0, 7.0))
    assert view.objects.boxes_xyxy.tolist() == [[0, 7, 30, 22]]
    assert (view.image[:, :7] == GREY).all()
    assert (view.image[:, 22:] == GREY).all()
    assert (view.image[0, 7:22] == 255).all()
    assert view.mask is not None
    assert (view.mask[:7] == UNJUDGED).all()
    assert (view.mask[7:22] == 1).all()


def test_letterbox_of_a_tall_picture_is_centred_in_grey() -> None:
    view = fitted(painted(40, 20, (0, 0, 20, 40)), Fit(size_hw=(30, 30)))
    assert view.frame == Frame((40, 20), (30, 30), (0.75, 0.75), (7.0, 0.0))
    assert view.objects.boxes_xyxy.tolist() == [[7, 0, 22, 30]]


@pytest.mark.parametrize(
    ("hw", "expected"), [((375, 500), (600, 800)), ((300, 600), (500, 1000)), ((600, 1000), (600, 1000))]
)
def test_resize_takes_the_short_side_to_600_unless_the_long_one_exceeds_1000(
    hw: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert Fit(way="resize").frame(hw).input_hw == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), ways)
def test_fit_of_any_size_gives_whole_pixels_inside_the_input(height: int, width: int, way: str) -> None:
    frame = FITS[way].frame((height, width))
    corner = np.array([width, height]) * frame.scale_xy
    np.testing.assert_allclose(corner, np.round(corner), atol=1e-6)
    assert (np.round(corner) >= 1).all()
    assert (np.round(corner) + frame.offset_xy <= frame.input_hw[::-1]).all()


@pytest.mark.parametrize("hw", [(320, 480), (2048, 3072), (3001, 2001)])  # the large ones are decoded at a fraction
@pytest.mark.parametrize("way", sorted(FITS))
def test_evaluation_of_bytes_maps_back_to_the_whole_picture(hw: tuple[int, int], way: str) -> None:
    top, left, side = hw[0] // 2 - 100, hw[1] // 2 - 50, 150
    image = np.zeros((*hw, 3), np.uint8)
    image[top : top + side, left : left + side] = 255
    objects = marked([[left, top, left + side, top + side]])
    view = evaluation(imaging.encode_jpeg(image), FITS[way], objects)
    box = view.objects.boxes_xyxy
    assert view.frame.original_hw == hw
    bright = view.image.min(axis=0) > 127
    np.testing.assert_allclose(extent(bright), box[0], atol=1)
    np.testing.assert_allclose(view.frame.to_original(box), objects.boxes_xyxy, atol=0.05)


def test_evaluation_of_bytes_equals_torchvisions_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    view = evaluation(imaging.encode_png(image), Fit(way="stretch", size_hw=(40, 50)))
    expected = v2.functional.resize(v2.functional.to_image(image), [40, 50], antialias=True).numpy()
    assert np.abs(view.image.astype(int) - expected).max() <= 1
    assert len(view.objects) == 0
    with pytest.raises(ImageError):
        evaluation(b"text", Fit())


def test_evaluation_drops_only_boxes_outside_the_picture() -> None:
    objects = marked([[-10, -10, 20, 20], [30, 30, 30, 35], [50, 0, 60, 10], [1, 1, 1.25, 1.25]])
    view = evaluation(imaging.encode_png(np.zeros((40, 40, 3), np.uint8)), Fit(size_hw=(40, 40)), objects)
    assert view.objects.labels.tolist() == [0, 3]
    assert view.objects.truncated.tolist() == [True, False]
    assert view.objects.boxes_xyxy[0].tolist() == [0, 0, 20, 20]


def test_crop_keeps_boxes_by_the_share_that_is_left() -> None:
    """The window cuts away 0, 50, 90 and 100 % of four boxes of width 20."""
    scene = Scene(
        np.zeros((40, 100, 3), np.uint8), marked([[60, 0, 80, 9], [40, 0, 60, 9], [32, 0, 52, 9], [0, 0, 20, 9]])
    )
    kept = {share: crop(scene, (50, 0, 100, 40), share).objects for share in (0.0, 0.2, 0.6)}
    assert {share: objects.labels.tolist() for share, objects in kept.items()} == {
        0.0: [0, 1, 2],
        0.2: [0, 1],
        0.6: [0],
    }
    assert kept[0.0].boxes_xyxy.tolist() == [[10, 0, 30, 9], [0, 0, 10, 9], [0, 0, 2, 9]]
    assert kept[0.0].truncated.tolist() == [False, True, True]
    assert kept[0.0].difficult.tolist() == [True, False, True]
    assert kept[0.0].crowd.tolist() == [True, False, False]


@settings(max_examples=60, deadline=None)
@given(crowded_scenes(), st.integers(-50, 130), st.integers(-50, 130), st.integers(1, 200), st.integers(1, 200))
def test_crop_of_any_window_is_the_picture_on_grey(scene: Scene, left: int, top: int, width: int, height: int) -> None:
    made = crop(scene, (left, top, left + width, top + height))
    canvas = np.full((500, 500, 3), GREY, np.uint8)
    canvas[100 : 100 + scene.size_hw[0], 100 : 100 + scene.size_hw[1]] = scene.image
    inside = (slice(100 + top, 100 + top + height), slice(100 + left, 100 + left + width))
    np.testing.assert_array_equal(made.image, canvas[inside])
    marks = np.full((500, 500), UNJUDGED, np.uint8)
    assert scene.mask is not None
    marks[100 : 100 + scene.size_hw[0], 100 : 100 + scene.size_hw[1]] = scene.mask
    np.testing.assert_array_equal(np.array(made.mask), marks[inside])


@settings(max_examples=100, deadline=None)
@given(crowded_scenes(least=1), seeds)
def test_iou_crop_keeps_a_window_of_allowed_size_and_the_objects_centred_in_it(scene: Scene, seed: int) -> None:
    made = iou_crop(scene, np.random.default_rng(seed))
    if made is scene:
        return
    (height, width), (h, w) = scene.size_hw, made.size_hw
    assert int(0.3 * height) <= h <= height
    assert int(0.3 * width) <= w <= width
    assert h <= 2 * w <= 4 * h
    assert len(made.objects) >= 1
    for label, box in zip(made.objects.labels, made.objects.boxes_xyxy, strict=True):
        before = scene.objects.boxes_xyxy[label]
        half = (before[2:] - before[:2]) / 2
        assert (box[2:] - box[:2] >= np.minimum(half, [w, h]) - 1e-3).all()  # its centre is in view


def test_iou_crop_reaches_every_least_overlap_and_leaves_one_in_seven_whole() -> None:
    scene = painted(100, 100, (20, 20, 80, 80))
    overlaps, whole = [], 0
    for seed in range(400):
        made = iou_crop(scene, np.random.default_rng(seed))
        whole += made is scene
        if made is not scene:
            visible = float(boxes.area(made.objects.boxes_xyxy)[0])
            overlaps.append(visible / (3600 + made.size_hw[0] * made.size_hw[1] - visible))
    assert 30 <= whole <= 200  # 57 by draw, and those of 0.9 that no window meets
    assert min(overlaps) < 0.3
    assert max(overlaps) > 0.7


def test_scale_and_translate_stay_within_their_limits() -> None:
    """A box in the centre of 100 x 100: its side changes by up to 20 %, its centre by up to 20 pixels."""
    scene, fit = painted(100, 100, (40, 40, 60, 60)), Fit(way="stretch", size_hw=(100, 100))
    augment = Augment(flip=False, scale=0.2, translate=0.2)
    found = np.array(
        [training([scene], fit, augment, np.random.default_rng(seed)).objects.boxes_xyxy[0] for seed in range(300)]
    )
    sides, centres = found[:, 2] - found[:, 0], (found[:, 0] + found[:, 2]) / 2
    assert 15.8 <= sides.min() < 17
    assert 23 < sides.max() <= 24.3
    assert 29.3 <= centres.min() < 32
    assert 68 < centres.max() <= 70.7


def test_mosaic_has_each_picture_on_its_side_of_the_point() -> None:
    """Four pictures of one colour each, as large as the result: only they and grey show, each in its corner."""
    scenes = [Scene(np.full((60, 80, 3), 10 * (number + 1), np.uint8), no_objects()) for number in range(4)]
    for seed in range(20):
        made = mosaic(scenes, (60, 80), np.random.default_rng(seed))
        assert made.mask is None
        plane = made.image[..., 0]
        assert set(np.unique(plane)) <= {10, 20, 30, 40, GREY}
        spots = {level: extent(plane == level) for level in (10, 20, 30, 40)}
        x, y = spots[40][:2]
        assert 20 <= x <= 60
        assert 15 <= y <= 45
        assert (spots[10][2:], spots[20][0], spots[20][3], spots[30][2], spots[30][1]) == ([x, y], x, y, x, y)


def test_mosaic_comes_as_often_as_asked_and_takes_four() -> None:
    nums = [num_scenes(Augment(mosaic=0.5), np.random.default_rng(seed)) for seed in range(200)]
    assert 70 <= nums.count(4) <= 130
    assert set(nums) == {1, 4}
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert num_scenes(Augment(), rng) == 1
    assert rng.bit_generator.state == before  # what is off draws nothing
    with pytest.raises(ValueError, match="4 scenes"):
        mosaic([painted(9, 9, (1, 1, 5, 5))] * 3, (9, 9), rng)


def colours(view: View) -> npt.NDArray[np.float64]:
    """Hue in turns, saturation, value of the one colour a view has, by the definition of HSV."""
    red, green, blue = (float(level) / 255 for level in view.image[:, 0, 0])
    value, span = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    hue = ((green - blue) / span % 6 if value == red else (blue - red) / span + 2 if value == green else 0) / 6
    return np.array([hue, span / value, value])


@pytest.mark.parametrize(("key", "changed"), [("exposure", 2), ("saturation", 1)])
def test_exposure_and_saturation_change_their_part_of_hsv_only_and_by_up_to_the_factor(key: str, changed: int) -> None:
    scene = Scene(np.full((4, 4, 3), (150, 100, 75), np.uint8), no_objects())
    fit, augment = Fit(way="stretch", size_hw=(4, 4)), Augment.model_validate({"flip": False, key: 1.5})
    found = np.array([colours(training([scene], fit, augment, np.random.default_rng(seed))) for seed in range(100)])
    was = colours(fitted(scene, fit))
    shares = found[:, changed] / was[changed]
    assert 1 / 1.5 - 0.01 <= shares.min() < 0.72
    assert 1.4 < shares.max() <= 1.51
    others = [part for part in range(3) if part != changed]
    np.testing.assert_allclose(found[:, others], np.tile(was[others], (100, 1)), atol=0.015)


def test_colours_at_the_ends_of_their_range_stay_there() -> None:
    """Black, white and grey have no colour to saturate; a full red can neither brighten nor turn to anything else."""
    image = np.array([[[0, 0, 0], [255, 255, 255], [80, 80, 80], [255, 0, 0]]], np.uint8)
    fit, augment = Fit(way="stretch", size_hw=(1, 4)), Augment(flip=False, saturation=3.0)
    for seed in range(30):
        view = training([Scene(image, no_objects())], fit, augment, np.random.default_rng(seed))
        assert view.image[:, 0, :3].T.tolist() == [[0, 0, 0], [255, 255, 255], [80, 80, 80]]
        red, green, blue = view.image[:, 0, 3].tolist()
        assert red == 255
        assert green == blue


@pytest.mark.parametrize(
    ("seed", "red", "green"), [(4, [0, 255, 0], [0, 0, 255]), (3, [0, 0, 255], [255, 0, 0])], ids=["forth", "back"]
)
def test_hue_turned_by_a_third_takes_each_primary_to_the_next_and_leaves_grey(
    seed: int, red: list[int], green: list[int]
) -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [90, 90, 90]]], np.uint8)
    drawn = float(np.random.default_rng(seed).uniform(-1, 1))  # which part of `hue` the circle is turned by
    fit, augment = Fit(way="stretch", size_hw=(1, 3)), Augment(flip=False, hue=1 / 3 / abs(drawn))
    view = training([Scene(image, no_objects())], fit, augment, np.random.default_rng(seed))
    np.testing.assert_allclose(view.image[:, 0].T, [red, green, [90, 90, 90]], atol=1)


def test_photometric_changes_leave_boxes_and_mask_alone() -> None:
    scene, fit = painted(40, 40, (5, 5, 30, 30)), Fit(size_hw=(40, 40))
    augment = Augment(flip=False, brightness=0.125, contrast=0.5, hue=0.1, exposure=1.5, saturation=1.5)
    view, plain = training([scene], fit, augment, np.random.default_rng(1)), fitted(scene, fit)
    assert not np.array_equal(view.image, plain.image)
    assert view.objects == plain.objects
    np.testing.assert_array_equal(np.array(view.mask), np.array(plain.mask))


@pytest.mark.parametrize("way", sorted(FITS))
def test_pictures_without_objects_pass_through_everything(way: str) -> None:
    data = imaging.encode_jpeg(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))
    scenes = [read(data)] * 4
    always = EVERYTHING.model_copy(update={"mosaic": 1.0, "iou_crop": 1.0})
    view = training(scenes, FITS[way], always, np.random.default_rng(0))
    assert_sound(view)
    assert len(view.objects) == 0


def test_bands_without_colour_are_fitted_and_moved_but_not_recoloured() -> None:
    scene = Scene(np.random.default_rng(0).integers(0, 256, (40, 50, 5), np.uint8), marked([[5, 5, 30, 30]]))
    view = training([scene], Fit(size_hw=(32, 32)), GEOMETRIC, np.random.default_rng(0))
    assert view.image.shape == (5, 32, 32)
    check(GEOMETRIC, 5)
    for key in ("exposure", "saturation"):
        with pytest.raises(ConfigError, match=key):
            check(Augment.model_validate({key: 1.5}), 5)
    for key in ("hue", "brightness", "contrast"):
        with pytest.raises(ConfigError, match=key):
            check(Augment.model_validate({key: 0.1}), 5)


def test_marks_of_another_picture_are_refused() -> None:
    image: UInt8Array = np.zeros((10, 12, 3), np.uint8)
    shares = replace(marked([[0, 0, 1, 1]]), frame_hw=(1, 1))
    with pytest.raises(ValueError, match="pixels of an image"):
        Scene(image, shares)
    with pytest.raises(ValueError, match="mask"):
        evaluation(imaging.encode_png(image), Fit(), mask=np.zeros((12, 10), np.uint8))


@pytest.mark.parametrize(
    "keys", [{"mosaic": 2}, {"scale": 0.9}, {"translate": 0.6}, {"exposure": 0.5}, {"hue": 1}, {"min_visible": -1}]
)
def test_augmentations_out_of_range_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse(Augment, keys, "here")


class Holder(Strict):
    fit: Fit


@pytest.mark.parametrize("keys", [{"size_hw": [0, 4]}, {"short_side": 0}, {"way": "squeeze"}])
def test_fits_that_no_picture_can_meet_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse(Holder, {"fit": keys}, "here")
