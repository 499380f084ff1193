"""The training loop on a miniature dataset, in this process, without Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from pipeline.errors import ModelError
from pipeline.evaluation.live import evaluate
from pipeline.models._contract import Classifier
from pipeline.training import checkpoint
from pipeline.training.loop import Epoch, Recipe, fit


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
    return models.build(given.model)


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


@pytest.mark.parametrize("model", [{"name": "lenet5", "num_classes": 2}, {"name": "alexnet", "num_classes": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    stripes: shards.Shards, tmp_path: Path, model: dict[str, Any]
) -> None:
    if model["name"] == "alexnet":  # dropout is random in every step
        model |= {"fc_features": 16, "input": {"size_hw": [67, 67]}}
    given = recipe(model=model, keep_best=True, optim={"lr": 0.01}, loading={"batch_size": 20, "reader": "local"})
    whole, epochs = trained(stripes, given)

    class Stopped(Exception):  # noqa: N818  (it is a person who stops it)
        pass

    def stop_after_two(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise Stopped

    first = fresh(given)
    loader = Loader(stripes, first.spec, given.loading, augment=given.augment, seed=given.seed)
    with pytest.raises(Stopped):
        fit(first, loader, given, checkpoints=tmp_path, observe=stop_after_two)
    resumed, rest = trained(stripes, given, checkpoints=tmp_path)
    assert [epoch.number for epoch in rest] == [3]
    assert same(whole, resumed)
    quick = {"train/loss", "lr", "val/top1", "val/loss"}
    assert {name: rest[0].metrics[name] for name in quick} == {name: epochs[2].metrics[name] for name in quick}


def test_the_same_seed_trains_the_same_weights_and_another_one_others(stripes: shards.Shards) -> None:
    first, again, other = (trained(stripes, recipe(epochs=1, seed=seed))[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_a_finished_run_is_not_trained_again(stripes: shards.Shards, tmp_path: Path) -> None:
    given = recipe(epochs=2)
    model, _ = trained(stripes, given, checkpoints=tmp_path)
    again, epochs = trained(stripes, given, checkpoints=tmp_path)
    assert epochs == []
    assert same(model, again)


def test_keep_best_ends_with_the_weights_of_the_best_epoch(stripes: shards.Shards, tmp_path: Path) -> None:
    seen: list[tuple[float, dict[str, Tensor]]] = []
    given = recipe(epochs=6, optim={"lr": 0.05, "schedule": "constant"}, keep_best=True)
    model = fresh(given)
    loader = Loader(stripes, model.spec, given.loading, augment=given.augment, seed=given.seed)

    def note(epoch: Epoch) -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((epoch.metrics["val/top1"], weights))

    fit(model, loader, given, observe=note, checkpoints=tmp_path)
    best = max(range(6), key=lambda index: (seen[index][0], -index))  # of equal ones the first
    assert best < 5, "the test needs a run that does not get better to the end"
    assert all(torch.equal(value, seen[best][1][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, seen[-1][1][name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    trained(stripes, recipe(epochs=1), checkpoints=tmp_path)
    with pytest.raises(ModelError, match=r"the training loss became nan in epoch 2; take a smaller optim\.lr"):
        trained(stripes, recipe(epochs=2, optim={"lr": 1e30}), checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.pt"]


class Recorder(torch.nn.Module):
    """A network that keeps a gradient on every logit: batch x classes parameters, all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(40, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


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


def test_checkpoints_are_those_of_the_newest_epochs(stripes: shards.Shards, tmp_path: Path) -> None:
    model, _ = trained(stripes, recipe(epochs=3), checkpoints=tmp_path)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    stored = checkpoint.load(newest, "cpu")
    assert stored["epoch"] == 3
    loaded = fresh(recipe())
    loaded.load_state_dict(stored["model"])
    assert same(loaded, model)
    assert torch.isfinite(loaded(Batch(torch.zeros(1, 3, 28, 28, dtype=torch.uint8)))).all()
