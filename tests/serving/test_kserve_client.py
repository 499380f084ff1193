"""KServe's own client, unmodified, over real HTTP: what it is told is what `POST /predict` says.

It asks for other versions of packages than ours, so `kserve_script.py` is run by another interpreter, which the
environment variable VENTRAL_KSERVE_PYTHON names; `make test-kserve` makes one.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from jobs._deploy import deploy
from jobs._process import Service

PYTHON = "VENTRAL_KSERVE_PYTHON"
SCRIPT = Path(__file__).with_name("kserve_script.py")
NUM_CLASSES, TOP_K = 10, 3

pytestmark = [
    pytest.mark.slow,  # `make test` skips nothing that an extra package would run
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no interpreter with kserve: make test-kserve"),
]


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]]) -> str:
    return deploy(ray_head, app_config({"max_images": 8}))


@pytest.fixture(scope="module")
def files(picture: Callable[..., bytes]) -> list[bytes]:
    """Two JPEGs."""
    return [picture(seed, "JPEG") for seed in (1, 2)]


@pytest.fixture(scope="module")
def lossless(picture: Callable[..., bytes]) -> list[bytes]:
    """Two PNGs of one size, whose pixels are sent as a tensor."""
    return [picture(seed, "PNG") for seed in (3, 4)]


@pytest.fixture(scope="module")
def told(url: str, files: list[bytes], lossless: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All that the client got."""
    folder = tmp_path_factory.mktemp("kserve")
    pixels = folder / "pixels.npy"
    np.save(pixels, np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in lossless]))
    images = [folder / f"{number}.jpg" for number in range(len(files))]
    for path, data in zip(images, files, strict=True):
        path.write_bytes(data)
    command = [os.environ[PYTHON], "-I", str(SCRIPT), url, "tiny", str(pixels), *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def predicted(url: str, data: bytes) -> list[dict[str, Any]]:
    """The house's own answer about one image: every class, the best first."""
    answer = requests.post(f"{url}/predict/tiny", data=data, params={"top_k": NUM_CLASSES}, timeout=30)
    rows: list[dict[str, Any]] = answer.json()["predictions"]
    return rows


def test_kserve_client_finds_server_and_model(told: Any) -> None:
    assert told["live"] is True
    assert told["ready"] is True
    assert told["models_ready"] == {"tiny": True, "no-tiny": False}


@pytest.mark.parametrize("of", ["pixels", "files"])
@pytest.mark.parametrize("binary", [False, True])
def test_kserve_client_is_told_what_predict_says(
    url: str, told: Any, files: list[bytes], lossless: list[bytes], of: str, binary: bool
) -> None:
    (answer,) = (one for one in told["answers"] if (one["of"], one["binary"]) == (of, binary))
    assert (answer["id"], answer["model"]) == (f"{of}-{binary}", "tiny")
    assert answer["type"] == ("application/octet-stream" if binary else "application/json")
    expected = [predicted(url, data) for data in (files if of == "files" else lossless)]
    outputs = answer["outputs"]
    assert outputs["top_k_indices"] == [[row["label"] for row in rows[:TOP_K]] for rows in expected]
    assert outputs["top_k_labels"] == [[row["class_name"] for row in rows[:TOP_K]] for rows in expected]
    scores = [[row["score"] for row in rows[:TOP_K]] for rows in expected]
    np.testing.assert_allclose(outputs["top_k_scores"], scores, atol=1e-5)
    probabilities = [[row["score"] for row in sorted(rows, key=lambda row: row["label"])] for rows in expected]
    np.testing.assert_allclose(outputs["probabilities"], probabilities, atol=1e-5)


def test_kserve_client_is_told_which_model_may_have_been_meant(told: Any) -> None:
    assert "did you mean 'tiny'" in told["refusal"]
    assert "404 Not Found" in told["refusal"]
