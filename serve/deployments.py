"""The replicas that compute: each holds one version of one model.

A replica decodes in a few threads and computes in one, so its event loop is free to take requests and answer health
checks. Decoding comes before batching: what is not an image never reaches its neighbours' batch. How replicas are
bound together and how many there are is decided in `serve.stage`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pipeline import imaging
from pipeline.batch import to_batch
from pipeline.errors import BundleError, ImageError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import Detector, Selection
from pipeline.types import Answer, Classification, Detections, Sample
from serve import throttle
from serve.batching import Batcher
from serve.metrics import Load, RayMeter
from serve.process import load_no_code
from serve.schemas import LATE, ModelArgs, Refused, Served, Told, Wanted

_LATE = Refused(LATE, "nobody waits for this image any more")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One image that waits for a batch; until when, in seconds since 1970."""

    sample: Sample
    select: Selection
    until_s: float


@dataclass(frozen=True, slots=True)
class _Inferred:
    """One image's place in a batch that was computed; times in seconds of the monotonic clock.

    Attributes:
        answer: an error where the model fails on this image; None where nobody waited for it any more.
    """

    answer: Answer | Exception | None
    began_s: float
    ended_s: float


class Replica:
    """One version of one model."""

    def __init__(self, served: Served, args: ModelArgs) -> None:
        load_no_code()
        torch.set_num_threads(max(1, int(args.num_cpus)))
        found = bundle.load(served.bundle)
        if not found.card.weights_sha256.startswith(served.weights):
            raise BundleError(f"{served.bundle} has become another bundle since version {served.version} was settled")
        self.predictor = Predictor(found, "cuda" if args.num_gpus else "cpu")
        self.decoders = ThreadPoolExecutor(args.decoders, "decode")
        self.engine = ThreadPoolExecutor(1, "infer")
        self.decoding = 0
        self.join = Batcher(self._infer, args.batch.max_size, args.batch.wait_ms / 1000, lambda: self.decoding > 0)
        self.load = Load(RayMeter(), served)
        for size in (1, args.batch.max_size):  # so that the first request waits for nothing
            self.engine.submit(self.predictor.warm_up, size).result()
        throttle.release()  # it may have been restrained so far, see `serve.stage`

    async def __call__(self, request: Request) -> Response:
        """Refuse HTTP: a replica may have a port of its own, which is nobody's business."""
        return PlainTextResponse("Ask the endpoint.\n", 404)

    async def ready(self) -> bool:
        """Answer at all: the model is loaded before any request is taken."""
        return True

    async def predict(self, images: Sequence[bytes], wanted: Wanted) -> list[Told | Refused]:
        """Rank the classes of each encoded image, or find its objects."""
        return await asyncio.gather(*(self._predict(data, wanted) for data in images))

    async def _predict(self, data: bytes, wanted: Wanted) -> Told | Refused:
        loop = asyncio.get_running_loop()
        with self.load.image():
            came_s = time.perf_counter()
            self.decoding += 1
            try:
                sample, decode_s = await loop.run_in_executor(self.decoders, self._decoded, data, wanted)
            except ImageError as error:
                return Refused(error.reason, str(error))
            finally:
                self.decoding -= 1
            done = await self.join(_Waiting(sample, self._select(wanted), wanted.until_s))
        if done.answer is None:
            return _LATE
        if isinstance(done.answer, Exception):
            raise done.answer
        best, boxes, picture = _best(done.answer, wanted), None, None
        if isinstance(best, Detections):
            boxes = tuple(map(tuple, best.boxes_xyxy.tolist()))
            picture = await loop.run_in_executor(self.decoders, self._drawn, data, best) if wanted.picture else None
        return Told(
            labels=tuple(best.labels.tolist()),
            class_names=self.predictor.class_names(best),
            scores=tuple(best.scores.tolist()),
            boxes=boxes,
            picture=picture,
            decode_ms=_ms(decode_s),
            queue_ms=_ms(done.began_s - came_s - decode_s),  # for a decoder, and for a batch
            infer_ms=_ms(done.ended_s - done.began_s),
        )

    def _decoded(self, data: bytes, wanted: Wanted) -> tuple[Sample, float]:
        """The model's input, and the seconds that making it took."""
        began_s = time.perf_counter()
        return self._sample(data, wanted), time.perf_counter() - began_s

    def _sample(self, data: bytes, wanted: Wanted) -> Sample:
        policy = self.predictor.card.decoding
        if time.time() > wanted.until_s:
            raise ImageError(LATE, _LATE.message)
        if wanted.pixels:
            policy = policy.model_copy(update={"formats": ("NPY",)})
        return self.predictor.decode(data, decoding=policy)

    def _select(self, wanted: Wanted) -> Selection:
        """Which candidates count, and by what overlap they are suppressed; of no importance to a classifier.

        What scores less than is wanted suppresses nothing that is wanted, so it can be left out beforehand.
        """
        own = self.predictor.model.select if isinstance(self.predictor.model, Detector) else Selection()
        below = np.nextafter(np.float32(wanted.score_threshold), np.float32(-1))  # the threshold itself is enough
        overlap = own.iou_threshold if wanted.iou_threshold is None else wanted.iou_threshold
        keys = {"score_threshold": float(below), "iou_threshold": overlap, "max_detections": wanted.max_detections}
        return own.model_copy(update=keys)

    def _drawn(self, data: bytes, found: Detections) -> bytes:
        return imaging.encode_png(self.predictor.drawn(data, found))

    async def _infer(self, waiting: list[_Waiting]) -> list[_Inferred]:
        with self.load.batch(len(waiting)):
            return await asyncio.get_running_loop().run_in_executor(self.engine, self._compute, waiting)

    def _compute(self, waiting: list[_Waiting]) -> list[_Inferred]:
        began_s, now_s = time.perf_counter(), time.time()
        due = [one for one in waiting if one.until_s >= now_s]
        found = dict(zip(map(id, due), self._answers(due), strict=True))
        ended_s = time.perf_counter()
        return [_Inferred(found.get(id(one)), began_s, ended_s) for one in waiting]

    def _answers(self, due: Sequence[_Waiting]) -> list[Answer | Exception]:
        """Each image's answer; where the model fails on one of several, its neighbours are answered without it."""
        if not due:
            return []
        try:
            batch, selects = to_batch([one.sample for one in due]), [one.select for one in due]
            return list(self.predictor.predict_batch(batch, selects))
        except Exception as error:
            return [error] if len(due) == 1 else [answer for one in due for answer in self._answers([one])]


def _best(answer: Answer, wanted: Wanted) -> Answer:
    """Of an answer what was asked for."""
    if isinstance(answer, Detections):
        return answer.best(wanted.score_threshold, wanted.max_detections)
    return Classification(answer.labels[: wanted.top_k], answer.scores[: wanted.top_k])


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
