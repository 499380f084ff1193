"""What tests share: one local Ray head and one MLflow server for the whole run, the folder of real data, and a
miniature dataset that a tiny net learns in seconds: pictures of stripes, as a folder and as shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from jobs import _stack
from jobs._process import Service, stop
from pipeline import imaging
from pipeline.data import rows, shards
from pipeline.data.datasets import digit_scenes, image_folder
from pipeline.types import Objects, Record, Split

# A machine is busy now and then, and whichever case comes first imports torch. The same cases every time: a failure is
# the change's, and can be seen again.
settings.register_profile("ventral", deadline=None, derandomize=True)
settings.load_profile("ventral")

# Ray reports every 10 s by default: no test has so long.
QUICK_METRICS = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_metrics_report_interval_ms": "2000",  # to the agents that Prometheus reads
}


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The one Ray head of the run: 4 logical CPUs, 2 logical GPUs that do not exist, a token."""
    head = _stack.ray_head(tmp_path_factory.mktemp("ray"), num_cpus=4, num_gpus=2, env=QUICK_METRICS, timeout_s=300)
    yield head
    stop(head)


@pytest.fixture(scope="module")
def cluster(ray_head: Service) -> Iterator[None]:
    """This process connected to the head, for the tests of one file."""
    from jobs._run import connected_to  # noqa: PLC0415  (brings torch and MLflow, which most tests do not need)

    with connected_to(ray_head):
        yield


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The one MLflow server of the run: SQLite and artifacts in a temporary folder, on a free loopback port."""
    server = _stack.mlflow_server(tmp_path_factory.mktemp("mlflow-server"), timeout_s=300)
    yield server
    stop(server)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; a test that needs it is skipped without."""
    folder = os.environ.get("VENTRAL_DATA")
    if folder is None:
        pytest.skip("VENTRAL_DATA does not name the folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def odd(real_data: Path) -> Path:
    """The folder of odd images among the real data: of many kinds, some damaged."""
    if not (real_data / "odd").is_dir():
        pytest.skip("VENTRAL_DATA has no folder odd/")
    return real_data / "odd"


@pytest.fixture(scope="session")
def odd_files(odd: Path) -> list[Path]:
    """Every odd image, and the licences among them, in order."""
    return sorted(one for one in odd.rglob("*") if one.is_file())


@pytest.fixture(scope="session")
def stripes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy stripes across or down, of several sizes: 40 training and 13 validation pictures, JPEG and PNG."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    counts: dict[Split, int] = {"train": 40, "val": 13}
    for split, count in counts.items():
        for index in range(count):
            across = index % 2 == 0
            height, width = 40 + index % 7, 36 + index % 5
            y, x = np.mgrid[0:height, 0:width]
            wave = 128 + 90 * np.sign(np.sin((y if across else x) / 2 + index))
            pixels = (wave[:, :, None] + rng.integers(-30, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)
            path = root / split / ("across" if across else "down") / f"{index:02d}.{'jpg' if index % 3 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(imaging.encode_jpeg(pixels) if index % 3 else imaging.encode_png(pixels))
    return root


@pytest.fixture(scope="session")
def stripes(stripes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """The same as shards, made without Ray: training in two of 24 and 16 rows, in row groups of 8. Do not change."""
    dataset = image_folder.Config(root=stripes_folder)
    path = tmp_path_factory.mktemp("stripes-shards")
    return _shards_of(path, {split: list(image_folder.records(dataset, split)) for split in dataset.splits})


@pytest.fixture(scope="session")
def boxed_stripes(stripes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """The same pictures with up to three boxes each, flags of every kind among them. Do not change."""
    rng, dataset = np.random.default_rng(1), image_folder.Config(root=stripes_folder)

    def boxed(record: Record, num: int) -> Record:
        corner = rng.uniform(0, 20, (num, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, 15, (num, 2))], axis=1).astype(np.float32)
        difficult, truncated, crowd = rng.random((3, num)) < 0.2
        marked = Objects(boxes, rng.integers(0, 2, num), difficult, truncated, crowd)
        return replace(record, label=None, objects=marked)

    path = tmp_path_factory.mktemp("boxed-shards")
    listed = {split: [*image_folder.records(dataset, split)] for split in dataset.splits}
    return _shards_of(
        path, {split: [boxed(one, at % 4) for at, one in enumerate(ones)] for split, ones in listed.items()}
    )


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """Digits in scenes of 64 x 64 pixels, one to three in each: 40 for training and 13 for validation."""
    path = tmp_path_factory.mktemp("scenes-shards")
    dataset = digit_scenes.Config(
        png=path / "png", size_hw=(64, 64), num_scenes=(40, 13), digits=(1, 3), sides=(18, 30)
    )
    listed: dict[Split, Sequence[Record]] = {split: [*digit_scenes.records(dataset, split)] for split in dataset.splits}
    return _shards_of(path, listed, digit_scenes.class_names(dataset))


def _shards_of(
    path: Path, records: Mapping[Split, Sequence[Record]], classes: tuple[str, ...] = ("across", "down")
) -> shards.Shards:
    """Records as shards of at most 24 rows, in row groups of 8."""
    config, made = rows.Config(rows_per_group=8), list[shards.Shard]()
    for split, ones in records.items():
        for at in range(0, len(ones), 24):
            one = rows.make_shard(path / f"{split}-{at:05d}.parquet", split, ones[at : at + 24], config)
            assert one.shard
            made.append(one.shard)
    manifest = shards.Manifest(
        dataset="image_folder",
        classes=classes,
        class_counts={"train": (20, 20), "val": (7, 6)},
        num_rejects=0,
        shards=tuple(made),
        digest="0" * 64,
        decoding=config.decoding,
        config={},
        tool_versions={},
    )
    (path / shards.MANIFEST).write_text(manifest.model_dump_json())
    return shards.load(path)
