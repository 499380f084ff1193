"""BentoML: a service with adaptive batching on one worker, as `bentoml serve` runs it.

`bentoml serve` imports this and tells it nothing: the folder comes by the environment variable `VENTRAL_PEER_FOLDER`.
"""

import os
from pathlib import Path

import bentoml
from PIL.Image import Image

from pipeline.benchmark.servers import classifier

FOLDER = "VENTRAL_PEER_FOLDER"


@bentoml.service
class AsDocumented:
    """Pictures of Pillow's, as in its documentation."""

    def __init__(self) -> None:
        self.model = classifier.Documented(Path(os.environ[FOLDER]))

    @bentoml.api(batchable=True, max_batch_size=16)  # type: ignore[untyped-decorator]
    def predict(self, images: list[Image]) -> list[classifier.Answer]:
        """A batch."""
        return self.model.classify([self.model.transform(image) for image in images])


@bentoml.service
class WithOurs:
    """The same with this project's predictor, which decodes for itself: files instead of pictures."""

    def __init__(self) -> None:
        self.model = classifier.Given(Path(os.environ[FOLDER]))

    @bentoml.api(batchable=True, max_batch_size=16)  # type: ignore[untyped-decorator]
    def predict(self, images: list[Path]) -> list[classifier.Answer]:
        """A batch."""
        return self.model.classify([self.model.decode(image.read_bytes()) for image in images])
