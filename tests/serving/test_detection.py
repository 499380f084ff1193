"""A detector behind the endpoint, beside a classifier: boxes in pixels of the upright original, as offline."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from jobs._deploy import deploy
from jobs._process import Service
from pipeline import models
from pipeline.config import parse
from pipeline.data import shards
from pipeline.errors import DataError
from pipeline.evaluation import parity
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client
from pipeline.inference.predictor import Predictor
from pipeline.types import Detections

SELECT = {"max_detections": 1000, "iou_threshold": 1.0}


@pytest.fixture(scope="module")
def model(small_scenes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small detector that has learnt nothing, and says so at scores that a threshold can tell apart.

    It suppresses nothing: of boxes whose scores are all but equal, the last bits would decide which one stays.
    """
    torch.manual_seed(0)
    keys = {"backbone": "plain", "channels": 16, "num_classes": 10, "select": SELECT}
    keys |= {"input": {"fit": {"size_hw": [64, 64]}}}
    config = parse(models.config_of("yolo_multiscale"), keys, "here")
    made = models.build(config)
    for name, value in made.named_parameters():
        if "classes" in name:
            torch.nn.init.normal_(value, mean=0.0 if name.endswith("weight") else -1.5, std=0.5)
    return bundle.save(tmp_path_factory.mktemp("model") / "b", made, config, classes=small_scenes.manifest.classes)


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]], model: Bundle) -> str:
    config = copy.deepcopy(app_config())
    served = config["applications"][0]["args"]["models"]
    served.append({"name": "digits", "bundle": str(model.path), "num_cpus": 0.5, "batch": {"max_size": 4}})
    return deploy(ray_head, config)


def turned() -> bytes:
    """A picture of 120 x 80 pixels stored on its side, with the orientation that says so."""
    coarse = np.random.default_rng(3).integers(0, 256, (8, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((120, 80), Image.Resampling.BICUBIC).save(encoded, "PNG", exif=exif)
    return encoded.getvalue()


def offline(model: Bundle, data: bytes, score_threshold: float) -> Detections:
    answer = Predictor(model).predict([data])[0]
    assert isinstance(answer, Detections)
    return answer.best(score_threshold)


def test_boxes_of_a_turned_photo_are_those_of_the_predictor_in_upright_pixels(url: str, model: Bundle) -> None:
    found = Client(url).detect("digits", turned(), score_threshold=0.05, max_detections=1000)
    expected = offline(model, turned(), 0.05)
    assert len(found.detections) == len(expected) > 0
    # The order of boxes whose scores are all but equal is that of their last bits.
    apart = np.abs(found.detections.boxes_xyxy[:, None] - expected.boxes_xyxy[None]).max(axis=2)
    assert apart.min(axis=0).max() < 1e-2
    assert apart.min(axis=1).max() < 1e-2
    np.testing.assert_allclose(found.detections.scores, expected.scores, atol=1e-5)
    assert (found.detections.boxes_xyxy <= [80, 120, 80, 120]).all()
    assert found.class_names == tuple(model.card.classes[label] for label in found.detections.labels)
    assert sorted(found.detections.labels) == sorted(expected.labels)


def test_thresholds_and_numbers_are_those_of_the_request(url: str, model: Bundle) -> None:
    client = Client(url)
    assert len(client.detect("digits", turned(), score_threshold=0.0, max_detections=3).detections) == 3
    assert len(client.detect("digits", turned(), score_threshold=1.0).detections) == 0
    plain = requests.post(f"{url}/predict/digits", data=turned(), timeout=30).json()["predictions"]
    assert len(plain) == min(100, len(offline(model, turned(), 0.25)))
    assert all(set(row) == {"label", "class_name", "score", "box"} for row in plain)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/predict/digits?top_k=3", r"query.top_k: digits is for detection, leave it out."),
        ("/predict/tiny?score_threshold=0.5", r"query.score_threshold: tiny is for classification, leave it out."),
        ("/predict/tiny?max_detections=5", r"query.max_detections: tiny is for classification, leave it out."),
        ("/predict/digits?score_threshold=1.5", "score_threshold"),
        ("/predict/digits?max_detections=0", "max_detections"),
    ],
)
def test_what_the_other_task_takes_is_refused(url: str, path: str, sentence: str) -> None:
    response = requests.post(url + path, data=turned(), timeout=30)
    assert response.status_code == 422
    assert sentence in response.json()["error"]
    assert response.json()["code"] == "query"


def test_both_tasks_answer_side_by_side(url: str, picture: Callable[..., bytes]) -> None:
    client = Client(url)
    assert len(client.predict("tiny", picture(1), top_k=2).labels) == 2
    assert client.detect("digits", picture(1)).model == "digits"
    with pytest.raises(DataError, match="415"):
        client.detect("digits", b"no image")


def test_served_boxes_equal_those_of_the_evaluation(url: str, model: Bundle, small_scenes: shards.Shards) -> None:
    found = parity.compare(Client(url), "digits", model, small_scenes, "val", 5)
    assert found.num_images == 5
    assert found.max_difference <= parity.TOLERANCE
