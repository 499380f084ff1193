"""The one training loop with a detector: the same promises as with a classifier (`test_loop`), on scenes of digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.errors import ConfigError
from pipeline.evaluation.live import Found, evaluate_detector
from pipeline.models._detector import Detector
from pipeline.training import loop
from pipeline.training.checkpoint import Config, Store
from pipeline.training.loop import RUNNING, Epoch, fit
from pipeline.training.recipe import Recipe
from pipeline.training.tasks import Detection


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**keys: Any) -> Recipe:
    raw = {
        "model": {
            "name": "yolo_multiscale",
            "backbone": "squeezenet1_1",
            "channels": 16,
            "num_classes": 10,
            "input": {"fit": {"size_hw": [64, 64]}},
        },
        "loading": {"batch_size": 8, "reader": "local", "num_tasks": 0},
        "augment": {"flip": False},
        "optim": {"optimizer": "adamw", "lr": 0.002, "clip_norm": 10.0},
        "epochs": 2,
    }
    return parse(Recipe, raw | keys, "here")


def fresh(given: Recipe) -> Detector:
    torch.manual_seed(given.seed)
    model = models.build(given.model)
    assert isinstance(model, Detector)
    return model


def loader_of(source: shards.Shards, given: Recipe, model: Detector) -> Loader:
    return Loader(source, model.spec, given.loading, augment=given.augment, seed=given.seed)


def trained(source: shards.Shards, given: Recipe, **keys: Any) -> tuple[Detector, list[Epoch]]:
    model, epochs = fresh(given), list[Epoch]()
    fit(model, loader_of(source, given, model), given, observe=epochs.append, **keys)
    return model, epochs


def same(first: Detector, second: Detector) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_fit_tells_every_metric_of_detection_and_lowers_the_loss(small_scenes: shards.Shards) -> None:
    model, epochs = trained(
        small_scenes, recipe(epochs=8, optim={"optimizer": "adamw", "lr": 0.003, "clip_norm": 10.0})
    )
    assert epochs[0].metrics.keys() == {*RUNNING, *(f"val/{name}" for name in Detection.MEASURED)}
    assert epochs[-1].metrics["train/loss"] < 0.9 * epochs[0].metrics["train/loss"]
    assert epochs[-1].metrics["val/loss"] < epochs[0].metrics["val/loss"]
    assert not model.training


def test_fit_ends_with_the_figures_that_an_evaluation_finds(small_scenes: shards.Shards) -> None:
    model, epochs = trained(small_scenes, recipe(epochs=1))
    found = evaluate_detector(model, loader_of(small_scenes, recipe(), model).evaluate("val"), 10)
    assert found.metrics()["loss"] == epochs[-1].metrics["val/loss"]
    assert {name: found.metrics()[name] for name in Detection.MEASURED} == {
        name: epochs[-1].metrics[f"val/{name}"] for name in Detection.MEASURED
    }


def test_parts_of_a_split_merge_to_the_figures_of_the_whole(small_scenes: shards.Shards) -> None:
    given = recipe()
    model = fresh(given)
    whole = evaluate_detector(model, loader_of(small_scenes, given, model).evaluate("val"), 10).metrics()
    loaders = [Loader(small_scenes, model.spec, given.loading, rank=rank, world_size=4) for rank in range(4)]
    parts = [evaluate_detector(model, loader.evaluate("val"), 10) for loader in loaders]
    merged = Found.merged(parts).metrics()
    assert len(parts[0].judged.ids) < 13
    assert merged.pop("loss") == pytest.approx(whole.pop("loss"), rel=0.5)  # a mean over other batches
    assert merged == pytest.approx(whole, abs=1e-6)


class KilledError(Exception):
    """What stands in for a kill."""


class Mortal(Loader):
    """A loader that ends the run instead of giving the batch of this number, counted from 0 over its whole life."""

    left = 0

    def train(self, epoch: int, offset: int = 0) -> Iterator[Batch]:
        for batch in super().train(epoch, offset):
            if self.left == 0:
                raise KilledError
            self.left -= 1
            yield batch


def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    small_scenes: shards.Shards, tmp_path: Path
) -> None:
    random = recipe(augment={"mosaic": 0.5, "scale": 0.2, "translate": 0.2}, ema={"decay": 0.9}, keep_best=True)
    whole, epochs = trained(small_scenes, random)
    store = Store(str(tmp_path), Config(every_steps=2))
    told = list[Epoch]()
    for last in (3, 4):
        torch.manual_seed(12345)  # whatever the random state of the new process is
        model = fresh(random)
        mortal = Mortal(small_scenes, model.spec, random.loading, augment=random.augment, seed=random.seed)
        mortal.left = last
        with pytest.raises(KilledError):
            fit(model, mortal, random, checkpoints=store, observe=told.append)
    model = fresh(random)
    fit(model, loader_of(small_scenes, random, model), random, checkpoints=store, observe=told.append)
    assert same(whole, model)
    exact = ("train/loss", "lr", "val/loss", "val/coco_map50")
    assert {epoch.number: [epoch.metrics[name] for name in exact] for epoch in told} == {
        epoch.number: [epoch.metrics[name] for name in exact] for epoch in epochs
    }


def test_a_batch_in_parts_gives_a_step_of_nearly_the_same_loss(small_scenes: shards.Shards) -> None:
    _, whole = trained(small_scenes, recipe(epochs=1))
    _, parts = trained(small_scenes, recipe(epochs=1, accumulate=2))
    assert parts[0].metrics["train/loss"] == pytest.approx(whole[0].metrics["train/loss"], rel=0.5)


def test_largest_batch_is_found_for_a_detector(small_scenes: shards.Shards) -> None:
    given = recipe()
    model = fresh(given)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = loop.find_batch(model, loader_of(small_scenes, given, model), given, limit_bytes=64 * 2**20)
    assert 1 <= found < 64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recipe_takes_the_augmentation_and_the_watched_metric_of_its_models_task() -> None:
    assert recipe().watch.metric == "val/coco_map50"
    assert parse(Recipe, {"model": {"name": "lenet5"}}, "here").watch.metric == "val/top1"
    given = recipe(augment={"mosaic": 1.0}, watch={"metric": "val/loss"})
    assert given.watch.metric == "val/loss"
    assert parse(Recipe, given.model_dump(mode="json"), "here") == given


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"augment": {"crop": "none"}}, r"augment\.crop: unknown key; .*iou_crop"),
        ({"mixing": {"mixup": 0.2}}, "mixing are for classifiers only"),
        ({"label_smoothing": 0.1, "class_weights": "balanced"}, "label_smoothing, class_weights are for classifiers"),
        ({"model": {"name": "lenet5"}, "augment": {"mosaic": 1.0}}, r"augment\.mosaic: unknown key"),
        ({"model": {"name": "lenet6"}, "augment": {"flip": True}}, r"model: unknown model 'lenet6'"),
    ],
)
def test_recipe_of_another_task_is_refused_by_the_name_of_the_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**keys)


def test_watching_what_a_detector_does_not_report_is_refused(small_scenes: shards.Shards) -> None:
    given = recipe(watch={"metric": "val/top1"})
    model = fresh(given)
    with pytest.raises(ConfigError, match=r"watch.metric: training reports no 'val/top1'.*val/coco_map50"):
        fit(model, loader_of(small_scenes, given, model), given)
