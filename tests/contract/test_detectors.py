"""What every detector promises: for every file in `pipeline/models` whose task is detection, present and future.

`SMALL` makes expensive models quick, `MORE` adds configurations worth their own pass; a model in neither is tested as
it stands.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save

from pipeline import config as configuration
from pipeline import models
from pipeline.batch import Batch, BoxTargets
from pipeline.errors import ModelError
from pipeline.models._detector import Detector, DetectorConfig, Selection
from pipeline.types import Frame

DETECTORS = [name for name in models.names() if models.config_of(name).task == "detection"]
SIDE = 64
FIXED: dict[str, Any] = {"num_classes": 3, "input": {"fit": {"way": "stretch", "size_hw": [SIDE, SIDE]}}}
SMALL: dict[str, dict[str, Any]] = {
    "alexnet_localizer": {"fc_features": 32, "dropout": 0.0},
    "fast_rcnn": {"backbone": "squeezenet1_1", "fc_features": 32, "rois_per_image": 16},
    "faster_rcnn": {
        "backbone": "squeezenet1_1",
        "fc_features": 32,
        "anchor_sizes": [[16, 32]],
        "post_nms_train": 50,
        "post_nms_test": 20,
    },
    "rcnn": {
        "backbone": "squeezenet1_1",
        "region_side": 48,
        "context": 4,
        "pool_size": 2,
        "fc_features": 32,
        "dropout": 0.0,
        "rois_per_image": 16,
    },
    "yolo": {"variant": "fast", "fc_features": 32, "dropout": 0.0},
    "yolo_multiscale": {"backbone": "squeezenet1_1", "channels": 16},
}
MORE: list[tuple[str, dict[str, Any]]] = [
    ("faster_rcnn", {"backbone": "alexnet"}),
    ("fast_rcnn", {"backbone": "alexnet", "region_pooling": "align"}),
    ("rcnn", {"scorer": "svm"}),
    ("yolo_multiscale", {"backbone": "mobilenet_v3_large"}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every detector, once per value of its key `variant` where it has one."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in DETECTORS:
        field = models.config_of(name).model_fields.get("variant")
        values = get_args(field.annotation) if field else ()
        found += [(name, {"variant": value}) for value in values] or [(name, {})]
    return found


def label(case: Any) -> str | None:
    if isinstance(case, str):
        return case
    return ",".join(map(str, case.values())) or "default" if isinstance(case, dict) else None


every_variant = pytest.mark.parametrize(("name", "keys"), variants(), ids=label)
CASES: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in DETECTORS), *MORE]
every_case = pytest.mark.parametrize(("name", "keys"), CASES, ids=label)


def small(name: str, keys: dict[str, Any]) -> DetectorConfig:
    config = configuration.parse(models.config_of(name), {**FIXED, **SMALL.get(name, {}), **keys}, name)
    assert isinstance(config, DetectorConfig)
    return config


def build(name: str, keys: dict[str, Any], seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    model = models.build(small(name, keys))
    assert isinstance(model, Detector)
    return model


def pictures(count: int) -> Batch:
    """Noise with a bright rectangle in each picture but the last, which is its one object."""
    images = torch.randint(0, 60, (count, 3, SIDE, SIDE), generator=torch.manual_seed(7))
    boxes = torch.tensor([[8.0 + at, 6.0, 44.0, 50.0 - at] for at in range(count - 1)]).reshape(-1, 4)
    for at, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        images[at, at % 3, top:bottom, left:right] += 190
    numbers = torch.arange(count - 1)
    targets = BoxTargets(boxes, numbers % 3, numbers, count)
    whole = torch.tensor([[0.0, 0.0, SIDE, SIDE], [8.0, 8.0, 40.0, 48.0], [20.0, 20.0, 60.0, 60.0]])
    frames = (Frame((SIDE, SIDE), (SIDE, SIDE)),) * count
    return Batch(images.to(torch.uint8), targets, frames, proposals=(whole,) * count)


def total(model: Detector, batch: Batch) -> torch.Tensor:
    assert isinstance(batch.targets, BoxTargets)
    return torch.stack([*model.loss(model(batch), batch.targets).values()]).sum()


@pytest.mark.parametrize("name", DETECTORS)
def test_config_of_every_file_names_that_file_and_no_other(name: str) -> None:
    schema = models.config_of(name)
    assert schema.model_validate({}).model_dump()["name"] == name
    assert Path(str(importlib.import_module(schema.__module__).__file__)).stem == name
    with pytest.raises(ValidationError, match="name"):
        schema.model_validate({"name": "another"})


@every_variant
def test_parameter_count_at_full_size_is_the_one_its_docstring_prints(name: str, keys: dict[str, Any]) -> None:
    config = configuration.parse(models.config_of(name), keys, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in models.build(config).parameters())
    assert f"{count:,}" in str(importlib.import_module(type(config).__module__).__doc__)


@every_case
def test_answers_are_boxes_inside_the_original_best_first(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), pictures(3)
    frames = (Frame((200, 100), (SIDE, SIDE), (0.64, 0.32)),) * 3
    with torch.no_grad():
        answers = model.postprocess(model(batch), frames)
    assert len(answers) == 3
    for answer in answers:
        assert answer.boxes_xyxy.dtype == answer.scores.dtype == np.float32
        assert (np.diff(answer.scores) <= 0).all()
        assert ((answer.scores >= 0) & (answer.scores <= 1)).all()
        assert set(answer.labels.tolist()) <= {0, 1, 2}
        assert (answer.boxes_xyxy >= 0).all()
        assert (answer.boxes_xyxy <= [100, 200, 100, 200]).all()
        assert (answer.boxes_xyxy[:, 2:] > answer.boxes_xyxy[:, :2]).all()
        assert len(answer) <= model.select.max_detections


@every_case
def test_answers_follow_the_frame_of_their_picture(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), pictures(1)
    with torch.no_grad():
        outputs = model(batch)
        (plain,) = model.postprocess(outputs, batch.frames)
        (twice,) = model.postprocess(outputs, (Frame((2 * SIDE, 2 * SIDE), (SIDE, SIDE), (0.5, 0.5)),))
    np.testing.assert_allclose(twice.boxes_xyxy, 2 * plain.boxes_xyxy, atol=1e-3)
    np.testing.assert_array_equal(twice.labels, plain.labels)


@every_case
def test_selection_bounds_scores_overlaps_and_number(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), pictures(2)
    with torch.no_grad():
        outputs = model(batch)
    everything = Selection(score_threshold=0.0, iou_threshold=1.0, max_detections=1000)
    every = model.postprocess(outputs, batch.frames, everything)[0]
    few = model.postprocess(outputs, batch.frames, everything.model_copy(update={"max_detections": 2}))[0]
    assert len(few) <= 2 <= len(every)
    middle = float(np.median(every.scores))
    above = model.postprocess(outputs, batch.frames, everything.model_copy(update={"score_threshold": middle}))[0]
    assert (above.scores > middle).all()
    assert len(above) <= len(every)


@every_case
def test_outputs_of_uint8_and_float_pixels_are_equal(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), pictures(2)
    with torch.no_grad():
        first, second = (
            model.postprocess(model(one), batch.frames) for one in (batch, replace(batch, images=batch.images.float()))
        )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)


@every_case
def test_answers_about_an_image_do_not_depend_on_its_neighbours(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), replace(pictures(3), targets=None)
    with torch.no_grad():
        together = model.postprocess(model(batch), batch.frames)[1]
        (alone,) = model.postprocess(model(batch.part(1, 2)), batch.frames[1:2])
    assert len(together) == len(alone)
    np.testing.assert_allclose(np.sort(together.scores), np.sort(alone.scores), atol=1e-4)


@every_case
def test_loss_is_finite_named_scalars_that_reach_every_parameter(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).train(), pictures(4)
    assert isinstance(batch.targets, BoxTargets)
    losses = model.loss(model(batch), batch.targets)
    assert losses
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    torch.autograd.backward([*losses.values()])
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@every_case
def test_a_batch_without_any_object_has_a_finite_loss_with_a_gradient_for_all(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).train(), pictures(2)
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2)
    loss = total(model, replace(batch, targets=nothing))
    assert loss.isfinite()
    torch.autograd.backward(loss)
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@every_case
def test_validation_loss_is_that_of_the_seed_and_changes_nothing(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).eval(), pictures(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = []
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(3)
            losses.append(total(model, batch))
    assert losses[0] == losses[1]
    assert losses[0].isfinite()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every_case
def test_loss_has_no_parameters_of_its_own_and_falls_in_a_few_steps(name: str, keys: dict[str, Any]) -> None:
    model, batch = build(name, keys).train(), pictures(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = total(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[1:]) < losses[0]


@every_case
def test_pictures_far_longer_than_wide_are_learnt_from_and_answered(name: str, keys: dict[str, Any]) -> None:
    """As a fit that keeps the aspect, where the model allows one, leaves what is 10,000 pixels across."""
    keeps = models.config_of(name).model_fields["input"].default.fit.way != "stretch"
    model = build(
        name, {**keys, "input": {"fit": {"way": "resize", "short_side": 1, "long_side": SIDE}}} if keeps else keys
    )
    for original_hw in ((100, 10_000), (10_000, 100)):
        frame = model.spec.fit.frame(original_hw)
        assert min(frame.input_hw) == (1 if keeps else SIDE)
        images = torch.full((1, 3, *frame.input_hw), 200, dtype=torch.uint8)
        whole = torch.tensor([[0.0, 0.0, frame.input_hw[1], frame.input_hw[0]]])
        targets = BoxTargets(whole, torch.tensor([1]), torch.tensor([0]), 1)
        batch = Batch(images, targets, (frame,), proposals=(whole,))
        model.train().zero_grad()
        loss = total(model, batch)
        torch.autograd.backward(loss)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        with torch.no_grad():
            (answer,) = model.eval().postprocess(model(replace(batch, targets=None)), batch.frames)
        assert (answer.boxes_xyxy >= 0).all()
        assert (answer.boxes_xyxy <= [original_hw[1], original_hw[0]] * 2).all()


@every_case
def test_exported_network_gives_equal_outputs_for_any_number_of_inputs(name: str, keys: dict[str, Any]) -> None:
    model, inputs = build(name, keys).eval(), []
    model.network.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(pictures(3))
    whole = inputs[0]
    count = torch.export.Dim("count")
    exported = torch.export.export(model.network, (whole[:2],), dynamic_shapes=({0: count},)).module()
    for number in (1, len(whole)):
        with torch.no_grad():
            torch.testing.assert_close(exported(whole[:number]), model.network(whole[:number]), rtol=1e-4, atol=1e-5)


@every_case
def test_state_dict_survives_safetensors_and_holds_no_constants(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys).eval()
    state = load(save({key: value.contiguous() for key, value in model.state_dict().items()}))
    other = build(name, keys, seed=1).eval()
    other.load_state_dict(state)
    assert not [key for key in state if key.startswith("normalize")]
    batch = pictures(1)
    with torch.no_grad():
        one, two = (found.postprocess(found(batch), batch.frames)[0] for found in (model, other))
    np.testing.assert_array_equal(one.boxes_xyxy, two.boxes_xyxy)


@every_case
def test_backbone_and_heads_are_parts_that_exist(name: str, keys: dict[str, Any]) -> None:
    model = build(name, keys)
    assert [*model.get_submodule(model.backbone).parameters()]
    others = build(name, {**keys, "num_classes": 5}).state_dict()
    changed = {key for key, value in model.state_dict().items() if value.shape != others[key].shape}
    inside = {key for key in model.state_dict() if any(key.startswith(f"{path}.") for path in model.heads)}
    assert changed
    assert changed <= inside


@every_case
def test_images_of_other_channels_are_refused(name: str, keys: dict[str, Any]) -> None:
    batch = pictures(1)
    with pytest.raises(ModelError, match="expected images"):
        build(name, keys)(replace(batch, images=batch.images[:, :1]))
