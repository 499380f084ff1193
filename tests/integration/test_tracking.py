"""Runs, the registry and the served model code against a real MLflow server."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from jobs._process import Service
from pipeline import models, provenance
from pipeline.errors import BundleError, ConfigError, TrackingError
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.tracking import connection, registry, runs
from pipeline.training import experiment
from pipeline.types import Classification

CONFIG = runs.Config(experiment="tracking-tests")
CLASSES = tuple(f"digit {number}" for number in range(10))


@pytest.fixture
def client(mlflow_server: Service) -> MlflowClient:
    return MlflowClient(mlflow_server.address, mlflow_server.address)


@pytest.fixture
def run(mlflow_server: Service) -> Iterator[runs.Run]:
    with runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as opened:
        yield opened


def make_bundle(path: Path, seed: int = 0) -> Bundle:
    torch.manual_seed(seed)
    config = models.config_of("lenet5").model_validate({"name": "lenet5"})
    origin = {"dataset": "digits", "dataset_digest": "c" * 64}
    return bundle.save(
        path,
        models.build_classifier(config),
        config,
        classes=CLASSES,
        metrics={"val/top1": 0.25 + seed, "lr": 0.1},
        provenance=origin,
    )


def make_jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# ---- runs


def test_start_without_error_ends_finished_and_records_origin(mlflow_server: Service, client: MlflowClient) -> None:
    params = {f"model.key{number}": str(number) for number in range(250)} | {"long": "x" * 7000, "empty": ""}
    with runs.start(mlflow_server.address, CONFIG, params=params, tags={"note": "mine"}) as run:
        assert client.get_run(run.id).info.status == "RUNNING"
    kept = client.get_run(run.id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {**params, "long": "x" * 6000}
    assert kept.data.tags["note"] == "mine"
    assert kept.data.tags["mlflow.source.git.commit"] == provenance.commit().rstrip("+")
    assert kept.data.tags["version.torch"] == torch.__version__.partition("+")[0]
    assert kept.data.tags["host"] == socket.gethostname()
    assert "pytest" in kept.data.tags["mlflow.source.name"]


def test_start_run_url_names_a_page_of_the_server(run: runs.Run, mlflow_server: Service) -> None:
    assert run.url == f"{mlflow_server.address}/#/experiments/{run.experiment_id}/runs/{run.id}"


def test_start_with_error_ends_failed_and_raises_it(mlflow_server: Service, client: MlflowClient) -> None:
    with (
        pytest.raises(ValueError, match="first line"),
        runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as run,
    ):
        raise ValueError("first line\nsecond line")
    kept = client.get_run(run.id)
    assert kept.info.status == "FAILED"
    assert kept.data.tags["error"] == "ValueError: first line"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_start_interrupted_ends_killed(
    mlflow_server: Service, client: MlflowClient, interruption: type[BaseException]
) -> None:
    with pytest.raises(interruption), runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as run:
        raise interruption
    assert client.get_run(run.id).info.status == "KILLED"


def wait_for_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def test_start_on_sigterm_turned_into_an_exit_ends_killed(mlflow_server: Service, client: MlflowClient) -> None:
    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit), runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as run:
            wait_for_sigterm()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert client.get_run(run.id).info.status == "KILLED"


def test_start_many_at_once_share_one_new_experiment(mlflow_server: Service) -> None:
    def open_and_close(_: int) -> str:
        with runs.start(mlflow_server.address, runs.Config(experiment="raced"), params={}, tags={}) as run:
            return run.experiment_id

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(open_and_close, range(6)))) == 1


def test_start_in_deleted_experiment_says_so(mlflow_server: Service, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with (
        pytest.raises(TrackingError, match="'gone' was deleted"),
        runs.start(mlflow_server.address, runs.Config(experiment="gone"), params={}, tags={}),
    ):
        pass


def test_attach_from_pickled_handle_writes_to_the_same_run(run: runs.Run, client: MlflowClient) -> None:
    worker = runs.attach(run.uri, run.id)
    assert pickle.loads(pickle.dumps(worker)) == run
    worker.log_metrics({"from/worker": 1.5}, step=4)
    assert client.get_run(run.id).data.metrics["from/worker"] == 1.5


def test_attach_to_unknown_run_raises(mlflow_server: Service) -> None:
    with pytest.raises(TrackingError, match="not found"):
        runs.attach(mlflow_server.address, "0" * 32)


def test_log_metrics_of_an_epoch_is_one_call_and_comes_back(
    run: runs.Run, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = requests.Session.send

    def counted(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        sent.append(str(request.url))
        return send(session, request, **options)

    monkeypatch.setattr(requests.Session, "send", counted)
    values = {f"train/m{number}": number / 7 for number in range(40)}
    run.log_metrics(values, step=3)
    assert [url.rpartition("/")[2] for url in sent] == ["log-batch"]
    assert client.get_run(run.id).data.metrics == values
    assert client.get_metric_history(run.id, "train/m1")[0].step == 3


def test_log_metrics_not_finite_become_tags(run: runs.Run, client: MlflowClient) -> None:
    run.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}, step=7)
    kept = client.get_run(run.id).data
    assert kept.metrics == {"d": 1.0}
    assert {key: kept.tags[f"nonfinite.{key}"] for key in "abc"} == {
        "a": "nan at step 7",
        "b": "inf at step 7",
        "c": "-inf at step 7",
    }


def test_log_dataset_for_two_contexts_shows_both_with_digest(run: runs.Run, client: MlflowClient) -> None:
    digest = "0123456789abcdef" * 4
    for context in ("train", "val"):
        run.log_dataset("digits", digest, "/somewhere/shards", context)
    inputs = client.get_run(run.id).inputs.dataset_inputs
    assert sorted(item.dataset.name for item in inputs) == ["digits/train", "digits/val"]
    for item in inputs:
        tags = {tag.key: tag.value for tag in item.tags}
        assert item.dataset.digest == digest[:36]
        assert tags["digest"] == digest
        assert item.dataset.name.endswith(tags["mlflow.data.context"])
        assert "/somewhere/shards" in item.dataset.source


def test_log_files_figures_and_texts_are_stored(run: runs.Run, client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    run.log_file(tmp_path / "report.json", "reports")
    run.log_text("config.yaml", "a: 1\n")
    run.log_figure("figures/confusion.png", Figure())
    stored = {file.path for folder in (None, "reports", "figures") for file in client.list_artifacts(run.id, folder)}
    assert stored >= {"config.yaml", "reports/report.json", "figures/confusion.png"}
    assert Path(client.download_artifacts(run.id, "config.yaml", str(tmp_path))).read_text() == "a: 1\n"


# ---- servers that do not answer


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: runs.attach(uri, "0" * 32),
        lambda uri: runs.Run(uri, "0" * 32, "1").log_metrics({"a": 1.0}, 0),
        lambda uri: registry.resolve(uri, "digits@champion"),
    ],
    ids=["attach", "log_metrics", "resolve"],
)
def test_dead_server_is_one_sentence_in_bounded_time(call: Callable[[str], object]) -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        call(uri)
    assert time.monotonic() - began < 15
    assert str(caught.value) == f"{uri}: no MLflow server answers there; start one (make up) or correct the address"
    assert caught.value.__suppress_context__


def test_check_hanging_server_gives_up_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer in time"):
            connection.check(uri)
        assert time.monotonic() - began < 15


def test_check_other_server_is_named_as_such() -> None:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(TrackingError, match="expected an MLflow server, but GET /health answered 200 'hello'"):
            connection.check(f"http://127.0.0.1:{server.server_address[1]}")


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "127.0.0.1:5000"])
def test_check_address_that_is_no_url_is_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="expected the address of an MLflow server"):
        connection.check(uri)


def test_start_server_dying_on_the_way_keeps_the_first_error(
    mlflow_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: runs.Run, tags: object) -> None:
        raise TrackingError("gone")

    monkeypatch.setattr(runs.Run, "set_tags", gone)
    with (
        pytest.raises(ValueError, match="what went wrong"),
        runs.start(mlflow_server.address, CONFIG, params={}, tags={}),
    ):
        raise ValueError("what went wrong")


def test_patience_restores_the_environment_and_respects_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    before = dict(os.environ)
    with connection.patience():
        with connection.patience():
            pass
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert dict(os.environ) == before


# ---- the registry


@dataclass(frozen=True)
class Published:
    """Two versions of one model, made from two bundles."""

    name: str
    run: runs.Run
    bundles: tuple[Bundle, Bundle]
    versions: tuple[registry.Version, registry.Version]


@pytest.fixture(scope="module")
def published(mlflow_server: Service, tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("bundles")
    first, second = (make_bundle(folder / f"seed{seed}", seed) for seed in (0, 1))
    with runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as run:
        versions = registry.publish(run, first, "digits"), registry.publish(run, second, "digits")
    registry.promote(mlflow_server.address, "digits", "1")
    return Published("digits", run, (first, second), versions)


def stored_folder(server: Service, client: MlflowClient, version: registry.Version) -> Path:
    location = client.get_model_version_download_uri(version.name, version.version)
    artifacts = server.log.parents[1] / "mlflow" / "artifacts"
    return artifacts / str(location).removeprefix("mlflow-artifacts:/")


def test_publish_then_fetch_by_alias_gives_the_same_weights_and_answers(published: Published, tmp_path: Path) -> None:
    version = registry.resolve(published.run.uri, "digits@champion")
    assert (version.version, version.aliases, version.run_id) == ("1", ("champion",), published.run.id)
    fetched = registry.fetch(published.run.uri, version, tmp_path)
    assert fetched.path == tmp_path / "digits" / "1"
    assert sorted(file.name for file in fetched.path.iterdir()) == ["model.json", "weights.safetensors"]
    mine, theirs = (load_file(made.path / bundle.WEIGHTS) for made in (published.bundles[0], fetched))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    images = [make_jpeg(seed) for seed in range(3)]
    for expected, got in zip(
        Predictor(published.bundles[0]).predict(images), Predictor(fetched).predict(images), strict=True
    ):
        assert isinstance(expected, Classification)
        assert isinstance(got, Classification)
        np.testing.assert_array_equal(expected.scores, got.scores)
        np.testing.assert_array_equal(expected.labels, got.labels)


def test_publish_records_checksums_dataset_and_figures(published: Published, client: MlflowClient) -> None:
    tags = client.get_model_version("digits", "2").tags
    card = published.bundles[1].card
    assert tags["weights_sha256"] == card.weights_sha256
    assert tags["dataset_digest"] == "c" * 64
    best = client.search_logged_models(
        [published.run.experiment_id],
        filter_string="metrics.`model/val/top1` > 1",
        datasets=[{"dataset_name": "digits/val", "dataset_digest": "c" * 36}],
    )
    assert [model.source_run_id for model in best] == [published.run.id]
    measured_on = {metric.key: metric.dataset_name for metric in best[0].metrics}
    assert measured_on == {"model/val/top1": "digits/val", "model/lr": None}
    assert f"models:/{best[0].model_id}" == published.versions[1].source
    assert [output.model_id for output in client.get_run(published.run.id).outputs.model_outputs]


def test_publish_stores_no_pickle(published: Published, mlflow_server: Service, client: MlflowClient) -> None:
    folder = stored_folder(mlflow_server, client, published.versions[0])
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".py", ".yaml", ".txt", ".json", ".safetensors", ""}
    assert [file.name for file in files if not file.suffix] == ["MLmodel"]
    for file in files:
        if file.suffix != ".safetensors":
            file.read_text()  # text, not an archive
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert "tracking" not in {path.name for path in (folder / "code" / "pipeline").iterdir()}


def test_promote_moves_the_alias_to_the_new_version(published: Published) -> None:
    uri = published.run.uri
    try:
        assert registry.promote(uri, "digits", "2").aliases == ("champion",)
        assert registry.resolve(uri, "models:/digits@champion").version == "2"
        assert registry.resolve(uri, "digits/1").aliases == ()
    finally:
        registry.promote(uri, "digits", "1")
    assert registry.resolve(uri, "digits@champion").version == "1"


def test_register_moves_the_alias_and_says_that_no_gate_was_asked(
    run: runs.Run, client: MlflowClient, tmp_path: Path
) -> None:
    version = experiment.register(run, make_bundle(tmp_path / "b"), experiment.Registration(model="registered"))
    assert version is not None
    assert version.aliases == ("champion",)
    told = client.get_model_version("registered", version.version).tags["promotion.champion"]
    assert told.endswith(f" UTC: registered by run {run.id}, no gate was asked")


def test_register_again_takes_the_version_of_this_run_and_these_weights(
    mlflow_server: Service, run: runs.Run, tmp_path: Path
) -> None:
    """As a job does that was killed between registering and noting that it had."""
    made, to = make_bundle(tmp_path / "b"), experiment.Registration(model="twice", alias=None)
    found = [experiment.register(run, made, to) for _ in range(2)]
    found.append(experiment.register(run, make_bundle(tmp_path / "other", seed=1), to))
    with runs.start(mlflow_server.address, CONFIG, params={}, tags={}) as other_run:
        found.append(experiment.register(other_run, made, to))
    assert [version.version for version in found if version] == ["1", "1", "2", "3"]


@pytest.mark.parametrize("alias", ["1", "12", "v1", "V2", "latest", "Latest", "a b", "", "-x"])
def test_promote_alias_that_reads_like_a_version_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="expected letters"):
        registry.promote("http://127.0.0.1:1", "digits", "1", alias)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("digit@champion", "no model 'digit' is registered; did you mean 'digits'?"),
        ("digits@chmpion", "model 'digits' has no alias 'chmpion'; did you mean 'champion'? (known: champion)"),
        ("digits/9", "model 'digits' has no version 9; it has: 1, 2"),
    ],
)
def test_resolve_unknown_names_what_exists(published: Published, reference: str, sentence: str) -> None:
    with pytest.raises(TrackingError) as caught:
        registry.resolve(published.run.uri, reference)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("reference", ["digits", "digits@", "@champion", "digits/x", "a/b/1", "runs:/x/1", ""])
def test_resolve_malformed_reference_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match="expected name@alias or name/3"):
        registry.resolve("http://127.0.0.1:1", reference)


def test_publish_under_a_name_with_slash_is_refused(run: runs.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model name 'a/b'"):
        registry.publish(run, make_bundle(tmp_path / "b"), "a/b")


def test_publish_interrupted_leaves_no_version(
    run: runs.Run, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_upload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        registry.publish(run, make_bundle(tmp_path / "b"), "interrupted")
    assert not client.search_registered_models("name = 'interrupted'")
    (left,) = client.search_logged_models([run.experiment_id], filter_string="name = 'interrupted'")
    assert str(left.status) == "FAILED"


def test_fetch_again_needs_no_server(published: Published, tmp_path: Path) -> None:
    first = registry.fetch(published.run.uri, published.versions[0], tmp_path)
    again = registry.fetch(f"http://127.0.0.1:{closed_port()}", published.versions[0], tmp_path)
    assert again == first


def test_fetch_damaged_copy_is_downloaded_again(published: Published, tmp_path: Path) -> None:
    fetched = registry.fetch(published.run.uri, published.versions[0], tmp_path)
    flip_a_byte(fetched.path / bundle.WEIGHTS)
    again = registry.fetch(published.run.uri, published.versions[0], tmp_path)
    assert bundle.digest(again.path) == published.versions[0].digest


def test_fetch_at_once_from_many_threads_leaves_one_whole_copy(published: Published, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(registry.fetch, published.run.uri, published.versions[0], tmp_path) for _ in range(4)]
        assert {future.result().path for future in futures} == {tmp_path / "digits" / "1"}
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1"]


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def swap_classes(file: Path) -> None:
    card = json.loads(file.read_text())
    card["classes"] = card["classes"][::-1]
    file.write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("name", "tamper"), [(bundle.WEIGHTS, flip_a_byte), (bundle.CARD, swap_classes)], ids=["weights", "card"]
)
def test_fetch_tampered_store_is_refused_and_leaves_nothing(
    published: Published,
    mlflow_server: Service,
    client: MlflowClient,
    tmp_path: Path,
    name: str,
    tamper: Callable[[Path], None],
) -> None:
    stored = stored_folder(mlflow_server, client, published.versions[1]) / "artifacts" / "bundle" / name
    kept = shutil.copy(stored, tmp_path / "kept")
    tamper(stored)
    try:
        with pytest.raises(BundleError, match="the stored bundle is not the registered one"):
            registry.fetch(published.run.uri, published.versions[1], tmp_path / "cache")
    finally:
        shutil.copy(kept, stored)
    assert list((tmp_path / "cache" / "digits").iterdir()) == []


def test_fetch_version_of_another_tool_is_refused(
    mlflow_server: Service, client: MlflowClient, run: runs.Run, tmp_path: Path
) -> None:
    client.create_registered_model("foreign")
    client.create_model_version("foreign", f"runs:/{run.id}/model", run.id, await_creation_for=0)
    version = registry.resolve(mlflow_server.address, "foreign/1")
    with pytest.raises(TrackingError, match="was not registered by this project"):
        registry.fetch(mlflow_server.address, version, tmp_path)
