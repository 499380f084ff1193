"""Initial weights from every place, fresh heads, frozen layers; a registry is a function that is passed in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.errors import BundleError, ConfigError, ModelError
from pipeline.inference import bundle, importing
from pipeline.inference.bundle import Bundle
from pipeline.models._contract import Classifier, ModelConfig
from pipeline.models._detector import Detector
from pipeline.training import start
from pipeline.training.optim import Config as Optim
from pipeline.training.optim import build_optimizer

CLASSES = ("ant", "bee", "cat")


def net(num_classes: int = 3, **keys: Any) -> ModelConfig:
    raw = {"name": "alexnet", "fc_features": 8, "norm": "batch", "num_classes": num_classes}
    return parse(models.config_of("alexnet"), raw | {"input": {"size_hw": [64, 64]}} | keys, "here")


def built(config: ModelConfig, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return models.build_classifier(config)


def config(weights: str, **keys: Any) -> start.Config:
    return parse(start.Config, {"weights": weights} | keys, "here")


def nowhere(reference: str) -> Bundle:
    raise AssertionError(f"asked the registry for {reference}")


def plain(model: Classifier) -> dict[str, Tensor]:
    """The state dict as others have it: without `network.`."""
    return {name.removeprefix("network."): value for name, value in model.state_dict().items()}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Classifier, Path]:
    """A model of three classes, and a folder with its weights in every form."""
    model = built(net(), seed=7)
    bundle.save(tmp_path / "bundle", model, net(), classes=CLASSES)
    torch.save(plain(model), tmp_path / "weights.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in plain(model).items()}}, tmp_path / "old.th")
    save_file(plain(model), tmp_path / "weights.safetensors")
    return model, tmp_path


def equal_but(one: nn.Module, other: nn.Module, fresh: str) -> bool:
    """Whether two models agree everywhere but under a prefix, and nowhere there."""
    pairs = [(name, value, other.state_dict()[name]) for name, value in one.state_dict().items()]
    return all(torch.equal(mine, theirs) != name.startswith(fresh) for name, mine, theirs in pairs)


@pytest.mark.parametrize("where", ["bundle", "weights.pth", "old.th", "weights.safetensors"])
def test_weights_of_every_form_start_a_model_with_a_fresh_head(where: str, trained: tuple[Classifier, Path]) -> None:
    model, root = trained
    weights = start.find(config(where), [root], nowhere)
    mine = built(net(5), seed=1)
    start.initialise(mine, weights, "new", tuple("abcde"))
    untouched = built(net(5), seed=1)
    assert all(
        torch.equal(value, (untouched if "classifier.6" in name else model).state_dict()[name])
        for name, value in mine.state_dict().items()
    )


def test_new_head_is_fresh_even_where_the_old_one_would_fit(trained: tuple[Classifier, Path]) -> None:
    model, root = trained
    mine = built(net(), seed=1)
    start.initialise(mine, start.find(config("bundle"), [root], nowhere), "new", ("x", "y", "z"))
    assert equal_but(mine, model, "network.classifier.6")


def test_zero_head_begins_with_equal_scores_over_the_given_body(trained: tuple[Classifier, Path]) -> None:
    model, root = trained
    mine = built(net(5), seed=1).eval()
    start.initialise(mine, start.find(config("bundle"), [root], nowhere), "zero", tuple("abcde"))
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.manual_seed(0)).to(torch.uint8)
    assert torch.equal(mine.scores(mine(Batch(images))), torch.full((2, 5), 0.2))
    assert equal_but(mine, model, "network.classifier.6")


def test_kept_head_gives_the_outputs_of_the_weights(trained: tuple[Classifier, Path]) -> None:
    model, root = trained
    mine = built(net(), seed=1)
    start.initialise(mine, start.find(config("bundle"), [root], nowhere), "keep", CLASSES)
    batch = Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert torch.equal(mine.eval()(batch), model.eval()(batch))


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("ant", "bee"), "has 3 classes, the dataset 2; set start.head to new"),
        (("ant", "cat", "bee"), "class 1 is 'bee', in the dataset it is 'cat'"),
    ],
)
def test_kept_head_of_other_classes_is_refused(
    trained: tuple[Classifier, Path], classes: tuple[str, ...], sentence: str
) -> None:
    weights = start.find(config("bundle"), [trained[1]], nowhere)
    with pytest.raises(ConfigError, match=sentence):
        start.initialise(built(net(len(classes))), weights, "keep", classes)


def test_registered_models_are_asked_of_the_function_that_knows_the_registry(trained: tuple[Classifier, Path]) -> None:
    _, root = trained
    asked: list[str] = []

    def registered(reference: str) -> Bundle:
        asked.append(reference)
        return bundle.load(root / "bundle")

    weights = start.find(config("models:/clothing@champion"), [root], registered)
    assert asked == ["clothing@champion"]
    assert (weights.origin, weights.classes) == ("models:/clothing@champion", CLASSES)


def test_torchvision_weights_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = torchvision.models.squeezenet1_1().state_dict()
    asked: list[str] = []

    def downloaded(name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        asked.append(name)
        return state, tuple(map(str, range(1000)))

    monkeypatch.setattr(importing, "from_torchvision", downloaded)
    weights = start.find(config("torchvision:SqueezeNet1_1_Weights.IMAGENET1K_V1"), [Path()], nowhere)
    assert asked == ["SqueezeNet1_1_Weights.IMAGENET1K_V1"]
    mine = built(parse(models.config_of("squeezenet"), {"variant": "1_1", "num_classes": 4}, "here"))
    start.initialise(mine, weights, "new", tuple("abcd"))
    found = plain(mine)
    assert all(torch.equal(value, found[name]) for name, value in state.items() if "classifier.1" not in name)
    assert found["classifier.1.weight"].shape[0] == 4


def test_weights_of_another_architecture_name_layers_and_shapes_in_one_sentence(
    trained: tuple[Classifier, Path],
) -> None:
    _, root = trained
    mine = built(net(fc_features=9))
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        start.initialise(mine, start.find(config("weights.pth"), [root], nowhere), "new", CLASSES)
    assert "network.classifier.1.weight: the model expects [9, 9216], the weights hold [8, 9216]" in str(caught.value)
    assert "and 1 more; choose the architecture" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_counters_that_old_files_lack_start_at_0(trained: tuple[Classifier, Path], tmp_path: Path) -> None:
    model, root = trained
    kept = {name: value for name, value in plain(model).items() if "num_batches" not in name}
    torch.save(kept, tmp_path / "older.pth")
    mine = built(net(), seed=1)
    start.initialise(mine, start.find(config("older.pth"), [root], nowhere), "keep", CLASSES)
    assert all(torch.equal(value, plain(mine)[name]) for name, value in kept.items())


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.pth: cannot be read \(No such file or directory\)"):
        start.find(config("none.pth"), [tmp_path], nowhere)


def test_a_relative_path_is_looked_for_in_each_folder(trained: tuple[Classifier, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert start.find(config("bundle"), [elsewhere, trained[1]], nowhere).classes == CLASSES


def test_another_normalisation_than_the_weights_had_is_said(
    trained: tuple[Classifier, Path], caplog: pytest.LogCaptureFixture
) -> None:
    weights = start.find(config("bundle"), [trained[1]], nowhere)
    start.initialise(built(net()), weights, "keep", CLASSES)
    assert not caplog.records
    assert weights.spec is not None
    other = replace(weights, spec=replace(weights.spec, mean=(0.5, 0.5, 0.5)))
    start.initialise(built(net()), other, "keep", CLASSES)
    assert "was trained with input.mean (0.5, 0.5, 0.5)" in caplog.text


def test_prepared_state_is_the_same_for_every_worker_and_follows_from_the_seed(
    trained: tuple[Classifier, Path], tmp_path: Path
) -> None:
    _, root = trained
    weights = start.find(config("bundle"), [root], nowhere)
    random_state = torch.get_rng_state()
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        start.prepare(tmp_path / name, net(5), weights, config("bundle"), seed, tuple("abcde"))
    assert torch.equal(torch.get_rng_state(), random_state)
    found = {}
    for name in ("one", "same", "other"):
        found[name] = built(net(5), seed=99)
        start.restore(found[name], tmp_path / name)
    assert equal_but(found["one"], found["same"], "nothing")
    assert equal_but(found["one"], found["other"], "network.classifier.6")
    assert sorted(path.suffix for path in tmp_path.iterdir()).count(".partial") == 0


def trainable(model: nn.Module) -> set[str]:
    return {name.removeprefix("network.") for name, value in model.named_parameters() if value.requires_grad}


def test_first_blocks_are_frozen_with_their_normalisation() -> None:
    model = built(net())
    start.freeze(model, start.Freeze(first=6))
    assert trainable(model) == {f"classifier.{layer}.{kind}" for layer in (4, 6) for kind in ("weight", "bias")}


def test_names_freeze_what_they_match() -> None:
    model = built(net())
    start.freeze(model, start.Freeze(names=("network.classifier.[14].*", "*.norm*.weight")))
    left = trainable(model)
    assert {"classifier.6.weight", "features.norm1.bias"} <= left
    assert not {"classifier.1.weight", "classifier.4.bias", "features.norm5.weight"} & left


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"first": 9}, "expected at most 8 blocks, got 9"),
        ({"first": 8}, "nothing to train"),
        ({"names": ["features.*"]}, r"'features\.\*' matches no parameter; there are for example \['network\."),
        ({"names": ["*"]}, "nothing to train"),
    ],
)
def test_impossible_freezing_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start.freeze(built(net()), parse(start.Freeze, keys, "here"))


def test_frozen_layers_keep_weights_and_statistics_while_the_rest_learns() -> None:
    model = built(net())
    start.freeze(model, start.Freeze(first=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, Optim(lr=0.1))
    start.hold_norms(model.train())
    batch = Batch(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    torch.autograd.backward(model.loss(model(batch), torch.tensor([0, 1, 2, 0]))["cross_entropy"])
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("network.features.0.", "network.features.norm1.", "network.features.3.", "network.features.norm2.")
    assert changed == {name for name in before if not name.startswith(frozen)}


def detector(**keys: Any) -> Detector:
    raw = {"backbone": "squeezenet1_1", "channels": 16, "num_classes": 3, "input": {"fit": {"size_hw": [64, 64]}}}
    torch.manual_seed(0)
    model = models.build(parse(models.config_of("yolo_multiscale"), raw | keys, "here"))
    assert isinstance(model, Detector)
    return model


def test_a_classifiers_weights_fit_into_a_detectors_backbone_and_the_rest_stays_as_it_is() -> None:
    torch.manual_seed(7)
    classifier = models.build(parse(models.config_of("squeezenet"), {"variant": "1_1", "num_classes": 4}, "here"))
    model, before = detector(), detector().state_dict()
    start.initialise(model, start.Weights("here", classifier.state_dict()), "new", CLASSES, "backbone")
    given = {name.removeprefix("network."): value for name, value in classifier.state_dict().items()}
    for name, value in model.state_dict().items():
        own = name.removeprefix("network.backbone.")
        assert torch.equal(value, given[own] if name.startswith("network.backbone.") else before[name]), name


def test_a_pyramids_body_takes_the_features_of_a_mobilenet() -> None:
    classifier = torchvision.models.mobilenet_v3_large(num_classes=3)
    model = models.build(parse(models.config_of("faster_rcnn"), {"backbone": "mobilenet_v3_320"}, "here"))
    start.initialise(model, start.Weights("here", classifier.state_dict()), "new", CLASSES, "backbone")
    found = model.get_submodule(model.backbone).state_dict() if isinstance(model, Detector) else {}
    assert torch.equal(found["0.0.weight"], classifier.state_dict()["features.0.0.weight"])


def test_weights_of_another_backbone_are_refused_by_name() -> None:
    alexnet = torchvision.models.alexnet(num_classes=3).state_dict()
    with pytest.raises(ModelError, match=r"network\.backbone\.features\.\d+\S*: the model expects"):
        start.initialise(detector(), start.Weights("here", alexnet), "new", CLASSES, "backbone")


def test_a_classifier_has_no_backbone_to_load_into() -> None:
    model = built(net())
    with pytest.raises(ConfigError, match=r"start\.part: only a detector has a backbone"):
        start.initialise(model, start.Weights("here", model.state_dict()), "new", CLASSES, "backbone")


@pytest.mark.parametrize("head", ["new", "zero"])
def test_a_detector_of_other_classes_gives_all_but_the_layers_of_the_classes(head: Literal["new", "zero"]) -> None:
    given, model, before = detector(num_classes=5), detector(), detector().state_dict()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.add_(0.5)
    start.initialise(model, start.Weights("here", given.state_dict()), head, CLASSES)
    for name, value in model.state_dict().items():
        if any(name.startswith(f"{path}.") for path in model.heads):
            assert torch.equal(value, before[name] if head == "new" else torch.zeros_like(value))
        else:
            assert torch.equal(value, given.state_dict()[name])


def test_kept_head_of_a_detector_answers_as_the_weights_did() -> None:
    given, model = detector(), detector()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.mul_(1.5)
    start.initialise(model, start.Weights("here", given.state_dict(), CLASSES), "keep", CLASSES)
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (("ant", "bee"), "has 3 classes, the dataset 2; set start.head to new"),
        (("ant", "bee", "cow"), "class 2 is 'cat', in the dataset it is 'cow'"),
        (("bee", "ant", "cat"), "class 0 is 'ant', in the dataset it is 'bee'"),
    ],
)
def test_kept_head_of_a_detector_of_other_classes_is_refused(classes: tuple[str, ...], sentence: str) -> None:
    weights = start.Weights("here", detector().state_dict(), CLASSES)
    with pytest.raises(ConfigError, match=sentence):
        start.initialise(detector(num_classes=len(classes)), weights, "keep", classes)


def test_kept_head_of_a_detector_whose_classes_are_unknown_is_refused_by_its_layers() -> None:
    weights = start.Weights("here", detector().state_dict())
    with pytest.raises(ModelError, match=r"network\.classes\.0\.weight"):
        start.initialise(detector(num_classes=5), weights, "keep", tuple("abcde"))


def test_blocks_of_a_detector_are_counted_from_the_first_layer_of_its_backbone() -> None:
    model = detector()
    start.freeze(model, start.Freeze(first=2))
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert all(name.startswith("network.backbone.features.") for name in frozen)
    assert "network.backbone.features.0.weight" in frozen
    assert any(name.startswith("network.backbone.features.12") for name in model.state_dict().keys() - frozen)
