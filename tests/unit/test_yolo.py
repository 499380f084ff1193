"""YOLO v1: equation 3 by hand and by loops, boxes there and back, and a picture learnt by heart."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import boxes as geometry
from pipeline.batch import Batch, BoxTargets
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models import yolo
from pipeline.models._detector import Selection
from pipeline.types import Frame
from tests.small_detection import targets

TERMS = ["centre", "size", "object", "no_object", "class"]
BOXES = [[8.0, 16.0, 40.0, 48.0], [96.0, 8.0, 124.0, 24.0]]
"""In 128x64 pixels, and in cells of 64x32: centred in row 1, column 0 and in row 0, column 1."""


def sized(height: int, width: int, **keys: Any) -> dict[str, Any]:
    return {"fit": {"way": "stretch", "size_hw": [height, width]}, **keys}


def config(**keys: Any) -> yolo.Config:
    return parse(yolo.Config, keys, "here")


def small(**keys: Any) -> yolo.Yolo:
    torch.manual_seed(0)
    return yolo.build(config(**{"variant": "fast", "fc_features": 16, "input": sized(64, 64), **keys}))


def without_weights(**keys: Any) -> yolo.Yolo:
    """A detector of 64x128 pixels and 2x2 cells for what needs no network."""
    with torch.device("meta"):
        return small(**{"grid": 2, "num_classes": 3, "input": sized(64, 128), **keys})


def cell(first: list[float], second: list[float], classes: list[float]) -> Tensor:
    return torch.tensor([*first, *second, *classes])


def values(terms: dict[str, Tensor]) -> list[float]:
    assert list(terms) == TERMS
    assert all(term.shape == () for term in terms.values())
    return [term.item() for term in terms.values()]


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "count", "num_convolutions", "first_full"),
    [("v1", 271_703_550, 24, 50176 * 4096), ("fast", 45_089_374, 9, 50176 * 256)],
)
def test_layers_and_parameters_are_those_the_docstring_counts(
    variant: str, count: int, num_convolutions: int, first_full: int
) -> None:
    with torch.device("meta"):
        model = yolo.build(config(variant=variant))
        outputs = model(Batch(torch.zeros(2, 3, 448, 448, dtype=torch.uint8)))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    full = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert outputs.shape == (2, 7, 7, 30)
    assert len(layers) - len(full) == num_convolutions
    assert full[0].weight.numel() == first_full
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count:,}" in str(yolo.__doc__)


def test_sizes_of_v1_at_448_are_those_of_figure_3() -> None:
    with torch.device("meta"):
        network = yolo.build(config()).network
        x, shapes = torch.zeros(1, 3, 448, 448), []
        for part in ("backbone", "added"):
            for layer in network.get_submodule(part).children():
                x = layer(x)
                if isinstance(layer, nn.MaxPool2d) or getattr(layer, "stride", None) == (2, 2):
                    shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 224, 224), (64, 112, 112), (192, 56, 56), (512, 28, 28), (1024, 14, 14), (1024, 7, 7)]
    assert len([layer for layer in network.get_submodule("backbone").children() if isinstance(layer, nn.Conv2d)]) == 20


@pytest.mark.parametrize("variant", ["v1", "fast"])
def test_network_takes_other_sizes_grids_classes_and_grey_pictures(variant: str) -> None:
    keys = {"variant": variant, "grid": 3, "boxes_per_cell": 4, "num_classes": 5, "fc_features": 6}
    with torch.device("meta"):
        model = yolo.build(config(**keys, input=sized(128, 192, mean=[0.5], std=[0.5])))
        assert model.network(torch.zeros(2, 1, 128, 192)).shape == (2, 3 * 3 * (4 * 5 + 5))
        assert model(Batch(torch.zeros(2, 3, 128, 192, dtype=torch.uint8))).shape == (2, 3, 3, 25)


def test_default_input_is_stretched_and_its_pixels_are_0_to_1() -> None:
    default = config()
    assert (default.input.fit.way, default.input.fit.size_hw) == ("stretch", (448, 448))
    assert default.select == Selection(score_threshold=0.001, iou_threshold=0.5)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    model = yolo.build(config(variant="fast", input={**default.model_dump()["input"], "fit": sized(64, 64)["fit"]}))
    assert model.normalized(Batch(pixels))[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])


def test_untrained_outputs_are_near_nothing_and_finite() -> None:
    outputs = small().eval()(Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)))
    assert outputs.isfinite().all()
    assert 0 < outputs.abs().mean() < 0.3


def test_loss_of_one_object_is_equation_3_by_hand() -> None:
    outputs = torch.zeros(2, 2, 2, 13)
    outputs[0, :, :, [4, 9]], outputs[1, :, :, [4, 9]] = 0.1, 0.2
    outputs[0, 1, 0] = cell([0.375, 0.5, 0.5, 0.5, 0.3], [0.475, 0.0, 0.5, 0.5, 0.8], [0.2, 0.7, 0.4])
    # Truth: centre (24, 32) of 128x64, so (0.375, 0) in cell (1, 0); sides 0.25 and 0.5 of the picture.
    # The first box is 0.25 x 0.25, 0.25 below: IoU = 0.25 * 0.125 / (0.125 + 0.0625 - 0.03125) = 0.2.
    # The second is 0.25 x 0.25, 0.05 to the right: IoU = 0.2 * 0.25 / (0.125 + 0.0625 - 0.05) = 4 / 11.
    centre = 5 * 0.1**2
    size = 5 * (math.sqrt(0.5) - 0.5) ** 2
    confidence = (0.8 - 4 / 11) ** 2
    no_object = 0.5 * (0.3**2 + 6 * 0.1**2 + 8 * 0.2**2)
    classes = 0.2**2 + 0.3**2 + 0.4**2
    found = without_weights().loss(outputs, targets([(BOXES[0], 1)], []))
    assert values(found) == near([term / 2 for term in (centre, size, confidence, no_object, classes)])


def test_responsible_box_is_the_nearest_where_none_touches_the_object() -> None:
    outputs = torch.zeros(1, 2, 2, 13)
    outputs[0, 1, 0] = cell([0.375, -1.4, 0.5, 0.6, 0.3], [0.375, 1.2, 0.5, 0.6, 0.4], [0.0, 1.0, 0.0])
    # The first is 0.7 above the object, the second 0.6 below it: IoU 0, so the second answers with a target of 0.
    expected = [5 * 1.2**2, 5 * (math.sqrt(0.5) - 0.6) ** 2, 0.4**2, 0.5 * 0.3**2, 0.0]
    assert values(without_weights().loss(outputs, targets([(BOXES[0], 1)]))) == near(expected)


def test_responsible_box_is_one_that_touches_however_near_another_is() -> None:
    outputs = torch.zeros(1, 2, 2, 13)
    outputs[0, 1, 0] = cell([0.375, 1.02, 0.5, math.sqrt(0.5), 0.3], [0.375, 0, 0.1, 0.1, 0.4], [0, 1, 0])
    # The first lies just below the object, 0.51 away. The second lies within it, 0.01 x 0.01: by its sides
    # sqrt(0.24^2 + 0.49^2) = 0.546 away, but its IoU is 0.0001 / 0.125.
    expected = [0, 5 * (0.4**2 + (math.sqrt(0.5) - 0.1) ** 2), (0.4 - 0.0008) ** 2, 0.5 * 0.3**2, 0.0]
    assert values(without_weights().loss(outputs, targets([(BOXES[0], 1)]))) == near(expected)


@pytest.mark.parametrize("sides", [0.5, 0.0])
def test_responsible_box_is_the_first_of_equals(sides: float) -> None:
    outputs = torch.zeros(1, 2, 2, 13)
    outputs[0, 1, 0] = cell([0.375, 0, sides, sides, 0.0], [0.375, 0, sides, sides, 2.0], [0, 1, 0])
    assert values(without_weights().loss(outputs, targets([(BOXES[0], 1)])))[3] == pytest.approx(0.5 * 2**2)


def test_loss_of_pictures_without_objects_is_that_of_confidences_alone() -> None:
    outputs = torch.full((3, 2, 2, 13), 0.5)
    assert values(without_weights().loss(outputs, targets([], [], []))) == near([0, 0, 0, 0.5 * 8 * 0.25, 0])


def test_only_the_first_of_two_objects_in_a_cell_is_learnt() -> None:
    outputs = torch.rand(2, 2, 2, 13, generator=torch.manual_seed(0))
    one, other, elsewhere = (BOXES[0], 1), ([10.0, 20.0, 30.0, 60.0], 2), (BOXES[1], 0)
    model = without_weights()

    def of(*images: list[tuple[list[float], int]]) -> list[float]:
        return values(model.loss(outputs, targets(*images)))

    assert of([elsewhere], [one, other, elsewhere]) == of([elsewhere], [one, elsewhere])
    assert of([elsewhere], [other, one, elsewhere]) == of([elsewhere], [other, elsewhere])
    assert of([], [one]) != of([], [other])
    assert of([one], [other]) != of([one], [one])  # the same cell of another picture is another cell


def test_weights_of_the_configuration_weigh_their_terms() -> None:
    outputs = torch.rand(1, 2, 2, 13, generator=torch.manual_seed(0))
    truth = targets([(BOXES[0], 1)])
    usual = values(without_weights().loss(outputs, truth))
    weighed = values(without_weights(coord_weight=1.0, no_object_weight=2.0).loss(outputs, truth))
    factors = [1 / 5, 1 / 5, 1, 2 / 0.5, 1]
    assert weighed == near([term * factor for term, factor in zip(usual, factors, strict=True)])


def iou_by_hand(one: list[float], other: list[float]) -> float:
    """Of boxes (centre x, centre y, width, height)."""
    shared = 1.0
    for axis in (0, 1):
        low = max(box[axis] - box[axis + 2] / 2 for box in (one, other))
        high = min(box[axis] + box[axis + 2] / 2 for box in (one, other))
        shared *= max(high - low, 0.0)
    joined = one[2] * one[3] + other[2] * other[3] - shared
    return shared / joined if joined > 0 else 0.0


def owners(size_hw: tuple[int, int], grid: int, boxes: Tensor, labels: Tensor) -> dict[Any, tuple[list[float], int]]:
    """The object (its box in shares, its label) that each cell (row, column) of one picture learns."""
    found: dict[Any, tuple[list[float], int]] = {}
    for (x1, y1, x2, y2), label in zip(boxes.double().tolist(), labels.tolist(), strict=True):
        box = [(x1 + x2) / 2 / size_hw[1], (y1 + y2) / 2 / size_hw[0]]
        box += [max(x2 - x1, 0.0) / size_hw[1], max(y2 - y1, 0.0) / size_hw[0]]
        row, column = (min(max(math.floor(part * grid), 0), grid - 1) for part in (box[1], box[0]))
        found.setdefault((row, column), (box, label))
    return found


def loops(model: yolo.Yolo, outputs: Tensor, truth: BoxTargets) -> tuple[list[float], set[bool]]:
    """Equation 3, image by image, cell by cell, box by box, in float64; and whether boxes touched their objects."""
    size, count, touched = model.grid, model.boxes_per_cell, set()
    terms = dict.fromkeys(TERMS, 0.0)
    for image, objects in enumerate(truth.per_image()):
        learnt = owners(model.spec.fit.size_hw, size, *objects)
        for row, column in itertools.product(range(size), repeat=2):
            raw = outputs[image, row, column].double().tolist()
            guesses = [raw[5 * number : 5 * number + 5] for number in range(count)]
            terms["no_object"] += sum(0.5 * guess[4] ** 2 for guess in guesses)
            if (row, column) not in learnt:
                continue
            box, label = learnt[row, column]
            shares = [[(column + x) / size, (row + y) / size, w * w, h * h] for x, y, w, h, _ in guesses]
            overlaps = [iou_by_hand(guess, box) for guess in shares]
            merits = overlaps if max(overlaps) > 0 else [-math.dist(guess, box) for guess in shares]
            chosen = merits.index(max(merits))
            x, y, w, h, confidence = guesses[chosen]
            terms["no_object"] -= 0.5 * confidence**2
            terms["centre"] += 5 * ((x + column - box[0] * size) ** 2 + (y + row - box[1] * size) ** 2)
            terms["size"] += 5 * ((w - math.sqrt(box[2])) ** 2 + (h - math.sqrt(box[3])) ** 2)
            terms["object"] += (confidence - overlaps[chosen]) ** 2
            terms["class"] += sum((value - (index == label)) ** 2 for index, value in enumerate(raw[5 * count :]))
            touched.add(max(overlaps) > 0)
    return [value / len(outputs) for value in terms.values()], touched


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("grid", "num_boxes", "num_classes"), [(7, 2, 20), (3, 3, 2), (1, 1, 1)])
def test_loss_equals_loops_on_random_outputs_and_objects(
    seed: int, grid: int, num_boxes: int, num_classes: int
) -> None:
    random = torch.manual_seed(seed)
    model = without_weights(grid=grid, boxes_per_cell=num_boxes, num_classes=num_classes)
    of_image = torch.tensor([0] * 9 + [2] * 9 + [3] * 9)  # none in the second picture
    centres = (torch.rand(27, 2, generator=random) * 1.2 - 0.1) * torch.tensor([128, 64])
    sides = (torch.rand(27, 2, generator=random) * 0.6 - 0.05) * torch.tensor([128, 64])  # some below 0
    labels = torch.randint(0, num_classes, (27,), generator=random)
    truth = BoxTargets(torch.cat([centres - sides / 2, centres + sides / 2], 1), labels, of_image, 4)
    outputs = torch.randn(4, grid, grid, num_boxes * 5 + num_classes, generator=random) * 0.5
    expected, touched = loops(model, outputs, truth)
    assert touched == {True, False} or grid == 1
    assert values(model.loss(outputs, truth)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("output", [0.0, -0.7, 0.6])
@pytest.mark.parametrize("box", [BOXES[0], [24.0, 32.0, 24.0, 32.0], [30.0, 40.0, 18.0, 24.0]])
def test_gradient_is_finite_whatever_the_sign_of_outputs_and_sides(output: float, box: list[float]) -> None:
    outputs = torch.full((1, 2, 2, 13), output, requires_grad=True)
    torch.autograd.backward([*without_weights().loss(outputs, targets([(box, 1)])).values()])
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 1, 0].any()


def test_no_gradient_flows_through_the_target_of_the_confidence() -> None:
    outputs = torch.full((1, 2, 2, 13), 0.5, requires_grad=True)
    torch.autograd.backward([without_weights().loss(outputs, targets([(BOXES[0], 1)]))["object"]])
    assert outputs.grad is not None
    assert outputs.grad.nonzero().tolist() == [[0, 1, 0, 4]]


def exact_outputs() -> Tensor:
    """What a perfect network of 2x2 cells says of `BOXES`, labels 1 and 2, and of a box centred outside, label 0."""
    outputs = torch.zeros(1, 2, 2, 13)
    outputs[0, 1, 0, :5] = torch.tensor([0.375, 0, 0.5, math.sqrt(0.5), 1])
    outputs[0, 1, 0, 10:] = torch.tensor([0, 1, 0])
    outputs[0, 0, 1, 5:10] = torch.tensor([46 / 64, 0.5, -math.sqrt(28 / 128), 0.5, 1])  # a negative root
    outputs[0, 0, 1, 10:] = torch.tensor([0, 0, 1])
    outputs[0, 1, 1, :5] = torch.tensor([80 / 64, 36 / 32, 0.5, 0.5, 1])
    outputs[0, 1, 1, 10:] = torch.tensor([1, 0, 0])
    return outputs


def test_candidates_of_truth_encoded_by_hand_are_the_boxes_in_pixels() -> None:
    model = without_weights()
    [found] = model.candidates(exact_outputs())
    assert found.boxes_xyxy.shape == (8, 4)
    assert found.scores.shape == (8, 3)
    expected = torch.tensor([BOXES[0], BOXES[1], [128.0, 60.0, 160.0, 76.0]])
    torch.testing.assert_close(found.boxes_xyxy[[4, 3, 6]], expected)
    assert found.scores.nonzero().tolist() == [[3, 2], [4, 1], [6, 0]]


def test_loss_of_a_perfect_answer_is_nothing() -> None:
    outputs = exact_outputs()
    outputs[0, 0, 1, 7] *= -1
    truth = targets([(BOXES[0], 1), (BOXES[1], 2), ([128.0, 60.0, 160.0, 76.0], 0)])
    assert values(without_weights().loss(outputs, truth)) == pytest.approx([0] * 5, abs=1e-6)


def test_postprocess_gives_the_boxes_in_original_pixels_best_first() -> None:
    outputs = exact_outputs()
    outputs[0, 1, 0, 4] = 0.75
    frame = Frame((32, 256), (64, 128), (0.5, 2.0))
    [found] = without_weights().postprocess(outputs, [frame])
    np.testing.assert_allclose(found.boxes_xyxy, [[192, 4, 248, 12], [16, 8, 80, 24]], rtol=1e-5)
    assert found.labels.tolist() == [2, 1]
    assert found.scores.tolist() == [1, 0.75]


@pytest.mark.parametrize(
    ("confidence", "probability", "score"),
    [(0.5, 0.5, 0.25), (-0.5, -0.5, 0), (-0.5, 0.5, 0), (0.5, -0.5, 0), (2, 0.4, 0.8), (2, 3, 1)],
)
def test_scores_are_products_within_0_and_1(confidence: float, probability: float, score: float) -> None:
    outputs = torch.zeros(1, 2, 2, 13)
    outputs[..., 4], outputs[..., 10] = confidence, probability
    [found] = without_weights().candidates(outputs.bfloat16())
    assert found.scores.dtype == found.boxes_xyxy.dtype == torch.float32
    assert found.scores[0, 0].item() == pytest.approx(score, rel=1e-2)


DRAWN = {(3.0, 5.0, 23.0, 25.0): 0, (36.0, 4.0, 60.0, 18.0): 1, (16.0, 38.0, 56.0, 58.0): 2}


def test_fast_yolo_learns_a_picture_of_three_rectangles_by_heart() -> None:
    model = small(num_classes=3, fc_features=64, dropout=0.0)
    picture = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in DRAWN.items():
        picture[0, label, int(y1) : int(y2), int(x1) : int(x2)] = 250
    batch, truth = Batch(picture), targets([([*box], label) for box, label in DRAWN.items()])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    for _ in range(30):
        optimiser.zero_grad()
        torch.autograd.backward([*model.loss(model(batch), truth).values()])
        optimiser.step()
    [found] = model.eval().postprocess(model(batch), [Frame((128, 64), (64, 64), (1.0, 0.5))])
    expected = np.array([[x1, y1 * 2, x2, y2 * 2] for x1, y1, x2, y2 in DRAWN])
    best = geometry.iou(found.boxes_xyxy[:3], expected)
    assert sorted(best.argmax(axis=1)) == [0, 1, 2]
    assert (best.max(axis=1) > 0.5).all()
    assert found.labels[:3].tolist() == [[*DRAWN.values()][place] for place in best.argmax(axis=1)]


def test_exported_network_gives_equal_outputs_for_any_batch() -> None:
    model = small(num_classes=2).eval()
    pixels = torch.rand(3, 3, 64, 64, generator=torch.manual_seed(1))
    exported = torch.export.export(model.network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (1, 3):
        with torch.no_grad():
            given, expected = exported.module()(pixels[:count]), model.network(pixels[:count])
        assert expected.shape == (count, 7 * 7 * 12)
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 64, 192), (2, 1, 64, 128)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        without_weights()(Batch(torch.zeros(shape, dtype=torch.uint8)))
    assert str(caught.value) == f"expected images [B, 3, 64, 128], got {list(shape)}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": sized(448, 450)}, r"multiples of 64, got input.fit.size_hw \(448, 450\)"),
        ({"input": {}}, r"multiples of 64, got input.fit.size_hw \(416, 416\)"),
        ({"input": {"fit": {"way": "resize", "size_hw": [448, 448]}}}, "stretch or letterbox, got resize"),
        ({"grid": 0}, "grid"),
        ({"boxes_per_cell": 0}, "boxes_per_cell"),
        ({"dropout": 1.0}, "dropout"),
        ({"coord_weight": -1.0}, "coord_weight"),
        ({"variant": "v2"}, "variant"),
        ({"width": 0.5}, "width"),
    ],
)
def test_impossible_values_are_refused_with_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**keys)


def test_letterboxed_pictures_are_taken_as_well() -> None:
    assert config(input={"fit": {"way": "letterbox", "size_hw": [448, 448]}}).input.fit.way == "letterbox"
