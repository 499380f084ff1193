"""The readers on real, openly licensed data; skipped where VENTRAL_DATA does not name it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline import imaging
from pipeline.data.datasets import image_folder, mnist


def test_mnist_files_hold_what_is_published(real_data: Path) -> None:
    raw = real_data / "MNIST" / "raw"
    for prefix, total in (("train", 60_000), ("t10k", 10_000)):
        assert mnist.read_idx(raw / f"{prefix}-images-idx3-ubyte").shape == (total, 28, 28)
        assert len(mnist.read_idx(raw / f"{prefix}-labels-idx1-ubyte")) == total
    labels = mnist.read_idx(raw / "train-labels-idx1-ubyte")
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_clothing10_photos_are_listed_and_decode_at_the_size_their_header_says(real_data: Path) -> None:
    config = image_folder.Config(root=real_data / "clothing10")
    assert len(image_folder.class_names(config)) == 10
    records = {split: list(image_folder.records(config, split)) for split in config.splits}
    assert {split: len(found) for split, found in records.items()} == {"train": 800, "val": 186}
    for record in records["val"][::10]:
        data = Path(record.uri).read_bytes()
        assert imaging.decode(data).shape[:2] == imaging.probe(data)
