"""A detector behind the endpoint, beside a classifier: boxes in pixels of the upright original, as offline."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
from faster_coco_eval import COCO
from tritonclient import http as triton

from jobs import predict
from jobs._deploy import deploy
from jobs._process import Service
from jobs._run import connected_to
from pipeline import config, imaging
from pipeline.data import shards
from pipeline.errors import DataError
from pipeline.evaluation import parity
from pipeline.evaluation.detection_report import DetectionEvaluation
from pipeline.evaluation.run import evaluate
from pipeline.inference import bulk
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import Client
from pipeline.inference.predictor import Predictor
from pipeline.types import Detections
from serve.oip import OUTPUTS
from tests.small_detection import assert_same, objects, photo, shards_of, untaught

SCORE = 0.05
ORIENTATIONS = {"val-0000.png": 1, "val-0001.png": 6, "val-0002.png": 8, "val-0003.png": 3}
"""Upright; on either side; on its head. All are stored with 80 rows of 120 pixels."""
TURNED = photo(9, 80, 120, orientation=6)


@pytest.fixture(scope="module")
def model(small_scenes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return untaught(tmp_path_factory.mktemp("model") / "b", small_scenes.manifest.classes)


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]], model: Bundle) -> str:
    given = copy.deepcopy(app_config())
    served = given["applications"][0]["args"]["models"]
    served.append({"name": "digits", "bundle": str(model.path), "num_cpus": 0.5, "batch": {"max_size": 4}})
    return deploy(ray_head, given)


def offline(model: Bundle, data: bytes, score_threshold: float) -> Detections:
    answer = Predictor(model).predict([data])[0]
    assert isinstance(answer, Detections)
    return answer.best(score_threshold)


def test_boxes_of_a_turned_photo_are_those_of_the_predictor_in_upright_pixels(url: str, model: Bundle) -> None:
    found = Client(url).detect("digits", TURNED, score_threshold=0.05, max_detections=1000)
    expected = offline(model, TURNED, 0.05)
    assert_same(found.detections, expected)
    assert (found.detections.boxes_xyxy <= [80, 120, 80, 120]).all()
    assert found.class_names == tuple(model.card.classes[label] for label in found.detections.labels)
    assert sorted(found.detections.labels) == sorted(expected.labels)


def test_thresholds_and_numbers_are_those_of_the_request(url: str, model: Bundle) -> None:
    client = Client(url)
    assert len(client.detect("digits", TURNED, score_threshold=0.0, max_detections=3).detections) == 3
    assert len(client.detect("digits", TURNED, score_threshold=1.0).detections) == 0
    plain = requests.post(f"{url}/predict/digits", data=TURNED, timeout=30).json()["predictions"]
    assert len(plain) == min(100, len(offline(model, TURNED, 0.25)))
    assert all(set(row) == {"label", "class_name", "score", "box"} for row in plain)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/predict/digits?top_k=3", r"query.top_k: digits is for detection, leave it out."),
        ("/predict/tiny?score_threshold=0.5", r"query.score_threshold: tiny is for classification, leave it out."),
        ("/predict/tiny?max_detections=5", r"query.max_detections: tiny is for classification, leave it out."),
        ("/predict/digits?score_threshold=1.5", "score_threshold"),
        ("/predict/digits?max_detections=0", "max_detections"),
        ("/predict/digits?max_detections=2000", "max_detections"),
    ],
)
def test_what_the_other_task_takes_is_refused(url: str, path: str, sentence: str) -> None:
    response = requests.post(url + path, data=TURNED, timeout=30)
    assert response.status_code == 422
    assert sentence in response.json()["error"]
    assert response.json()["code"] == "query"


@pytest.mark.parametrize(
    ("height", "width", "code"),
    [
        (1, 1, None),
        (100, 10_000, None),
        (10_000, 100, None),
        (99, 10_000, "image_aspect"),
        (300, 17_000, "image_pixels"),
    ],
)
def test_picture_of_any_size_is_answered_within_its_sides_or_refused(
    url: str, height: int, width: int, code: str | None
) -> None:
    data = photo(0, height, width)
    if code is not None:
        refused = requests.post(f"{url}/predict/digits", data=data, timeout=30)
        assert (refused.status_code, refused.json()["code"]) == (422, code)
        return
    found = Client(url).detect("digits", data, score_threshold=0.0, max_detections=1000).detections
    assert len(found) > 0
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= [width, height, width, height]).all()


def test_both_tasks_answer_side_by_side(url: str, picture: Callable[..., bytes]) -> None:
    client = Client(url)
    assert len(client.predict("tiny", picture(1), top_k=2).labels) == 2
    assert client.detect("digits", picture(1)).model == "digits"
    with pytest.raises(DataError, match="415"):
        client.detect("digits", b"no image")


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_the_predictors_boxes_padded_to_the_most_of_an_image(
    url: str, model: Bundle, binary: bool
) -> None:
    photos = [TURNED, photo(3, 60, 90)]
    best = [float(offline(model, data, 0.0).scores.max()) for data in photos]
    threshold = sum(best) / 2
    expected = [offline(model, data, threshold).best(threshold, 7) for data in photos]
    tensor = triton.InferInput("image", [2], "BYTES")
    given = photos if binary else [base64.b64encode(data).decode() for data in photos]
    tensor.set_data_from_numpy(np.array(given, np.object_), binary_data=binary)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS["detection"]]
    asked = {"score_threshold": threshold, "max_detections": 7}
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        answer = client.infer("digits", [tensor], outputs=wanted, parameters=asked)
    counts = [len(one) for one in expected]
    assert counts[0] != counts[1]
    assert answer.as_numpy("num_detections").tolist() == [[count] for count in counts]
    named = answer.as_numpy("detection_labels")
    for row, (one, count) in enumerate(zip(expected, counts, strict=True)):
        found = [answer.as_numpy(f"detection_{name}")[row] for name in ("boxes", "classes", "scores")]
        assert_same(Detections(*(each[:count] for each in found)), one)
        assert not any(each[count:].any() for each in found)
        names = [model.card.classes[label] for label in one.labels] + [""] * (max(counts) - count)
        assert [text.decode() if isinstance(text, bytes) else text for text in named[row]] == names


def test_served_boxes_equal_those_of_the_evaluation(url: str, model: Bundle, small_scenes: shards.Shards) -> None:
    found = parity.compare(Client(url), "digits", model, small_scenes, "val", 5)
    assert found.num_images == 5
    assert found.max_difference <= parity.TOLERANCE


# One picture, however it lies, through evaluation, `jobs.predict` and what that writes, and the endpoint.


@pytest.fixture(scope="module")
def source(model: Bundle, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """The pictures as shards, their files beside them; each has an object in its upper left corner when upright."""
    one = objects(([0, 0, 40, 40], 0))
    pictures = [(photo(seed, 80, 120, turned), one) for seed, turned in enumerate(ORIENTATIONS.values())]
    return shards_of(tmp_path_factory.mktemp("turned"), {"val": pictures}, model.card.classes)


@pytest.fixture(scope="module")
def evaluated(ray_head: Service, model: Bundle, source: shards.Shards) -> dict[str, Detections]:
    """What evaluation has seen in each picture, by the name of its file."""
    with connected_to(ray_head):
        report = evaluate(model, source, "val")
    assert isinstance(report, DetectionEvaluation)
    return {f"{one.image_id.replace('/', '-')}.png": one.found.best(SCORE) for one in report.seen}


@pytest.fixture(scope="module")
def predicted(
    ray_head: Service, model: Bundle, source: shards.Shards, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that `jobs.predict` leaves behind."""
    home = tmp_path_factory.mktemp("predicted")
    photos = home / "photos"
    photos.mkdir()
    for name in ORIENTATIONS:
        (photos / name).write_bytes((source.path / name).read_bytes())
    asked = {"model": model.path, "folder": photos, "output": "answers", "storage": home, "kept.score_threshold": SCORE}
    asked |= {"kept.pictures": "true", "forms": "[jsonl, coco, voc]", "num_workers": 1}
    job = config.load(predict.Predict, None, [f"{key}={value}" for key, value in asked.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "unused")
        patch.setattr(predict, "ray_session", lambda storage, num_cpus: connected_to(ray_head))  # the one that is there
        predict.predict(job)
    return home / "answers"


def detections(rows: list[tuple[list[float], int, float]]) -> Detections:
    ordered = sorted(rows, key=lambda row: -row[2])
    return Detections(
        np.array([box for box, _, _ in ordered], np.float32).reshape(-1, 4),
        np.array([label for _, label, _ in ordered], np.int64),
        np.array([score for _, _, score in ordered], np.float32),
    )


def of_parquet(folder: Path) -> dict[str, Detections]:
    rows = [row for part in bulk.parts_of(folder) for row in pq.read_table(part).to_pylist()]
    sizes = {Path(row["image_id"]).name: (row["height"], row["width"]) for row in rows}
    assert sizes == {name: (120, 80) if turned > 4 else (80, 120) for name, turned in ORIENTATIONS.items()}
    return {
        Path(row["image_id"]).name: detections([*zip(row["boxes"], row["labels"], row["scores"], strict=True)])
        for row in rows
    }


def of_jsonl(folder: Path) -> dict[str, Detections]:
    rows = map(json.loads, (folder / "detections.jsonl").read_text().splitlines())
    return {
        Path(row["image_id"]).name: detections(
            [(one["box"], int(one["class_name"]), one["score"]) for one in row["detections"]]
        )
        for row in rows
    }


def of_coco(folder: Path) -> dict[str, Detections]:
    truth = COCO(str(folder / "coco_images.json"))
    results, found = truth.loadRes(str(folder / "coco.json")), {}
    for image in truth.loadImgs(truth.getImgIds()):
        rows = []
        for one in results.loadAnns(results.getAnnIds(imgIds=[image["id"]])):
            left, top, width, height = one["bbox"]
            name = truth.loadCats([one["category_id"]])[0]["name"]
            rows.append(([left, top, left + width, top + height], int(name), one["score"]))
        found[Path(image["file_name"]).name] = detections(rows)
    return found


def of_voc(folder: Path) -> dict[str, Detections]:
    rows: dict[str, list[tuple[list[float], int, float]]] = {name: [] for name in ORIENTATIONS}
    for label in range(10):
        for line in (folder / "voc" / f"{label}.txt").read_text().splitlines():
            image_id, score, *numbers = line.split()
            left, top, right, bottom = map(float, numbers)
            rows[f"{Path(image_id).name}.png"].append(([left - 1, top - 1, right, bottom], label, float(score)))
    return {name: detections(found) for name, found in rows.items()}


@pytest.mark.parametrize("read", [of_parquet, of_jsonl, of_coco, of_voc])
def test_everything_that_a_batch_prediction_writes_is_what_evaluation_saw(
    read: Callable[[Path], dict[str, Detections]], predicted: Path, evaluated: dict[str, Detections]
) -> None:
    found = read(predicted)
    assert found.keys() == evaluated.keys() == ORIENTATIONS.keys()
    for name, expected in evaluated.items():
        assert_same(found[name], expected)


def test_pictures_are_drawn_upright(predicted: Path) -> None:
    files = (predicted / "pictures").iterdir()
    drawn = {path.name.split("%2F")[-1]: imaging.probe(path.read_bytes()) for path in files}
    assert drawn == {f"{name}.jpg": (120, 80) if turned > 4 else (80, 120) for name, turned in ORIENTATIONS.items()}


def test_served_boxes_of_a_picture_however_it_lies_are_those_of_evaluation(
    url: str, source: shards.Shards, evaluated: dict[str, Detections]
) -> None:
    client = Client(url)
    for name, expected in evaluated.items():
        answer = client.detect("digits", (source.path / name).read_bytes(), score_threshold=SCORE, max_detections=1000)
        assert_same(answer.detections, expected)
