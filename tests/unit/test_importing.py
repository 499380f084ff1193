"""Weights from elsewhere: files with plain or prefixed names, and everything that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import BundleError, ConfigError, ModelError
from pipeline.inference import bundle, importing
from pipeline.inference.importing import Config, bundle_from
from pipeline.models._contract import Classifier

LENET = {"name": "lenet5", "num_classes": 3}


def lenet() -> Classifier:
    torch.manual_seed(5)
    return models.build_classifier(parse(models.config_of("lenet5"), LENET, "here"))


def weights() -> dict[str, Tensor]:
    """As somebody else would have them: without the `network.` in front."""
    return {name.removeprefix("network."): value for name, value in lenet().state_dict().items()}


def config(name: str = "lenet.pt", **keys: Any) -> Config:
    return parse(Config, {"model": LENET, "weights": name, "classes": ["a", "b", "c"]} | keys, "here")


@pytest.mark.parametrize("form", ["plain", "module.", "network.", "state_dict", "safetensors"])
def test_weights_in_a_file_become_a_bundle(tmp_path: Path, form: str) -> None:
    name = "lenet.safetensors" if form == "safetensors" else "lenet.pt"
    if form == "safetensors":
        save_file(weights(), tmp_path / name)
    elif form == "state_dict":
        torch.save({"epoch": 3, "state_dict": weights()}, tmp_path / name)
    else:
        prefix = form.removeprefix("plain")
        torch.save({prefix + key: value for key, value in weights().items()}, tmp_path / name)
    made = bundle_from(config(name), tmp_path, tmp_path / "made")
    assert bundle.load(tmp_path / "made") == made
    assert made.card.classes == ("a", "b", "c")
    assert made.card.provenance["imported_from"] == name
    batch = Batch(torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8))
    stored = made.build().state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in lenet().state_dict().items())
    torch.testing.assert_close(made.build()(batch), lenet().eval()(batch))


def other_shape() -> dict[str, Tensor]:
    return weights() | {"c3.weight": torch.zeros(16, 5, 5, 5)}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (other_shape(), r"network\.c3\.weight: the model expects \[16, 6, 5, 5\], the weights hold \[16, 5, 5, 5\]"),
        (
            {k: v for k, v in weights().items() if k != "f6.bias"},
            r"f6\.bias: .*expects \[84\], the weights hold nothing",
        ),
        (weights() | {"extra": torch.zeros(2)}, r"extra: the model expects nothing, the weights hold \[2\]"),
    ],
)
def test_weights_that_do_not_fit_name_the_differences(tmp_path: Path, state: dict[str, Tensor], sentence: str) -> None:
    torch.save(state, tmp_path / "lenet.pt")
    with pytest.raises(ModelError, match=sentence):
        bundle_from(config(), tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"a": 1}, {"state_dict": 3}, {1: torch.zeros(3)}]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "lenet.pt")
    with pytest.raises(BundleError, match="expected a state dict of tensors, got"):
        bundle_from(config(), tmp_path, tmp_path / "made")


@pytest.mark.parametrize("name", ["lenet.pt", "lenet.safetensors"])
@pytest.mark.parametrize("data", [b"", b"text of no format", b"\x80\x02."])
def test_a_file_of_no_weights_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BundleError, match="expected a state dict or safetensors"):
        bundle_from(config(name), tmp_path, tmp_path / "made")


@pytest.mark.parametrize("name", ["lenet.pt", "lenet.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=f"{name}: cannot be read"):
        bundle_from(config(name), tmp_path, tmp_path / "made")


@pytest.mark.parametrize("name", ["AlexNet", "AlexNet_Weights.NONE_SUCH", "Nonsense_Weights.DEFAULT"])
def test_unknown_torchvision_weights_are_named(tmp_path: Path, name: str) -> None:
    given = parse(Config, {"model": {"name": "alexnet"}, "torchvision": name}, "here")
    with pytest.raises(ConfigError, match=f"torchvision has no weights '{name}'"):
        bundle_from(given, tmp_path, tmp_path / "made")


def test_class_names_come_from_a_file_and_must_be_as_many_as_outputs(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "lenet.pt")
    given = config(classes=[], classes_file="names.txt")
    (tmp_path / "names.txt").write_text("ant\n\nbeé \ncat\n", "utf-8")
    assert bundle_from(given, tmp_path, tmp_path / "made").card.classes == ("ant", "beé", "cat")
    (tmp_path / "names.txt").write_text("ant\n")
    with pytest.raises(ConfigError, match=r"model\.num_classes is 3, but there are 1 class names"):
        bundle_from(given, tmp_path, tmp_path / "made")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"names\.txt: cannot read the class names"):
        bundle_from(given, tmp_path, tmp_path / "made")


def test_class_names_of_torchvisions_weights_need_no_download(tmp_path: Path) -> None:
    wide = parse(models.config_of("lenet5"), {"num_classes": 1000}, "here")
    torch.save(models.build_classifier(wide).state_dict(), tmp_path / "lenet.pt")
    given: dict[str, Any] = {"model": {"name": "lenet5", "num_classes": 1000}, "classes": []}
    made = bundle_from(config(**given, classes_of="VGG16_Weights.DEFAULT"), tmp_path, tmp_path / "made")
    assert made.card.classes[0] == "tench"
    with pytest.raises(ConfigError, match="torchvision has no weights 'None_Weights"):
        bundle_from(config(**given, classes_of="None_Weights.X"), tmp_path, tmp_path / "made")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"torchvision": "x"}, "exactly one of torchvision and weights"),
        ({"weights": None}, "exactly one of torchvision and weights"),
        ({"classes": []}, "exactly one of classes, classes_file and classes_of"),
        ({"classes_file": "names.txt"}, "exactly one of classes, classes_file and classes_of"),
        ({"classes_of": "AlexNet_Weights.DEFAULT"}, "exactly one of classes, classes_file and classes_of"),
    ],
)
def test_two_sources_or_none_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**keys)


def test_torchvisions_published_detectors_load_by_the_names_that_they_were_stored_under() -> None:
    config = parse(models.config_of("faster_rcnn"), {"backbone": "resnet50_fpn", "num_classes": 90}, "here")
    with torch.device("meta"):
        model = models.build(config)
    stored = {
        name.removeprefix("network.")
        .replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        .replace("blocks.0.0.", "blocks.0.")
        .replace("blocks.1.0.", "blocks.1.")
        .replace("blocks.2.0.", "blocks.2.")
        .replace("blocks.3.0.", "blocks.3."): value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "rpn.head.conv.weight" in stored
    assert "backbone.fpn.inner_blocks.3.bias" in stored
    importing.load_state(model, stored, "torchvision")
    del stored["rpn.head.conv.weight"]
    with pytest.raises(ModelError, match=r"network\.rpn\.head\.conv\.0\.0\.weight: .*the weights hold nothing"):
        importing.load_state(model, stored, "torchvision")
