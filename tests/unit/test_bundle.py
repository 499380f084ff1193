"""Bundles: the same model comes back, and what is missing or altered is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import models
from pipeline.batch import Batch
from pipeline.errors import BundleError
from pipeline.imaging import Decoding
from pipeline.inference import bundle
from pipeline.models._contract import Classifier, ModelConfig

CLASSES = ("ant", "bee", "cat")


def lenet() -> tuple[Classifier, ModelConfig]:
    torch.manual_seed(0)
    config = models.config_of("lenet5")(name="lenet5", num_classes=3)
    return models.build_classifier(config), config


@pytest.fixture
def saved(tmp_path: Path) -> bundle.Bundle:
    model, config = lenet()
    return bundle.save(
        tmp_path / "model",
        model,
        config,
        classes=CLASSES,
        decoding=Decoding(max_pixels=5000),
        metrics={"val/top1": 0.5},
        provenance={"commit": "abc"},
    )


def change(path: Path, **keys: Any) -> None:
    card = json.loads((path / bundle.CARD).read_text())
    (path / bundle.CARD).write_text(json.dumps(card | keys))


def test_saved_and_loaded_bundle_is_the_same_and_builds_the_same_model(saved: bundle.Bundle) -> None:
    loaded = bundle.load(saved.path)
    assert loaded == saved
    assert (loaded.card.classes, loaded.card.decoding.max_pixels) == (CLASSES, 5000)
    batch = Batch(torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8))
    model = loaded.build()
    assert not model.training
    other = lenet()[0].eval()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    torch.testing.assert_close(model(batch), other(batch))  # to the last bits: its weights are laid out otherwise


def test_save_replaces_a_bundle_and_leaves_nothing_beside_it(saved: bundle.Bundle) -> None:
    model, config = lenet()
    bundle.save(saved.path, model, config, classes=("x", "y", "z"))
    assert bundle.load(saved.path).card.classes == ("x", "y", "z")
    assert [path.name for path in saved.path.parent.iterdir()] == [saved.path.name]
    assert {path.name for path in saved.path.iterdir()} == {bundle.CARD, bundle.WEIGHTS}


@pytest.mark.parametrize("at", [0, 200, -1])
def test_weights_with_a_flipped_byte_are_refused(saved: bundle.Bundle, at: int) -> None:
    data = bytearray((saved.path / bundle.WEIGHTS).read_bytes())
    data[at] ^= 1
    (saved.path / bundle.WEIGHTS).write_bytes(data)
    with pytest.raises(
        BundleError, match=r"weights\.safetensors: sha256 differs from model\.json .*; copy or download"
    ):
        bundle.load(saved.path)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"task": "detection"}, "task"),
        ({"model": {"name": "resnet9000"}}, "unknown model 'resnet9000'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_card_of_another_version_names_the_first_difference(
    saved: bundle.Bundle, keys: dict[str, Any], sentence: str
) -> None:
    change(saved.path, **keys)
    with pytest.raises(BundleError, match=rf"not a card this version reads: .*{sentence}"):
        bundle.load(saved.path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe"])
def test_card_that_is_no_json_is_a_bundle_error(saved: bundle.Bundle, data: bytes) -> None:
    (saved.path / bundle.CARD).write_bytes(data)
    with pytest.raises(BundleError, match="not a card this version reads"):
        bundle.load(saved.path)


def test_missing_parts_are_named(saved: bundle.Bundle, tmp_path: Path) -> None:
    (saved.path / bundle.WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors is missing; copy or download the bundle again"):
        bundle.load(saved.path)
    with pytest.raises(BundleError, match=r"none: expected a bundle with model\.json"):
        bundle.load(tmp_path / "none")


def test_weights_of_another_architecture_do_not_build(saved: bundle.Bundle) -> None:
    change(saved.path, model={"name": "lenet5", "num_classes": 4})
    with pytest.raises(BundleError, match=r"the weights do not fit lenet5: .*output"):
        bundle.load(saved.path).build()
