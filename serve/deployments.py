"""The replicas that compute: each holds one version of one model.

A replica decodes in a few threads and computes in one, so its event loop is free to take requests and answer health
checks. Decoding comes before batching: what is not an image never reaches its neighbours' batch. How replicas are
bound together and how many there are is decided in `serve.app`.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import ray.serve
import torch

from pipeline.batch import to_batch
from pipeline.errors import ImageError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Answer, Detections, Sample
from serve.schemas import Box, ModelArgs, Refused, Served, Told, Wanted


@dataclass(frozen=True, slots=True)
class _Inferred:
    """One image's place in a batch that was computed; times in seconds of the monotonic clock."""

    answer: Answer
    began_s: float
    ended_s: float


class Replica:
    """One version of one model."""

    def __init__(self, served: Served, args: ModelArgs) -> None:
        torch.set_num_threads(max(1, int(args.num_cpus)))
        self.predictor = Predictor(bundle.load(served.bundle), "cuda" if args.num_gpus else "cpu")
        self.decoders = ThreadPoolExecutor(args.decoders, "decode")
        self.engine = ThreadPoolExecutor(1, "infer")
        join = ray.serve.batch(max_batch_size=args.batch.max_size, batch_wait_timeout_s=args.batch.wait_ms / 1000)
        self.join = join(self._infer)
        for size in (1, args.batch.max_size):  # so that the first request waits for nothing
            self.engine.submit(self.predictor.warm_up, size).result()

    async def ready(self) -> bool:
        """Answer at all: the model is loaded before any request is taken."""
        return True

    async def predict(self, data: bytes, wanted: Wanted) -> Told | Refused:
        """Rank the classes of an encoded image, or find its objects."""
        loop = asyncio.get_running_loop()
        start_s = time.perf_counter()
        try:
            sample = await loop.run_in_executor(self.decoders, self.predictor.decode, data)
        except ImageError as error:
            return Refused(error.reason, str(error))
        decoded_s = time.perf_counter()
        done: _Inferred = await self.join(sample)
        labels, scores, boxes = _chosen(done.answer, wanted)
        return Told(
            labels=tuple(labels),
            class_names=tuple(self.predictor.classes[label] for label in labels),
            scores=tuple(scores),
            boxes=boxes,
            decode_ms=_ms(start_s, decoded_s),
            queue_ms=_ms(decoded_s, done.began_s),
            infer_ms=_ms(done.began_s, done.ended_s),
        )

    async def _infer(self, samples: list[Sample]) -> list[_Inferred]:
        return await asyncio.get_running_loop().run_in_executor(self.engine, self._compute, samples)

    def _compute(self, samples: list[Sample]) -> list[_Inferred]:
        began_s = time.perf_counter()
        answers = self.predictor.predict_batch(to_batch(samples))
        return list(map(partial(_Inferred, began_s=began_s, ended_s=time.perf_counter()), answers))


def _chosen(answer: Answer, wanted: Wanted) -> tuple[list[int], list[float], tuple[Box, ...] | None]:
    """Labels, scores and boxes of what was asked for."""
    if isinstance(answer, Detections):
        best = answer.best(wanted.score_threshold, wanted.max_detections)
        return best.labels.tolist(), best.scores.tolist(), tuple(map(tuple, best.boxes_xyxy.tolist()))
    return answer.labels[: wanted.top_k].tolist(), answer.scores[: wanted.top_k].tolist(), None


def _ms(start_s: float, end_s: float) -> float:
    return round((end_s - start_s) * 1000, 3)
