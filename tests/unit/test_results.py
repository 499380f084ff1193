"""A detector's batch prediction as JSON lines, COCO's and VOC's results: read back by those who read them elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faster_coco_eval import COCO

from pipeline.inference import results
from pipeline.inference.bulk import OUTPUT

CLASSES = ("ant", "bee/wasp")
FOUND = {
    "image_id": "train/a.jpg",
    "height": 60,
    "width": 80,
    "boxes": [[10.0, 20.0, 30.0, 50.0], [0.0, 0.0, 8.5, 8.0]],
    "labels": [1, 0],
    "class_names": ["bee/wasp", "ant"],
    "scores": [0.75, 0.5],
    "error": None,
}
EMPTY = FOUND | {"image_id": "b.jpg", "boxes": [], "labels": [], "class_names": [], "scores": []}
BROKEN = {"image_id": "c.txt", "error": "is not an image"}


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    made = []
    for number, rows in enumerate(([FOUND, BROKEN], [EMPTY])):
        path = tmp_path / f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=OUTPUT["detection"]), path)
        made.append(path)
    return made


def test_json_lines_hold_an_image_each_with_its_boxes_or_its_error(parts: list[Path], tmp_path: Path) -> None:
    (path,) = results.write(parts, CLASSES, tmp_path / "out", ["jsonl"])
    first, broken, empty = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "image_id": "train/a.jpg",
        "height": 60,
        "width": 80,
        "detections": [
            {"label": 1, "class_name": "bee/wasp", "score": 0.75, "box": [10, 20, 30, 50]},
            {"label": 0, "class_name": "ant", "score": 0.5, "box": [0, 0, 8.5, 8]},
        ],
    }
    assert broken == {"image_id": "c.txt", "error": "is not an image"}
    assert empty["detections"] == []


def test_cocos_own_reader_takes_the_results_beside_the_images(parts: list[Path], tmp_path: Path) -> None:
    results.write(parts, CLASSES, tmp_path / "out", ["coco"])
    truth = COCO(str(tmp_path / "out" / "coco_images.json"))
    loaded = truth.loadRes(str(tmp_path / "out" / "coco.json"))
    (image,) = [one for one in truth.loadImgs(truth.getImgIds()) if one["file_name"] == "train/a.jpg"]
    found = loaded.loadAnns(loaded.getAnnIds(imgIds=[image["id"]]))
    assert [one["bbox"] for one in found] == [[10, 20, 20, 30], [0, 0, 8.5, 8]]
    assert [truth.loadCats([one["category_id"]])[0]["name"] for one in found] == ["bee/wasp", "ant"]
    assert len(truth.getImgIds()) == 3


def test_vocs_results_are_lines_for_each_class_counted_from_one(parts: list[Path], tmp_path: Path) -> None:
    (folder,) = results.write(parts, CLASSES, tmp_path / "out", ["voc"])
    assert (folder / "bee%2Fwasp.txt").read_text() == "train/a 0.750000 11.00 21.00 30.00 50.00\n"
    name, score, *box = (folder / "ant.txt").read_text().split()
    assert (name, float(score)) == ("train/a", 0.5)
    np.testing.assert_allclose([float(value) for value in box], [1, 1, 8.5, 8])


@pytest.mark.parametrize("count", [0, 2000])
def test_any_number_of_boxes_of_an_image_is_written_and_read_back(count: int, tmp_path: Path) -> None:
    at = np.arange(count, dtype=float)
    found = EMPTY | {
        "boxes": np.stack([at, at, at + 8, at + 9], axis=1).tolist(),
        "labels": (at % 2).astype(int).tolist(),
        "class_names": [CLASSES[number % 2] for number in range(count)],
        "scores": np.linspace(0.9, 0.1, count).tolist(),
    }
    part = tmp_path / "part-00000.parquet"
    pq.write_table(pa.Table.from_pylist([found], schema=OUTPUT["detection"]), part)
    lines, _, folder = results.write([part], CLASSES, tmp_path / "out", ["jsonl", "coco", "voc"])
    assert len(json.loads(lines.read_text())["detections"]) == count
    assert sum(len(path.read_text().splitlines()) for path in folder.iterdir()) == count
    truth = COCO(str(tmp_path / "out" / "coco_images.json"))
    loaded = truth.loadRes(str(tmp_path / "out" / "coco.json"))
    assert [one["bbox"] for one in loaded.loadAnns(loaded.getAnnIds())] == [[x, x, 8, 9] for x in range(count)]
