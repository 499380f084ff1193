"""The doors as a user finds them: the README's three commands, and one clear sentence for every mistake."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests

from jobs._process import Service
from pipeline import imaging
from pipeline.data import shards

ROOT = Path(__file__).parents[2]


def run(*words: str, storage: Path) -> subprocess.CompletedProcess[str]:
    """A job in a process of its own, without whatever servers this session knows."""
    clean = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=clean | {"VENTRAL_STORAGE": str(storage)},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of bright and dark pictures, as a user would have them."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, total in (("train", 64), ("val", 20)):
        for number in range(total):
            base = 170 * (number % 2)
            folder = root / split / ("dark", "bright")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(base, base + 60, (128, 140, 3), np.uint8)
            (folder / f"{number}.jpg").write_bytes(imaging.encode_jpeg(pixels))
    return root


def readme_commands() -> list[list[str]]:
    """The three commands of the section "Your own folder to an endpoint"."""
    section = (ROOT / "README.md").read_text().split("## Your own folder to an endpoint")[1]
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]
    return [line.removeprefix("python -m ").split() for line in block.strip().splitlines()]


@pytest.mark.long
def test_own_folder_to_endpoint_in_the_three_commands_of_the_readme(photos: Path, tmp_path: Path) -> None:
    preprocess, train, deploy = readme_commands()
    at = [word.replace("root=photos", f"root={photos}") for word in preprocess]
    done = run(*at, storage=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"train +64 images in 1 shards", done.stdout)
    quick = {"epochs": 6, "model.fc_features": 32, "loading.batch_size": 8}
    smaller = [f"training.recipe.{key}={value}" for key, value in quick.items()]
    done = run(*train, *smaller, storage=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model    folder version 1 (champion)" in done.stdout
    top1 = re.search(r"val +top-1 ([\d.]+) of 20 images", done.stdout)
    assert top1
    assert float(top1[1]) > 0.8

    server = subprocess.Popen(
        [sys.executable, "-m", *deploy],
        cwd=ROOT,
        env=os.environ | {"VENTRAL_STORAGE": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    try:
        lines: list[str] = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("serving until"):
                break
        (endpoint,) = re.findall(r"endpoint (http://\S+)", "".join(lines)) or [pytest.fail("".join(lines))]
        answer = requests.post(endpoint, data=next((photos / "val" / "dark").iterdir()).read_bytes(), timeout=60).json()
        assert answer["predictions"][0]["class_name"] == "dark"
        assert answer["model"].items() >= {"name": "folder", "version": "1", "alias": "champion"}.items()
    finally:
        server.send_signal(signal.SIGINT)
        server.stdout.read()
        assert server.wait(120) == 130
    with pytest.raises(requests.ConnectionError):
        requests.post(endpoint, data=b"", timeout=5)


@pytest.mark.slow
def test_quickstart_kept_answers_until_down_and_leaves_nothing(tmp_path: Path) -> None:
    done = run("jobs.quickstart", "jobs/configs/quickstart/digits.yaml", "keep=true", storage=tmp_path)
    try:
        assert done.returncode == 0, done.stderr[-3000:]
        top1 = re.search(r"digits: top-1 ([\d.]+) on 355 held-out images", done.stdout)
        map50 = re.search(r"digit-scenes: coco_map50 ([\d.]+) on 200 held-out images", done.stdout)
        assert top1
        assert map50
        assert float(top1[1]) >= 0.97
        assert float(map50[1]) >= 0.85
        assert done.stdout.count("32 answers equal the offline ones") == 2
        asked = re.findall(r"curl --data-binary '@(\S+)' (\S+)", done.stdout)
        ranked, found = (requests.post(url, data=Path(image).read_bytes(), timeout=60).json() for image, url in asked)
        assert len(ranked["predictions"]) == 5
        assert found["predictions"]
        assert all(len(one["box"]) == 4 for one in found["predictions"])
        endpoint = asked[0][1]
        second = run("jobs.deploy", "model=digits", storage=tmp_path)
        assert second.returncode == 7
        assert "a stack is up already" in second.stderr
    finally:
        down = run("jobs.down", storage=tmp_path)
    assert down.stdout == "stopped  MLflow, Ray\n"
    with pytest.raises(requests.ConnectionError):
        requests.get(endpoint, timeout=5)


SHARDS = "training.shards=shards/none"
DIGITS = "jobs/configs/train/lenet5_digits.yaml"


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """A job in this process, by the name of its module; for mistakes, which end it before anything starts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VENTRAL_STORAGE", str(tmp_path / "storage"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def call(name: str, *words: str) -> Ended:
        code = importlib.import_module(name).main(list(words))
        return Ended(code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["jobs.train", "none.yaml"], 2, r"none.yaml: cannot read the configuration"),
        (
            ["jobs.train", DIGITS, "training.recipe.epoch=3"],
            2,
            r"training.recipe.epoch: unknown key; did you mean 'epochs'",
        ),
        (
            ["jobs.train", DIGITS, "training.recipe.model.name=lenet6"],
            2,
            r"unknown model 'lenet6'; did you mean 'lenet5'",
        ),
        (["jobs.train", DIGITS, SHARDS], 3, r"shards/none: expected a dataset with manifest.json, found none"),
        (["jobs.preprocess", "jobs/configs/preprocess/folder.yaml", "dataset.root=/none"], 3, r"/none is not a folder"),
        (["jobs.evaluate", "model=m@champion", "shards=shards/none"], 3, r"expected a dataset with manifest.json"),
        (["jobs.predict", "model=m@champion", "output=o"], 2, r"expected exactly one of folder, shards and list"),
        (["jobs.import_model", "source.weights=w.pth"], 2, r"register_as: missing"),
    ],
)
def test_mistake_is_one_clear_sentence_before_anything_starts(
    job: Callable[..., Ended], words: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    ended = job(*words)
    assert ended.code == code, ended.err
    assert re.search(sentence, ended.err)
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_shards_for_detection_are_one_clear_sentence_before_anything_starts(
    job: Callable[..., Ended], stripes: shards.Shards, tmp_path: Path
) -> None:
    without = stripes.manifest.model_copy(update={"class_counts": {"train": (0, 0), "val": (0, 0)}})
    folder = tmp_path / "storage" / "boxes"
    folder.mkdir(parents=True)
    (folder / shards.MANIFEST).write_text(without.model_dump_json())
    ended = job("jobs.train", DIGITS, "training.shards=boxes")
    assert ended.code == 3, ended.err
    assert re.fullmatch(r"error: .*/boxes: expected a class for each image of '(train|val)', .*\n", ended.err)
    assert list(folder.parent.iterdir()) == [folder]


def test_two_mistakes_are_reported_together(job: Callable[..., Ended]) -> None:
    ended = job("jobs.train", DIGITS, "training.recipe.epochs=ten", "training.recipe.optim.lr=-1")
    assert ended.code == 2
    assert "training.recipe.epochs: " in ended.err
    assert "training.recipe.optim.lr: " in ended.err


def test_dry_run_prints_the_whole_configuration_and_does_nothing(job: Callable[..., Ended], tmp_path: Path) -> None:
    ended = job("jobs.train", DIGITS, "training.recipe.epochs=3", "--dry-run")
    assert ended.code == 0
    assert "epochs: 3" in ended.out
    assert "label_smoothing: 0.0" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_class_folders_that_differ_are_named(job: Callable[..., Ended], photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "train" / "dark").rename(root / "train" / "gone")
    ended = job("jobs.preprocess", "jobs/configs/preprocess/folder.yaml", f"dataset.root={root}")
    assert ended.code == 3
    assert re.search(r"'val' has 'dark' that 'train' lacks and lacks 'gone'", ended.err)


def test_dead_mlflow_server_is_named_quickly(job: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    ended = job("jobs.promote", "model=m", "version=1")
    assert ended.code == 6
    assert re.search(r"http://127.0.0.1:9: no MLflow server answers there", ended.err)
    assert time.monotonic() - started < 60


def test_unknown_model_names_those_that_exist(
    job: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, mlflow_server: Service
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.address)
    ended = job("jobs.promote", "model=none", "version=1")
    assert ended.code == 6
    assert "no model 'none' is registered" in ended.err


def test_taken_port_is_one_sentence(job: Callable[..., Ended]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ended = job("jobs.deploy", "model=m", f"port={port}")
    assert ended.code == 7
    assert re.search(rf"port {port}\b.*taken", ended.err)
