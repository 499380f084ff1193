"""A tiny bundle with random weights, and what to send to it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.inference import bundle

NUM_CLASSES = 10


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    """A LeNet-5 that has learnt nothing."""
    torch.manual_seed(7)
    config = models.config_of("lenet5")(name="lenet5", num_classes=NUM_CLASSES)
    classes = tuple(f"class {label}" for label in range(NUM_CLASSES))
    return bundle.save(tmp_path_factory.mktemp("bundles") / "tiny", models.build(config), config, classes=classes)


@pytest.fixture(scope="session")
def app_config(tiny: bundle.Bundle) -> Callable[..., dict[str, Any]]:
    """Serve's declarative configuration for `tiny`; keywords go to the model's arguments."""

    def make(limits: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
        args = {
            "models": [{"name": "tiny", "bundle": str(tiny.path), "num_cpus": 0.5} | model],
            "limits": limits or {},
            "ingress_cpus": 0.1,
        }
        application = {"name": "ventral", "route_prefix": "/", "import_path": "serve.app:build", "args": args}
        return {"proxy_location": "HeadOnly", "http_options": {"request_timeout_s": 60}, "applications": [application]}

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Encoded noise, another picture for every seed."""

    def make(seed: int = 0, encoding: str = "JPEG", hw: tuple[int, int] = (40, 36)) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, encoding)
        return buffer.getvalue()

    return make
