"""`jobs.optimize` on a registered model: version in, engines tried, new version out, on a real MLflow server."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from jobs import optimize, promote
from jobs._process import Service
from pipeline import models
from pipeline.data import shards
from pipeline.evaluation import tuning
from pipeline.evaluation.tuning import Times
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.inference.engine import PLAIN, Engine
from pipeline.tracking import registry, runs

BF16 = Engine(precision="bf16")
EXPERIMENT = "optimize-tests"
QUICK = ("tune.runtimes=[eager]", "tune.num_rounds=1", "tune.block_s=0.001", "tune.batch_size=4")
ANY_ANSWER = ("tune.gate.max_difference=0.99", "tune.gate.min_agreement=0")  # the gate has tests of its own


@dataclass(frozen=True)
class Place:
    """Where jobs run: an MLflow server, a folder, and shards whose classes the models know."""

    uri: str
    storage: Path
    source: shards.Shards

    @property
    def client(self) -> MlflowClient:
        """Of the server."""
        return MlflowClient(self.uri, self.uri)

    def publish(self, name: str) -> str:
        """A model whose one version, the champion, has learnt nothing and says that it was trained elsewhere."""
        torch.manual_seed(0)
        architecture = models.config_of("lenet5")(name="lenet5", num_classes=2)
        made = bundle.save(
            self.storage / "made" / name,
            models.build(architecture),
            architecture,
            classes=self.source.manifest.classes,
            metrics={"val/top1": 0.5},
            provenance={"dataset": "elsewhere", "dataset_digest": "e" * 64, "run": "of-old"},
        )
        with runs.start(self.uri, runs.Config(experiment=EXPERIMENT), params={}, tags={}) as run:
            registry.promote(self.uri, name, registry.publish(run, made, name).version)
        return name

    def optimize(self, model: str, *more: str, quickest: Engine = BF16) -> int:
        """The door. All engines are timed, but `quickest` wins: which it is on a machine is nothing to test."""
        measure, threads = tuning.timed, torch.get_num_threads()

        def timed(*args: Any) -> Mapping[Engine, Times]:
            return {one: each if one == quickest else Times(1e3, 1e3) for one, each in measure(*args).items()}

        where = (f"storage={self.storage}", f"shards={self.source.path}", f"tracking.experiment={EXPERIMENT}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            patch.setattr(tuning, "timed", timed)
            try:
                return optimize.main([f"model={model}", *where, *QUICK, *ANY_ANSWER, *more])
            finally:
                torch.set_num_threads(threads)

    def bundle(self, reference: str) -> Bundle:
        """Of a version."""
        return registry.fetch(self.uri, registry.resolve(self.uri, reference), self.storage / "fetched")

    def versions(self, name: str) -> list[str]:
        """Their numbers."""
        return sorted(found.version for found in self.client.search_model_versions(f"name = '{name}'"))

    def num_runs(self) -> int:
        """In the experiment of these tests."""
        (experiment,) = self.client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
        return len(self.client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def place(mlflow_server: Service, stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(mlflow_server.address, tmp_path_factory.mktemp("optimize"), stripes)


@pytest.fixture(scope="module")
def said(place: Place) -> str:
    """What is printed when the champion of `once` is optimised, whose version 2 is the outcome."""
    with redirect_stdout(io.StringIO()) as out:
        assert place.optimize(f"{place.publish('once')}@champion") == 0
    return out.getvalue()


def test_optimize_of_an_alias_registers_a_version_on_the_quickest_engine(place: Place, said: str) -> None:
    assert "model    once version 2 (no alias moves)" in said
    assert place.versions("once") == ["1", "2"]
    old, new = place.bundle("once/1"), place.bundle("once/2")
    assert (old.card.engine, new.card.engine) == (PLAIN, BF16)
    weights = [load_file(made.path / bundle.WEIGHTS) for made in (old, new)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    told = {"optimized_from": "once/1", "engine": "eager-bf16"}
    assert new.card.provenance.items() >= (old.card.provenance | told).items()
    assert new.card.metrics["val/top1"] == 0.5
    assert new.card.metrics["engine/images_per_s"] > new.card.metrics["engine/plain/images_per_s"]
    before = {name: getattr(old.card, name) for name in ("engine", "metrics", "provenance")}
    assert new.card.model_copy(update=before) == old.card


def test_optimize_leaves_in_mlflow_where_the_version_came_from(place: Place, said: str, tmp_path: Path) -> None:
    client = place.client
    made = client.get_model_version("once", "2")
    assert (made.tags["optimized_from"], made.tags["engine"]) == ("once/1", "eager-bf16")
    assert (made.tags["dataset"], made.tags["dataset_digest"]) == ("elsewhere", "e" * 64)
    assert (made.tags["engine_dataset"], made.tags["engine_dataset_digest"]) == ("image_folder/val", "0" * 64)
    run = client.get_run(made.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["optimized_from"], run.data.tags["dataset_digest"]) == ("once/1", "0" * 64)
    assert (run.data.params["model"], run.data.params["tune.runtimes"]) == ("once@champion", '["eager"]')
    (seen,) = run.inputs.dataset_inputs
    assert seen.dataset.name == "image_folder/val"
    table = Path(client.download_artifacts(run.info.run_id, "engines.txt", str(tmp_path))).read_text()
    assert re.search(r"(?m)^eager-bf16 .* chosen$", table)
    assert table in said
    logged = client.get_logged_model(made.source.removeprefix("models:/"))
    figures = {metric.key: metric.value for metric in logged.metrics}
    assert figures == {f"model/{key}": value for key, value in place.bundle("once/2").card.metrics.items()}
    assert figures.keys() >= {"model/engine/top1", "model/engine/agreement", "model/engine/plain/latency_ms"}


def test_optimize_moves_no_alias_and_says_how_one_is_moved(
    place: Place, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.client.get_registered_model("once").aliases == {"champion": "1"}
    command = re.search(r"python -m jobs\.promote (.*)", said)
    assert command
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    words = [*command[1].split(), f"storage={place.storage}"]
    assert promote.main([word for word in words if word != "force=true"]) != 0  # the gate asks for a gain
    assert promote.main(words) == 0
    try:
        assert place.client.get_registered_model("once").aliases == {"champion": "2"}
    finally:
        registry.promote(place.uri, "once", "1")


def test_optimize_again_registers_only_what_is_quicker_than_what_answers_now(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.publish("again")
    assert place.optimize("again/1", quickest=PLAIN) == 0
    assert "nothing to write: eager-fp32" in capsys.readouterr().out
    assert place.versions("again") == ["1"]
    assert [place.optimize("again/1"), place.optimize("again/2")] == [0, 0]
    assert "nothing to write: eager-bf16" in capsys.readouterr().out
    assert place.versions("again") == ["1", "2"]
    assert [place.optimize("again/1"), place.optimize("again/2", quickest=PLAIN)] == [0, 0]
    told = capsys.readouterr().out
    assert re.findall(r"again version \d", told) == ["again version 2", "again version 3"]  # 1 was not made of 2
    assert "jobs.promote model=again version=2 force=true" in told
    assert place.versions("again") == ["1", "2", "3"]
    third = place.bundle("again/3").card
    assert third.engine == PLAIN
    assert (third.provenance["optimized_from"], third.provenance["engine"]) == ("again/2", "eager-fp32")


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("once@chmpion", "model 'once' has no alias 'chmpion'; did you mean 'champion'?"),
        ("once/9", "model 'once' has no version 9; it has: 1, 2"),
        ("nobody-knows-this/1", "no model 'nobody-knows-this' is registered"),
        ("once", "expected name@alias or name/3"),
    ],
)
def test_optimize_of_what_is_not_registered_is_one_sentence(
    place: Place, said: str, capsys: pytest.CaptureFixture[str], reference: str, sentence: str
) -> None:
    before = place.num_runs()
    assert place.optimize(reference) != 0
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert sentence in told
    assert "\n" not in told
    assert (place.versions("once"), place.num_runs()) == (["1", "2"], before)


def test_optimize_on_shards_of_other_classes_is_one_sentence(
    place: Place, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = place.source.manifest.model_copy(update={"classes": ("up", "down")})
    (tmp_path / shards.MANIFEST).write_text(manifest.model_dump_json())
    assert place.optimize("once/1", f"shards={tmp_path}") != 0
    assert "2 classes that are not the 2 of" in capsys.readouterr().err
    assert place.versions("once") == ["1", "2"]
