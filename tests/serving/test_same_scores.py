"""One picture through offline evaluation, the predictor, `mlflow models serve` and the endpoint: the same scores."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from jobs import _deploy, _process
from jobs._process import Service
from pipeline import imaging, models
from pipeline.config import validate
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client
from pipeline.inference.predictor import Predictor
from pipeline.tracking import registry, runs
from pipeline.types import Classification, Detections
from tests.small_detection import assert_same, untaught

NAME = "same-scores"
CLASSES = tuple(f"class {label}" for label in range(7))

pytestmark = pytest.mark.slow


def photo(seed: int = 0) -> bytes:
    """A smooth picture of 1,600 x 1,200 pixels lying on its side: scaled decoding and orientation both matter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC).save(encoded, "JPEG", exif=exif)
    return encoded.getvalue()


@dataclass(frozen=True)
class Published:
    """A registered AlexNet with random weights, and the address of the registry."""

    made: Bundle
    uri: str


@pytest.fixture(scope="module")
def published(mlflow_server: Service, tmp_path_factory: pytest.TempPathFactory) -> Published:
    torch.manual_seed(3)
    config = validate(
        models.config_of("alexnet"),
        {"name": "alexnet", "num_classes": len(CLASSES), "fc_features": 64, "init": "kaiming"},
    )
    model = models.build_classifier(config)
    output = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    torch.nn.init.normal_(output.weight, std=3.0)  # a net that has an opinion
    made = bundle.save(tmp_path_factory.mktemp("bundles") / "bundle", model, config, classes=CLASSES)
    with runs.start(mlflow_server.address, runs.Config(experiment=NAME), params={}, tags={}) as run:
        version = registry.publish(run, made, NAME)
    registry.promote(mlflow_server.address, NAME, version.version)
    return Published(made, mlflow_server.address)


@contextmanager
def models_serve(uri: str, name: str, folder: Path) -> Iterator[str]:
    """MLflow's own scoring server on a registered model; not in the checkout, for the code must come with the model."""
    (port,) = _process.free_ports(1)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow calls uvicorn by name
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{name}@champion", "--env-manager"]
    command += ["local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = folder / "log"
    process = _process.launch(command, log, environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not _process.answers(f"{url}/ping"):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def scoring(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with models_serve(published.uri, NAME, tmp_path_factory.mktemp("scoring")) as url:
        yield url


def ask(url: str, images: list[bytes], **params: float) -> requests.Response:
    rows = [{"image": base64.b64encode(data).decode()} for data in images]
    return requests.post(f"{url}/invocations", json={"dataframe_records": rows, "params": params}, timeout=60)


def evaluate_offline(made: Bundle, data: bytes, folder: Path) -> Classification:
    """The evaluation's way: from shards through the loader."""
    height, width = imaging.probe(data)
    sizes = {"height": height, "width": width, "original_height": height, "original_width": width}
    with shards.Writer(folder / "val-00000.parquet", "val", 1) as writer:
        writer.add({"image_id": "one", "image": data, "label": 0, "sha256": "", **sizes})
    assert writer.shard
    manifest = shards.Manifest(
        dataset="one",
        classes=CLASSES,
        class_counts={"val": (1, 0, 0, 0, 0, 0, 0)},
        num_rejects=0,
        shards=(writer.shard,),
        digest="",
        decoding=imaging.DEFAULT,
        config={},
        tool_versions={},
    )
    model = made.build()
    loader = Loader(shards.Shards(folder, manifest), model.spec, Loading(batch_size=1, reader="local"))
    (batch,) = loader.evaluate("val")
    with torch.inference_mode():
        answer = model.postprocess(model(batch), batch.frames)[0]
    assert isinstance(answer, Classification)
    return answer


def test_same_scores_on_all_four_ways(published: Published, scoring: str, ray_head: Service, tmp_path: Path) -> None:
    data = photo()
    (expected,) = Predictor(published.made).predict([data])
    assert isinstance(expected, Classification)
    assert expected.scores[0] - expected.scores[-1] > 0.01  # the net has an opinion
    names = [CLASSES[label] for label in expected.labels]

    offline = evaluate_offline(published.made, data, tmp_path)
    assert offline.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(offline.scores, expected.scores, atol=1e-6, rtol=0)

    (of_mlflow,) = ask(scoring, [data], top_k=7).json()["predictions"]
    assert of_mlflow["labels"] == names
    np.testing.assert_allclose(of_mlflow["scores"], expected.scores, atol=1e-5, rtol=0)

    endpoint = _deploy.deploy(ray_head, _deploy.application([NAME], "champion", published.uri, tmp_path))
    served = Client(endpoint).predict(NAME, data, top_k=7)
    assert (list(served.class_names), served.version) == (names, "1")
    np.testing.assert_allclose(served.scores, expected.scores, atol=1e-5, rtol=0)


def test_models_serve_without_top_k_answers_five_best_first(scoring: str) -> None:
    (prediction,) = ask(scoring, [photo()]).json()["predictions"]
    assert len(prediction["labels"]) == len(prediction["scores"]) == 5
    assert prediction["scores"] == sorted(prediction["scores"], reverse=True)


def test_models_serve_many_images_are_answered_in_their_order(scoring: str, published: Published) -> None:
    images = [photo(seed) for seed in range(35)]  # more than one batch
    predictions = ask(scoring, images, top_k=1).json()["predictions"]
    for answer, got in zip(Predictor(published.made).predict(images), predictions, strict=True):
        assert isinstance(answer, Classification)
        assert got["labels"] == [CLASSES[answer.labels[0]]]


def test_models_serve_bad_image_is_refused_with_its_place_and_reason(scoring: str) -> None:
    answer = ask(scoring, [photo(), b"not an image"])
    assert answer.status_code == 400
    assert "image 1: " in answer.json()["message"]


def test_models_serve_top_k_of_zero_is_refused(scoring: str) -> None:
    answer = ask(scoring, [photo()], top_k=0)
    assert answer.status_code == 400
    assert "top_k: expected at least 1, got 0" in answer.json()["message"]


def test_models_serve_of_a_detector_answers_with_the_boxes_of_the_predictor(
    mlflow_server: Service, tmp_path: Path
) -> None:
    made = untaught(tmp_path / "bundle", ("ant", "bee", "cat"))
    with runs.start(mlflow_server.address, runs.Config(experiment=NAME), params={}, tags={}) as run:
        registry.promote(mlflow_server.address, "same-boxes", registry.publish(run, made, "same-boxes").version)
    pictures = [photo(), photo(1)]
    with models_serve(mlflow_server.address, "same-boxes", tmp_path) as url:
        told = ask(url, pictures, score_threshold=0.05).json()["predictions"]
        nothing = ask(url, pictures[:1], score_threshold=1.0).json()["predictions"]
        refused = ask(url, [pictures[0], b"not an image"])
    for row, expected in zip(told, Predictor(made).predict(pictures), strict=True):
        assert isinstance(expected, Detections)
        labels = [made.card.classes.index(name) for name in row["labels"]]
        found = Detections(np.array(row["boxes"], np.float32), np.array(labels), np.array(row["scores"], np.float32))
        assert_same(found, expected.best(0.05), atol_px=0.1)  # of 1,600 pixels
    assert nothing == [{"labels": [], "scores": [], "boxes": []}]
    assert (refused.status_code, "image 1: " in refused.json()["message"]) == (400, True)
