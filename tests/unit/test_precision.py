"""Number formats and layouts: what computes in which, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline import models
from pipeline.config import parse
from pipeline.evaluation.live import Precision, autocast
from pipeline.models._contract import Classifier
from pipeline.training.precision import arrange, compile_network, grad_scaler


def lenet() -> Classifier:
    torch.manual_seed(0)
    return models.build_classifier(parse(models.config_of("lenet5"), {}, "here"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_convolutions_compute_in_the_precision_asked_for(precision: Precision, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(1, 2, 3)
    with autocast(precision, "cpu"):
        outputs = layer(torch.zeros(1, 1, 5, 5))
    assert outputs.dtype == dtype
    assert layer.weight.dtype == torch.float32


def overflowing_step(parameter: nn.Parameter, scaler: torch.amp.GradScaler, gradient: float) -> None:
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.scale((parameter * gradient).sum()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    parameter.grad = None


def test_fp16_leaves_out_a_step_that_overflows_and_goes_on_exactly_from_its_state() -> None:
    parameter, scaler = nn.Parameter(torch.ones(1)), grad_scaler("fp16", "cpu")
    first_scale = scaler.get_scale()
    overflowing_step(parameter, scaler, float("inf"))
    assert parameter.item() == 1.0
    assert scaler.get_scale() == first_scale / 2
    resumed = grad_scaler("fp16", "cpu")
    resumed.load_state_dict(copy.deepcopy(scaler.state_dict()))
    for one in (scaler, resumed):
        overflowing_step(nn.Parameter(torch.ones(1)), one, 0.5)
    assert resumed.state_dict() == scaler.state_dict()
    assert scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scaler_of_other_precisions_changes_nothing(precision: Precision) -> None:
    scaler, loss = grad_scaler(precision, "cpu"), torch.tensor(3.0)
    assert scaler.scale(loss) is loss
    assert scaler.state_dict() == {}


def test_channels_last_changes_the_layout_and_no_value() -> None:
    model = lenet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arranged = arrange(model, channels_last=True, sync_batch_norm=False)
    weight = dict(arranged.named_parameters())["network.c3.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in arranged.state_dict().items())


def test_batch_norm_stays_in_one_process_and_on_cpus(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert type(arrange(model, channels_last=False, sync_batch_norm=True)[1]) is nn.BatchNorm2d
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert type(arrange(model, channels_last=False, sync_batch_norm=True)[1]) is nn.BatchNorm2d
    finally:
        dist.destroy_process_group()


def test_batch_norm_is_synchronised_between_gpus_and_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    names = list(model.state_dict())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    arranged = arrange(model, channels_last=False, sync_batch_norm=True)
    assert type(arranged[1]) is nn.SyncBatchNorm
    assert list(arranged.state_dict()) == names


def test_compiling_asks_torch_once_and_keeps_the_names() -> None:
    model = lenet()
    names = list(model.state_dict())
    compile_network(model)
    assert list(model.state_dict()) == names
    assert model.network._compiled_call_impl is not None
    assert model._compiled_call_impl is None
