"""The localiser: its loss by hand, guesses there and back, pictures without objects, and one learnt by heart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from pipeline import boxes as geometry
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import ConfigError, ModelError
from pipeline.models import alexnet_localizer
from pipeline.models.alexnet_localizer import Outputs
from pipeline.types import Frame
from tests.small_detection import targets

BOX = [8.0, 16.0, 40.0, 48.0]
"""In 128x64 pixels: centre (24, 32), sides (32, 32), as shares (0.1875, 0.5, 0.25, 0.5)."""
both = pytest.mark.parametrize("regression", ["per_class", "single"])


def sized(height: int, width: int, **keys: Any) -> dict[str, Any]:
    return {"fit": {"way": "stretch", "size_hw": [height, width]}, **keys}


def config(**keys: Any) -> alexnet_localizer.Config:
    return parse(alexnet_localizer.Config, keys, "here")


def small(**keys: Any) -> alexnet_localizer.AlexNetLocalizer:
    torch.manual_seed(0)
    keys = {"fc_features": 16, "num_classes": 3, "dropout": 0.0, "input": sized(64, 64), **keys}
    return alexnet_localizer.build(config(**keys))


def without_weights(**keys: Any) -> alexnet_localizer.AlexNetLocalizer:
    """A localiser of 64x128 pixels for what needs no network."""
    with torch.device("meta"):
        return small(**{"input": sized(64, 128), **keys})


def values(terms: dict[str, Tensor]) -> list[float]:
    assert list(terms) == ["class", "box"]
    assert all(term.shape == () for term in terms.values())
    return [term.item() for term in terms.values()]


def random_outputs(count: int, num_boxes: int = 3) -> Outputs:
    random = torch.manual_seed(0)
    return Outputs(torch.randn(count, 3, generator=random), torch.rand(count, num_boxes, 4, generator=random))


@pytest.mark.parametrize(("regression", "count"), [("per_class", 57_413_540), ("single", 57_102_168)])
def test_parameters_are_as_many_as_the_docstring_counts(regression: str, count: int) -> None:
    with torch.device("meta"):
        model = alexnet_localizer.build(config(regression=regression))
        outputs = model(Batch(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)))
    assert outputs.logits.shape == (2, 20)
    assert outputs.boxes.shape == (2, 20 if regression == "per_class" else 1, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count:,}" in str(alexnet_localizer.__doc__)


def test_backbone_takes_the_convolutions_of_a_classifier_by_their_names() -> None:
    model = small()
    classifier = torchvision.models.alexnet(num_classes=2).state_dict()
    convolutions = {name: value for name, value in classifier.items() if name.startswith("features.")}
    model.get_submodule(model.backbone).load_state_dict(convolutions)
    assert torch.equal(model.state_dict()["network.backbone.features.10.weight"], classifier["features.10.weight"])


@both
def test_heads_are_the_layers_that_other_classes_change(regression: str) -> None:
    three, four = (without_weights(regression=regression, num_classes=count) for count in (3, 4))
    shapes = {name: value.shape for name, value in four.state_dict().items()}
    changed = {name for name, value in three.state_dict().items() if value.shape != shapes[name]}
    assert {name.rpartition(".")[0] for name in changed} == set(three.heads)


def test_untrained_network_guesses_about_the_middle_of_the_picture() -> None:
    boxes = small().eval()(Batch(torch.full((1, 3, 64, 64), 90, dtype=torch.uint8))).boxes
    torch.testing.assert_close(boxes, torch.full((1, 3, 4), 0.5), atol=0.1, rtol=0)


def test_loss_of_one_object_is_the_one_computed_by_hand() -> None:
    boxes = torch.full((1, 3, 4), 9.0)
    boxes[0, 1] = torch.tensor([0.2875, 0.5, 0.25, 0.3])  # 0.1 beside in x, 0.2 too low
    outputs = Outputs(torch.tensor([[0.0, math.log(2), 0.0]]), boxes)
    expected = [math.log(2), 4 * (0.1**2 + 0.2**2)]  # the probability of class 1 is 2 / 4
    assert values(without_weights(box_weight=4.0).loss(outputs, targets([(BOX, 1)]))) == pytest.approx(expected)


def test_single_box_learns_whatever_the_class() -> None:
    outputs = Outputs(torch.zeros(2, 3), torch.tensor([[[0.1875, 0.5, 0.25, 0.5]], [[0.1875, 0.5, 0.35, 0.5]]]))
    model = without_weights(regression="single", box_weight=1.0)
    expected = [math.log(3), 0.1**2 / 2]
    assert values(model.loss(outputs, targets([(BOX, 2)], [(BOX, 0)]))) == pytest.approx(expected, abs=1e-6)


@both
def test_loss_is_the_mean_over_pictures_that_have_an_object(regression: str) -> None:
    model = without_weights(regression=regression)
    outputs = random_outputs(4, 3 if regression == "per_class" else 1)
    first, last = ([(BOX, 1)], [([50.0, 0.0, 90.0, 20.0], 2)])
    each = [
        values(model.loss(Outputs(*(part[place : place + 1] for part in outputs)), targets(one)))
        for place, one in ((1, first), (3, last))
    ]
    assert values(model.loss(outputs, targets([], first, [], last))) == pytest.approx(np.mean(each, axis=0).tolist())


def test_of_several_objects_the_largest_is_learnt_and_of_equal_ones_the_first() -> None:
    model, outputs = without_weights(), random_outputs(2)
    tiny, wide, elsewhere = ([0.0, 0.0, 60.0, 10.0], 0), ([0.0, 0.0, 100.0, 40.0], 2), ([0.0, 0.0, 120.0, 60.0], 1)
    same_as_wide = ([20.0, 10.0, 120.0, 50.0], 1)

    def of(*images: list[tuple[list[float], int]]) -> list[float]:
        return values(model.loss(outputs, targets(*images)))

    assert of([tiny, wide, (BOX, 1)], [elsewhere]) == of([wide], [elsewhere])
    assert of([wide, tiny], [tiny, elsewhere]) == of([wide], [elsewhere])
    assert of([tiny, same_as_wide, wide], [tiny]) == of([same_as_wide], [tiny])
    assert of([wide], [tiny]) != of([same_as_wide], [tiny])


@both
def test_pictures_without_objects_have_no_loss_and_zero_gradients(regression: str) -> None:
    model = small(regression=regression)
    pixels = torch.randint(0, 255, (2, 3, 64, 64), generator=torch.manual_seed(1)).to(torch.uint8)
    terms = model.loss(model(Batch(pixels)), targets([], []))
    assert values(terms) == [0, 0]
    torch.autograd.backward([*terms.values()])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@both
def test_gradient_reaches_every_layer_and_of_boxes_only_that_of_the_true_class(regression: str) -> None:
    model = small(regression=regression)
    pixels = torch.randint(0, 255, (1, 3, 64, 64), generator=torch.manual_seed(1)).to(torch.uint8)
    torch.autograd.backward([*model.loss(model(Batch(pixels)), targets([(BOX, 1)])).values()])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    grad = model.get_parameter("network.boxes.bias").grad
    assert grad is not None
    assert grad.view(-1, 4).any(dim=1).tolist() == ([False, True, False] if regression == "per_class" else [True])


def test_candidates_of_truth_encoded_by_hand_are_one_guess_per_class_in_pixels() -> None:
    shares = [[0.1875, 0.5, 0.25, 0.5], [1.0, 0.0, 0.5, 0.5], [0.5, 0.5, 3.0, 0.25]]
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    [found] = without_weights().candidates(Outputs(logits, torch.tensor([shares])))
    expected = torch.tensor([BOX, [96.0, 0.0, 128.0, 16.0], [0.0, 24.0, 128.0, 40.0]])  # the others clipped
    torch.testing.assert_close(found.boxes_xyxy, expected[None])
    torch.testing.assert_close(found.scores, torch.tensor([[0.2, 0.3, 0.5]]))


def test_guesses_of_perfect_boxes_have_no_box_loss() -> None:
    model, outputs = without_weights(), random_outputs(3)
    pixels = torch.stack([found.boxes_xyxy[0, 1] for found in model.candidates(outputs)])
    lower, upper = pixels.tensor_split(2, dim=1)
    shares = torch.cat([(lower + upper) / 2, upper - lower], dim=1) / torch.tensor([128, 64, 128, 64])
    truth = targets(*([(box, 1)] for box in pixels.tolist()))
    perfect = Outputs(outputs.logits, shares[:, None].expand(-1, 3, -1))
    assert values(model.loss(perfect, truth))[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("box", "corner"),
    [([0.5, 0.5, -1.0, 0.0], [64, 32]), ([7.0, -7.0, 0.1, 0.1], [127, 0]), ([-3.0, 5.0, 1.0, -2.0], [0, 63])],
)
def test_guess_that_is_nowhere_keeps_a_pixel_so_that_its_class_is_not_lost(box: list[float], corner: list[int]) -> None:
    model = without_weights()
    outputs = Outputs(torch.zeros(1, 3), torch.tensor([[box] * 3]))
    x, y = corner
    assert model.candidates(outputs)[0].boxes_xyxy.tolist() == [[[x, y, x + 1, y + 1]] * 3]
    [found] = model.postprocess(outputs, [Frame((32, 256), (64, 128), (0.5, 2.0))])
    assert sorted(found.labels) == [0, 1, 2]


@both
def test_postprocess_gives_five_guesses_of_different_classes_in_original_pixels(regression: str) -> None:
    model = without_weights(regression=regression, num_classes=8)
    logits = torch.tensor([[0.01, 0.02, 0.03, 0.3, 0.1, 0.2, 0.25, 0.09]]).log()
    boxes = torch.tensor([0.1875, 0.5, 0.25, 0.5]).expand(1, 8 if regression == "per_class" else 1, 4)
    [found] = model.postprocess(Outputs(logits, boxes), [Frame((32, 256), (64, 128), (0.5, 2.0))])
    assert found.labels.tolist() == [3, 6, 5, 4, 7]
    np.testing.assert_allclose(found.scores, [0.3, 0.25, 0.2, 0.1, 0.09], rtol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy, [[16, 8, 80, 24]] * 5, rtol=1e-5)


def test_answers_in_half_precision_are_given_in_fp32() -> None:
    model = without_weights()
    outputs = Outputs(*(part.bfloat16() for part in random_outputs(1)))
    [found] = model.candidates(outputs)
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in model.loss(outputs, targets([(BOX, 1)])).values())


@both
def test_picture_of_one_rectangle_is_learnt_by_heart(regression: str) -> None:
    model = small(regression=regression, fc_features=32, input=sized(48, 48))
    picture = torch.full((1, 3, 48, 48), 100, dtype=torch.uint8)
    picture[0, 1, 6:26, 20:44] = 250
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(50):
        optimiser.zero_grad()
        torch.autograd.backward([*model.loss(model(Batch(picture)), targets([([20.0, 6.0, 44.0, 26.0], 1)])).values()])
        optimiser.step()
    [found] = model.eval().postprocess(model(Batch(picture)), [Frame((96, 48), (48, 48), (1.0, 0.5))])
    assert found.labels[0] == 1
    assert found.scores[0] > 0.9
    assert geometry.iou(found.boxes_xyxy[:1], [[20, 12, 44, 52]])[0, 0] > 0.75


@both
def test_exported_network_gives_equal_outputs_for_any_batch(regression: str) -> None:
    model = small(regression=regression).eval()
    pixels = torch.rand(3, 3, 64, 64, generator=torch.manual_seed(1))
    exported = torch.export.export(model.network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for count in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(pixels[:count]), model.network(pixels[:count]))


def test_grey_pictures_of_other_sizes_are_taken() -> None:
    with torch.device("meta"):
        model = small(input=sized(40, 200, mean=[0.5], std=[0.5]))
        assert model.network(torch.zeros(2, 1, 40, 200)).boxes.shape == (2, 3, 4)
        assert model(Batch(torch.zeros(2, 3, 40, 200, dtype=torch.uint8))).logits.shape == (2, 3)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 64, 128)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        without_weights()(Batch(torch.zeros(shape, dtype=torch.uint8)))
    assert str(caught.value) == f"expected images [B, 3, 64, 128], got {list(shape)}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": {"fit": {"way": "resize"}}}, "set input.fit.way to stretch or letterbox, got resize"),
        ({"regression": "both"}, "regression"),
        ({"box_weight": -1.0}, "box_weight"),
        ({"dropout": 1.0}, "dropout"),
        ({"fc_features": 0}, "fc_features"),
    ],
)
def test_impossible_values_are_refused_with_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**keys)
