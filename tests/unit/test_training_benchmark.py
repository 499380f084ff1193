"""The training benchmark: what its clock counts, what a model computes, what the table says; tiny blocks end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import benchmark as door
from pipeline import imaging, models
from pipeline.benchmark import flops, own_loop, training
from pipeline.benchmark.clock import Clock, Figures, Steps
from pipeline.benchmark.training_block import Task, set_up
from pipeline.benchmark.training_report import Block, Report, table
from pipeline.config import load, validate
from pipeline.errors import ConfigError, DataError
from pipeline.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
LENET = {"model": {"name": "lenet5"}, "loading": {"batch_size": 4, "reader": "local"}}
TINY = {"warm_up": 1, "timed": 2, "watched": 1}


def recipe(**keys: Any) -> Recipe:
    return validate(Recipe, LENET | keys)


def figures(step_ms: float, rate: float = 100.0, others_share: float = 0.0) -> Figures:
    return Figures(
        step_ms=step_ms,
        mean_step_ms=step_ms,
        images_per_s=rate,
        wait_share=0.01,
        start_s=4.0,
        peak_bytes=2**20,
        others_share=others_share,
        num_threads=1,
    )


def block(**keys: Any) -> Block:
    given = {"case": "a", "data": "synthetic", "way": "loop", "num_workers": 1, "device": "cpu", "threads": 1}
    return Block.model_validate(given | {"number_format": "fp32", "flop_per_image": 10**9} | keys)


def report(blocks: list[Block], *rounds: list[Figures], **keys: Any) -> Report:
    names = [found.name for found in blocks]
    return Report(
        commit="c",
        versions={},
        machine={},
        config={},
        quiet_share=0.05,
        load=(0.0, 1.0),
        **{"models": {found.case: {"name": "alexnet"} for found in blocks}} | keys,
        blocks=dict(zip(names, blocks, strict=True)),
        rounds=tuple(dict(zip(names, found, strict=True)) for found in rounds),
    )


class Slow:
    """Batches that take a while to come."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.asked += 1
        time.sleep(self.seconds)
        return self.asked


def test_clock_gives_every_batch_once_and_tells_waiting_from_work() -> None:
    steps, source = Steps(warm_up=2, timed=3, watched=1), Slow(0.02)
    clock = Clock(steps, torch.device("cpu"), time.time() - 5, [os.getpid()])
    seen = []
    for batch in clock.watch(source):
        seen.append(batch)
        time.sleep(0.06)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert source.asked == steps.total
    found = clock.figures(global_batch_size=8)
    assert found.step_ms >= 80  # waiting and work, both slept at least so long
    assert found.images_per_s == pytest.approx(8e3 / found.mean_step_ms)
    assert 0 < found.wait_share < 0.5
    assert 5 <= found.start_s < 60
    assert found.peak_bytes > 2**24
    assert found.gpu_bytes is None


def test_flop_of_lenet_are_those_counted_by_hand() -> None:
    config = validate(models.config_of("lenet5"), {"name": "lenet5"})
    products = {"c1": 28 * 28 * 6 * 25, "c3": 10 * 10 * 16 * 6 * 25, "c5": 400 * 120, "f6": 120 * 84, "out": 84 * 10}
    # Twice per product; forward, by the weights, and by the input, which the first layer has no use for.
    expected = 2 * (3 * sum(products.values()) - products["c1"])
    assert flops.per_image(config) == expected


def test_flop_of_alexnet_are_three_times_those_of_its_714_million_products() -> None:
    config = validate(models.config_of("alexnet"), {"name": "alexnet"})
    first = 55 * 55 * 64 * 3 * 121
    products = first + 27 * 27 * 192 * 64 * 25 + 13 * 13 * 9 * (384 * 192 + 256 * 384 + 256 * 256)
    products += 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert products == pytest.approx(714e6, rel=0.001)
    assert flops.per_image(config) == 2 * (3 * products - first)


def test_peak_of_an_unknown_card_is_not_guessed() -> None:
    assert flops.peak("NVIDIA H200", "bf16") == 989.4e12
    assert flops.peak("cpu", "fp32") is None


def test_ratios_are_of_step_times_within_a_round() -> None:
    blocks = [block(), block(way="ray"), block(way="script")]
    found = report(blocks, [figures(10), figures(11), figures(20)], [figures(100), figures(102), figures(80)])
    loop, ray, script = found.blocks
    assert found.ratio(ray, loop, lambda value: value.step_ms) == pytest.approx((1.06, 1.02, 1.1))
    lines = table(found).splitlines()
    assert "1.060 (1.020..1.100)" in lines[2]
    assert lines[1].count("0.875 (0.500..1.250)") == 1  # the loop by the script, and by nothing else
    assert any("1.060 times the loop's step without Ray; 1.03 is the limit" in line for line in lines)
    assert "Not measured on a GPU: there is none." in lines
    assert found.rival(script, "script") is None


def test_card_is_measured_by_its_peak_and_by_the_cpu_of_its_machine() -> None:
    card = {"device": "NVIDIA H200", "number_format": "bf16", "peak": 989.4e12}
    blocks = [block(), block(case="b", **card)]
    found = report(blocks, [figures(10, 100), figures(1, 50_000)])
    cpu, gpu = found.blocks
    assert found.on_cpu(gpu) == cpu
    assert found.utilisation(gpu) == pytest.approx((50_000 * 1e9 / 989.4e12,) * 3)
    assert found.utilisation(cpu) is None
    text = table(found)
    assert "500 times the images/s of a, synthetic, loop, 1 worker" in text
    assert "NVIDIA H200, bf16: MFU is a share of 989.4 TFLOP/s" in text
    assert "Not measured on a GPU" not in text
    others = report(blocks, [figures(10, 100), figures(1, 50_000)], models={"a": {"name": "lenet5"}, "b": {}})
    assert others.on_cpu(gpu) is None


@pytest.mark.parametrize(("share", "is_said"), [(0.04, False), (0.30, True)])
def test_table_says_when_the_machine_was_not_quiet(share: float, is_said: bool) -> None:
    assert ("not quiet" in table(report([block()], [figures(10, others_share=share)]))) is is_said


def test_case_that_not_every_way_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="not every way to train knows ema; leave it out"):
        training.Case(recipe=recipe(ema={"decay": 0.9}))
    with pytest.raises(ValueError, match="expected local"):
        training.Case(recipe=recipe(loading={"batch_size": 4, "reader": "ray"}))


def test_unknown_case_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = training.Config(cases={"lenet5": training.Case(recipe=recipe())}, only=("lenet",))
    with pytest.raises(ConfigError, match="unknown case 'lenet'; did you mean 'lenet5'"):
        training.run(config, tmp_path / "scratch", None)
    assert not (tmp_path / "scratch").exists()


def test_worker_with_other_threads_than_asked_for_is_refused(tmp_path: Path) -> None:
    threads = torch.get_num_threads() + 1
    task = Task(
        way="loop", data="synthetic", recipe=recipe(), steps=Steps(), threads=threads, scratch=tmp_path, began=0.0
    )
    with pytest.raises(DataError, match=f"expected a worker with {threads} threads"):
        set_up(task)


def test_synthetic_loader_gives_one_batch_for_every_step_of_the_loop(tmp_path: Path) -> None:
    steps = Steps(warm_up=1, timed=2, watched=1)
    task = Task(way="loop", data="synthetic", recipe=recipe(), steps=steps, scratch=tmp_path, began=0.0)
    model = models.build_classifier(task.recipe.model)
    clock = Clock(steps, torch.device("cpu"), 0.0, [os.getpid()])
    loader = own_loop.Timed(task, model, clock, 0, torch.device("cpu"))
    batches = list(loader.train(0))
    assert len(batches) == loader.steps_per_epoch == 4
    assert {id(batch) for batch in batches} == {id(batches[0])}
    assert len(loader.source.manifest.classes) == 10
    assert batches[0].images.dtype == torch.uint8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three JPEGs."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(3):
            path = root / "train" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(imaging.encode_jpeg(rng.integers(0, 255, (40, 44, 3), np.uint8)))
    return root


def config_file(path: Path, folder: Path) -> Path:
    cases = {
        "lenet5": {"recipe": LENET, "steps": TINY},
        "pair": {"recipe": LENET, "data": ["real"], "ways": ["loop", "script"], "workers": [2], "steps": TINY},
        "card": {"recipe": LENET | {"precision": "bf16"}, "ways": ["loop"], "device": "cuda", "steps": TINY},
    }
    source = {"name": "image_folder", "root": str(folder), "splits": ["train"]}
    path.write_text(json.dumps({"train": {"sources": [source], "rounds": 1, "cases": cases}}))
    return path


NO_RAY = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {"ray", "mlflow"} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its case is not left out")
def test_door_measures_without_ray_and_mlflow_and_names_what_it_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(NO_RAY)  # for the processes of the blocks too
    paths = [str(tmp_path / "without"), str(ROOT)]
    command = [sys.executable, "-m", "jobs.benchmark", "train", str(config_file(tmp_path / "run.yaml", folder))]
    ended = subprocess.run(
        [*command, f"storage={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    found = Report.model_validate_json((tmp_path / "benchmarks" / "train.json").read_bytes())
    measured = [
        *("lenet5, synthetic, loop, 1 worker", "lenet5, synthetic, plain script, 1 worker"),
        *("pair, real, loop, 2 workers", "pair, real, plain script, 2 workers"),
    ]
    assert list(found.rounds[0]) == list(found.blocks) == measured
    assert all(value.images_per_s > 0 and value.peak_bytes > 2**24 for value in found.rounds[0].values())
    assert {value.num_threads for value in found.rounds[0].values()} == {1}
    assert found.left_out == {
        "lenet5, synthetic, loop under Ray Train, 1 worker": "'ray' is not installed",
        "card, synthetic, loop, 1 worker": "it needs 1 GPUs and there are 0",
    }
    assert table(found) in ended.stdout
    assert list((tmp_path / "benchmarks" / "scratch").iterdir()) == []


def test_block_that_fails_or_has_no_photos_is_left_out_of_all_rounds_with_the_reason(tmp_path: Path) -> None:
    steps = Steps(warm_up=1, timed=2, watched=1)
    good = training.Case(recipe=recipe(), data=("synthetic", "real"), ways=("loop",), steps=steps)
    bad = training.Case(recipe=recipe(optim={"lr": 1e30}), ways=("loop",), steps=steps)
    found = training.run(training.Config(cases={"good": good, "bad": bad}, rounds=2), tmp_path, None)
    assert [list(blocks) for blocks in found.rounds] == [["good, synthetic, loop, 1 worker"]] * 2
    assert "no photos" in found.left_out["good, real, loop, 1 worker"]
    assert "the training loss became" in found.left_out["bad, synthetic, loop, 1 worker"]


def test_door_takes_the_committed_run_and_refuses_that_of_another_plane(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["train", "train.rounds=2", "--dry-run"]) == 0
    assert "alexnet, bf16, channels_last, compile" in capsys.readouterr().out
    assert door.main(["train", str(door.CONFIGS / "ingest.yaml")]) == 2
    assert "expected the key that the command names" in capsys.readouterr().err


def test_committed_run_asks_for_the_four_forms_on_a_gpu_at_224() -> None:
    job = load(door.Benchmark, door.CONFIGS / "train.yaml")
    assert job.train is not None
    assert all(flops.per_image(case.recipe.model) > 0 for case in job.train.cases.values())  # the models are there
    cards = [case.recipe for case in job.train.cases.values() if case.device == "cuda"]
    assert {(given.precision, given.channels_last, given.compile) for given in cards} == {
        ("fp32", False, False),
        ("bf16", False, False),
        ("bf16", True, False),
        ("bf16", True, True),
    }
    assert {given.loading.batch_size for given in cards} == {1024}
