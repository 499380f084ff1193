"""Boxes and pictures that are odd, from Pascal VOC and from COCO to shards: kept as documented, or a reject."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data import findings, ingest, shards, verify
from pipeline.data.datasets import DatasetConfig, coco, voc
from tests.small_detection import photo

pytestmark = pytest.mark.usefixtures("cluster")

Box = tuple[float, float, float, float]
MARKED: dict[str, tuple[tuple[int, int], list[Box]]] = {  # (height, width), boxes as xyxy
    "inside": ((60, 80), [(5, 5, 25, 25), (0, 0, 80, 60)]),
    "reaching": ((60, 80), [(-10, -20, 30, 30), (70, 50, 500, 700)]),
    "outside": ((60, 80), [(100, 5, 120, 25), (-30, -30, -5, -5), (5, 60, 25, 80), (1, 1, 9, 9)]),
    "without": ((60, 80), [(5, 5, 5, 25), (5, 25, 25, 5), (10, 10, 10, 10)]),
    "empty": ((60, 80), []),
    "pixel": ((1, 1), [(0, 0, 1, 1)]),
    "wide": ((100, 10_000), [(9_990, 0, 10_000, 100)]),
    "too-wide": ((99, 10_000), [(0, 0, 10, 10)]),
}
KEPT: dict[str, list[list[float]]] = {
    "inside": [[5, 5, 25, 25], [0, 0, 80, 60]],
    "reaching": [[0, 0, 30, 30], [70, 50, 80, 60]],
    "outside": [[1, 1, 9, 9]],
    "without": [],
    "empty": [],
    "pixel": [[0, 0, 1, 1]],
    "wide": [[9_990, 0, 10_000, 100]],
}


def as_voc(root: Path) -> DatasetConfig:
    (root / "Annotations").mkdir()
    for name, (_, boxes) in MARKED.items():
        found = "".join(
            f"<object><name>ant</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
            f"<ymax>{bottom}</ymax></bndbox></object>"
            for left, top, right, bottom in boxes
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{found}</annotation>")
    return voc.Config(root=root, splits=("train",), listed=False)


def as_coco(root: Path) -> DatasetConfig:
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(MARKED)]
    marked = [(image, box) for image, (_, boxes) in enumerate(MARKED.values()) for box in boxes]
    annotations = [
        {"id": number, "image_id": image, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
        for number, (image, (left, top, right, bottom)) in enumerate(marked)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "ant"}]}
    (root / "all.json").write_text(json.dumps(content))
    return coco.Config(root=root, splits=("train",), annotations="all.json", images="JPEGImages")


@pytest.mark.parametrize("form", [as_voc, as_coco])
def test_every_box_is_stored_within_its_picture_or_is_a_reject_and_every_picture_too(
    form: Callable[[Path], DatasetConfig], tmp_path: Path
) -> None:
    (tmp_path / "JPEGImages").mkdir()
    for name, (hw, _) in MARKED.items():
        (tmp_path / "JPEGImages" / f"{name}.png").write_bytes(photo(0, *hw))
    made = ingest.ingest(form(tmp_path), ingest.Config(max_reject_share=0.2), tmp_path / "shards")
    rows = shards.read(made.path / made.manifest.shards[0].name, [0]).to_pylist()
    stem = {row["image_id"].removeprefix("train/").removesuffix(".png"): row for row in rows}
    assert {name: row["boxes"] for name, row in stem.items()} == KEPT
    assert made.manifest.object_counts["train"] == (sum(map(len, KEPT.values())),)
    rejects = Counter(
        (row["image_id"].removeprefix("train/").removesuffix(".png"), row["reason"], row["class_name"])
        for row in shards.rejects(made)
    )
    assert rejects == {("outside", "box", "ant"): 3, ("without", "box", "ant"): 3, ("too-wide", "aspect", ""): 1}
    assert made.manifest.num_rejects == 7
    assert verify.verify(made, findings.Config()).total("error") == 0
