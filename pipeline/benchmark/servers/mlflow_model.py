"""The model of `servers.mlflow` as documented: MLflow executes this file where it loads the model."""

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.benchmark.servers.classifier import WEIGHTS, Answer, Documented


class JpegModel(PythonModel):  # type: ignore[misc]
    """Rows with a JPEG in the column `image`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights."""
        self.model = Documented(Path(context.artifacts[WEIGHTS]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Answer]:
        """Answer about each row."""
        return self.model.classify([self.model.decode(data) for data in model_input["image"]])


set_model(JpegModel())
