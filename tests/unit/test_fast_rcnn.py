"""Fast R-CNN: where regions are pooled from, which are drawn, and what it does without any."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

from pipeline import config as configuration
from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ConfigError, ModelError
from pipeline.models import _regions, fast_rcnn
from pipeline.models._regions import Lesson, Outputs, RegionPool, Regions
from pipeline.models.fast_rcnn import Config, FastRCNN
from pipeline.types import Frame

SMALL: dict[str, Any] = {"backbone": "squeezenet1_1", "num_classes": 2, "fc_features": 32, "pool_size": 3}
FRAME = Frame((64, 96), (64, 96))
Box = list[float]
RED: Box = [6, 8, 42, 40]
BLUE: Box = [54, 14, 86, 58]
FAR: list[Box] = [[0, 44, 20, 64], [88, 0, 96, 10], [30, 50, 50, 64]]  # no overlap with either
NEAR: list[Box] = [[24, 8, 60, 40], [54, 36, 86, 80], [6, 24, 42, 56]]  # overlaps of 1/3


def build(seed: int = 0, **keys: Any) -> FastRCNN:
    torch.manual_seed(seed)
    return fast_rcnn.build(Config(**(SMALL | keys)))


def targets_of(*images: tuple[list[Box], list[int]]) -> BoxTargets:
    """Of each image its boxes and labels."""
    counts = torch.tensor([len(labels) for _, labels in images])
    boxes = boxes_of([box for boxes, _ in images for box in boxes])
    labels = torch.tensor([label for _, labels in images for label in labels], dtype=torch.int64)
    return BoxTargets(boxes, labels, torch.arange(len(images)).repeat_interleave(counts), len(images))


def boxes_of(rows: list[Box]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def scene(proposals: list[Box], objects: bool = True) -> Batch:
    """A red and a blue rectangle on grey, and some regions; or grey alone."""
    image = torch.full((1, 3, 64, 96), 90, dtype=torch.uint8)
    if not objects:
        return Batch(image, targets_of(([], [])), (FRAME,), proposals=(boxes_of(proposals),))
    image[0, :, 8:40, 6:42] = torch.tensor([230, 40, 40], dtype=torch.uint8)[:, None, None]
    image[0, :, 14:58, 54:86] = torch.tensor([40, 60, 230], dtype=torch.uint8)[:, None, None]
    return Batch(image, targets_of(([RED, BLUE], [0, 1])), (FRAME,), proposals=(boxes_of(proposals),))


def losses(model: FastRCNN, batch: Batch) -> dict[str, Tensor]:
    return model.loss(model(batch), batch.boxes)


def drawn(model: FastRCNN, batch: Batch) -> tuple[list[Box], list[int]]:
    """Boxes and classes (0: background) of what is drawn of one image, sorted."""
    lesson = model.train()(batch).lesson
    pairs = sorted(zip(lesson.regions.boxes_xyxy[0].tolist(), lesson.labels.tolist(), strict=True))
    return [box for box, _ in pairs], [label for _, label in pairs]


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", get_args(_regions.SingleMap))
def test_cells_of_a_backbone_see_squares_around_the_places_that_pooling_takes_them_for(name: Any, stride: Any) -> None:
    network, _ = _regions.single_map(name, 3, stride)
    for path, layer in [*network.named_modules()]:
        if isinstance(layer, nn.MaxPool2d):  # whose gradient would name one pixel only
            network.set_submodule(path, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
        elif isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 0.01)
    image = torch.ones(1, 3, 16, 272, requires_grad=True)
    cell = 128 // stride
    network(image)[-1][0, 0, 0, cell].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
    assert seen[0] > 0
    assert seen[-1] < 271
    assert (seen[0] + seen[-1] + 1) / 2 == _regions.origin(name, stride) + stride * cell


@pytest.mark.parametrize(("origin", "stride"), [(0.5, 16), (8.0, 16), (0.5, 8), (4.0, 8)])
def test_region_of_a_map_that_holds_places_is_pooled_to_the_places_of_its_parts(origin: float, stride: int) -> None:
    x = (origin + stride * torch.arange(20.0)).expand(24, 20)
    y = (origin + stride * torch.arange(24.0))[:, None].expand(24, 20)
    boxes = boxes_of([[40, 30, 100, 150], [33.5, 64.25, 35.5, 66.25]])  # the other one smaller than a cell
    pooled = RegionPool("align", 2, origin, stride)({"0": torch.stack([x, y])[None]}, [boxes])
    for (x1, y1, x2, y2), (columns, rows) in zip(boxes.tolist(), pooled, strict=True):
        torch.testing.assert_close(columns[0], torch.tensor([x1 * 0.75 + x2 * 0.25, x1 * 0.25 + x2 * 0.75]))
        torch.testing.assert_close(rows[:, 0], torch.tensor([y1 * 0.75 + y2 * 0.25, y1 * 0.25 + y2 * 0.75]))


@pytest.mark.parametrize(
    ("origin", "box", "last"),
    [
        (0.5, [16, 0, 48, 1], 3),  # pixels 16 to 47: those next to cells 1 (pixel 16) to 3 (pixel 48)
        (0.5, [16, 0, 40, 1], 2),  # pixel 39 is next to cell 2 (pixel 32)
        (8.0, [16, 0, 48, 1], 2),  # the squares of cells 1 and 2
        (8.0, [16, 0, 49, 1], 3),
    ],
)
def test_maximum_is_taken_from_the_cell_at_the_first_pixel_to_that_at_the_last(
    origin: float, box: Box, last: int
) -> None:
    places = torch.arange(10.0).expand(1, 1, 3, 10)
    pool = RegionPool("max", 1, origin)
    assert pool({"0": places}, [boxes_of([box])]).item() == last
    assert pool({"0": -places}, [boxes_of([box])]).item() == -1


def test_regions_of_each_image_are_pooled_from_its_own_map() -> None:
    maps = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 4, 6)
    kinds: tuple[_regions.Kind, ...] = ("max", "align")
    for kind in kinds:
        pooled = RegionPool(kind, 1, 8.0)({"0": maps}, [boxes_of([RED]), boxes_of([BLUE, RED])])
        assert pooled.flatten().tolist() == [1, 2, 2]


def test_background_is_drawn_from_near_misses_only() -> None:
    boxes, classes = drawn(build(rois_per_image=64), scene([*FAR, *NEAR]))
    assert (boxes, classes) == (sorted([*NEAR, RED, BLUE]), [1, 0, 0, 2, 0])


def test_objects_alone_are_drawn_where_no_region_comes_near() -> None:
    boxes, classes = drawn(build(), scene(FAR))
    assert (boxes, classes) == ([RED, BLUE], [1, 2])


def test_background_of_an_image_without_objects_is_any_region() -> None:
    boxes, classes = drawn(build(), scene([*FAR, *NEAR], objects=False))
    assert (boxes, classes) == (sorted([*FAR, *NEAR]), [0] * 6)


@pytest.mark.parametrize(("overlap", "label"), [(0.49, 0), (0.51, 1), (0.11, 0), (0.09, None)])
def test_overlap_decides_what_a_region_is(overlap: float, label: int | None) -> None:
    inner = [6.0, 8, 6 + 36 * overlap, 40]  # a part of the red rectangle
    boxes, classes = drawn(build(), scene([inner]))
    found = [kind for box, kind in zip(boxes, classes, strict=True) if box == boxes_of([inner])[0].tolist()]
    assert found == ([] if label is None else [label])


def test_a_quarter_of_what_is_drawn_are_objects_at_most() -> None:
    shifts = [delta / 10 for delta in range(30)]
    hits = [[6 + by, 8, 42 + by, 40] for by in shifts]
    misses = [[24 + by, 8, 60 + by, 40] for by in shifts]
    _, classes = drawn(build(rois_per_image=20), scene([*hits, *misses]))
    assert sum(label > 0 for label in classes) == 5
    assert len(classes) == 20


def test_draws_follow_torchs_generator() -> None:
    model = build(rois_per_image=4).train()
    batch = scene([[6 + by / 4, 8, 42, 40] for by in range(60)])

    def boxes(seed: int) -> list[Box]:
        torch.manual_seed(seed)
        return cast(list[Box], model(batch).lesson.regions.boxes_xyxy[0].tolist())

    assert boxes(1) == boxes(1)
    assert boxes(1) != boxes(2)


def test_loss_of_known_outputs_is_the_sum_done_by_hand() -> None:
    deltas = torch.zeros(4, 3, 4)
    deltas[1, 2] = torch.tensor([3.0, 0.5, 0.0, 0.0])
    deltas[1, 1] = 7.0  # of a class that the region is not of
    lesson = Lesson(Regions((), torch.zeros(4, 3), deltas), torch.tensor([0, 2, 0, 0]), torch.zeros(4, 4))
    found = build().loss(Outputs([], None, lesson), targets_of(([], [])))
    assert set(found) == {"classifier", "box_reg"}
    assert found["classifier"] == pytest.approx(math.log(3))
    assert found["box_reg"] == pytest.approx((2.5 + 0.125) / 4)


def test_losses_are_torchvisions_but_for_where_smooth_l1_turns() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = (torch.randn(6, *shape, generator=generator) for shape in ((3,), (3, 4)))
    labels, wanted = torch.tensor([0, 1, 2, 0, 1, 0]), torch.randn(6, 4, generator=generator) + 5  # all beyond beta
    found = build().loss(Outputs([], None, Lesson(Regions((), logits, deltas), labels, wanted)), targets_of(([], [])))
    classifier, box_reg = fastrcnn_loss(logits, deltas.flatten(1), [labels], [wanted])
    torch.testing.assert_close(found["classifier"], classifier)
    torch.testing.assert_close(found["box_reg"] + 3 * 4 / 6 * (1 - 1 / 9) / 2, box_reg)


def test_corrections_are_in_the_standard_deviations_of_the_paper() -> None:
    """A region 36 wide that must move 3.6 to the right: by 0.1 of its width, which is one deviation of 0.1."""
    lesson = build().train()(scene([[2.4, 8, 38.4, 40]])).lesson
    row = (lesson.regions.boxes_xyxy[0][:, 0] == torch.tensor(2.4)).nonzero().item()
    torch.testing.assert_close(lesson.wanted[row], torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=1e-5)


def test_zero_corrections_answer_with_the_regions_themselves() -> None:
    model = build().eval()
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    regions: list[Box] = [RED, [54, 14, 200, 58], [100, 0, 120, 64]]
    (found,) = model.candidates(model(scene(regions)))
    expected = boxes_of([RED, [54, 14, 96, 58], [96, 0, 96, 64]])
    torch.testing.assert_close(found.boxes_xyxy, expected[:, None].expand(3, 2, 4), rtol=0, atol=1e-4)
    assert (found.scores[:2] > 0).all()
    assert (found.scores[2] == 0).all()  # nothing of it lies in the picture


@pytest.mark.parametrize("training", [True, False])
def test_missing_proposals_are_asked_for(training: bool) -> None:
    batch = Batch(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), targets_of(([], []), ([], [])))
    with pytest.raises(ModelError, match=r"2 images.*proposals job"):
        build().train(training)(batch)


@pytest.mark.parametrize("kind", ["max", "align"])
def test_images_without_any_proposal_are_trained_and_nothing_is_found_in_them(kind: str) -> None:
    model = build(region_pooling=kind).train()
    for objects in (False, True):
        found = losses(model, scene([], objects))
        torch.autograd.backward([*found.values()])
        assert all(value.isfinite() for value in found.values())
        assert (found["classifier"] > 0) == objects
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(scene([])), [FRAME])
    assert len(answer) == 0


def test_one_image_of_two_without_proposals_leaves_the_other_alone() -> None:
    model, one = build().eval(), scene([RED, BLUE])
    two = Batch(one.images.repeat(2, 1, 1, 1), proposals=(boxes_of([]), *one.proposals))
    with torch.no_grad():
        both, alone = model.candidates(model(two)), model.candidates(model(one))
    assert both[0].boxes_xyxy.shape == (0, 2, 4)
    torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["max", "align"])
@pytest.mark.parametrize("objects", [True, False])
def test_regions_and_objects_without_area_are_survived(kind: str, objects: bool) -> None:
    model = build(region_pooling=kind).train()
    batch = scene([[10, 10, 10, 30], [0, 0, 0, 0], [30, 10, 30.5, 10.5], [-40, -40, -20, -20]], objects)
    torch.autograd.backward([*losses(model, batch).values()])
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(batch), [FRAME])
    assert ((answer.boxes_xyxy[:, 2:] - answer.boxes_xyxy[:, :2]) > 0).all()


def test_validation_loss_is_finite_and_leaves_answers_alone() -> None:
    model, batch = build().eval(), scene([*NEAR, *FAR])
    with torch.inference_mode():
        outputs = model(batch)
        found = model.loss(outputs, batch.boxes)
        plain = model(Batch(batch.images, proposals=batch.proposals))
    assert all(value.isfinite() and value > 0 for value in found.values())
    assert torch.equal(outputs.regions.logits, plain.regions.logits)


@pytest.mark.parametrize("kind", ["max", "align"])
def test_two_rectangles_are_learnt_by_heart(kind: str) -> None:
    places = itertools.product(range(0, 64, 8), range(0, 40, 8), (32, 40), (32, 40))
    batch = scene([[x, y, x + width, y + height] for x, y, width, height in places])
    model = build(region_pooling=kind, rois_per_image=32).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(120):
        optimizer.zero_grad()
        torch.autograd.backward([*losses(model, batch).values()])
        optimizer.step()
        if step % 5 == 4 and knows(model, batch):
            return
    pytest.fail("not found after 120 steps")


def knows(model: FastRCNN, batch: Batch) -> bool:
    """Whether the best box of each class is sure and lies on its rectangle."""
    with torch.no_grad():
        (answer,) = model.eval().postprocess(model(batch), [FRAME])
    model.train()
    places = [(answer.labels == label).nonzero()[0][:1] for label in (0, 1)]
    if not all(len(place) and answer.scores[place[0]] > 0.5 for place in places):
        return False
    best = torch.from_numpy(answer.boxes_xyxy[[place[0] for place in places]])
    return bool((box_iou(best, boxes_of([RED, BLUE])).diag() > 0.5).all())


def test_background_overlap_above_that_of_objects_is_refused() -> None:
    with pytest.raises(ConfigError, match="background_iou"):
        configuration.parse(Config, {"background_iou": 0.5}, "here")


def test_defaults_are_the_papers_and_read_back() -> None:
    config = configuration.parse(Config, {}, "here")
    assert (config.backbone, config.region_pooling, config.rois_per_image) == ("vgg16", "max", 64)
    assert (config.input.fit.way, config.input.fit.short_side, config.input.fit.long_side) == ("resize", 600, 1000)
    assert configuration.parse(Config, config.model_dump(mode="json"), "again") == config
