"""Training on several workers: the same gradients as on one, the right devices, failures in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pipeline import imaging, models
from pipeline.config import parse, validate
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.data.transforms.classify import Augment
from pipeline.errors import ConfigError, ModelError
from pipeline.training import launch
from pipeline.training.loop import Epoch, fit
from pipeline.training.optim import Config as Optim
from pipeline.training.recipe import Recipe

NUM_TRAIN, NUM_VAL = 48, 23
PLAIN = {"model": {"name": "lenet5"}, "augment": {"crop": "none", "flip": False}, "optim": {"lr": 0.05}, "epochs": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """Bright and dark pictures, in shards."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    files = []
    for split, total in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        labels = [number % 2 for number in range(total)]
        pictures = [rng.integers(40 + 130 * label, 90 + 130 * label, (28, 28, 3), np.uint8) for label in labels]
        writer = shards.Writer(folder / f"{split}-00000.parquet", "train" if split == "train" else "val", 8)
        with writer:
            for number, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
                sizes = dict.fromkeys(("height", "width", "original_height", "original_width"), 28)
                row = {"image_id": f"{split}/{number}", "image": imaging.encode_png(picture), "sha256": ""}
                writer.add({**sizes, **row, "label": label})
        assert writer.shard
        files.append(writer.shard)
    manifest = shards.Manifest(
        dataset="grey",
        classes=("dark", "bright"),
        class_counts={"train": (24, 24), "val": (12, 11)},
        num_rejects=0,
        shards=tuple(files),
        digest="d",
        decoding=imaging.DEFAULT,
        config={},
        tool_versions={},
    )
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json())
    return shards.load(folder)


def train_rank(rank: int, world_size: int, path: str, store: str, batch_size: int) -> None:
    """One process of `world_size`: two epochs, then weights and metrics to files."""
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = validate(models.config_of("lenet5"), {"name": "lenet5", "num_classes": 2})
    recipe = Recipe(model=config, loading=Loading(batch_size=batch_size, num_tasks=0), optim=Optim(lr=0.05), epochs=2)
    augment = Augment(crop="none", flip=False)
    model = models.build_classifier(config)
    loader = Loader(
        shards.load(Path(path)), model.spec, recipe.loading, augment=augment, seed=3, rank=rank, world_size=world_size
    )
    seen: list[Epoch] = []
    fit(model, loader, recipe, observe=seen.append)
    torch.save(model.state_dict(), f"{store}/{world_size}-{rank}.pt")
    Path(f"{store}/{world_size}-{rank}.json").write_text(json.dumps(seen[-1].metrics))
    if world_size > 1:
        dist.destroy_process_group()


def test_two_workers_of_four_train_as_one_of_eight(source: shards.Shards, tmp_path: Path) -> None:
    train_rank(0, 1, str(source.path), str(tmp_path), 8)
    spawn(train_rank, (2, str(source.path), str(tmp_path), 4), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)
    metrics = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0")]
    for name in ("train/loss", "val/top1", "val/loss"):  # 23 images on 2 ranks: none twice, none lost
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-4)


@pytest.mark.usefixtures("cluster")
def test_training_on_two_ray_workers_learns_and_leaves_a_bundle(source: shards.Shards, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source.path, tmp_path / "shards"))
    newer = source.manifest.model_copy(update={"version": 2, "digest": "e", "shards": ()})
    (copied / shards.MANIFEST).write_text(newer.model_dump_json())  # workers read the version that the driver has read
    source = shards.Shards(copied, source.manifest)
    recipe = validate(Recipe, PLAIN | {"epochs": 4, "loading": {"batch_size": 4, "num_tasks": 1}})
    made = launch.train(tmp_path / "run", source, recipe, launch.Cluster(num_workers=2), provenance={"commit": "abc"})
    assert made.card.metrics["val/top1"] == 1.0
    assert made.card.classes == ("dark", "bright")
    assert made.card.provenance == {"commit": "abc", "dataset_digest": "d"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["bundle", "checkpoints"]
    assert launch.store_of(tmp_path / "run").positions() == [(3, 0), (4, 0)]
    with pytest.raises(ConfigError, match="holds an earlier run"):
        launch.check_folder(tmp_path / "run", resume=False)

    diverging = validate(Recipe, PLAIN | {"optim": {"lr": 1e30}, "loading": {"batch_size": 4, "num_tasks": 0}})
    with pytest.raises(ModelError, match="the training loss became") as error:
        launch.train(tmp_path / "bad", source, diverging, launch.Cluster(num_workers=2, max_failures=9))
    assert error.value.__cause__ is None  # no worker has failed for Ray, which would have started all anew, nine times
    assert not (tmp_path / "bad" / "bundle").exists()


def test_number_of_classes_that_the_shards_do_not_have_is_refused(source: shards.Shards) -> None:
    config = validate(models.config_of("alexnet"), {"name": "alexnet", "num_classes": 7})
    with pytest.raises(ConfigError, match=r"num_classes is 7, but .* holds 2 classes; leave it out"):
        launch.fitted(config, source)


def test_gpu_workers_ask_for_one_gpu_each() -> None:
    scaling = launch.scaling(launch.Cluster(num_workers=2, cpus_per_worker=3, gpu=True))
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (2, True, {"CPU": 3, "GPU": 1})
    assert launch.scaling(launch.Cluster()).resources_per_worker == {"CPU": 1}


def test_number_of_workers_may_move_between_two_bounds() -> None:
    assert launch.scaling(launch.Cluster(num_workers=4, min_workers=2)).num_workers == (2, 4)
    with pytest.raises(ConfigError, match="min_workers is 5, more than num_workers, 4"):
        parse(launch.Cluster, {"num_workers": 4, "min_workers": 5}, "here")


def test_folder_of_a_run_is_neither_begun_anew_nor_resumed_by_accident(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume; leave resume out to start anew"):
        launch.check_folder(tmp_path, resume=True)
    launch.check_folder(tmp_path, resume=False)
    (tmp_path / launch.RECORD).write_text("{}")
    with pytest.raises(ConfigError, match="holds an earlier run; choose another name, delete it, or set resume=true"):
        launch.check_folder(tmp_path, resume=False)
    launch.check_folder(tmp_path, resume=True)
