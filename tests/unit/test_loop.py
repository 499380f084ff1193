"""The training loop on a miniature dataset, in this process, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.errors import ConfigError
from pipeline.evaluation.live import evaluate
from pipeline.models._contract import Classifier
from pipeline.training import guard
from pipeline.training.checkpoint import Config, Position, Store
from pipeline.training.guard import DivergedError
from pipeline.training.loop import RUNNING, Epoch, Progress, fit
from pipeline.training.recipe import Recipe
from pipeline.training.tasks import Classification
from pipeline.types import InputSpec


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny nets on a busy machine are ten times slower with threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**keys: Any) -> Recipe:
    raw = {
        "model": {"name": "lenet5", "num_classes": 2},
        "loading": {"batch_size": 8, "reader": "local"},
        "augment": {"crop": "none", "flip": True},
        "optim": {"lr": 0.05, "momentum": 0.9},
        "epochs": 3,
    }
    return parse(Recipe, raw | keys, "here")


def fresh(given: Recipe) -> Classifier:
    torch.manual_seed(given.seed)
    return models.build_classifier(given.model)


def trained(source: shards.Shards, given: Recipe, **keys: Any) -> tuple[Classifier, list[Epoch]]:
    model, epochs = fresh(given), list[Epoch]()
    loader = Loader(source, model.spec, given.loading, augment=given.augment, seed=given.seed)
    fit(model, loader, given, observe=epochs.append, **keys)
    return model, epochs


def same(first: Classifier, second: Classifier) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_fit_learns_stripes_and_tells_every_epoch(stripes: shards.Shards) -> None:
    model, epochs = trained(stripes, recipe(epochs=8))
    assert [(epoch.number, epoch.total) for epoch in epochs] == [(number, 8) for number in range(1, 9)]
    assert epochs[-1].metrics["train/loss"] < 0.5 * epochs[0].metrics["train/loss"]
    assert epochs[-1].metrics["val/top1"] == 1.0
    assert not model.training
    counts = evaluate(model, Loader(stripes, model.spec, recipe().loading).evaluate("val"), 2)
    assert counts.metrics()["top1"] == 1.0
    last = epochs[-1].metrics
    assert {"lr", "images_per_s", "data_wait_share", "val/top5", "val/mean_recall", "val/loss"} <= last.keys()
    assert 0 <= last["data_wait_share"] <= 1
    assert last["lr"] == pytest.approx(0.025 * (1 + math.cos(math.pi * 39 / 40)))


class KilledError(Exception):
    """What stands in for a kill."""


class Mortal(Loader):
    """A loader that ends the run instead of giving the batch of this number, counted from 0 over its whole life."""

    def __init__(self, source: shards.Shards, given: Recipe, spec: InputSpec, last: int) -> None:
        super().__init__(source, spec, given.loading, augment=given.augment, seed=given.seed)
        self.left = last

    def train(self, epoch: int, offset: int = 0) -> Iterator[Batch]:
        for batch in super().train(epoch, offset):
            if self.left == 0:
                raise KilledError
            self.left -= 1
            yield batch


EVERYTHING_RANDOM = {
    "model": {
        "name": "alexnet",
        "num_classes": 2,
        "norm": "batch",
        "fc_features": 16,
        "input": {"size_hw": [67, 67]},
    },
    "loading": {"batch_size": 8, "reader": "local", "num_tasks": 0, "sampling": {"balance": True}},
    "augment": {"crop": "none", "flip": True},
    "mixing": {"mixup": 0.2, "cutmix": 1.0},
    "optim": {"lr": 0.01, "warmup_epochs": 1, "clip_norm": 1.0},
    "ema": {"decay": 0.9},
    "accumulate": 2,
    "class_weights": "balanced",
    "label_smoothing": 0.1,
    "keep_best": True,
    "epochs": 2,
}
"""Dropout, mixing, sampling, running statistics, momentum, averages, a schedule: 5 steps an epoch."""
EXACT = ("train/loss", "lr", "val/top1", "val/top5", "val/loss", "val/mean_recall")


def exact(epoch: Epoch) -> dict[str, float]:
    """The figures that depend on no clock."""
    return {name: epoch.metrics[name] for name in EXACT}


@pytest.fixture(scope="module")
def uninterrupted(stripes: shards.Shards) -> tuple[Classifier, list[Epoch]]:
    return trained(stripes, parse(Recipe, EVERYTHING_RANDOM, "here"))


@pytest.mark.parametrize(
    ("kills", "every_steps"), [((0, 1, 1), 1), ((3, 2), 2), ((4,), 3), ((5, 1), None), ((7, 2), 3), ((9, 0), 4)]
)
def test_a_run_that_is_killed_anywhere_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    stripes: shards.Shards,
    uninterrupted: tuple[Classifier, list[Epoch]],
    tmp_path: Path,
    kills: tuple[int, ...],
    every_steps: int | None,
) -> None:
    given, told = parse(Recipe, EVERYTHING_RANDOM, "here"), list[Epoch]()
    store = Store(str(tmp_path), Config(every_steps=every_steps))
    for last in kills:
        torch.manual_seed(12345)  # whatever the random state of the new process is
        model = models.build_classifier(given.model) if store.positions() else fresh(given)
        with pytest.raises(KilledError):
            fit(model, Mortal(stripes, given, model.spec, last), given, checkpoints=store, observe=told.append)
    torch.manual_seed(54321)
    model = models.build_classifier(given.model) if store.positions() else fresh(given)
    loader = Loader(stripes, model.spec, given.loading, augment=given.augment, seed=given.seed)
    final = fit(model, loader, given, checkpoints=store, observe=told.append)
    whole, epochs = uninterrupted
    assert same(whole, model)
    assert {epoch.number: exact(epoch) for epoch in told} == {epoch.number: exact(epoch) for epoch in epochs}
    newest = store.newest("cpu")
    assert newest is not None
    assert [{name: metrics[name] for name in EXACT} for metrics in newest.progress["history"]] == [
        exact(epoch) for epoch in epochs
    ]
    assert {name: final[name] for name in EXACT} == exact(max(epochs, key=lambda epoch: epoch.metrics["val/top1"]))


def test_a_resumed_run_repeats_no_step_that_a_checkpoint_holds(stripes: shards.Shards, tmp_path: Path) -> None:
    given, store = recipe(epochs=2), Store(str(tmp_path), Config(every_steps=2))
    model = fresh(given)
    with pytest.raises(KilledError):
        fit(model, Mortal(stripes, given, model.spec, 8), given, checkpoints=store)
    assert store.positions()[-1] == (1, 16)  # the second epoch has taken 3 of 5 steps of 8
    with pytest.raises(KilledError):
        fit(model, Mortal(stripes, given, model.spec, 2), given, checkpoints=store)
    fit(model, Mortal(stripes, given, model.spec, 1), given, checkpoints=store)  # one step is left, and no more
    assert store.positions()[-1] == (2, 0)


def test_checkpoints_inside_an_epoch_come_also_by_the_clock(
    stripes: shards.Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOOK_S", 1e-9)
    store, model = Store(str(tmp_path), Config(every_s=1e-9)), fresh(recipe())
    with pytest.raises(KilledError):
        fit(model, Mortal(stripes, recipe(), model.spec, 3), recipe(), checkpoints=store)
    assert store.positions() == [(0, 16), (0, 24)]
    patient = Store(str(tmp_path / "patient"), Config(every_s=1e9))
    with pytest.raises(KilledError):
        fit(model, Mortal(stripes, recipe(), model.spec, 3), recipe(), checkpoints=patient)
    assert patient.positions() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "was begun with dataset_digest 0{16}, seed 0, .* now it is .* seed 1"),
        ({"model": {"name": "lenet1", "num_classes": 2}}, "the stored model does not fit the recipe"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    stripes: shards.Shards, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    store = Store(str(tmp_path))
    trained(stripes, recipe(epochs=1), checkpoints=store)
    with pytest.raises(ConfigError, match=said) as error:
        trained(stripes, recipe(epochs=2, **change), checkpoints=store)
    assert len(str(error.value).splitlines()) == 1


def moved(source: shards.Shards) -> shards.Shards:
    """The same images in another order."""
    return replace(source, manifest=source.manifest.model_copy(update={"shards": source.manifest.shards[::-1]}))


def test_a_run_is_not_resumed_on_shards_whose_images_lie_in_another_order(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    trained(stripes, recipe(epochs=1), checkpoints=store)
    with pytest.raises(ConfigError, match=r"was begun on training shards that held the same images in another order"):
        trained(moved(stripes), recipe(epochs=2), checkpoints=store)


def test_a_checkpoint_that_does_not_tell_the_order_of_images_is_resumed(stripes: shards.Shards, tmp_path: Path) -> None:
    first, second = Store(str(tmp_path / "first")), Store(str(tmp_path / "second"))
    trained(stripes, recipe(epochs=1), checkpoints=first)
    found = first.newest("cpu")
    assert found
    order = {key: value for key, value in found.progress["order"].items() if key != "shards_digest"}
    second.save(found.position, found.parts, found.progress | {"order": order})
    assert [epoch.number for epoch in trained(stripes, recipe(epochs=2), checkpoints=second)[1]] == [2]
    order["seed"] = 1
    second.save(found.position, found.parts, found.progress | {"order": order})
    with pytest.raises(ConfigError, match=r"was begun with .* seed 1"):
        trained(stripes, recipe(epochs=2), checkpoints=second)


def test_the_same_seed_trains_the_same_weights_and_another_one_others(stripes: shards.Shards) -> None:
    first, again, other = (trained(stripes, recipe(epochs=1, seed=seed))[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_a_finished_run_is_not_trained_again(stripes: shards.Shards, tmp_path: Path) -> None:
    given = recipe(epochs=2)
    model, _ = trained(stripes, given, checkpoints=Store(str(tmp_path)))
    again, epochs = trained(stripes, given, checkpoints=Store(str(tmp_path)))
    assert epochs == []
    assert same(model, again)


def test_keep_best_ends_with_the_weights_of_the_best_epoch(stripes: shards.Shards, tmp_path: Path) -> None:
    seen: list[tuple[float, dict[str, Tensor]]] = []
    given = recipe(epochs=6, optim={"lr": 0.05, "schedule": "constant"}, keep_best=True)
    store = Store(str(tmp_path), Config(every_steps=2))
    model = fresh(given)
    loader = Loader(stripes, model.spec, given.loading, augment=given.augment, seed=given.seed)

    def note(epoch: Epoch) -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((epoch.metrics["val/top1"], weights))

    fit(model, loader, given, observe=note, checkpoints=store)
    best = max(range(6), key=lambda index: (seen[index][0], -index))  # of equal ones the first
    assert best < 5, "the test needs a run that does not get better to the end"
    assert all(torch.equal(value, seen[best][1][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, seen[-1][1][name]) for name, value in model.state_dict().items())


def test_the_best_weights_survive_the_loss_of_any_one_checkpoint(stripes: shards.Shards, tmp_path: Path) -> None:
    given = recipe(epochs=6, optim={"lr": 0.05, "schedule": "constant"}, keep_best=True)
    whole, epochs = trained(stripes, given)
    values = [epoch.metrics["val/top1"] for epoch in epochs]
    assert max(values) > values[-1], "the test needs a run that does not get better to the end"
    for number in range(2, 6):  # before the best epoch, just after it and later
        store, model = Store(str(tmp_path / str(number))), fresh(given)
        with pytest.raises(KilledError):
            fit(model, Mortal(stripes, given, model.spec, 5 * number), given, checkpoints=store)
        assert store.positions() == [(number - 1, 0), (number, 0)]
        (tmp_path / str(number) / Position(number).name / "model.pt").write_bytes(b"torn")
        again, _ = trained(stripes, given, checkpoints=store)
        assert same(whole, again)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    trained(stripes, recipe(epochs=1), checkpoints=store)
    with pytest.raises(DivergedError, match=r"the training loss became nan in epoch 2, .*; take a smaller optim\.lr"):
        trained(stripes, recipe(epochs=2, optim={"lr": 1e30}), checkpoints=store)
    assert store.positions() == [(1, 0)]


def test_a_loss_that_is_not_finite_is_noticed_inside_the_epoch(
    stripes: shards.Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOOK_S", 1e-9)
    given = recipe(optim={"lr": 1e30})
    model = fresh(given)
    with pytest.raises(DivergedError, match="in epoch 1, within its first 16 images"):
        fit(model, Mortal(stripes, given, model.spec, 4), given)  # a fifth batch would kill it


def test_within_an_epoch_it_is_told_how_far_it_is(stripes: shards.Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LOOK_S", 1e9)
    monkeypatch.setattr(guard, "LOOK_EVERY", 2)
    told = list[Progress]()
    _, epochs = trained(stripes, recipe(epochs=2), notice=told.append)
    assert [(each.number, each.images, each.num_images) for each in told] == [
        *[(1, 8, 40), (1, 24, 40), (1, 40, 40)],  # after the first step nobody knows yet how long one takes
        *[(2, 16, 40), (2, 32, 40)],
    ]
    assert told[2].loss == pytest.approx(epochs[0].metrics["train/loss"])
    assert told[2].left_s == pytest.approx(40 / told[2].images_per_s)
    assert epochs[0].left_s == pytest.approx(epochs[0].seconds + epochs[0].measuring_s)
    assert epochs[1].left_s == 0


class Recorder(torch.nn.Module):
    """A network that keeps a gradient on every logit: batch x classes parameters, all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(40, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


class Steep(Recorder):
    """Its loss is finite, its gradient is not."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).sqrt()


def test_no_checkpoint_holds_weights_that_are_not_finite(stripes: shards.Shards, tmp_path: Path) -> None:
    store, given = Store(str(tmp_path), Config(every_steps=1)), recipe()
    model = Classifier(fresh(given).spec, Steep())
    loader = Loader(stripes, model.spec, given.loading)
    with pytest.raises(DivergedError, match="the weights became nan or infinite in epoch 1, within its first 8 images"):
        fit(model, loader, given, checkpoints=store)
    assert store.positions() == []


def one_step(source: shards.Shards, **keys: Any) -> tuple[Tensor, float]:
    """The change of the logits in one step on all 40 pictures, and the loss."""
    given = recipe(
        epochs=1, loading={"batch_size": 40, "reader": "local"}, **{"optim": {"lr": 1, "momentum": 0}} | keys
    )
    network = Recorder()
    model = Classifier(fresh(given).spec, network)
    losses: list[float] = []
    loader = Loader(source, model.spec, given.loading)
    fit(model, loader, given, observe=lambda epoch: losses.append(epoch.metrics["train/loss"]))
    return network.logits.detach() * 1, losses[0]


def test_label_smoothing_spreads_its_share_over_all_classes(stripes: shards.Shards) -> None:
    # From equal logits p = 1/2; the targets are 0.9 and 0.1 (0.2 spread over two classes): gradient (p - t) / 40.
    change, loss = one_step(stripes, label_smoothing=0.2, optim={"lr": 1, "momentum": 0, "weight_decay": 0})
    torch.testing.assert_close(change.abs(), torch.full((40, 2), 0.4 / 40))
    assert loss == pytest.approx(math.log(2))
    plain, _ = one_step(stripes, optim={"lr": 1, "momentum": 0, "weight_decay": 0})
    torch.testing.assert_close(plain.abs(), torch.full((40, 2), 0.5 / 40))


def test_clip_norm_limits_the_norm_of_the_whole_gradient(stripes: shards.Shards) -> None:
    optim = {"lr": 1, "momentum": 0, "weight_decay": 0}
    free, _ = one_step(stripes, optim=optim)
    clipped, _ = one_step(stripes, optim={**optim, "clip_norm": 0.01})
    assert float(free.norm()) == pytest.approx(0.5 / 40 * 80**0.5, rel=1e-5)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    loose, _ = one_step(stripes, optim={**optim, "clip_norm": 100.0})
    torch.testing.assert_close(loose, free)


def test_bf16_trains_in_fp32_weights(stripes: shards.Shards) -> None:
    model, epochs = trained(stripes, recipe(epochs=1, precision="bf16"))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    exact, _ = trained(stripes, recipe(epochs=1))
    assert not same(model, exact)
    assert math.isfinite(epochs[0].metrics["train/loss"])


def test_fp16_goes_on_with_the_scale_of_its_loss(stripes: shards.Shards, tmp_path: Path) -> None:
    given, store = recipe(epochs=1, precision="fp16"), Store(str(tmp_path), Config(every_steps=1))
    whole, _ = trained(stripes, given)
    model = fresh(given)
    with pytest.raises(KilledError):
        fit(model, Mortal(stripes, given, model.spec, 3), given, checkpoints=store)
    newest = store.newest("cpu")
    assert newest is not None
    assert newest.parts["scaler"]["scale"] > 1
    again, _ = trained(stripes, given, checkpoints=store)
    assert same(whole, again)


def test_a_run_whose_watched_metric_stalls_ends_early_and_stays_ended(stripes: shards.Shards, tmp_path: Path) -> None:
    given = recipe(epochs=9, optim={"lr": 1e-9}, watch={"metric": "val/top1", "patience": 2}, keep_best=True)
    model, epochs = trained(stripes, given, checkpoints=Store(str(tmp_path)))
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    again, more = trained(stripes, given, checkpoints=Store(str(tmp_path)))
    assert more == []
    assert same(model, again)


def test_a_plateau_lowers_the_rate(stripes: shards.Shards) -> None:
    optim = {"lr": 1e-9, "schedule": "plateau", "step_factor": 0.5}
    _, epochs = trained(stripes, recipe(epochs=4, optim=optim, watch={"plateau_patience": 1}))
    assert [epoch.metrics["lr"] for epoch in epochs] == pytest.approx([1e-9, 1e-9, 0.5e-9, 0.25e-9])


def test_an_unknown_watched_metric_is_named(stripes: shards.Shards) -> None:
    given = recipe(epochs=1, watch={"metric": "val/top2", "mode": "max"})
    with pytest.raises(ConfigError, match=r"training reports no 'val/top2'; .*known: .*val/top1"):
        fit(fresh(given), Mortal(stripes, given, fresh(given).spec, 0), given)  # the first batch would kill it


def test_every_reported_metric_can_be_watched(stripes: shards.Shards) -> None:
    _, epochs = trained(stripes, recipe(epochs=1))
    assert epochs[0].metrics.keys() == {*RUNNING, *(f"val/{name}" for name in Classification.MEASURED)}


def test_a_resumed_run_takes_decay_and_momentum_from_its_recipe(stripes: shards.Shards, tmp_path: Path) -> None:
    def resumed(name: str, **optim: Any) -> Classifier:
        store, given = Store(str(tmp_path / name)), recipe(epochs=1, optim={"lr": 0.05, "schedule": "constant"})
        trained(stripes, given, checkpoints=store)
        return trained(stripes, recipe(epochs=2, optim=dict(given.optim) | optim), checkpoints=store)[0]

    unchanged = resumed("unchanged")
    assert same(unchanged, resumed("again"))
    assert not same(unchanged, resumed("decay", weight_decay=0.1))
    assert not same(unchanged, resumed("momentum", momentum=0.5))


@pytest.mark.parametrize(
    "change",
    [
        {"class_weights": "balanced"},
        {"mixing": {"mixup": 0.4}},
        {"mixing": {"cutmix": 1.0}},
        {"label_smoothing": 0.1},
        {"precision": "bf16"},
        {"ema": {"decay": 0.9}},
        {"augment": {"crop": "none", "flip": False}},
        {"optim": {"lr": 0.05, "momentum": 0.9, "clip_norm": 0.01}},
        {"optim": {"lr": 0.05, "momentum": 0.9, "warmup_epochs": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_of_the_recipe_changes_what_is_trained(
    stripes: shards.Shards, plain_epoch: Classifier, change: dict[str, Any]
) -> None:
    manifest = stripes.manifest.model_copy(update={"class_counts": {"train": (10, 30), "val": (7, 6)}})
    uneven = shards.Shards(stripes.path, manifest)  # what weights go by
    assert not same(plain_epoch, trained(uneven, recipe(epochs=1, **change))[0])


@pytest.fixture(scope="module")
def plain_epoch(stripes: shards.Shards) -> Classifier:
    return trained(stripes, recipe(epochs=1))[0]


def test_accumulated_parts_add_up_to_the_whole(stripes: shards.Shards, plain_epoch: Classifier) -> None:
    parts, _ = trained(stripes, recipe(epochs=1, accumulate=4))
    assert not same(plain_epoch, parts), "the last bits tell that it was done in parts"
    for name, value in plain_epoch.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_the_rate_is_scaled_to_the_batch(stripes: shards.Shards) -> None:
    optim = {"lr": 0.1, "schedule": "constant", "reference_batch_size": 32}
    _, epochs = trained(stripes, recipe(epochs=1, optim=optim))
    assert epochs[0].metrics["lr"] == pytest.approx(0.1 * 8 / 32)


def test_the_average_is_what_is_measured_and_kept(stripes: shards.Shards, tmp_path: Path) -> None:
    given, store = recipe(epochs=2, ema={"decay": 0.9}), Store(str(tmp_path))
    model, epochs = trained(stripes, given, checkpoints=store)
    newest = store.newest("cpu")
    assert newest is not None
    kept = newest.parts["ema"]["model"]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, newest.parts["model"][name]) for name, value in kept.items())
    counts = evaluate(model, Loader(stripes, model.spec, given.loading).evaluate("val"), 2)
    assert counts.metrics()["loss"] == pytest.approx(epochs[-1].metrics["val/loss"], rel=1e-5)


@pytest.mark.slow
def test_compiled_training_keeps_names_and_learns_alike(stripes: shards.Shards) -> None:
    compiled, epochs = trained(stripes, recipe(epochs=1, compile=True))
    plain, expected = trained(stripes, recipe(epochs=1))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert epochs[0].metrics["train/loss"] == pytest.approx(expected[0].metrics["train/loss"], rel=1e-3)


def test_checkpoint_after_the_run_holds_its_weights(stripes: shards.Shards, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    model, _ = trained(stripes, recipe(epochs=3), checkpoints=store)
    stored = store.load(Position(3), "cpu")
    loaded = fresh(recipe())
    loaded.load_state_dict(stored.parts["model"])
    assert same(loaded, model)
    assert torch.isfinite(loaded(Batch(torch.zeros(1, 3, 28, 28, dtype=torch.uint8)))).all()
