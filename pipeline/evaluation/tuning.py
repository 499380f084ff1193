"""Which engine a bundle is to be answered by: all that run here are timed, and held to what the plain one answers.

Every engine answers the same decoded batches through its own `Predictor`, as it would where it is served: timed in
turns, so that whatever slows the machine for a while meets all alike, and then counted on a whole split. The quickest
whose answers pass the gate is chosen. In one process and without Ray, for a replica computes alone too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import Field

from pipeline import provenance
from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.errors import ConfigError
from pipeline.evaluation.detect import Judged, judge, merge
from pipeline.evaluation.run import check_fits, check_truth
from pipeline.inference import bundle, engine
from pipeline.inference.bundle import Bundle
from pipeline.inference.engine import PLAIN, Engine, Runtime
from pipeline.inference.predictor import Predictor
from pipeline.models._detector import check_proposals
from pipeline.types import Answer, Detections, Split, Task

Objective = Literal["throughput", "latency"]
ACCURACY: dict[Task, str] = {"classification": "top1", "detection": "coco_map50"}
Say = Callable[[str], None]
"""Told what begins."""


class Gate(Strict):
    """How far an engine's answers may be from the plain one's.

    Attributes:
        max_difference: of the accuracy, either way: 0.005 is half a point of top-1, or of a detector's `coco_map50`.
        min_agreement: share of the images that get the same best class; of classifiers only.
    """

    max_difference: float = Field(default=0.005, ge=0, lt=1)
    min_agreement: float = Field(default=0.995, ge=0, le=1)

    def objection(self, found: Figures, plain: Figures) -> str:
        """Why an engine does not pass, "" if it does."""
        apart = abs(found.accuracy - plain.accuracy)
        if not apart <= self.max_difference + 1e-12:
            return f"accuracy differs by {apart:.4f}"
        if found.agreement is not None and found.agreement < self.min_agreement:
            return f"agrees on {found.agreement:.2%} only"
        return ""


class Config(Strict):
    """How engines are measured and chosen.

    Attributes:
        objective: `throughput` is images a second in batches of `batch_size`, `latency` the time of one image alone.
        batch_size: what is served at once.
        gate: that answers must pass.
        runtimes: that are tried, where they are installed.
        num_threads: of a replica; default: those of torch here.
        num_rounds: in which each engine has its turn; what counts is the median.
        block_s: seconds of each turn, for single images and for batches.
    """

    objective: Objective = "throughput"
    batch_size: int = Field(default=16, ge=1)
    gate: Gate = Gate()
    runtimes: tuple[Runtime, ...] = ("eager", "compile", "onnxruntime", "openvino")
    num_threads: int | None = Field(default=None, ge=1)
    num_rounds: int = Field(default=5, ge=1)
    block_s: float = Field(default=0.5, gt=0)


class Figures(Strict):
    """What was measured of one engine.

    Attributes:
        start_s: until it answered first.
        latency_ms: of one image alone, from decoded pixels to its answer; median of the rounds.
        images_per_s: in batches as they are served, likewise.
        accuracy: top-1, or a detector's `coco_map50`.
        agreement: share of the images with the plain engine's best class; None of a detector.
    """

    engine: Engine
    start_s: float
    latency_ms: float
    images_per_s: float
    accuracy: float
    agreement: float | None


def decide(figures: Sequence[Figures], gate: Gate, objective: Objective) -> Figures:
    """The quickest that passes; `figures` hold those of the plain engine, which always does."""
    plain = next(each for each in figures if each.engine == PLAIN)
    passing = [each for each in figures if not gate.objection(each, plain)]
    if objective == "latency":
        return min(passing, key=lambda each: each.latency_ms)
    return max(passing, key=lambda each: each.images_per_s)


@dataclass(frozen=True)
class Tuning:
    """What was found about a bundle.

    Attributes:
        refused: engines that are installed but do not run this model, with the reason.
        where: device and threads, for people.
        load: average over one minute, before and after.
    """

    made: Bundle
    source: shards.Shards
    split: Split
    config: Config
    figures: tuple[Figures, ...]
    refused: Mapping[Engine, str]
    where: str
    load: tuple[float, float]

    @property
    def plain(self) -> Figures:
        """Of the engine that computes as the model was trained."""
        return next(each for each in self.figures if each.engine == PLAIN)

    @property
    def chosen(self) -> Figures:
        """Of the engine to take."""
        return decide(self.figures, self.config.gate, self.config.objective)

    def table(self) -> str:
        """All figures, for people."""
        accuracy, objective = ACCURACY[self.made.card.task], self.config.objective
        batch = f"batch {self.config.batch_size}"
        lines = [
            f"{'engine':17} {'1 image':>9} {batch:>11} {accuracy:>11} {'agreement':>10} {'start':>7}",
            *(f"{_row(each)}  {self._verdict(each)}".rstrip() for each in self.figures),
            *(f"{each!s:17} {reason}" for each, reason in self.refused.items()),
            f"objective {objective}; {self.source.manifest.num_rows(self.split)} images of "
            f"{self.source.manifest.dataset}/{self.split}; {self.where}; {self._load}",
        ]
        return "\n".join(lines)

    def write(self, path: Path, origin: str) -> Bundle:
        """The bundle on the chosen engine, with the figures in its card; `origin` says which one it was made from."""
        manifest, accuracy = self.source.manifest, ACCURACY[self.made.card.task]
        sides = {"engine": self.chosen, "engine/plain": self.plain}
        metrics = {
            f"{side}/{name}": value
            for side, found in sides.items()
            for name, value in (
                ("latency_ms", found.latency_ms),
                ("images_per_s", found.images_per_s),
                (accuracy, found.accuracy),
                ("agreement", found.agreement),
            )
            if value is not None
        }
        facts = {
            "optimized_from": origin,
            "engine": str(self.chosen.engine),
            "engine_measured_on": f"{self.where}; batch {self.config.batch_size}; {self._load}",
            "engine_dataset": f"{manifest.dataset}/{self.split}",
            "engine_dataset_digest": manifest.digest,
            "engine_commit": provenance.commit(),
        }
        return bundle.on_engine(path, self.made, self.chosen.engine, metrics=metrics, provenance=facts)

    @property
    def _load(self) -> str:
        return f"load average {self.load[0]:.2f} before, {self.load[1]:.2f} after"

    def _verdict(self, found: Figures) -> str:
        return "chosen" if found == self.chosen else self.config.gate.objection(found, self.plain)


def tune(
    made: Bundle,
    source: shards.Shards,
    split: Split,
    config: Config,
    *,
    proposals: str | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
) -> Tuning:
    """Measure every engine that runs here on a split.

    Raises:
        ConfigError: proposals for a model that takes none, or none for one that needs them.
        DataError: the classes of model and data differ, or the split has not what a model of this task is measured by.
    """
    check_truth(source, made.card.task, [split])
    check_proposals(made.card.model, proposals, source.address)
    check_fits(made, source, split)
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    load_before = os.getloadavg()[0]
    wanted = [one for one in engine.candidates(device) if one == PLAIN or one.runtime in config.runtimes]
    started, refused = _started(made, wanted, device, say)
    predictors = {one: predictor for one, (predictor, _) in started.items()}
    loading = Loading(batch_size=config.batch_size, num_tasks=0, proposals=proposals)
    batches = Loader(source, predictors[PLAIN].model.spec, loading).evaluate(split)
    first = next(batches)
    say(f"timing {len(predictors)} engines in {config.num_rounds} rounds")
    times = timed(predictors, first, config.num_rounds, config.block_s)
    say(f"answering {split}")
    answers = compared(predictors, chain([first], batches))
    figures = tuple(
        Figures(
            engine=one,
            start_s=start_s,
            latency_ms=times[one].one_s * 1e3,
            images_per_s=len(first) / times[one].batch_s,
            accuracy=answers[one].accuracy(),
            agreement=answers[one].agreement(),
        )
        for one, (_, start_s) in started.items()
    )
    where = f"{torch.device(device).type}, {torch.get_num_threads()} threads"
    return Tuning(made, source, split, config, figures, refused, where, (load_before, os.getloadavg()[0]))


@dataclass(frozen=True)
class Times:
    """Seconds of one call: for one image, and for a batch."""

    one_s: float
    batch_s: float


def timed(predictors: Mapping[Engine, Predictor], batch: Batch, num_rounds: int, block_s: float) -> dict[Engine, Times]:
    """The median over rounds in which each engine has its turn, another one first each time."""
    one, names = batch.part(0, 1), list(predictors)
    found: dict[Engine, list[Times]] = {name: [] for name in names}
    for number in range(num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            answer = predictors[name].predict_batch
            found[name].append(Times(_seconds(answer, one, block_s), _seconds(answer, batch, block_s)))
    return {
        name: Times(median(each.one_s for each in times), median(each.batch_s for each in times))
        for name, times in found.items()
    }


@dataclass
class Tally:
    """What one engine answered about a split, beside the truth and the plain engine's answers."""

    num_images: int = 0
    right: int = 0
    agreed: int = 0
    judged: list[Judged] = field(default_factory=list)

    def add(self, answers: Sequence[Answer], plain: Sequence[Answer], batch: Batch, num_classes: int) -> None:
        """Count one batch."""
        self.num_images += len(batch)
        found = [answer for answer in answers if isinstance(answer, Detections)]
        if found:
            images = zip(found, batch.objects, batch.ids, strict=True)
            self.judged.append(merge([judge(*image, num_classes) for image in images]))
            return
        best, other = ([int(answer.labels[0]) for answer in side] for side in (answers, plain))
        self.right += sum(map(int.__eq__, best, batch.labels.tolist()))
        self.agreed += sum(map(int.__eq__, best, other))

    def accuracy(self) -> float:
        """Top-1, or `coco_map50`."""
        return merge(self.judged).metrics()["coco_map50"] if self.judged else self.right / self.num_images

    def agreement(self) -> float | None:
        """Share of the images with the plain engine's best class; None of a detector."""
        return None if self.judged else self.agreed / self.num_images


def compared(predictors: Mapping[Engine, Predictor], batches: Iterable[Batch]) -> dict[Engine, Tally]:
    """What each engine, the plain one among them, answers about labelled batches; they are decoded once for all."""
    tallies = {name: Tally() for name in predictors}
    num_classes = len(predictors[PLAIN].classes)
    for batch in batches:
        answers = {name: predictor.predict_batch(batch) for name, predictor in predictors.items()}
        for name, tally in tallies.items():
            tally.add(answers[name], answers[PLAIN], batch, num_classes)
    return tallies


def _started(
    made: Bundle, wanted: Sequence[Engine], device: torch.device | str, say: Say
) -> tuple[dict[Engine, tuple[Predictor, float]], dict[Engine, str]]:
    """A predictor for each engine and the seconds until it answered, and why others cannot."""
    started: dict[Engine, tuple[Predictor, float]] = {}
    refused: dict[Engine, str] = {}
    for one in wanted:
        say(f"starting {one}")
        began = time.perf_counter()
        try:
            predictor = Predictor(replace(made, card=made.card.model_copy(update={"engine": one})), device)
        except ConfigError as error:
            if one == PLAIN:
                raise
            refused[one] = str(error)
            continue
        predictor.warm_up(1)
        started[one] = predictor, time.perf_counter() - began
    return started, refused


def _seconds(answer: Callable[[Batch], object], batch: Batch, block_s: float) -> float:
    """Of one call, the mean over a while, behind one that does not count."""
    answer(batch)
    began, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < block_s or not calls:
        answer(batch)
        calls += 1
    return passed / calls


def _row(found: Figures) -> str:
    agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
    return (
        f"{found.engine!s:17} {found.latency_ms:6.1f} ms {found.images_per_s:9.1f}/s {found.accuracy:11.4f} "
        f"{agreement:>10} {found.start_s:5.1f} s"
    )
