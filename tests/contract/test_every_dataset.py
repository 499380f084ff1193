"""What every dataset promises: for every file in `pipeline/data/datasets`, present and future.

`MADE` lays out a miniature of a dataset that needs files; one that is not in it is tested as it stands.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pipeline import imaging, storage
from pipeline.config import Strict, parse
from pipeline.data import datasets
from pipeline.data.datasets import ArraysConfig, DatasetConfig, mnist
from pipeline.types import SPLITS


class Holder(Strict):
    dataset: datasets.AnyDataset


def _folders(root: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/b/c/2.png", "val/a/1.png", "val/b/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(imaging.encode_png(np.full((9, 9, 3), len(name), np.uint8)))


def _idx(root: Path) -> None:
    (root / "raw").mkdir(parents=True)
    for prefix, count in (("train", mnist.NUM_VAL + 3), ("t10k", 4)):
        sizes = np.array([count, 2, 2], ">u4").tobytes()
        (root / "raw" / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes(count * 4))
        labels = bytes(index % 10 for index in range(count))
        (root / "raw" / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels)


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(imaging.encode_png(np.zeros((9, 9, 3), np.uint8)))


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _voc(root: Path) -> None:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>5</ymax></bndbox>"
    for split, names in (("train", "ab"), ("val", "c")):
        _text(root / f"ImageSets/Main/{split}.txt", "\n".join(names))
        for name in names:
            _image(root / f"JPEGImages/{name}.jpg")
            _text(root / f"Annotations/{name}.xml", f"<a><object><name>{name}</name>{box}</object></a>")


def _coco(root: Path) -> None:
    categories = [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]
    for split in ("train", "val"):
        _image(root / f"{split}2017/x/1.jpg")
        _image(root / f"{split}2017/2.jpg")
        images = [{"id": 1, "file_name": "x/1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
        annotations = [{"id": 1, "image_id": 2, "category_id": 7, "bbox": [0, 1, 2, 3]}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        _text(root / f"annotations/instances_{split}2017.json", json.dumps(content))


def _yolo(root: Path) -> None:
    _text(root / "data.yaml", "names: [b, a]")
    for split in ("train", "val"):
        _image(root / f"images/{split}/1.jpg")
        _image(root / f"images/{split}/2.jpg")
        _text(root / f"labels/{split}/2.txt", "1 0.5 0.5 0.2 0.2")


def _packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _imagenet(root: Path) -> None:
    image = imaging.encode_png(np.zeros((9, 9, 3), np.uint8))
    inner = {f"{wnid}.tar": _packed({f"{wnid}_1.JPEG": image}) for wnid in ("n02018795", "n01440764")}
    for wnid in ("n01440764", "n02018795"):
        (root / "val" / wnid).mkdir(parents=True)
        (root / "val" / wnid / "ILSVRC2012_val_00000001.JPEG").write_bytes(image)
    (root / "ILSVRC2012_img_train.tar").write_bytes(_packed(inner))


def _samples(root: Path) -> None:
    root.mkdir()
    for split in ("train", "val"):
        files = {f"{key}.png": imaging.encode_png(np.full((9, 9, 3), key, np.uint8)) for key in range(3)}
        labels = {f"{key}.cls": str(10 - key).encode() for key in range(3)}
        (root / f"{split}-000.tar").write_bytes(_packed(dict(sorted((files | labels).items()))))


def _table(root: Path) -> None:
    _folders(root)
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in ("train/a/1.png", "val/b/1.png")]
    (root / "images.csv").write_text("\n".join(["uri,class_name,split", *rows, ""]))


MADE: dict[str, Callable[[Path], None]] = {
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "image_folder": _folders,
    "mnist": _idx,
    "imagenet": _imagenet,
    "webdataset": _samples,
    "uri_list": _table,
}


@pytest.fixture(scope="module", params=datasets.names())
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    raw: dict[str, Any] = {"name": name}
    if name in MADE:
        MADE[name](folder / "root")
        raw["root"] = "root"
    return parse(Holder, {"dataset": raw}, name).dataset.at(folder, folder / "storage")


def test_config_is_chosen_by_the_file_name(dataset: DatasetConfig) -> None:
    assert type(dataset) is datasets.config_of(dataset.name)
    field = type(dataset).model_fields["name"]
    assert (get_args(field.annotation), field.default) == ((dataset.name,), dataset.name)


def test_class_names_are_distinct_and_sorted(dataset: DatasetConfig) -> None:
    names = datasets.class_names(dataset)
    assert list(names) == sorted(set(names))
    assert len(names) >= 2


def test_records_are_stable_distinct_and_within_their_split(dataset: DatasetConfig) -> None:
    num_classes, seen = len(datasets.class_names(dataset)), set[str]()
    assert set(dataset.splits) <= set(SPLITS)
    for split in dataset.splits:
        records = list(datasets.records(dataset, split))
        assert records == list(datasets.records(dataset, split))
        ids = {record.image_id for record in records}
        assert len(ids) == len(records) > 0
        assert not ids & seen
        seen |= ids
        assert {record.split for record in records} == {split}
        for record in records:
            labels = [record.label] if record.objects is None else record.objects.labels.tolist()
            assert set(labels) <= set(range(num_classes))
            assert record.objects is None or record.label is None
        assert not any(record.image_id.startswith("/") or "\\" in record.image_id for record in records)
        for record in (records[0], records[-1]):
            assert Path(record.uri).is_absolute()
            assert imaging.decode(storage.read(record.uri, record.byte_range)).ndim == 3


def test_what_is_written_lies_in_storage(dataset: DatasetConfig) -> None:
    if isinstance(dataset, ArraysConfig):
        assert "storage" in dataset.png.parts
        uris = [Path(record.uri) for record in datasets.records(dataset, dataset.splits[0])]
        assert all(uri.is_relative_to(dataset.png) for uri in uris)


def test_datasets_are_imported_without_torch_and_ray() -> None:
    code = (
        "import sys; from pipeline.data import datasets; [datasets.config_of(name) for name in datasets.names()]; "
        "print({'torch', 'ray', 'torchvision'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
