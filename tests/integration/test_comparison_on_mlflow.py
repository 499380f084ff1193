"""Runs are compared, and versions promoted or refused, by what they left on a real MLflow server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from jobs import compare, promote
from jobs._process import Service
from pipeline.data import shards
from pipeline.errors import ConfigError, DataError, ModelError, TrackingError
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.mistakes import error_sheet
from pipeline.evaluation.report import ClassificationReport, Evaluation, evidence_metrics
from pipeline.tracking import compare as comparison
from pipeline.tracking import gate, registry, runs
from pipeline.tracking.gate import Gate
from pipeline.tracking.predictions import PLAIN, Origin, Predictions, merge
from pipeline.types import Views

EXPERIMENT = "zoo of nets"
MODEL = "zoo-net"


@dataclass(frozen=True)
class Zoo:
    """A server with runs of two recipes and three versions of a model."""

    uri: str
    runs: dict[str, str]
    client: MlflowClient


def evaluation(
    source: shards.Shards,
    wrong: Sequence[int],
    weights: str,
    digest: str = "",
    views: Views = "centre",
    engine: str = PLAIN,
) -> Evaluation:
    """What an evaluation of 13 real pictures would have found, repeated 30 times under other names."""
    rows = shards.read(source.path / source.manifest.of("val")[0].name, [0, 1], ["image_id", "label"])
    ids = rows.column("image_id").to_pylist()
    ids += [f"~{copy}/{image_id}" for copy in range(29) for image_id in ids]
    labels = np.tile(rows.column("label").to_numpy(), 30)
    scores = np.where(np.eye(2)[labels] > 0, 0.9, 0.1).astype(np.float32)
    scores[list(wrong)] = scores[list(wrong)][:, ::-1]
    origin = Origin(
        split="val",
        dataset="stripes",
        dataset_digest=digest or source.manifest.digest,
        weights_sha256=weights,
        classes=source.manifest.classes,
        views=views,
        engine=engine,
    )
    said = merge([Predictions.of(origin, ids, labels, scores)])
    counts = Counts.of(scores, labels, 10.0 + len(list(wrong)))
    report = ClassificationReport.of(counts, "val", source.manifest.classes, {})
    figures = {"metrics": report.metrics | evidence_metrics(said)}
    errors = error_sheet(said, source)
    return Evaluation(**dict(report.model_copy(update=figures)), predictions=said, errors=errors)


def leave_a_run(
    uri: str,
    source: shards.Shards,
    folder: Path,
    recipe: str,
    seed: int,
    wrong: Sequence[int],
    digest: str = "",
    views: Views = "centre",
    *,
    engine: str = PLAIN,
) -> str:
    params = {"recipe.model.activation": recipe, "recipe.seed": str(seed), "cluster.num_workers": "2"}
    tags = {"dataset_digest": digest or source.manifest.digest}
    config = runs.Config(experiment=EXPERIMENT, run_name=f"{recipe}-seed{seed}")
    with runs.start(uri, config, params=params, tags=tags) as run:
        run.log_dataset("stripes", digest or source.manifest.digest, str(source.path), "val")
        for epoch in range(1, 4):
            values = {"train/loss": 1 / epoch, "val/top1": 1 - len(wrong) / 390 / epoch, "images_per_s": 100.0 * epoch}
            run.log_metrics(values | {"epoch_s": 3600.0 * epoch}, step=epoch)
        evaluation(source, wrong, f"weights of {recipe} {seed}", digest, views, engine).record(
            run, folder / f"{recipe}{seed}.json"
        )
    return run.id


@pytest.fixture(scope="module")
def zoo(mlflow_server: Service, stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    uri, folder = mlflow_server.address, tmp_path_factory.mktemp("zoo")
    client = MlflowClient(uri, uri)
    wrongs = {("relu", 0): range(10, 14), ("relu", 1): range(10, 16), ("tanh", 0): range(60)}
    left = {
        f"{recipe}{seed}": leave_a_run(uri, stripes, folder, recipe, seed, wrong)
        for (recipe, seed), wrong in wrongs.items()
    }
    client.create_registered_model(MODEL)
    for name in ("tanh 0", "relu 0", "relu 1"):  # versions 1, 2, 3
        run_id = left[name.replace(" ", "")]
        tags = {"weights_sha256": f"weights of {name}"}
        client.create_model_version(MODEL, f"runs:/{run_id}/model", run_id, tags, await_creation_for=0)
    return Zoo(uri, left, client)


class Addresses(HTMLParser):
    """What a page points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attrs if key in {"src", "href"}]


def test_compare_job_on_an_experiment_prints_the_answer_and_writes_the_page(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
    assert compare.main([EXPERIMENT, f"storage={tmp_path}", "page=pages/zoo.html"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("relu should be champion (its best run: relu-seed0): mean top-1 98.72 %, 14.10 points above")
    page = (tmp_path / "pages" / "zoo.html").read_text()
    assert f"page  {tmp_path}/pages/zoo.html" in out
    assert "relu should be champion" in page
    pictures = Addresses(page).found
    assert pictures  # of the 13 real ones, those that changed
    assert all(address.startswith("data:image/") for address in pictures)
    for expected in ("recipe.model.activation", "val/top1", "train/loss", "training images/s", zoo.runs["tanh0"]):
        assert expected in page, expected


def test_compare_runs_models_and_aliases_name_the_same_evidence(zoo: Zoo) -> None:
    by_run = comparison.compare(zoo.uri, [zoo.runs["relu0"], zoo.runs["tanh0"]])
    by_model = comparison.compare(zoo.uri, [f"{MODEL}/2", f"models:/{MODEL}/1", f"{MODEL}/1"])
    assert [group.name for group in by_model.verdict.ranked] == [f"{MODEL}/2", f"{MODEL}/1"]
    assert [each.p for each in by_run.verdict.contrasts] == [each.p for each in by_model.verdict.contrasts]
    trial = by_run.verdict.leader.trials[0]
    assert trial.curves["train/loss"] == ((1, 1.0), (2, 0.5), (3, 1 / 3))
    assert trial.metrics["final/val/top1"] == pytest.approx(trial.value("top1"))
    assert trial.seconds == 6 * 3600  # as its epochs say, not the moment from its start to its end


def test_compare_unknown_things_are_named(zoo: Zoo) -> None:
    with pytest.raises(TrackingError, match=r"'zoo of net' is neither a run id .*did you mean 'zoo of nets'"):
        comparison.compare(zoo.uri, ["zoo of net"])
    with pytest.raises(TrackingError, match="has no finished run that was evaluated on 'test'"):
        comparison.compare(zoo.uri, [EXPERIMENT], comparison.Config(split="test"))
    with pytest.raises(TrackingError, match=r"zoo-net/1 was never evaluated on 'test'; run python -m jobs.evaluate"):
        comparison.compare(zoo.uri, [f"{MODEL}/1"], comparison.Config(split="test"))
    with pytest.raises(ConfigError, match="name at least one"):
        comparison.compare(zoo.uri, [])


def test_compare_job_on_different_data_is_refused_with_the_exit_code_of_data(
    zoo: Zoo,
    stripes: shards.Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = leave_a_run(zoo.uri, stripes, tmp_path, "elu", 0, range(3), digest="f" * 64)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
        words = [other, zoo.runs["relu0"], f"storage={tmp_path}"]
        assert compare.main(words) == DataError.exit_code
        assert re.search(
            r"error: the runs were evaluated on 2 different datasets or views \(.*ffffffffffff: elu",
            capsys.readouterr().err,
        )
        assert not (tmp_path / "comparison.html").exists()
        assert compare.main([*words, "compare.mixed=true"]) == 0
        assert "Nothing can be said about a champion" in capsys.readouterr().out
    finally:
        zoo.client.delete_run(other)


@pytest.fixture
def tanh_is_champion(zoo: Zoo) -> None:
    registry.promote(zoo.uri, MODEL, "1")


def tag_of(zoo: Zoo, version: str) -> str:
    return str(zoo.client.get_model_version(MODEL, version).tags.get("promotion.champion", ""))


@pytest.mark.usefixtures("tanh_is_champion")
def test_promote_job_through_a_gate_moves_the_alias_and_writes_why(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
    assert promote.main([f"model={MODEL}", "version=2", "gate.min_improvement=0.1"]) == 0
    assert registry.resolve(zoo.uri, f"{MODEL}@champion").version == "2"
    told = tag_of(zoo, "2")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC: top-1 on val is 98.97 % against 84.62 % of zoo-net/1, 14.36", told)
    assert "on 390 images of data 000000000000" in told
    assert told.partition("UTC: ")[2] in capsys.readouterr().out


@pytest.mark.usefixtures("tanh_is_champion")
def test_promote_job_is_refused_with_figures_and_forced_with_a_word(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
    words = [f"model={MODEL}", "version=3", "gate.min_improvement=0.2"]
    assert promote.main(words) == ModelError.exit_code
    assert re.search(
        r"error: zoo-net/3 does not become champion: top-1 on val is 98.46 % against 84.62 % of zoo-net/1, 13.85 "
        r"points better where at least 20.00 points is asked, and p = \S+( 0.001)? where less than 0.05 is asked",
        capsys.readouterr().err,
    )
    assert registry.resolve(zoo.uri, f"{MODEL}@champion").version == "1"
    assert promote.main([*words, "force=true"]) == 0
    assert registry.resolve(zoo.uri, f"{MODEL}@champion").version == "3"
    assert "UTC: forced, though the gate does not hold: top-1 on val is" in tag_of(zoo, "3")


@pytest.mark.usefixtures("tanh_is_champion")
def test_promote_job_without_a_word_asks_the_default_gate_and_leaves_no_reason_that_is_old(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
    assert tag_of(zoo, "1").endswith(" UTC: no gate was asked")
    assert promote.main([f"model={MODEL}", "version=3"]) == 0
    assert "13.85 points better where at least 0.00 points is asked" in tag_of(zoo, "3")
    assert promote.main([f"model={MODEL}", "version=1"]) == ModelError.exit_code
    assert "zoo-net/1 does not become champion" in capsys.readouterr().err
    assert registry.resolve(zoo.uri, f"{MODEL}@champion").version == "3"
    assert promote.main([f"model={MODEL}", "version=1", "force=true"]) == 0
    assert "UTC: forced, though the gate does not hold: top-1 on val is 84.62 %" in tag_of(zoo, "1")
    registry.promote(zoo.uri, MODEL, "3", reason="by hand")
    assert tag_of(zoo, "3").endswith(" UTC: by hand")


def test_gate_between_seeds_of_one_recipe_asks_the_images_only(zoo: Zoo) -> None:
    registry.promote(zoo.uri, MODEL, "3")
    worse, better = (registry.resolve(zoo.uri, f"{MODEL}/{version}") for version in (3, 2))
    found = gate.decide(zoo.uri, better, worse, Gate())
    assert not found.holds  # two images of difference are no proof
    assert "0.51 points better" in found.reason
    assert "seeds" not in found.reason
    assert gate.decide(zoo.uri, worse, better, Gate(alpha=1.0)).holds is False  # never for a worse one
    assert gate.decide(zoo.uri, better, better, Gate()).holds
    assert gate.decide(zoo.uri, better, None, Gate()).holds


def test_gate_of_the_lucky_seed_of_a_worse_recipe_does_not_hold(
    zoo: Zoo, stripes: shards.Shards, tmp_path: Path
) -> None:
    """The images say that the candidate is better, its recipe's seeds that it was luck."""
    wrongs = {("lucky", 0): 80, ("lucky", 1): 81, ("lucky", 2): 79, ("lucky", 3): 40}
    wrongs |= {("steady", 0): 60, ("steady", 1): 61, ("steady", 2): 59}
    made = {key: leave_a_run(zoo.uri, stripes, tmp_path, *key, range(wrong)) for key, wrong in wrongs.items()}
    try:
        candidate, holder = (
            registry.Version(MODEL, number, made[key], "", "", weights_sha256=f"weights of {key[0]} {key[1]}")
            for number, key in (("11", ("lucky", 3)), ("10", ("steady", 0)))
        )
        found = gate.decide(zoo.uri, candidate, holder, Gate())
        assert not found.holds
        assert "5.13 points better" in found.reason
        assert "p = 1 where less than 0.05 is asked" in found.reason
        assert "4 against 3 seeds 1, for their means, 82.05 % and 84.62 %, say the opposite" in found.reason
    finally:
        for run_id in made.values():
            zoo.client.delete_run(run_id)


@pytest.mark.parametrize(
    ("digest", "views", "told"), [("f" * 64, "centre", "ffffffffffff"), ("", "ten_crop", r"000000000000 (ten_crop)")]
)
def test_gate_of_versions_on_different_data_or_views_or_without_evidence_does_not_hold(
    zoo: Zoo, stripes: shards.Shards, tmp_path: Path, digest: str, views: Views, told: str
) -> None:
    elsewhere = leave_a_run(zoo.uri, stripes, tmp_path, "gelu", 0, range(1), digest, views)
    try:
        made = [
            zoo.client.create_model_version(
                MODEL, f"runs:/{elsewhere}/model", elsewhere, {"weights_sha256": weights}, await_creation_for=0
            )
            for weights in ("weights of gelu 0", "never evaluated")
        ]
        holder = registry.resolve(zoo.uri, f"{MODEL}/1")
        foreign = registry.resolve(zoo.uri, f"{MODEL}/{made[0].version}")
        found = gate.decide(zoo.uri, foreign, holder, Gate())
        assert not found.holds
        assert f"it was evaluated on data {told}, but zoo-net/1 on 000000000000;" in found.reason
        unknown = registry.resolve(zoo.uri, f"{MODEL}/{made[1].version}")
        found = gate.decide(zoo.uri, unknown, holder, Gate())
        assert f"{MODEL}/{made[1].version} was never evaluated image by image on 'val'" in found.reason
        found = gate.decide(zoo.uri, foreign, holder, Gate(split="test"))
        assert "was never evaluated image by image on 'test'" in found.reason
    finally:
        zoo.client.delete_run(elsewhere)


def test_gate_takes_no_evaluation_of_the_same_weights_on_another_engine(
    zoo: Zoo, stripes: shards.Shards, tmp_path: Path
) -> None:
    left = [leave_a_run(zoo.uri, stripes, tmp_path, "gelu", 0, range(1))]
    try:
        tags = {"weights_sha256": "weights of gelu 0", "engine": "openvino-bf16"}
        made = zoo.client.create_model_version(MODEL, f"runs:/{left[0]}/model", left[0], tags, await_creation_for=0)
        quick, holder = (registry.resolve(zoo.uri, f"{MODEL}/{number}") for number in (made.version, 1))
        found = gate.decide(zoo.uri, quick, holder, Gate())
        assert f"{MODEL}/{made.version} was never evaluated image by image on 'val'" in found.reason
        left.append(leave_a_run(zoo.uri, stripes, tmp_path, "gelu", 0, range(2), engine="openvino-bf16"))
        found = gate.decide(zoo.uri, quick, holder, Gate())
        assert "top-1 on val is 99.49 % against" in found.reason  # two of 390 images are wrong, not one
    finally:
        for run_id in left:
            zoo.client.delete_run(run_id)
