"""Engines: each answers as the plain one does, a bundle keeps its own, and the quickest that does is chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data import shards
from pipeline.data.loading import Config, Loader
from pipeline.errors import BundleError, ConfigError
from pipeline.evaluation import tuning
from pipeline.evaluation.tuning import Figures, Gate, decide
from pipeline.inference import bundle, engine
from pipeline.inference.bundle import Bundle
from pipeline.inference.engine import PLAIN, Engine
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import Detector
from pipeline.types import Classification, Detections, Frame
from tests.small_detection import assert_same, untaught

BF16, ONNX = Engine(precision="bf16"), Engine(runtime="onnxruntime")
OTHERS = [one for one in engine.candidates() if one != PLAIN]
QUICK = [one for one in OTHERS if one.runtime != "compile"]
ANY = [pytest.param(one, id=str(one)) for one in QUICK]
COMPILED = pytest.param(Engine(runtime="compile", precision="bf16"), id="compile-bf16", marks=pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def exported_once() -> Iterator[None]:
    """An export takes seconds and is the same for every runtime: each network of this file is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        made, export = dict[str, bytes](), engine._exported

        def once(network: torch.nn.Module, example: torch.Tensor, *, sizes_vary: bool) -> bytes:
            key = f"{network} {example.shape} {sum(float(each.sum()) for each in network.parameters())}"
            return made.get(key) or made.setdefault(key, export(network, example, sizes_vary=sizes_vary))

        patch.setattr(engine, "_exported", once)
        yield


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A classifier of three classes that has learnt nothing, but says so with conviction."""
    torch.manual_seed(0)
    config = models.config_of("lenet5")(name="lenet5", num_classes=3)
    made = models.build(config)
    for value in made.parameters():
        value.data *= 2
    return bundle.save(tmp_path_factory.mktemp("bundles") / "lenet", made, config, classes=tuple("abc"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One whose pictures keep their aspect, so that they are of many sizes."""
    fit = {"way": "resize", "short_side": 64, "long_side": 96}
    return untaught(tmp_path_factory.mktemp("bundles") / "detector", tuple("abc"), input={"fit": fit})


def on(made: Bundle, one: Engine) -> Predictor:
    return Predictor(replace(made, card=made.card.model_copy(update={"engine": one})))


def pictures(num: int, height: int, width: int) -> Batch:
    coarse = torch.rand(num, 3, 5, 7, generator=torch.Generator().manual_seed(num)) * 255
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)
    return Batch(images, frames=(Frame((height, width), (height, width)),) * num)


def close(one: Engine) -> float:
    return 1e-5 if one.precision == "fp32" else 2e-2


@pytest.mark.parametrize("one", [*ANY, COMPILED])
def test_a_classifier_on_every_engine_answers_as_the_plain_one_in_batches_of_any_size(
    lenet: Bundle, one: Engine
) -> None:
    plain, other = Predictor(lenet), on(lenet, one)
    for num in (1, 2, 3, 5, 4, 1):
        expected, found = (each.predict_batch(pictures(num, 28, 28)) for each in (plain, other))
        for mine, theirs in zip(found, expected, strict=True):
            assert isinstance(mine, Classification)
            assert mine.labels[0] == theirs.labels[0]
            assert mine.scores.dtype == np.float32
            np.testing.assert_allclose(
                mine.scores[mine.labels.argsort()], theirs.scores[theirs.labels.argsort()], atol=close(one)
            )


@pytest.mark.parametrize("one", ANY)
def test_a_detector_on_every_engine_answers_as_the_plain_one_about_pictures_of_any_size(
    detector: Bundle, one: Engine
) -> None:
    plain, other = Predictor(detector), on(detector, one)
    for num, height, width in ((1, 64, 96), (5, 64, 96), (2, 96, 64), (3, 64, 64), (1, 40, 70)):
        batch = pictures(num, height, width)
        if one.precision != "fp32":
            assert isinstance(plain.model, Detector)
            with torch.inference_mode():
                wanted, given = (each.model(batch).boxes_xyxy for each in (plain, other))
            assert given.dtype == torch.float32
            torch.testing.assert_close(given, wanted, atol=2.0, rtol=0)
            continue
        for mine, theirs in zip(other.predict_batch(batch), plain.predict_batch(batch), strict=True):
            assert isinstance(mine, Detections)
            assert isinstance(theirs, Detections)
            assert_same(mine, theirs)


@pytest.mark.parametrize("one", [BF16, *(one for one in QUICK if one == ONNX)], ids=str)
def test_a_two_stage_detector_runs_its_first_stage_on_every_engine(one: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    raw = {"backbone": "squeezenet1_1", "num_classes": 2, "fc_features": 16, "post_nms_test": 20}
    fit = {"way": "resize", "short_side": 64, "long_side": 96}
    config = parse(models.config_of("faster_rcnn"), raw | {"input": {"fit": fit}}, "here")
    made = bundle.save(tmp_path / "b", models.build(config), config, classes=("a", "b"))
    batch = pictures(3, 64, 80)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=one == BF16):
        images = made.build().normalized(batch, 16)  # type: ignore[operator]
        wanted, given = (each.model.network(images) for each in (Predictor(made), on(made, one)))
    assert given[0].keys() == wanted[0].keys()
    for mine, theirs in zip((*given[0].values(), *given[1]), (*wanted[0].values(), *wanted[1]), strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), atol=close(one) * theirs.abs().max().item(), rtol=0)
    assert len(on(made, one).predict_batch(batch)) == 3


LET_GO = """
import gc, signal, torch
from pipeline.inference import engine

exported = engine._exported(torch.nn.Conv2d(3, 2, 1), torch.rand(2, 3, 8, 8), sizes_vary=False)
running = [engine._openvino(exported, "fp32", 1) for _ in range(2)]
while running:
    running.pop(0)
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
signal.raise_signal(signal.SIGCHLD)
"""


@pytest.mark.skipif(not any(one.runtime == "openvino" for one in OTHERS), reason="openvino is not installed")
def test_a_process_survives_a_signal_after_engines_are_let_go_in_the_order_they_came() -> None:
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", LET_GO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["handled"]), done.stderr


def test_bf16_keeps_weights_of_16_bits_and_gives_fp32(lenet: Bundle) -> None:
    model = on(lenet, BF16).model
    kept = {name: value.dtype for name, value in model.named_parameters()}
    assert torch.bfloat16 in kept.values()
    assert kept.keys() == dict(lenet.build().named_parameters()).keys()
    with torch.inference_mode():
        assert model(pictures(2, 28, 28)).dtype == torch.float32


def test_a_bundle_on_an_engine_keeps_it_with_the_figures_and_the_same_weights(lenet: Bundle, tmp_path: Path) -> None:
    made = bundle.on_engine(
        tmp_path / "b", lenet, BF16, metrics={"engine/latency_ms": 1.5}, provenance={"engine": "eager-bf16"}
    )
    read = bundle.load(tmp_path / "b")
    assert read == made
    assert (read.card.engine, read.card.weights_sha256) == (BF16, lenet.card.weights_sha256)
    assert (read.card.metrics, read.card.provenance) == ({"engine/latency_ms": 1.5}, {"engine": "eager-bf16"})
    assert next(read.build().parameters()).dtype == torch.float32  # as it was trained
    answers = [each.predict_batch(pictures(2, 28, 28))[0] for each in (Predictor(read), on(lenet, BF16))]
    np.testing.assert_array_equal(answers[0].scores, answers[1].scores)


def test_a_plain_card_does_not_mention_engines_so_that_older_versions_read_it(lenet: Bundle) -> None:
    written = json.loads((lenet.path / bundle.CARD).read_text())
    assert "engine" not in written
    assert bundle.load(lenet.path).card.engine == PLAIN


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"runtime": "tensorrt"}, "engine.runtime"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "has the precisions fp32, got bf16"),
        ({"precision": "int4"}, "engine.precision"),
    ],
)
def test_an_unknown_engine_in_a_card_is_named(
    lenet: Bundle, tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    made = bundle.on_engine(tmp_path / "b", lenet, BF16, metrics={}, provenance={})
    card = json.loads((made.path / bundle.CARD).read_text())
    (made.path / bundle.CARD).write_text(json.dumps(card | {"engine": keys}))
    with pytest.raises(BundleError, match=sentence):
        bundle.load(made.path)


def test_an_engine_that_is_not_installed_is_refused_in_a_sentence(
    lenet: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.PACKAGES, "onnxruntime", ("onnx", "no_such_package"))
    with pytest.raises(
        ConfigError, match=r"engine onnxruntime-fp32 needs no_such_package, not installed .*\[engines\]"
    ):
        on(lenet, ONNX)
    assert ONNX not in engine.candidates()


@pytest.mark.parametrize(
    ("one", "device", "sentence"),
    [
        (Engine(precision="fp16"), "cpu", "fp16 is for GPUs, got cpu; take bf16 or fp32"),
        (Engine(runtime="compile"), "cpu", "needs a C\\+\\+ compiler, and there is no no-such-compiler here"),
    ],
)
def test_what_a_machine_cannot_run_is_refused_in_a_sentence(
    one: Engine, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ConfigError, match=sentence):
        engine.check(one, device)


@pytest.mark.skipif(ONNX not in QUICK, reason="the extra `engines` is not installed")
def test_an_exported_engine_on_a_gpu_is_refused_before_it_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="onnxruntime-fp32 runs on cpu, got cuda; take runtime eager or compile"):
        engine.check(ONNX, "cuda")


def figures(one: Engine, latency_ms: float, images_per_s: float, accuracy: float, agreement: float | None) -> Figures:
    measured = {"latency_ms": latency_ms, "images_per_s": images_per_s, "accuracy": accuracy, "agreement": agreement}
    return Figures(engine=one, start_s=1.0, **measured)


def test_the_choice_follows_the_objective() -> None:
    slow, quick, prompt = (
        figures(PLAIN, 15.0, 150.0, 0.6, 1.0),
        figures(BF16, 7.0, 460.0, 0.6, 1.0),
        figures(ONNX, 5.0, 300.0, 0.6, 1.0),
    )
    assert decide([slow, quick, prompt], Gate(), "throughput") == quick
    assert decide([slow, quick, prompt], Gate(), "latency") == prompt


@pytest.mark.parametrize(
    ("accuracy", "agreement", "passes"),
    [
        (0.605, 0.995, True),
        (0.595, None, True),
        (0.5949, 1.0, False),
        (0.6051, 1.0, False),
        (0.6, 0.9949, False),
        (float("nan"), 1.0, False),
    ],
)
def test_a_quicker_engine_is_taken_only_if_it_passes_the_gate(
    accuracy: float, agreement: float | None, passes: bool
) -> None:
    plain, quick = figures(PLAIN, 15, 150, 0.6, 1.0), figures(BF16, 7, 460, accuracy, agreement)
    assert decide([plain, quick], Gate(), "throughput") == (quick if passes else plain)
    assert (Gate().objection(quick, plain) == "") == passes


def striped(stripes: shards.Shards, path: Path) -> Bundle:
    torch.manual_seed(0)
    config = models.config_of("lenet5")(name="lenet5", num_classes=2)
    made = models.build(config)
    for value in made.parameters():
        value.data *= 2
    return bundle.save(path / "stripes", made, config, classes=stripes.manifest.classes)


def test_the_gate_rejects_an_engine_that_answers_wrongly(stripes: shards.Shards, tmp_path: Path) -> None:
    plain, damaged = (Predictor(striped(stripes, tmp_path)) for _ in range(2))
    network = damaged.model.network
    network.register_forward_hook(lambda *call: -call[-1])  # the class that it thinks least of
    loader = Loader(stripes, plain.model.spec, Config(batch_size=4, num_tasks=0))
    tallies = tuning.compared({PLAIN: plain, BF16: damaged}, loader.evaluate("val"))
    assert tallies[PLAIN].num_images == 13
    assert (tallies[PLAIN].agreement(), tallies[BF16].agreement()) == (1.0, 0.0)
    assert tallies[BF16].accuracy() == pytest.approx(1 - tallies[PLAIN].accuracy())
    found = [
        figures(one, 1, 1 if one == PLAIN else 9, each.accuracy(), each.agreement()) for one, each in tallies.items()
    ]
    assert decide(found, Gate(), "throughput").engine == PLAIN


def test_a_tuned_classifier_says_what_was_measured_and_is_written_with_it(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    made, threads = striped(stripes, tmp_path), torch.get_num_threads()
    config = tuning.Config(batch_size=4, num_rounds=2, block_s=0.01, num_threads=1, runtimes=("eager",))
    try:
        found = tuning.tune(made, stripes, "val", config)
    finally:
        torch.set_num_threads(threads)
    assert [each.engine for each in found.figures] == [PLAIN, BF16]
    assert found.plain.agreement == 1.0
    assert all(each.latency_ms > 0 and each.images_per_s > 0 for each in found.figures)
    assert "13 images of" in found.table()
    written = found.write(tmp_path / "tuned", "digits/3")
    assert written.card.engine == found.chosen.engine
    assert written.card.provenance["optimized_from"] == "digits/3"
    assert written.card.metrics["engine/plain/top1"] == found.plain.accuracy


def test_a_tuned_detector_is_judged_by_its_average_precision(boxed_stripes: shards.Shards, tmp_path: Path) -> None:
    made = untaught(tmp_path / "b", boxed_stripes.manifest.classes)
    config = tuning.Config(batch_size=4, num_rounds=1, block_s=0.01, runtimes=("eager",))
    found = tuning.tune(made, boxed_stripes, "val", config)
    assert [each.agreement for each in found.figures] == [None, None]
    assert "coco_map50" in found.table()


def test_a_model_that_an_engine_cannot_run_is_told_of_and_not_chosen(
    stripes: shards.Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for this\nand a long report")

    monkeypatch.setitem(engine.PACKAGES, "onnxruntime", ("json",))
    monkeypatch.setattr(engine, "_exported", broken)
    config = tuning.Config(batch_size=4, num_rounds=1, block_s=0.01, runtimes=("onnxruntime",))
    found = tuning.tune(striped(stripes, tmp_path), stripes, "val", config)
    said = "engine onnxruntime-fp32 cannot run lenet5: RuntimeError: no kernel for this; take another engine"
    assert found.refused == {ONNX: said}
    assert said in found.table()
    assert found.chosen.engine == PLAIN
