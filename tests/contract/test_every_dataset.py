"""What every dataset promises: for every file in `pipeline/data/datasets`, present and future.

`MADE` lays out a miniature of a dataset that needs files; one that is not in it is tested as it stands.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pipeline import imaging
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


MADE: dict[str, Callable[[Path], None]] = {"image_folder": _folders, "mnist": _idx}


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
        assert {record.label for record in records} <= set(range(num_classes))
        assert not any(record.image_id.startswith("/") or "\\" in record.image_id for record in records)
        for record in (records[0], records[-1]):
            assert Path(record.uri).is_absolute()
            assert imaging.decode(Path(record.uri).read_bytes()).ndim == 3


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
