"""The stage `solve` on a real Ray: layers of all regions' features are those that one process finds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.config import parse
from pipeline.data import proposals, regions, shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.evaluation.run import evaluate_detector
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.models import rcnn
from pipeline.models._solvable import Examples
from pipeline.training import linear, solve
from pipeline.training.linear import Config

pytestmark = pytest.mark.usefixtures("cluster")

SEARCH = regions.Config(width=50, min_side=5, max_proposals=30)
NAME = "few"
TINY: dict[str, Any] = {
    "backbone": "squeezenet1_1",
    "region_side": 32,
    "context": 2,
    "pool_size": 1,
    "fc_features": 16,
    "input": {"fit": {"size_hw": [48, 64]}},
}


@pytest.fixture(scope="module")
def source(boxed_stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    copy = shards.load(Path(shutil.copytree(boxed_stripes.path, tmp_path_factory.mktemp("shards") / "stripes")))
    proposals.make(copy, SEARCH, name=NAME)
    return copy


@pytest.fixture(scope="module")
def fitted(source: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network that nobody has fitted: its features are random, and do for this."""
    torch.manual_seed(0)
    classes = source.manifest.classes
    config = parse(rcnn.Config, TINY | {"num_classes": len(classes)}, "here")
    path = tmp_path_factory.mktemp("run") / "bundle"
    return bundle.save(path, models.build(config), config, classes=classes, search=SEARCH, provenance={"run_id": "7"})


@pytest.fixture(scope="module")
def examples(source: shards.Shards, fitted: Bundle) -> Examples:
    """Of all training images, looked at one after the other."""
    model = fitted.build()
    assert isinstance(model, rcnn.RCNN)
    loader = Loader(source, model.spec, Loading(batch_size=1, num_tasks=0, proposals=NAME))
    with torch.inference_mode():
        found = [model.examples(batch) for batch in loader.evaluate("train")]
    joined = Examples(*(torch.cat(column) for column in zip(*found, strict=True)))
    return joined._replace(features=joined.features.half().float(), pooled=joined.pooled.half().float())


def copied(fitted: Bundle, folder: Path) -> Bundle:
    return bundle.load(Path(shutil.copytree(fitted.path, folder / "bundle")))


def layers(made: Bundle) -> dict[str, torch.Tensor]:
    state = made.build().network.state_dict()
    return {name: state[name] for name in ("classes.weight", "classes.bias", "boxes.weight", "boxes.bias")}


def test_layers_are_those_that_one_process_finds_in_all_regions(
    source: shards.Shards, fitted: Bundle, examples: Examples, tmp_path: Path
) -> None:
    config = Config(svm_c=0.01, hard_rounds=0)
    made, told = solve.solve(tmp_path, copied(fitted, tmp_path), source, config, proposals=NAME)
    num_classes = len(source.manifest.classes)
    ours = (examples.labels[:, None] == torch.arange(num_classes)) & examples.is_object[:, None]
    machines = linear.support_vectors(
        examples.features.numpy(),
        ours.numpy(),
        (examples.overlaps < config.negative_iou).numpy(),
        c=config.svm_c,
        norm=config.feature_norm,
        positive_weight=config.positive_weight,
    )
    found = layers(made)
    margins = examples.features @ found["classes.weight"].T + found["classes.bias"]
    np.testing.assert_allclose(margins.numpy(), machines(examples.features.numpy()), atol=0.02)
    for label in range(num_classes):
        rows = (examples.labels == label) & (examples.overlaps.amax(dim=1) >= config.correction_iou)
        ridge = linear.ridge(examples.pooled[rows].numpy(), examples.wanted[rows].numpy(), config.ridge_penalty)
        weight = found["boxes.weight"][4 * label : 4 * label + 4]
        np.testing.assert_allclose(weight.numpy(), ridge.weight, atol=1e-4)
        assert told.corrections[source.manifest.classes[label]] == int(rows.sum())
    assert list(told.objects.values()) == ours.sum(dim=0).tolist()
    assert told.hard_negatives == ()


def test_what_is_left_is_a_finished_bundle_that_answers(source: shards.Shards, fitted: Bundle, tmp_path: Path) -> None:
    made, _ = solve.solve(tmp_path, copied(fitted, tmp_path), source, Config(), proposals=NAME)
    assert made == bundle.load(tmp_path / "bundle")
    assert made.card.model.is_solved
    assert (made.card.search, made.card.provenance) == (SEARCH, {"run_id": "7"})
    assert not (tmp_path / solve.FEATURES).exists()
    report = evaluate_detector(made, source, "val", proposals=NAME)
    assert report.metrics["loss"] > 0


def test_layers_are_the_same_on_any_number_of_tasks(
    source: shards.Shards, fitted: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer examples than there are, of which then the same must be taken."""
    config = Config(first_negatives=40, hard_negatives=30, corrections=50)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, told = solve.solve(tmp_path / "one", copied(fitted, tmp_path / "one"), source, config, proposals=NAME)
    monkeypatch.setattr(solve, "CHUNK", 7)
    two, other = solve.solve(
        tmp_path / "two", copied(fitted, tmp_path / "two"), source, config, proposals=NAME, num_tasks=2
    )
    assert told == other
    for name, value in layers(one).items():
        np.testing.assert_allclose(value.numpy(), layers(two)[name].numpy(), atol=0.01 * float(value.abs().max()))


def test_hard_negatives_are_the_regions_that_the_first_machines_take_for_objects(
    source: shards.Shards, fitted: Bundle, examples: Examples, tmp_path: Path
) -> None:
    config = Config(first_negatives=40, svm_c=0.01)
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    first, _ = solve.solve(
        tmp_path / "without",
        copied(fitted, tmp_path / "without"),
        source,
        config.model_copy(update={"hard_rounds": 0}),
        proposals=NAME,
    )
    second, told = solve.solve(tmp_path / "with", copied(fitted, tmp_path / "with"), source, config, proposals=NAME)

    def mistakes(made: Bundle) -> torch.Tensor:
        """Regions that are no object's, and look like one, by class."""
        found = layers(made)
        margins = examples.features @ found["classes.weight"].T + found["classes.bias"]
        against = (examples.overlaps < config.negative_iou) & ~examples.is_object[:, None]
        return ((margins > -1) & against).sum(dim=0)

    (added,) = told.hard_negatives
    before = mistakes(first)
    # Of the forty that the first machines have seen, some are on the wrong side of the margin too.
    assert all(0 < number <= int(most) <= number + 40 for number, most in zip(added.values(), before, strict=True))
    assert int(mistakes(second).sum()) < int(before.sum())
