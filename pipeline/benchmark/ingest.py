"""The ingest benchmark: the same photos, the same work, every contender in turn, round after round.

How blocks take turns is in `rounds`, what is compared in `contender`, how in `block`, what comes out in `report`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import Field

from pipeline.benchmark import block, conversion, photos, rounds
from pipeline.benchmark.block import Figures
from pipeline.benchmark.contender import CONTENDERS, Setting
from pipeline.benchmark.conversion import Config as Converting
from pipeline.benchmark.report import Conversion, Report, Round
from pipeline.benchmark.rounds import Say
from pipeline.config import Strict, nearest
from pipeline.data.datasets import AnyDataset
from pipeline.errors import ConfigError

PEER_PACKAGES = ("webdataset", "mosaicml-streaming", "psutil")


class Config(Strict):
    """What is measured.

    Attributes:
        sources: JPEGs in class folders, repeated to `num_images`; both splits are read.
        short_side: to which they are resized before any contender stores them.
        num_processes: that decode, for each contender.
        rounds: blocks of each contender.
        epochs: that are timed in a block.
        skip_batches: at the start of each epoch, that do not count for the steady rate.
        contenders: which; all by default.
        conversion: from originals to shards; None to leave it out.
        quiet_share: of the machine's CPU time, that other processes may take before it is called busy.
    """

    sources: tuple[AnyDataset, ...] = Field(min_length=1)
    num_images: int = Field(default=20_000, ge=1)
    short_side: int = Field(default=256, ge=8)
    batch_size: int = Field(default=128, ge=1)
    size: int = Field(default=224, ge=8)
    num_processes: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=5, ge=1)
    epochs: int = Field(default=2, ge=2)
    skip_batches: int = Field(default=8, ge=1)
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    conversion: Converting | None = Converting()
    quiet_share: float = Field(default=0.05, ge=0, le=1)


def run(config: Config, scratch: Path, ray_address: str, say: Say = lambda line: None) -> Report:
    """Write the photos, measure all contenders, and clean up.

    Needs an initialised Ray of `num_processes` CPUs.

    Args:
        config: what is measured.
        scratch: folder in which a folder is made, and removed at the end whatever happens.
        ray_address: of Ray's head, for the contenders' own processes.
        say: told what begins.

    Raises:
        ConfigError: a contender is unknown, or none is installed.
        DataError: the sources hold no JPEG, or a contender failed.
    """
    names, missing = _chosen(config.contenders)
    load = os.getloadavg()[0]
    with rounds.workspace(scratch) as folder:
        found = _rounds(config, names, folder, ray_address, say)
        converted = _converted(config, folder, say) if config.conversion else None
    facts = rounds.facts(config, config.quiet_share, load)
    return Report(
        **facts | {"versions": facts["versions"] | _versions()}, rounds=found, missing=missing, conversion=converted
    )


def _chosen(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The contenders that can run, and the library that each other one lacks."""
    for name in wanted:
        if name not in CONTENDERS:
            raise ConfigError(f"unknown contender '{name}'; {nearest(name, list(CONTENDERS))}")
    here = [name for name in wanted if CONTENDERS[name].is_here]
    if not here:
        raise ConfigError("no contender to measure is installed; choose others or install 'ventral[bench]'")
    return here, {name: CONTENDERS[name].needs or "" for name in wanted if name not in here}


def _rounds(config: Config, names: list[str], folder: Path, ray_address: str, say: Say) -> tuple[Round, ...]:
    photos.write(folder / "photos", config.sources, config.num_images, config.short_side)
    tasks = {name: _task(config, name, folder, ray_address) for name in names}
    for name, task in tasks.items():
        say(f"prepare  {name}")
        block.run(task.model_copy(update={"photos": folder / "photos"}), folder)

    def measure(name: str, number: str) -> Figures:
        figures = block.run(tasks[name], folder)
        assert figures is not None
        say(f"round {number}  {name}: {figures.images_per_s:.0f} images/s")
        return figures

    return rounds.take_turns(names, config.rounds, measure)


def _task(config: Config, name: str, folder: Path, ray_address: str) -> block.Task:
    entry = CONTENDERS[name]
    setting = Setting(
        folder=folder / f"{entry.module}-{entry.decoder}-{entry.reader}-{entry.stored}",
        decoder=entry.decoder,
        reader=entry.reader,
        stored=entry.stored,
        batch_size=config.batch_size,
        size=config.size,
        num_processes=config.num_processes,
        seed=config.seed,
        ray_address=ray_address,
    )
    return block.Task(name=name, setting=setting, epochs=config.epochs, skip_batches=config.skip_batches)


def _converted(config: Config, folder: Path, say: Say) -> Conversion:
    assert config.conversion is not None
    say("conversion")
    photos.write(folder / "originals", config.sources, config.conversion.num_images, None)
    photos.write_folders(photos.read(folder / "originals"), folder / "files")
    return conversion.compare(folder / "files", folder, config.num_processes, config.conversion)


def _versions() -> dict[str, str]:
    found = {}
    for name in PEER_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
