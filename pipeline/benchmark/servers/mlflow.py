"""MLflow: `mlflow models serve` of a model that takes base64 in JSON, since its scoring server takes no bytes."""

import os
import sys
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from pipeline.benchmark.servers import classifier
from pipeline.inference import bundle
from pipeline.tracking import registry

CODE = Path(__file__).with_name("mlflow_model.py")


def save(form: classifier.Form, folder: Path, path: Path) -> None:
    """Write the model as a user would log it, or as this project's registry does."""
    if form == "given":
        registry.save(bundle.load(folder / classifier.BUNDLE), path)
        return
    mlflow.pyfunc.save_model(
        path,
        python_model=CODE,
        artifacts={name: str(folder / name) for name in (classifier.WEIGHTS, classifier.CLASSES)},
        signature=ModelSignature(inputs=Schema([ColSpec("binary", "image")])),
        pip_requirements=[],
    )


def main() -> None:
    """Run from the command line: python -m pipeline.benchmark.servers.mlflow --form documented --folder F --port P."""
    args = classifier.arguments()
    path = args.folder.parent / f"mlflow-{args.form}"
    save(args.form, args.folder, path)
    where = ["--model-uri", str(path), "--host", args.host, "--port", str(args.port), "--env-manager", "local"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "models", "serve", *where])  # noqa: S606  (no shell on purpose)


if __name__ == "__main__":
    main()
