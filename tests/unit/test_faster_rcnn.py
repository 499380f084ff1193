"""Faster R-CNN against torchvision's, against sums done by hand, and on pictures that it must learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import box_iou

from pipeline import config as configuration
from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ConfigError, ModelError
from pipeline.models import _regions, faster_rcnn
from pipeline.models._detector import Selection
from pipeline.models._regions import AnchorLesson, Lesson, Outputs, Regions
from pipeline.models.faster_rcnn import Config, FasterRCNN
from pipeline.training import start
from pipeline.types import Detections, Frame

SMALL: dict[str, Any] = {
    "backbone": "squeezenet1_1",
    "num_classes": 2,
    "fc_features": 32,
    "pool_size": 3,
    "anchor_sizes": ((32, 64),),
    **{"pre_nms_train": 200, "post_nms_train": 64, "pre_nms_test": 200, "post_nms_test": 100},
    "rois_per_image": 32,
}
PYRAMIDS = {"resnet50_fpn": "fasterrcnn_resnet50_fpn", "mobilenet_v3_320": "fasterrcnn_mobilenet_v3_large_320_fpn"}


def build(seed: int = 0, **keys: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    return faster_rcnn.build(Config(**(SMALL | keys)))


def targets_of(*images: tuple[list[list[float]], list[int]]) -> BoxTargets:
    """Of each image its boxes and labels."""
    counts = torch.tensor([len(labels) for _, labels in images])
    boxes = torch.tensor([box for boxes, _ in images for box in boxes], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, labels in images for label in labels], dtype=torch.int64)
    return BoxTargets(boxes, labels, torch.arange(len(images)).repeat_interleave(counts), len(images))


def noise(count: int, height: int = 96, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def black_and_white(count: int) -> Tensor:
    """Noise that is -1 and 1 after a normalisation by one half, exactly, whoever divides in whatever order."""
    return (noise(count) > 127).to(torch.uint8) * 255


def frames(images: Tensor) -> tuple[Frame, ...]:
    size = (images.shape[2], images.shape[3])
    return (Frame(size, size),) * len(images)


def scene() -> Batch:
    """A red and a blue rectangle on grey."""
    image = torch.full((1, 3, 64, 96), 90, dtype=torch.uint8)
    image[0, :, 8:40, 6:42] = torch.tensor([230, 40, 40], dtype=torch.uint8)[:, None, None]
    image[0, :, 14:58, 54:86] = torch.tensor([40, 60, 230], dtype=torch.uint8)[:, None, None]
    return Batch(image, targets_of(([[6, 8, 42, 40], [54, 14, 86, 58]], [0, 1])), frames(image))


def losses(model: FasterRCNN, batch: Batch) -> dict[str, Tensor]:
    return model.loss(model(batch), batch.boxes)


def torchvisions(name: str, num_classes: int, **keys: Any) -> nn.Module:
    made = getattr(torchvision.models.detection, PYRAMIDS[name])
    built: nn.Module = made(weights=None, weights_backbone=None, num_classes=num_classes + 1, **keys)
    return built


def equal_pair() -> tuple[FasterRCNN, nn.Module]:
    """Ours and torchvision's with the same weights, whose values keep their scale so that boxes can be told apart."""
    half = (0.5,) * 3
    spec = dataclasses.replace(Config(backbone="mobilenet_v3_320").input, mean=half, std=half)
    mine = faster_rcnn.build(Config(backbone="mobilenet_v3_320", num_classes=4, input=spec))
    theirs = {"min_size": 96, "max_size": 128, "_skip_resize": True, "box_score_thresh": 0.3}
    torch.manual_seed(0)
    other = torchvisions("mobilenet_v3_320", 4, image_mean=half, image_std=half, **theirs)
    for layer in other.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(other.get_parameter("roi_heads.box_predictor.bbox_pred.weight"), std=0.001)
    with torch.no_grad():
        other.get_submodule("backbone").train()(torch.randn(4, 3, 96, 128))
    mine.network.load_state_dict(other.state_dict())
    return mine, other


@pytest.mark.parametrize("name", list(PYRAMIDS))
def test_names_and_shapes_of_weights_with_a_pyramid_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        mine = faster_rcnn.build(Config.model_validate({"backbone": name, "num_classes": 90}))
        other = torchvisions(name, 90).state_dict()
    found = mine.network.state_dict()
    assert [(key, value.shape) for key, value in found.items()] == [(key, value.shape) for key, value in other.items()]


def test_answers_are_those_of_torchvisions_detector() -> None:
    mine, other = equal_pair()
    images = black_and_white(2)
    with torch.no_grad():
        found = mine.eval().postprocess(mine(Batch(images)), frames(images), Selection(score_threshold=0.3))
        expected = other.eval()([*(images / 255)])
    for got, wanted in zip(found, expected, strict=True):
        assert len(got) > 20
        torch.testing.assert_close(torch.from_numpy(got.boxes_xyxy), wanted["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(got.scores), wanted["scores"], rtol=1e-5, atol=1e-5)
        assert got.labels.tolist() == (wanted["labels"] - 1).tolist()


def test_training_losses_are_those_of_torchvisions_detector_with_the_same_draws() -> None:
    mine, other = equal_pair()
    images = black_and_white(2)
    targets = targets_of(([[10, 12, 60, 70], [70, 20, 110, 90]], [1, 3]), ([], []))
    theirs = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in targets.per_image()]
    torch.manual_seed(5)
    expected = other.train()([*(images / 255)], theirs)
    torch.manual_seed(5)
    found = losses(mine.train(), Batch(images, targets))
    pairs = {"objectness": "objectness", "rpn_box": "rpn_box_reg", "classifier": "classifier", "box_reg": "box_reg"}
    for ours, name in pairs.items():
        torch.testing.assert_close(found[ours], expected[f"loss_{name}"], rtol=1e-5, atol=1e-6)


def test_loss_of_known_outputs_is_the_sum_done_by_hand() -> None:
    deltas = torch.zeros(4, 3, 4)
    deltas[1, 2] = torch.tensor([1.0, 0.1, 0.0, 0.0])
    lesson = Lesson(Regions((), torch.zeros(4, 3), deltas), torch.tensor([0, 2, 0, 0]), torch.zeros(4, 4))
    anchors = AnchorLesson(
        objectness=torch.zeros(5),
        labels=torch.tensor([1.0, 0, 0, 0, 0]),
        deltas=torch.tensor([[0.0, 0.0, -2.0, 0.05]]),
        wanted=torch.zeros(1, 4),
    )
    found = build().loss(Outputs([], None, lesson, anchors), targets_of(([], [])))
    half = 1 / 18  # of smooth L1's beta
    assert set(found) == {"objectness", "rpn_box", "classifier", "box_reg"}
    assert found["classifier"] == pytest.approx(math.log(3))
    assert found["box_reg"] == pytest.approx(((1 - half) + 0.1**2 / 2 * 9) / 4)
    assert found["objectness"] == pytest.approx(math.log(2))
    assert found["rpn_box"] == pytest.approx(((2 - half) + 0.05**2 / 2 * 9) / 5)


def test_zero_last_layers_give_the_losses_of_complete_ignorance() -> None:
    model = build(num_classes=6).train()
    for layer in (model.network.rpn.head.cls_logits, model.roi_heads.box_predictor.cls_score):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = losses(model, scene())
    assert found["classifier"].item() == pytest.approx(math.log(7), rel=1e-5)
    assert found["objectness"].item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("score", [0.0, 0.99], ids=["proposals", "no proposals"])
def test_batch_without_any_object_gives_finite_losses_and_a_gradient_for_every_parameter(score: float) -> None:
    model = build(proposal_score=score).train()
    found = losses(model, Batch(noise(2), targets_of(([], []), ([], []))))
    torch.autograd.backward([*found.values()])
    assert all(value.isfinite() for value in found.values())
    assert found["rpn_box"] == found["box_reg"] == 0
    assert (found["classifier"] > 0) == (score == 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gradient_reaches_every_parameter_where_one_image_of_two_is_empty() -> None:
    model = build().train()
    found = losses(model, Batch(noise(2), targets_of(([[8, 10, 48, 50]], [1]), ([], []))))
    torch.autograd.backward([*found.values()])
    assert all(value.isfinite() and value > 0 for value in found.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_boxes_under_a_pixel_are_not_learnt_from() -> None:
    seen: list[list[float]] = [[8, 10, 48, 50]]
    unseen: list[list[float]] = [
        [20, 20, 20, 60],
        [5, 5, 5.5, 40],
        [30, 30, 20, 20],
        [200, 10, 240, 50],
        [-60, -60, -2, 50],
    ]
    model = build().train()
    torch.manual_seed(1)
    found = losses(model, Batch(noise(1), targets_of((seen + unseen, [1] + [0] * len(unseen)))))
    torch.manual_seed(1)
    expected = losses(model, Batch(noise(1), targets_of((seen, [1]))))
    torch.testing.assert_close(found, expected)


def test_validation_loss_is_finite_and_leaves_model_and_answers_alone() -> None:
    model = build(backbone="mobilenet_v3_320", anchor_sizes=((32, 64),) * 3).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = scene()
    with torch.inference_mode():
        outputs = model(batch)
        found = model.loss(outputs, batch.boxes)
        plain = model(dataclasses.replace(batch, targets=None))
    assert all(value.isfinite() and value > 0 for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs.regions.logits, plain.regions.logits)
    with pytest.raises(ModelError, match="targets"):
        model.loss(plain, batch.boxes)


def test_answers_are_refused_of_outputs_in_training() -> None:
    model, batch = build().train(), scene()
    with pytest.raises(ModelError, match="eval"):
        model.postprocess(model(batch), batch.frames)


def test_outputs_of_an_image_do_not_depend_on_its_neighbours() -> None:
    model, images = build().eval(), noise(3)
    with torch.no_grad():
        together, alone = model(Batch(images)), model(Batch(images[1:2]))
    count = [len(boxes) for boxes in together.regions.boxes_xyxy]
    logits = torch.split(together.regions.logits, count)[1]
    torch.testing.assert_close(together.regions.boxes_xyxy[1], alone.regions.boxes_xyxy[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logits, alone.regions.logits, rtol=1e-4, atol=1e-5)


def test_boxes_end_at_the_edge_of_the_picture_and_not_of_its_padding() -> None:
    model = build().eval()
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=3.0)
    small = Frame((50, 70), (50, 70))
    with torch.no_grad():
        outputs = model(Batch(noise(2), frames=(small, *frames(noise(1)))))
    for boxes, (height, width) in zip(outputs.regions.boxes_xyxy, [(50, 70), (96, 128)], strict=True):
        assert (boxes >= 0).all()
        assert boxes.amax(dim=0)[2:].tolist() == [width, height]
    first = model.candidates(outputs)[0].boxes_xyxy
    assert first.shape[1:] == (2, 4)
    assert first.amax(dim=(0, 1))[2:].tolist() == [70, 50]


@pytest.mark.parametrize(
    ("backbone", "stride", "width", "precision"),
    [
        ("alexnet", 16, 600, torch.float32),
        ("vgg16", 16, 136, torch.float32),
        ("vgg16", 8, 132, torch.float32),
        ("squeezenet1_1", 16, 600, torch.bfloat16),
        ("squeezenet1_1", 8, 300, torch.bfloat16),
    ],
)
def test_anchors_are_centred_on_cells_whatever_the_size_and_the_precision(
    backbone: Any, stride: Any, width: int, precision: torch.dtype
) -> None:
    """The width is no multiple of the stride, and 16 bits cannot tell pixels beyond 256 apart."""
    model = build(
        backbone=backbone, stride=stride, anchor_sizes=((16,),), anchor_ratios=(1.0,), proposal_iou=1.0
    ).eval()
    nn.init.zeros_(model.network.rpn.head.bbox_pred.weight)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        (boxes,) = model(Batch(noise(1, 40, width))).regions.boxes_xyxy
    inside = (boxes[:, 0] > 0) & (boxes[:, 2] < width) & (boxes[:, 1] > 0) & (boxes[:, 3] < 40)
    centres = (boxes[inside, :2] + boxes[inside, 2:]) / 2
    cells = (centres - _regions.origin(backbone, stride)) / stride
    assert inside.sum() > 5
    assert torch.equal(cells, cells.round())


def found_by_heart(model: FasterRCNN, batch: Batch) -> bool:
    """Whether the best box of each class lies on its rectangle."""
    with torch.no_grad():
        answer = model.eval().postprocess(model(batch), batch.frames)[0]
    model.train()
    return all(lies_on(answer, label, box) for label, box in enumerate(batch.boxes.boxes_xyxy))


def lies_on(answer: Detections, label: int, box: Tensor) -> bool:
    places = (answer.labels == label).nonzero()[0]
    if len(places) == 0 or answer.scores[places[0]] < 0.5:
        return False
    return bool(box_iou(torch.from_numpy(answer.boxes_xyxy[places[:1]]), box[None]) > 0.5)


def test_two_rectangles_are_learnt_by_heart() -> None:
    few = {"anchor_sizes": ((32,),), "post_nms_train": 32, "post_nms_test": 32, "rois_per_image": 16}
    model, batch = build(2, fc_features=64, **few).train(), scene()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(150):
        optimizer.zero_grad()
        torch.autograd.backward([*losses(model, batch).values()])
        optimizer.step()
        if step % 5 == 4 and found_by_heart(model, batch):
            return
    pytest.fail("not found after 150 steps")


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [("alexnet", "alexnet"), ("squeezenet1_0", "squeezenet1_0"), ("vgg16", "vgg16"), ("resnet50_fpn", "resnet50")],
)
def test_weights_of_a_classifier_fit_the_backbone_by_their_names(backbone: Any, classifier: str) -> None:
    with torch.device("meta"):
        model = faster_rcnn.build(Config(backbone=backbone))
        names = getattr(torchvision.models, classifier)().state_dict()
    inside = model.get_submodule(model.backbone).state_dict()
    assert {name: value.shape for name, value in inside.items()} == {
        name: value.shape for name, value in names.items() if not name.startswith(("classifier", "fc"))
    }


@pytest.mark.parametrize(
    ("backbone", "patterns"),
    [
        ("resnet50_fpn", ("network.backbone.body.*bn*", "*.downsample.1.*")),
        ("mobilenet_v3_320", ("network.backbone.body.*.1.weight", "network.backbone.body.*.1.bias")),
    ],
)
def test_patterns_that_the_docstring_names_freeze_the_normalisations_alone(
    backbone: Any, patterns: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        model = faster_rcnn.build(Config(backbone=backbone))
    start.freeze(model, start.Freeze(names=patterns))
    text = " ".join(str(faster_rcnn.__doc__).split())
    assert all(f"`{pattern}`" in text for pattern in patterns)
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            assert parameter.requires_grad != isinstance(layer, nn.BatchNorm2d)


def test_head_that_follows_from_the_classes_is_named() -> None:
    shapes = [{k: v.shape for k, v in build(num_classes=count).state_dict().items()} for count in (2, 5)]
    differing = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in differing} == set(FasterRCNN.heads)


def test_defaults_follow_the_backbone_and_read_back() -> None:
    papers = configuration.parse(Config, {}, "here")
    assert (papers.pre_nms_test, papers.post_nms_test, papers.rois_per_image) == (6000, 300, 128)
    mobile = configuration.parse(Config, {"backbone": "mobilenet_v3_320", "post_nms_test": 99}, "here")
    assert (mobile.pre_nms_test, mobile.post_nms_test, mobile.rois_per_image) == (150, 99, 512)
    assert (mobile.input.fit.short_side, mobile.input.fit.long_side) == (320, 640)
    assert configuration.parse(Config, mobile.model_dump(mode="json"), "again") == mobile


def test_pyramid_has_no_one_stride() -> None:
    with pytest.raises(ConfigError, match="stride: backbone 'mobilenet_v3_320' has maps of several"):
        configuration.parse(Config, {"backbone": "mobilenet_v3_320", "stride": 8}, "here")


@pytest.mark.parametrize("sizes", [[], [[]], [[32], [64]]])
def test_anchors_for_another_number_of_maps_are_refused(sizes: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="has 1 maps"):
        configuration.parse(Config, {"anchor_sizes": sizes}, "here")


def test_pyramid_needs_as_many_anchors_on_every_map() -> None:
    raw = {"backbone": "mobilenet_v3_320", "anchor_sizes": [[32, 64], [128], [256]]}
    with pytest.raises(ConfigError, match="all of one length"):
        configuration.parse(Config, raw, "here")


@pytest.mark.parametrize("backbone", ["squeezenet1_1", "mobilenet_v3_320"])
def test_grey_network_takes_colour_pictures(backbone: Any) -> None:
    spec = dataclasses.replace(Config().input, mean=(0.5,), std=(0.25,))
    sizes = ((32,),) * faster_rcnn.NUM_MAPS.get(backbone, 1)
    model = build(backbone=backbone, anchor_sizes=sizes, input=spec).eval()
    with torch.no_grad():
        assert model(Batch(noise(1))).regions.logits.shape[1] == 3
