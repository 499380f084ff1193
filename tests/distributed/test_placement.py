"""Which GPU a training worker is given, with logical GPUs: the head says it has two, and nothing touches them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch

from pipeline.training import launch


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_gpu_workers_on_one_node_get_a_gpu_each(tmp_path: Path) -> None:
    def place(config: dict[str, Any]) -> None:
        # What ray.train.torch.get_device asks where CUDA is there; here it would answer that it is not.
        from ray.air._internal.device_manager.nvidia_gpu import CUDATorchDeviceManager  # noqa: PLC0415

        rank = ray.train.get_context().get_world_rank()
        devices = [str(device) for device in CUDATorchDeviceManager().get_devices()]
        found = {"ids": ray.get_gpu_ids(), "visible": os.environ["CUDA_VISIBLE_DEVICES"], "devices": devices}
        Path(config["folder"], f"{rank}.json").write_text(json.dumps(found))

    trainer = ray.train.torch.TorchTrainer(
        place,
        train_loop_config={"folder": str(tmp_path)},
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=launch.scaling(launch.Cluster(num_workers=2, gpu=True)),
        run_config=ray.train.RunConfig(name="placement", storage_path=str(tmp_path / "ray")),
    )
    trainer.fit()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert {len(worker["ids"]) for worker in (first, second)} == {1}
    assert first["ids"] != second["ids"]
    assert sorted(worker["devices"][0] for worker in (first, second)) == ["cuda:0", "cuda:1"]
    for worker in (first, second):  # the device that torch counts is the GPU that Ray gave
        assert len(worker["devices"]) == 1
        place_of = worker["visible"].split(",").index(str(worker["ids"][0]))
        assert worker["devices"] == [f"cuda:{place_of}"]
