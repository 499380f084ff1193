"""[Ray] From original photos to shards: this project's ingest against the usual two processes of Pillow and webdataset.

All read the same files in class folders and keep JPEGs of short side 256, quality 90. The whole run counts, with the
start of processes and, for Ray, of its tasks; Ray itself is up before. This project looks at more on the way: limits,
checksums, statistics of the pixels.
"""

from __future__ import annotations

import importlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import Field

from pipeline.benchmark import levers
from pipeline.benchmark.contender import CONTENDERS
from pipeline.benchmark.machine import OthersShare
from pipeline.benchmark.report import Conversion
from pipeline.benchmark.rounds import rotated
from pipeline.config import Strict
from pipeline.data import ingest, rows
from pipeline.data.datasets import image_folder
from pipeline.types import Record

SHORT_SIDE, QUALITY, PER_SHARD = 256, 90, 1024
PEER = "Pillow + webdataset, two processes"
FORK = multiprocessing.get_context("fork")


class Config(Strict):
    """How much is converted: photos, and how often."""

    num_images: int = Field(default=4000, ge=2)
    rounds: int = Field(default=3, ge=1)
    lever_images: int = Field(default=200, ge=1)


def compare(folder: Path, scratch: Path, num_processes: int, config: Config) -> Conversion:
    """Run the converters in turn, another one first each round.

    Args:
        folder: originals in `train/<class>/`.
        scratch: for what they write, which is removed.
        num_processes: of each; Ray is initialised with as many CPUs.
        config: how often.
    """
    dataset = image_folder.Config(root=str(folder), splits=("train",))
    records = list(image_folder.records(dataset, "train"))
    converters = _converters(dataset, records, num_processes)
    rates: dict[str, list[float]] = {name: [] for name in converters}
    others = OthersShare(_ray_processes)
    for number in range(config.rounds):
        for name in rotated(list(converters), number):
            target = scratch / "converted"
            target.mkdir()
            started = time.perf_counter()
            converters[name](target)
            rates[name].append(len(records) / (time.perf_counter() - started))
            shutil.rmtree(target)
    share = others.read()
    return Conversion(
        num_images=len(records),
        images_per_s={name: tuple(found) for name, found in rates.items()},
        ratios={
            name: tuple(own / peer for own, peer in zip(found, rates[PEER], strict=True))
            for name, found in rates.items()
            if name != PEER and PEER in rates
        },
        levers=levers.measure([Path(record.uri).read_bytes() for record in records[: config.lever_images]]),
        others_share=share,
    )


def _converters(
    dataset: image_folder.Config, records: Sequence[Record], num_processes: int
) -> dict[str, Callable[[Path], None]]:
    per_shard = min(PER_SHARD, -(-len(records) // num_processes))
    config = ingest.Config(train_short_side=SHORT_SIDE, jpeg_quality=QUALITY, rows_per_shard=per_shard)

    def on_ray(target: Path) -> None:
        ingest.ingest(dataset, config, target / "shards")

    def bare(target: Path) -> None:
        parts = [records[at : at + per_shard] for at in range(0, len(records), per_shard)]
        _in_processes(lambda part: _make_shards(target, parts, part, num_processes, config), num_processes)

    found: dict[str, Callable[[Path], None]] = {"ventral ingest on Ray": on_ray, "ventral rows, bare processes": bare}
    if CONTENDERS["webdataset, as documented"].is_here:
        convert = importlib.import_module("pipeline.benchmark.webdataset").convert
        files = [(Path(record.uri), record.label or 0) for record in records]

        def peer(target: Path) -> None:
            _in_processes(
                lambda part: convert(files[part::num_processes], f"{target}/{part}-%05d.tar", SHORT_SIDE, QUALITY),
                num_processes,
            )

        found[PEER] = peer
    return found


def _make_shards(target: Path, parts: list[Sequence[Record]], first: int, step: int, config: rows.Config) -> None:
    for number in range(first, len(parts), step):
        rows.make_shard(target / f"train-{number:05d}.parquet", "train", parts[number], config)


def _in_processes(work: Callable[[int], None], num_processes: int) -> None:
    """Fork, work, wait.

    Raises:
        RuntimeError: one of them failed; its own words are on the terminal.
    """
    processes = [FORK.Process(target=work, args=(part,)) for part in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a converting process failed")


def _ray_processes() -> list[int]:
    found: list[int] = importlib.import_module("pipeline.benchmark.ventral").ray_processes()
    return found
