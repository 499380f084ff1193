"""A registered detector as MLflow itself loads it: `mlflow.pyfunc.load_model`, in a process that knows the registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from mlflow.exceptions import MlflowException

from jobs._process import Service
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.tracking import registry, runs
from pipeline.types import Detections
from tests.small_detection import CLASSES, assert_same, photo, untaught

NAME = "registered-detector"
PICTURES = [photo(0, 80, 120), photo(1, 80, 120, orientation=6), photo(2, 1, 1), photo(3, 60, 500)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return untaught(tmp_path_factory.mktemp("bundles") / "b", CLASSES)


@pytest.fixture(scope="module")
def loaded(mlflow_server: Service, made: Bundle) -> Iterator[Any]:
    """The model of the alias; what loading does to the path of modules is undone."""
    with runs.start(mlflow_server.address, runs.Config(experiment=NAME), params={}, tags={}) as run:
        registry.promote(mlflow_server.address, NAME, registry.publish(run, made, NAME).version)
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        mlflow.set_tracking_uri(mlflow_server.address)
        yield mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
        mlflow.set_tracking_uri(before)


def asked(loaded: Any, images: list[bytes], **params: float) -> list[Detections]:
    rows = loaded.predict(pd.DataFrame({"image": images}), params=params)
    return [
        Detections(
            np.array(row["boxes"], np.float32).reshape(-1, 4),
            np.array([CLASSES.index(name) for name in row["labels"]], np.int64),
            np.array(row["scores"], np.float32),
        )
        for row in rows
    ]


def test_loaded_detector_answers_as_the_predictor_does(loaded: Any, made: Bundle) -> None:
    for found, expected in zip(
        asked(loaded, PICTURES, score_threshold=0.05), Predictor(made).predict(PICTURES), strict=True
    ):
        assert isinstance(expected, Detections)
        assert_same(found, expected.best(0.05))


def test_loaded_detector_answers_with_what_reaches_the_threshold(loaded: Any) -> None:
    every, some, none = (asked(loaded, PICTURES[:1], score_threshold=score)[0] for score in (0.0, 0.25, 1.0))
    assert len(none) == 0 < len(some) < len(every)
    assert (some.scores >= 0.25).all()
    assert len(loaded.predict(pd.DataFrame({"image": PICTURES[:1]}))[0]["boxes"]) == len(some)  # where none is given


def test_loaded_detector_refuses_what_is_no_picture_by_its_place(loaded: Any) -> None:
    with pytest.raises(MlflowException, match=r"image 1: .*"):
        asked(loaded, [PICTURES[0], b"text", PICTURES[1]])


def test_signature_says_what_goes_in_and_comes_out(loaded: Any) -> None:
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["labels", "scores", "boxes"]
    assert [(param.name, param.default) for param in signature.params] == [("score_threshold", 0.25)]
