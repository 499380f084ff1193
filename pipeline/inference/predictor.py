"""Bytes in, predictions out: the one road that the endpoint, batch prediction and `mlflow models serve` all take.

It decodes and transforms exactly as evaluation does (`evaluation` in `transforms.classify` and `transforms.detect`),
runs the model, and ranks classes or finds objects. One bad image never fails its neighbours: its place holds the error.

A detector that judges given regions gets those of selective search, with the settings of the proposals that it was
trained with, which takes a second or more for a photo. Evaluation reads what `jobs.propose` has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline import imaging
from pipeline.batch import Batch, of_equal_size, to_batch
from pipeline.data import lookup, regions, sheet
from pipeline.data.transforms import classify, detect
from pipeline.errors import ImageError
from pipeline.imaging import Decoding
from pipeline.inference import engine
from pipeline.inference.bundle import Bundle
from pipeline.models._detector import Detector, Selection
from pipeline.types import Answer, Detections, DetectorSpec, InputSpec, Sample, Task, UInt8Array

BATCH_SIZE: dict[Task, int] = {"classification": 32, "detection": 8}


class Predictor:
    """A bundle's model, ready to answer.

    `decode` may run in many threads at once; `predict_batch` is for one thread at a time.

    Raises:
        ConfigError: the model needs proposals, and OpenCV, which makes them, is not installed; or this machine cannot
            run the bundle's engine.
    """

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu") -> None:
        self.card = bundle.card
        self.device = torch.device(device)
        self.model = bundle.start(device)
        self.classes = bundle.card.classes
        if self.card.model.needs_proposals:
            regions.opencv_version()  # now, not at the first image

    def decode(self, data: bytes, image_id: str = "", *, decoding: Decoding | None = None) -> Sample:
        """Turn encoded bytes into the model's input.

        Args:
            data: an image.
            image_id: its name in the sample.
            decoding: what is accepted, instead of what the bundle says.

        Raises:
            ImageError: the bytes are not an image this project accepts.
        """
        spec, policy = self.model.spec, decoding or self.card.decoding
        if isinstance(spec, InputSpec):
            image, frame = classify.evaluation(data, spec, policy)
            return Sample(image=image, frame=frame, image_id=image_id)
        if self.card.model.needs_proposals:
            return self._with_proposals(data, spec, image_id, policy)
        view = detect.evaluation(data, spec.fit, decoding=policy)
        return Sample(image=view.image, frame=view.frame, image_id=image_id)

    def _with_proposals(self, data: bytes, spec: DetectorSpec, image_id: str, decoding: Decoding) -> Sample:
        picture = imaging.decode(data, decoding)  # every pixel; the model may be shown a reduction
        found = regions.selective_search(lookup.visible(picture), self.card.search)
        view = detect.evaluation(data, spec.fit, decoding=decoding, proposals=found)
        return Sample(image=view.image, frame=view.frame, image_id=image_id, proposals=view.proposals)

    @property
    def batch_size(self) -> int:
        """Images that are best answered at once, so that many do not need memory for all their pictures and maps."""
        return BATCH_SIZE[self.card.task]

    def predict_batch(self, batch: Batch, selects: Sequence[Selection] | None = None) -> list[Answer]:
        """Rank the classes, or find the objects, of each image of a batch; none depends on the others.

        Args:
            batch: at least one image.
            selects: for each image which of a detector's candidates are answered, instead of the model's own rule.
        """
        model = self.model
        with torch.inference_mode():
            if not isinstance(model, Detector):
                return list(model.postprocess(model(batch.to(self.device)), batch.frames))
            selects, answers = selects or [model.select] * len(batch), dict[int, Answer]()
            for places, part in of_equal_size(batch):
                outputs = model(part.to(self.device))
                found = model.postprocess(outputs, part.frames, [selects[place] for place in places])
                answers |= zip(places, found, strict=True)
        return [answers[place] for place in range(len(batch))]

    def class_names(self, answer: Answer) -> tuple[str, ...]:
        """The name of each class or object of an answer, in its order."""
        return tuple(self.classes[label] for label in answer.labels.tolist())

    def drawn(self, data: bytes, found: Detections) -> UInt8Array:
        """The upright image, RGB [H, W, 3], with the boxes that were found in it and what is said of each."""
        said = [f"{name} {score:.2f}" for name, score in zip(self.class_names(found), found.scores, strict=True)]
        return sheet.drawn(imaging.decode(data, self.card.decoding), found.boxes_xyxy, found.labels, said)

    def warm_up(self, num_images: int) -> None:
        """Answer about as many pictures without content, so that the first real ones wait for nothing."""
        self.predict_batch(engine.blank(self.model, self.card.model, num_images))

    def predict(self, images: Sequence[bytes], select: dict[str, Any] | None = None) -> list[Answer | ImageError]:
        """Answer about encoded images, in their order; what is not an image gets its error in its place.

        Args:
            images: encoded.
            select: keys of a detector's `Selection` that are others than the model's.
        """
        samples = [self._try_decode(data) for data in images]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        selects = None
        if select and isinstance(self.model, Detector):
            selects = [self.model.select.model_copy(update=select)] * len(good)
        answers = iter(self.predict_batch(to_batch(good), selects) if good else [])
        return [next(answers) if isinstance(sample, Sample) else sample for sample in samples]

    def _try_decode(self, data: bytes) -> Sample | ImageError:
        try:
            return self.decode(data)
        except ImageError as error:
            return error
