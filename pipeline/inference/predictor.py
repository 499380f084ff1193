"""Bytes in, predictions out: the one road that the endpoint, batch prediction and `mlflow models serve` all take.

It decodes and transforms exactly as evaluation does (`transforms.classify.evaluation`), runs the model, and ranks. One
bad image never fails its neighbours: its place holds the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.batch import Batch, to_batch
from pipeline.data.transforms import classify
from pipeline.errors import ImageError
from pipeline.inference.bundle import Bundle
from pipeline.types import Classification, Sample


class Predictor:
    """A bundle's model, ready to answer.

    `decode` may run in many threads at once; `predict_batch` is for one thread at a time.
    """

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu") -> None:
        self.card = bundle.card
        self.device = torch.device(device)
        self.model = bundle.build(device)
        self.classes = bundle.card.classes

    def decode(self, data: bytes, image_id: str = "") -> Sample:
        """Turn encoded bytes into the model's input.

        Raises:
            ImageError: the bytes are not an image this project accepts.
        """
        image, frame = classify.evaluation(data, self.model.spec, self.card.decoding)
        return Sample(image=image, frame=frame, image_id=image_id)

    def predict_batch(self, batch: Batch) -> list[Classification]:
        """Rank the classes of each image of a batch."""
        with torch.inference_mode():
            return self.model.postprocess(self.model(batch.to(self.device)), batch.frames)

    def predict(self, images: Sequence[bytes]) -> list[Classification | ImageError]:
        """Answer about encoded images, in their order; what is not an image gets its error in its place."""
        samples = [self._try_decode(data) for data in images]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        answers = iter(self.predict_batch(to_batch(good)) if good else [])
        return [next(answers) if isinstance(sample, Sample) else sample for sample in samples]

    def _try_decode(self, data: bytes) -> Sample | ImageError:
        try:
            return self.decode(data)
        except ImageError as error:
            return error
