"""Nets that are torchvision's, and ZFNet: their weights load unchanged and give the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data.transforms import classify
from pipeline.errors import ConfigError
from pipeline.inference import bundle, importing
from pipeline.models._contract import Classifier


def build(name: str, **keys: Any) -> Classifier:
    torch.manual_seed(0)
    return models.build_classifier(parse(models.config_of(name), keys, "here"))


@pytest.mark.parametrize(
    ("name", "keys", "theirs"),
    [
        ("resnet", {"depth": 18}, "resnet18"),
        ("resnet", {}, "resnet50"),
        ("squeezenet", {}, "squeezenet1_0"),
        ("squeezenet", {"variant": "1_1", "final_relu": False}, "squeezenet1_1"),
        ("vgg", {}, "vgg16"),
        ("vgg", {"depth": 11, "batch_norm": True}, "vgg11_bn"),
        ("vgg", {"depth": 13}, "vgg13"),
        ("vgg", {"depth": 19}, "vgg19"),
    ],
)
def test_names_and_shapes_of_weights_are_torchvisions(name: str, keys: dict[str, Any], theirs: str) -> None:
    with torch.device("meta"):
        mine = build(name, **keys).network.state_dict()
        other = getattr(torchvision.models, theirs)().state_dict()
    assert [(key, value.shape) for key, value in mine.items()] == [(key, value.shape) for key, value in other.items()]


@pytest.mark.parametrize(
    ("name", "keys", "theirs"),
    [
        ("resnet", {"depth": 18}, "resnet18"),
        ("squeezenet", {}, "squeezenet1_0"),
        ("vgg", {"depth": 11}, "vgg11"),
    ],
)
def test_torchvision_file_becomes_a_bundle_with_torchvisions_outputs(
    name: str, keys: dict[str, Any], theirs: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = getattr(torchvision.models, theirs)().eval()
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    raw = {"model": {"name": name} | keys, "weights": "weights.pth", "classes": [str(at) for at in range(1000)]}
    importing.bundle_from(parse(importing.Config, raw, "here"), tmp_path, tmp_path / "made")
    mine = bundle.load(tmp_path / "made").build()
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = other((pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(mine(Batch(pixels)), expected, rtol=1e-3, atol=1e-4)


def test_real_squeezenet_weights_name_accordions_and_airliners(real_data: Path) -> None:
    classes = torchvision.models.SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]
    model = build("squeezenet").eval()
    weights = real_data / "weights/squeezenet/squeezenet1_0_imagenet.pth"
    importing.load_state(model, importing.read_state(weights), str(weights))
    for folder, expected in (("accordion", "accordion"), ("airplanes", "airliner")):
        files = sorted((real_data / "caltech/val" / folder).iterdir())
        views = [torch.from_numpy(classify.evaluation(file.read_bytes(), model.spec)[0]) for file in files]
        with torch.inference_mode():
            named = [classes[label] for label in model(Batch(torch.stack(views))).argmax(1)]
        assert named.count(expected) >= 0.7 * len(files), named


def test_squeezenet_without_its_last_relu_has_logits_below_0() -> None:
    pixels = torch.randn(4, 3, 64, 64, generator=torch.manual_seed(0))
    outputs = {relu: build("squeezenet", final_relu=relu).eval().network(pixels) for relu in (True, False)}
    assert outputs[True].min() == 0
    assert outputs[False].min() < 0


def test_maps_of_zfnet_at_224_are_the_papers() -> None:
    with torch.device("meta"):
        features = build("zfnet").network.get_submodule("features")
        x, sizes = torch.zeros(1, 3, 224, 224), []
        for layer in features.children():
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(96, 110), (96, 55), (256, 26), (256, 13), (384, 13), (384, 13), (256, 13), (256, 6)]


def test_zfnet_starts_as_the_paper_says_and_batch_norm_takes_the_biases() -> None:
    layers = [part for part in build("zfnet", fc_features=64).modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert [layer.weight.std().item() for layer in layers] == pytest.approx([0.01] * 8, rel=0.1)
    assert all(layer.bias is not None and not layer.bias.any() for layer in layers)
    normed = [type(part).__name__ for part in build("zfnet", fc_features=8, norm="batch").modules()]
    assert (normed.count("BatchNorm2d"), normed.count("ResponseNorm")) == (5, 0)
    plain = [type(part).__name__ for part in build("zfnet", fc_features=8).modules()]
    assert plain.count("ResponseNorm") == 2


@pytest.mark.parametrize(
    ("name", "keys", "smallest"),
    [
        ("zfnet", {"fc_features": 8}, 47),
        ("vgg", {"fc_features": 8, "depth": 11}, 32),
        ("squeezenet", {}, 21),
        ("squeezenet", {"variant": "1_1"}, 17),
    ],
)
def test_smallest_input_works_and_one_pixel_less_is_refused(name: str, keys: dict[str, Any], smallest: int) -> None:
    net = build(name, input={"size_hw": [smallest, smallest]}, num_classes=3, **keys).network.eval()
    assert net(torch.zeros(1, 3, smallest, smallest)).shape == (1, 3)
    with pytest.raises(ConfigError, match=f"at least {smallest}x{smallest}, got input.size_hw"):
        build(name, input={"size_hw": [smallest - 1, smallest - 1]}, **keys)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("zfnet", {"fc_features": 8}),
        ("vgg", {"fc_features": 8, "depth": 11}),
        ("resnet", {"depth": 18}),
        ("squeezenet", {}),
    ],
)
def test_grey_images_need_one_channel_of_the_first_layer(name: str, keys: dict[str, Any]) -> None:
    grey = {"size_hw": [64, 64], "mean": [0.5], "std": [0.5]}
    model = build(name, input=grey, num_classes=3, **keys).eval()
    assert model(Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))).shape == (1, 3)


def test_deep_residual_nets_may_start_as_shallow_ones() -> None:
    scales = [
        part.weight.detach()
        for name, part in build("resnet", depth=18, zero_init=True).named_modules()
        if name.endswith("bn2") and isinstance(part, nn.BatchNorm2d)
    ]
    assert len(scales) == 8
    assert not torch.stack([scale.abs().max() for scale in scales]).any()
