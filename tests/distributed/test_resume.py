"""A training on several processes that is killed and goes on, on as many and on fewer, without Ray."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import validate
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.training.checkpoint import Config, Store
from pipeline.training.loop import Epoch, fit
from pipeline.training.recipe import Recipe

BY_CLOCK = ("images_per_s", "data_wait_share")
RECIPE: dict[str, Any] = {
    "model": {
        "name": "alexnet",
        "num_classes": 2,
        "norm": "batch",
        "fc_features": 16,
        "input": {"size_hw": [67, 67]},
    },
    "loading": {"batch_size": 2, "num_tasks": 0},
    "augment": {"crop": "none", "flip": True},
    "mixing": {"mixup": 0.2},
    "optim": {"lr": 0.01},
    "ema": {"decay": 0.9},
    "keep_best": True,
    "epochs": 2,
}
"""Dropout, mixing, running statistics, averages, a schedule; 20 steps an epoch for one process, 6 for three."""


class Listed(Loader):
    """Notes the pictures of each step, and kills its process instead of giving the batch of this number."""

    def __init__(self, *args: Any, last: int, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.left, self.seen = last, list[list[str]]()

    def train(self, epoch: int, offset: int = 0) -> Iterator[Batch]:
        for batch in super().train(epoch, offset):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            self.seen.append(list(batch.ids))
            yield batch


def train_rank(rank: int, world_size: int, source: str, folder: str, name: str, changes: dict[str, Any]) -> None:
    """One process of several; what it saw and what came out goes to files. `kills` names the step a rank dies in."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{name}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    kills = changes.get("kills", {}).get(rank, -1)
    recipe = validate(Recipe, RECIPE | changes.get("recipe", {}))
    torch.manual_seed(0)
    model = models.build(recipe.model)
    ranks = {"rank": rank, "world_size": world_size}
    loader = Listed(shards.load(Path(source)), model.spec, recipe.loading, augment=recipe.augment, last=kills, **ranks)
    told: list[Epoch] = []
    fit(
        model,
        loader,
        recipe,
        checkpoints=Store(f"{folder}/{changes['run']}", Config(every_steps=2)),
        observe=told.append,
    )
    torch.save(model.state_dict(), f"{folder}/{name}-{rank}.pt")
    found = {"seen": loader.seen, "metrics": {epoch.number: epoch.metrics for epoch in told}}
    Path(f"{folder}/{name}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train(num: int, source: shards.Shards, folder: Path, name: str, **changes: Any) -> None:
    spawn(train_rank, (num, str(source.path), str(folder), name, changes), nprocs=num)  # type: ignore[no-untyped-call]


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of rank 0, and what it told."""
    return torch.load(folder / f"{name}-0.pt"), json.loads((folder / f"{name}-0.json").read_text())


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_inside_an_epoch_end_with_the_same_bits(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    train(3, stripes, tmp_path, "whole", run="whole")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train(3, stripes, tmp_path, "killed", run="killed", kills={1: 9})
    assert Store(str(tmp_path / "killed")).positions()[-1] == (1, 2 * 6)
    train(3, stripes, tmp_path, "resumed", run="killed")
    (weights, told), (again, rest) = outcome(tmp_path, "whole"), outcome(tmp_path, "resumed")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert len(rest["seen"]) == 4  # of 12 steps
    expected, found = told["metrics"]["2"], rest["metrics"]["2"]
    assert {key: found[key] for key in expected if key not in BY_CLOCK} == {
        key: value for key, value in expected.items() if key not in BY_CLOCK
    }
    assert list(rest["metrics"]) == ["2"]


@pytest.mark.slow
def test_a_run_that_goes_on_with_fewer_processes_repeats_and_skips_no_picture(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    """Of 40 pictures two processes take 4 a step until they die in step 6; one goes on with 2 a step.

    Whether the checkpoint after step 6 was still written or only the one after step 4 is for the machine to say.
    """
    epoch = {"recipe": {"epochs": 1}, "run": "run"}
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train(2, stripes, tmp_path, "two", **epoch, kills={0: 6, 1: 6})
    reached = Store(str(tmp_path / "run")).positions()[-1].offset
    assert reached in {16, 24}
    train(1, stripes, tmp_path, "one", **epoch)
    model = models.build_classifier(validate(Recipe, RECIPE).model)
    first = [
        Loader(stripes, model.spec, validate(Recipe, RECIPE).loading, rank=rank, world_size=2).train(0)
        for rank in range(2)
    ]
    before = [
        name for batches in first for _, batch in zip(range(reached // 4), batches, strict=False) for name in batch.ids
    ]
    seen = [name for step in outcome(tmp_path, "one")[1]["seen"] for name in step]
    assert (len(before), len(seen)) == (reached, 40 - reached)
    assert len({*before, *seen}) == 40


DETECTORS: dict[str, dict[str, Any]] = {
    "yolo_multiscale": {"backbone": "plain", "channels": 16, "input": {"fit": {"size_hw": [64, 64]}}},
    "faster_rcnn": {
        "backbone": "squeezenet1_1",
        "fc_features": 16,
        "anchor_sizes": [[16, 32]],
        "post_nms_train": 50,
        "post_nms_test": 20,
        "input": {"fit": {"way": "resize", "short_side": 40, "long_side": 80}},
    },
}
"""The second draws regions, and its pictures have several sizes."""


@pytest.mark.parametrize(
    "name",
    [pytest.param("yolo_multiscale", marks=pytest.mark.slow), pytest.param("faster_rcnn", marks=pytest.mark.long)],
)
def test_a_detector_on_two_processes_of_which_one_is_killed_ends_with_the_same_bits(
    boxed_stripes: shards.Shards, tmp_path: Path, name: str
) -> None:
    """Pictures have nought to three boxes, so the ranks have other numbers of targets in every step."""
    recipe = {
        "model": {"name": name, "num_classes": 2} | DETECTORS[name],
        "augment": {"flip": True, "scale": 0.2},
        "mixing": {},
        "optim": {"optimizer": "adamw", "lr": 1e-3},
    }
    train(2, boxed_stripes, tmp_path, "whole", run="whole", recipe=recipe)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train(2, boxed_stripes, tmp_path, "killed", run="killed", kills={1: 13}, recipe=recipe)
    train(2, boxed_stripes, tmp_path, "resumed", run="killed", recipe=recipe)
    (weights, told), (again, rest) = outcome(tmp_path, "whole"), outcome(tmp_path, "resumed")
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    expected, found = told["metrics"]["2"], rest["metrics"]["2"]
    assert {key: found[key] for key in expected if key not in BY_CLOCK} == {
        key: value for key, value in expected.items() if key not in BY_CLOCK
    }
    second = torch.load(tmp_path / "resumed-1.pt")
    assert all(torch.equal(value, second[key]) for key, value in again.items())
    of_other = json.loads((tmp_path / "resumed-1.json").read_text())["metrics"]["2"]
    assert of_other["val/coco_map"] == found["val/coco_map"]
    assert of_other["val/loss"] == found["val/loss"]
