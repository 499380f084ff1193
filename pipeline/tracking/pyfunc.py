"""The model code that MLflow runs for a published bundle: `mlflow models serve -m models:/<name>@champion`.

MLflow copies this file beside the bundle and executes it where the model is loaded ("models from code"), so nothing is
pickled. It answers through the same `Predictor` as everything else; our own endpoint does not run it. Unlike any other
file here it has an effect when it is executed: `set_model`, which is how MLflow finds the model.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.errors import ImageError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Answer, Detections

TOP_K = 5
SCORE_THRESHOLD = 0.25


class BundleModel(PythonModel):  # type: ignore[misc]
    """Encoded images in, the best classes or the objects that were found out."""

    predictor: Predictor
    lock: threading.Lock

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that lies beside this code, on the device that the model configuration names."""
        device = (context.model_config or {}).get("device", "cpu")
        self.predictor = Predictor(bundle.load(Path(context.artifacts["bundle"])), device)
        self.lock = threading.Lock()  # MLflow's scoring server answers in many threads

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answer about each row's `image` (encoded bytes; base64 over JSON).

        Returns:
            One entry per image: `labels`, class names, and `scores` in [0, 1], best first; the `top_k` best classes, or
            every object of at least `score_threshold` with its `boxes`, x_min, y_min, x_max, y_max in pixels of the
            upright original.

        Raises:
            MlflowException: `top_k` is not positive, or a row is not an image; it says which and why.
        """
        top_k = int((params or {}).get("top_k", TOP_K))
        if top_k < 1:
            raise MlflowException(f"top_k: expected at least 1, got {top_k}", INVALID_PARAMETER_VALUE)
        images = list(model_input["image"])
        score_threshold = float((params or {}).get("score_threshold", SCORE_THRESHOLD))
        answers: list[Answer] = []
        size = self.predictor.batch_size
        for at in range(0, len(images), size):
            with self.lock:
                found = self.predictor.predict(images[at : at + size])
            answers.extend(_checked(answer, at + row) for row, answer in enumerate(found))
        return [self._told(answer, top_k, score_threshold) for answer in answers]

    def _told(self, answer: Answer, top_k: int, score_threshold: float) -> dict[str, Any]:
        boxes: dict[str, Any] = {}
        if isinstance(answer, Detections):
            answer, top_k = answer.best(score_threshold), len(answer)
            boxes = {"boxes": answer.boxes_xyxy.tolist()}
        labels = [self.predictor.classes[label] for label in answer.labels[:top_k]]
        return {"labels": labels, "scores": [float(score) for score in answer.scores[:top_k]]} | boxes


def _checked(answer: Answer | ImageError, row: int) -> Answer:
    if isinstance(answer, ImageError):
        raise MlflowException(f"image {row}: {answer}", INVALID_PARAMETER_VALUE)
    return answer


set_model(BundleModel())
