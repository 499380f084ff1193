"""One collection as Pascal VOC and as COCO: through ingest and loading both show the same, and give the same figures.

The given files were drawn twice, by hand: up to 12 pixels apart, and one of 165 objects in one of them only. So they
are compared as far as they agree, and COCO's boxes are also written in VOC's form, which must change nothing at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline import boxes
from pipeline.data import ingest, shards
from pipeline.data.datasets import DatasetConfig, coco, voc
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.evaluation.detect import Judged, judge, merge
from pipeline.types import Detections, DetectorSpec, Fit, Float32Array, Objects, Split

pytestmark = pytest.mark.usefixtures("cluster")

SPLITS: tuple[Split, ...] = ("train", "test")
CLASSES = ("date", "fig", "hazelnut")
APART_PX = 12.0  # the two drawings, at most
BY_HAND_AP = 0.02  # of a mean over 3 classes, where 165 objects were drawn twice


@dataclass(frozen=True)
class Seen:
    """What is known of a picture once it has been loaded, and its file's checksum."""

    sha256: str
    size_hw: tuple[int, int]
    objects: Objects


def seen(source: shards.Shards) -> dict[str, Seen]:
    """Every picture by split and name without suffix, as evaluation gets it."""
    found, checksums = dict[str, Seen](), dict[str, str]()
    for shard in source.manifest.shards:
        rows = shards.read(source.path / shard.name, range(len(shard.row_groups)), ["image_id", "sha256"])
        checksums |= {row["image_id"]: row["sha256"] for row in rows.to_pylist()}
    loader = Loader(source, DetectorSpec(Fit(size_hw=(32, 32))), Loading(batch_size=4, num_tasks=0, reader="local"))
    for split in SPLITS:
        for batch in loader.evaluate(split):
            for image_id, frame, objects in zip(batch.ids, batch.frames, batch.objects, strict=True):
                key = str(PurePath(image_id).with_suffix(""))
                assert key not in found
                found[key] = Seen(checksums[image_id], frame.original_hw, objects)
    return found


@pytest.fixture(scope="module")
def ingested(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, shards.Shards]:
    """The given VOC files, the given COCO file, and this one written as VOC."""
    root, home = real_data / "snacks", tmp_path_factory.mktemp("snacks")
    rewritten = as_voc(root, home / "rewritten")
    datasets: dict[str, DatasetConfig] = {
        "voc": voc.Config(root=root, listed=False, annotations="voc/{split}", splits=SPLITS, images="voc/{split}"),
        "coco": coco.Config(
            root=root,
            annotations="coco_instances.json",
            missing_images="skip",
            splits=SPLITS,
            images="voc/{split}",
        ),
        "coco as voc": voc.Config(root=rewritten, splits=SPLITS),
    }
    return {name: ingest.ingest(dataset, ingest.Config(), home / name) for name, dataset in datasets.items()}


def as_voc(root: Path, folder: Path) -> Path:
    """COCO's boxes as a tree of the development kit: numbers from 1, the last pixel included."""
    content = json.loads((root / "coco_instances.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    for split in SPLITS:
        stems = sorted(path.stem for path in (root / "voc" / split).glob("*.jpg"))
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems))
        for image in (image for image in content["images"] if Path(image["file_name"]).stem in stems):
            shutil.copy(root / "voc" / split / image["file_name"], folder / "JPEGImages")
            annotation = ElementTree.Element("annotation")
            for found in (found for found in content["annotations"] if found["image_id"] == image["id"]):
                one = ElementTree.SubElement(annotation, "object")
                ElementTree.SubElement(one, "name").text = names[found["category_id"]]
                box = ElementTree.SubElement(one, "bndbox")
                left, top, width, height = found["bbox"]
                edges = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
                for tag, value in edges.items():
                    ElementTree.SubElement(box, tag).text = str(value)
            path = folder / "Annotations" / Path(image["file_name"]).with_suffix(".xml")
            ElementTree.ElementTree(annotation).write(path)
    return folder


def detections(truth: dict[str, Seen], seed: int) -> dict[str, Detections]:
    """Most objects found, some twice or by another name, all jittered; some boxes where nothing is."""
    rng = np.random.default_rng(seed)
    return {key: _detections(one.objects, one.size_hw, rng) for key, one in sorted(truth.items())}


def _detections(objects: Objects, size_hw: tuple[int, int], rng: np.random.Generator) -> Detections:
    kept = np.repeat(np.arange(len(objects)), rng.choice([0, 1, 2], len(objects), p=[0.1, 0.8, 0.1]))
    found = objects.boxes_xyxy[kept] + rng.normal(0, 4, (len(kept), 4))
    nowhere = np.sort(rng.uniform(0, size_hw[0], (4, 2, 2)), axis=1).reshape(4, 4)
    labels = np.concatenate([objects.labels[kept], rng.integers(0, 3, 4)])
    labels = np.where(rng.random(len(labels)) < 0.1, (labels + 1) % 3, labels)
    places: Float32Array = np.concatenate([found, nowhere]).astype(np.float32)
    order = np.argsort(-(scores := rng.random(len(labels)).astype(np.float32)))
    return Detections(places[order], labels[order], scores[order])


def judged(truth: dict[str, Seen], found: dict[str, Detections]) -> Judged:
    return merge([judge(found[key], one.objects, key, len(CLASSES)) for key, one in truth.items()])


def pairs(first: dict[str, Seen], second: dict[str, Seen]) -> Iterator[tuple[str, Seen, Seen]]:
    assert first.keys() == second.keys()
    return ((key, one, second[key]) for key, one in first.items())


def test_both_forms_are_ingested_whole_with_the_same_classes_and_pictures(ingested: dict[str, shards.Shards]) -> None:
    counts = {}
    for name, source in ingested.items():
        assert source.manifest.classes == CLASSES
        assert source.manifest.num_rejects == 0
        assert [source.manifest.num_rows(split) for split in SPLITS] == [16, 2]
        counts[name] = np.sum([source.manifest.object_counts[split] for split in SPLITS], axis=0).tolist()
    assert counts["coco"] == counts["coco as voc"]
    assert (sum(counts["voc"]), sum(counts["coco"])) == (164, 165)
    for _, one, other in pairs(seen(ingested["voc"]), seen(ingested["coco"])):
        assert (one.sha256, one.size_hw) == (other.sha256, other.size_hw)


def test_objects_drawn_twice_are_the_same_but_for_the_hand_that_drew_them(ingested: dict[str, shards.Shards]) -> None:
    for key, one, other in pairs(seen(ingested["voc"]), seen(ingested["coco"])):
        best = boxes.iou(one.objects.boxes_xyxy, other.objects.boxes_xyxy).argmax(axis=1)
        assert len(set(best)) == len(best) >= len(other.objects) - (key == "train/17")
        apart = np.abs(one.objects.boxes_xyxy - other.objects.boxes_xyxy[best])
        assert apart.max() <= APART_PX
        assert np.array_equal(one.objects.labels, other.objects.labels[best])


def test_boxes_written_in_the_other_form_are_the_same_numbers(ingested: dict[str, shards.Shards]) -> None:
    for _, one, other in pairs(seen(ingested["coco"]), seen(ingested["coco as voc"])):
        assert (one.sha256, one.size_hw) == (other.sha256, other.size_hw)
        np.testing.assert_allclose(one.objects.boxes_xyxy, other.objects.boxes_xyxy, atol=1e-4, rtol=0)
        assert np.array_equal(one.objects.labels, other.objects.labels)


@pytest.mark.parametrize("seed", range(3))
def test_same_detections_have_the_same_average_precision_in_both_forms(
    ingested: dict[str, shards.Shards], seed: int
) -> None:
    truth = {name: seen(source) for name, source in ingested.items()}
    found = detections(truth["coco"], seed)
    figures = {name: judged(one, found).metrics() for name, one in truth.items()}
    assert 0.3 < figures["coco"]["voc_map50"] < 0.9  # some are right and some are wrong
    assert figures["coco as voc"] == pytest.approx(figures["coco"], abs=1e-6)
    for name in ("voc_map50", "voc07_map50", "coco_map50"):  # at one IoU most boxes drawn twice are judged alike
        assert figures["voc"][name] == pytest.approx(figures["coco"][name], abs=BY_HAND_AP), name
