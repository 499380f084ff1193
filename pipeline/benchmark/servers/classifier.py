"""What every peer serves: AlexNet as torchvision's documentation runs it, or this project's bundle in its `Predictor`.

Bytes become an input, inputs become answers. Peers differ in how requests reach this and in nothing else. A folder
holds all they need: `weights.pth`, `classes.txt`, `bundle/`.
"""

from __future__ import annotations

import argparse
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from PIL import Image

Form = Literal["documented", "given"]
Answer = dict[str, list[dict[str, Any]]]
"""`predictions`: the best classes, best first, each with `class_name` and `score`."""
TOP_K = 5
WEIGHTS, CLASSES, BUNDLE = "weights.pth", "classes.txt", "bundle"


class Classifier(ABC):
    """Bytes in, answers out; `decode` and `classify` may run in any threads."""

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """The network's input for one JPEG."""

    @abstractmethod
    def classify(self, inputs: Sequence[Any]) -> list[Answer]:
        """The best classes of each."""

    def answer(self, data: bytes) -> Answer:
        """The best classes of one JPEG."""
        return self.classify([self.decode(data)])[0]


class Documented(Classifier):
    """fp32 weights in torchvision's network, with the transforms that come with them, on a picture of Pillow's."""

    def __init__(self, folder: Path) -> None:
        self.model = torchvision.models.alexnet()
        self.model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
        self.model.eval()
        self.preprocess = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
        self.classes = (folder / CLASSES).read_text().splitlines()

    def decode(self, data: bytes) -> torch.Tensor:
        """As torchvision's documentation: decoded whole, resized and cropped by Pillow, scaled and normalised."""
        return self.transform(Image.open(io.BytesIO(data)))

    def transform(self, picture: Image.Image) -> torch.Tensor:
        """The same for a picture that was opened already."""
        made: torch.Tensor = self.preprocess(picture.convert("RGB"))
        return made

    def classify(self, inputs: Sequence[torch.Tensor]) -> list[Answer]:
        """One forward pass for all."""
        with torch.inference_mode():
            best = self.model(torch.stack(list(inputs))).softmax(1).topk(TOP_K)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [_told([self.classes[label] for label in labels], scores) for labels, scores in rows]


class Given(Classifier):
    """The bundle of this project, with its decoding and engine."""

    def __init__(self, folder: Path) -> None:
        from pipeline.batch import to_batch  # noqa: PLC0415  (peers as documented need torchvision only)
        from pipeline.inference import bundle  # noqa: PLC0415
        from pipeline.inference.predictor import Predictor  # noqa: PLC0415

        self._to_batch = to_batch
        self.predictor = Predictor(bundle.load(folder / BUNDLE))
        self._turn = threading.Lock()  # batches are for one thread at a time

    def decode(self, data: bytes) -> Any:
        """As the endpoint does."""
        return self.predictor.decode(data)

    def classify(self, inputs: Sequence[Any]) -> list[Answer]:
        """One forward pass for all."""
        with self._turn:
            answers = self.predictor.predict_batch(self._to_batch(list(inputs)))
        return [_told(self.predictor.class_names(answer)[:TOP_K], answer.scores[:TOP_K].tolist()) for answer in answers]


def build(form: Form, folder: Path) -> Classifier:
    """The classifier of a form."""
    return Documented(folder) if form == "documented" else Given(folder)


def arguments() -> argparse.Namespace:
    """What the command line of a peer says: `form` and `folder`, as `build` takes them, `host` and `port`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    return parser.parse_args()


def _told(names: Sequence[str], scores: Sequence[float]) -> Answer:
    return {"predictions": [{"class_name": name, "score": score} for name, score in zip(names, scores, strict=True)]}
