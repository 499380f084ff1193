"""What all servers of the benchmark are given, one AlexNet in two forms and pictures; and its cost without a server.

The same weights lie there as a state dict for torchvision's network and as a bundle. Without ImageNet's they are drawn
by chance, in a way that lets different pictures have different answers.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline import imaging, models
from pipeline.batch import to_batch
from pipeline.benchmark import photos, serving_block
from pipeline.benchmark.machine import OthersShare
from pipeline.benchmark.servers import classifier
from pipeline.config import Strict
from pipeline.data.datasets import DatasetConfig
from pipeline.data.transforms import classify
from pipeline.data.transforms.resizing import shrink_short
from pipeline.inference import bundle, importing
from pipeline.inference.engine import Engine
from pipeline.models._contract import Classifier
from pipeline.models.alexnet import Config as AlexNet
from pipeline.types import Sample, UInt8Array

SHORT_SIDE = 375
"""Of the pictures, as most of ImageNet's."""
QUALITIES = (98, 95, 92, 88, 84, 78, 70, 60)
BATCH = 16


class BareTask(Strict):
    """What is measured without a server: the classifier of a form, for so many seconds in each way."""

    form: classifier.Form
    model: Path
    pictures: Path
    seconds: float


class Bare(Strict):
    """The limit.

    Attributes:
        forward_per_s: images, by the size of the batch, inputs at hand.
        whole_per_s: images from JPEG to answer, in batches of 16, decoded by a thread for each CPU.
        whole_ms: from JPEG to answer, one at a time, median.
        top1: the best class of each picture.
    """

    forward_per_s: dict[int, float]
    whole_per_s: float
    whole_ms: float
    top1: tuple[str, ...]
    others_share: float


def prepare(folder: Path, pictures: Path, weights: Path | None, engine: Engine, seed: int) -> str:
    """Put the model into `folder` in both forms, and say which weights it has.

    Args:
        folder: a new one.
        pictures: that weights drawn by chance are to answer differently.
        weights: torchvision's state dict; None for weights drawn by chance.
        engine: of the bundle.
        seed: of the weights drawn.
    """
    folder.mkdir(parents=True)
    config = AlexNet(init="kaiming")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build_classifier(config)
    if weights is None:
        _centre(model, config, serving_block.read(pictures)[:BATCH])
    else:
        importing.load_state(model, importing.read_state(weights), str(weights))
    torch.save(model.network.state_dict(), folder / classifier.WEIGHTS)
    classes = tuple(f"class {label}" for label in range(config.num_classes))
    (folder / classifier.CLASSES).write_text("\n".join(classes))
    made = bundle.save(folder / "plain", model, config, classes=classes)
    bundle.on_engine(folder / classifier.BUNDLE, made, engine, metrics={}, provenance={})
    return (f"random weights, seed {seed}" if weights is None else weights.name) + f", our bundle on {engine}"


def draw(folder: Path, sources: Sequence[DatasetConfig], num_pictures: int, num_bytes: int) -> str:
    """Write JPEGs of about so many bytes into `folder`, and say what they show.

    They are photos of the sources; where none of these is here, parts of scikit-learn's two sample images.
    """
    folder.mkdir(parents=True)
    here = [source for source in sources if source.root and Path(source.root).is_dir()]
    pixels = _photos(here) if here else _samples()
    for number, picture in enumerate(itertools.islice(pixels, num_pictures)):
        encoded = [imaging.encode_jpeg(picture, quality) for quality in QUALITIES]
        (folder / f"{number:03d}.jpg").write_bytes(min(encoded, key=lambda data: abs(len(data) - num_bytes)))
    sizes = [path.stat().st_size for path in folder.iterdir()]
    origin = ", ".join(Path(source.root or "").name for source in here) or "scikit-learn's sample images"
    return f"{len(sizes)} JPEGs of {sum(sizes) / len(sizes) / 1000:.0f} kB on average, from {origin}"


def main(asked: Path, answer: Path) -> None:
    """Do a `BareTask` in this process."""
    task = BareTask.model_validate_json(asked.read_bytes())
    answer.write_text(measure(task).model_dump_json())


def measure(task: BareTask) -> Bare:
    """Time the classifier of a form, with all CPUs."""
    model, pictures = classifier.build(task.form, task.model), serving_block.read(task.pictures)
    others = OthersShare(lambda: [os.getpid()])
    inputs = [model.decode(data) for data in pictures]
    top1 = [said["predictions"][0]["class_name"] for one in inputs for said in model.classify([one])]
    turns = itertools.cycle(range(len(pictures)))

    def forward(size: int) -> None:
        model.classify([inputs[next(turns)] for _ in range(size)])

    def whole() -> None:
        model.classify(list(pool.map(model.decode, [pictures[next(turns)] for _ in range(BATCH)])))

    forward_per_s = {size: size / _median_s(partial(forward, size), task.seconds) for size in (1, BATCH)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole_s = _median_s(whole, task.seconds)
    one_s = _median_s(lambda: model.answer(pictures[next(turns)]), task.seconds)
    return Bare(
        forward_per_s=forward_per_s,
        whole_per_s=BATCH / whole_s,
        whole_ms=1000 * one_s,
        top1=tuple(top1),
        others_share=others.read(),
    )


def _centre(model: Classifier, config: AlexNet, pictures: Sequence[bytes]) -> None:
    """Take from every class what it gives to all pictures alike: without training that would decide."""
    model.eval()
    samples = [Sample(*classify.evaluation(data, config.input)) for data in pictures]
    with torch.inference_mode():
        alike = model(to_batch(samples)).mean(0)
    last = model.network.get_submodule("classifier.6")
    assert isinstance(last, torch.nn.Linear)
    last.bias.data -= alike


def _median_s(call: Callable[[], object], seconds: float) -> float:
    call()
    took, ends = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < ends or not took:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def _photos(sources: Sequence[DatasetConfig]) -> Iterator[UInt8Array]:
    """Every eighth that is large enough, so that many classes are among the first."""
    large = (data for data, _ in photos.collect(sources) if min(imaging.probe(data)) >= 256)
    for data in itertools.islice(large, 0, None, 8):
        yield shrink_short(imaging.decode(data), SHORT_SIDE)


def _samples() -> Iterator[UInt8Array]:
    from sklearn.datasets import load_sample_images  # noqa: PLC0415  (slow to import, seldom needed)

    whole, rng = load_sample_images().images, np.random.default_rng(0)
    for number in itertools.count():
        image = whole[number % len(whole)]
        top, left = rng.integers(0, image.shape[0] - SHORT_SIDE), rng.integers(0, image.shape[1] - 500)
        yield np.ascontiguousarray(image[top : top + SHORT_SIDE, left : left + 500])
