"""How fast detectors are on this machine: proposals, network and post-processing apart, at several batch sizes.

Every detector answers about the same pictures in a process of its own, in turns; what is said of several rounds is the
median. Decoding is told apart and left out of images a second: all need it. Source of the split: the speed tables of
Girshick 2015 (its Table 4), Ren et al. 2015 (Table 5) and Redmon et al. 2016 (Table 1), which leave proposals out or
not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Self

import torch
from pydantic import Field, PositiveInt, model_validator

from pipeline.batch import Batch, to_batch
from pipeline.benchmark import rounds
from pipeline.benchmark.machine import OthersShare, peak_memory
from pipeline.config import Strict
from pipeline.data import lookup, shards
from pipeline.data.transforms import detect
from pipeline.errors import ModelError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import Detector
from pipeline.types import Split

Say = rounds.Say


class Config(Strict):
    """What is measured.

    Attributes:
        batches: images at once; 1 among them.
        num_images: that every detector answers about in a round, at each batch size.
        num_rounds: blocks of each detector; figures are medians over them.
        threads: of torch; None: all CPUs.
        device: where the networks run.
    """

    batches: tuple[PositiveInt, ...] = (1, 4, 8)
    num_images: int = Field(default=16, ge=1)
    num_rounds: int = Field(default=3, ge=1)
    threads: int | None = Field(default=None, ge=1)
    device: str = "cpu"

    @model_validator(mode="after")
    def _one_by_one_too(self) -> Self:
        if 1 not in self.batches:
            raise ValueError(f"batches: expected 1 among them, which others are compared with, got {self.batches}")
        return self


class Task(Strict):
    """What one process is told."""

    bundle: Path
    shards: Path
    split: Split
    config: Config


class Step(Strict):
    """Milliseconds of one image in a batch of some size."""

    network_ms: float
    post_ms: float


class Figures(Strict):
    """One detector in one round.

    Attributes:
        decoding_ms: from an encoded image to the network's input.
        proposals_ms: selective search for one image; 0 where the network proposes.
        steps: by batch size.
        peak_bytes: of the process, with all that it has imported.
        num_detections: that it gave of an image, on average: a detector that finds nothing has little to suppress.
        others_share: of the machine's CPU time, that other processes took.
    """

    decoding_ms: float
    proposals_ms: float
    steps: dict[int, Step]
    peak_bytes: int
    num_detections: float
    others_share: float


class Speed(Strict):
    """One detector over all rounds, medians.

    Attributes:
        decoding_ms: from an encoded image to the network's input; left out of `images_per_s`.
        network_ms, post_ms: at a batch of 1.
        images_per_s: proposals included, by batch size.
        bare_ratio: at a batch of 1, decoding, proposals, network and post-processing over the network alone.
        num_detections: of an image, on average.
    """

    parameters: int
    decoding_ms: float
    proposals_ms: float
    network_ms: float
    post_ms: float
    images_per_s: dict[int, float]
    bare_ratio: float
    peak_bytes: int
    num_detections: float

    @property
    def best_batch(self) -> int:
        """The batch size of the most images a second."""
        return max(self.images_per_s, key=self.images_per_s.__getitem__)


def measure(
    models: Mapping[str, bundle.Bundle], source: shards.Shards, split: Split, config: Config, scratch: Path, say: Say
) -> tuple[dict[str, Speed], float]:
    """The speed of every detector, and the largest share of the CPUs that other processes took meanwhile.

    Raises:
        DataError: a process failed, or a model is no detector.
    """

    def block(name: str, number: str) -> Figures:
        say(f"round {number}: {name}")
        task = Task(bundle=models[name].path.absolute(), shards=source.path.absolute(), split=split, config=config)
        found = rounds.in_process(main, task, Figures, folder)
        assert found is not None
        return found

    with rounds.workspace(scratch) as folder:
        found = rounds.take_turns([*models], config.num_rounds, block)
    speeds = {
        name: _concluded([blocks[name] for blocks in found], _num_parameters(model)) for name, model in models.items()
    }
    return speeds, max(figures.others_share for blocks in found for figures in blocks.values())


def main(asked: Path, answer: Path) -> None:
    """Do one task in this process."""
    task = Task.model_validate_json(asked.read_bytes())
    answer.write_text(_measured(task).model_dump_json())


def _measured(task: Task) -> Figures:
    config = task.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    predictor = Predictor(bundle.load(task.bundle), config.device)
    if not isinstance(predictor.model, Detector):
        raise ModelError(f"{task.bundle}: is no detector; leave it out")
    spec = predictor.model.spec
    images = islice(lookup.in_order(shards.load(task.shards), task.split), config.num_images)
    samples, decoding_ms, both_ms = [], list[float](), list[float]()
    for _, data in images:
        began = time.perf_counter()
        detect.evaluation(data, spec.fit, decoding=predictor.card.decoding)
        between = time.perf_counter()
        samples.append(predictor.decode(data))  # the same, and proposals where the model needs them
        decoding_ms.append(1000 * (between - began))
        both_ms.append(1000 * (time.perf_counter() - between))
    others = OthersShare(lambda: [os.getpid()])
    steps = {}
    for size in config.batches:
        batches = [to_batch(samples[at : at + size]) for at in range(0, len(samples), size)]
        predictor.predict_batch(batches[0])
        steps[size] = _step(predictor, batches, len(samples))
    others_share = others.read()
    with peak_memory(lambda: [os.getpid()]) as peak:
        answers = predictor.predict_batch(to_batch(samples[: max(config.batches)]))
    needs = predictor.card.model.needs_proposals
    return Figures(
        decoding_ms=median(decoding_ms),
        proposals_ms=max(median(both_ms) - median(decoding_ms), 0.0) if needs else 0.0,
        steps=steps,
        peak_bytes=peak.num_bytes,
        num_detections=sum(len(answer.labels) for answer in answers) / len(answers),
        others_share=others_share,
    )


def _step(predictor: Predictor, batches: Sequence[Batch], num_images: int) -> Step:
    network_s = post_s = 0.0
    with torch.inference_mode():
        for batch in batches:
            began = time.perf_counter()
            outputs = predictor.model(batch.to(predictor.device))
            if predictor.device.type == "cuda":
                torch.cuda.synchronize()
            between = time.perf_counter()
            predictor.model.postprocess(outputs, batch.frames)
            network_s, post_s = network_s + between - began, post_s + time.perf_counter() - between
    return Step(network_ms=1000 * network_s / num_images, post_ms=1000 * post_s / num_images)


def _concluded(blocks: Sequence[Figures], parameters: int) -> Speed:
    sizes = sorted(blocks[0].steps)
    decoding_ms, proposals_ms = (
        median(getattr(figures, name) for figures in blocks) for name in ("decoding_ms", "proposals_ms")
    )
    network = {size: median(figures.steps[size].network_ms for figures in blocks) for size in sizes}
    post = {size: median(figures.steps[size].post_ms for figures in blocks) for size in sizes}
    return Speed(
        parameters=parameters,
        decoding_ms=decoding_ms,
        proposals_ms=proposals_ms,
        network_ms=network[sizes[0]],
        post_ms=post[sizes[0]],
        images_per_s={size: 1000 / (proposals_ms + network[size] + post[size]) for size in sizes},
        bare_ratio=1 + (decoding_ms + proposals_ms + post[sizes[0]]) / network[sizes[0]],
        peak_bytes=max(figures.peak_bytes for figures in blocks),
        num_detections=blocks[0].num_detections,
    )


def _num_parameters(model: bundle.Bundle) -> int:
    return sum(parameter.numel() for parameter in model.build().parameters())
