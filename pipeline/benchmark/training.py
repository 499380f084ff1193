"""The training benchmark: the same model, batch and threads, trained by every way in turn, round after round.

What a way is stands in `training_block`, what is measured in `clock`, what comes out in `training_report`. A case is
one thing to train on one kind of device; those whose device, data or library is not here are left out and named, so the
same command runs on a laptop and on a GPU machine without Ray. Ray's workers must be on this machine, whose clock and
processes are watched.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from pipeline.benchmark import flops, photos, rounds, ventral
from pipeline.benchmark.clock import Figures, Steps
from pipeline.benchmark.rounds import Say
from pipeline.benchmark.training_block import Data, Task, Way, main
from pipeline.benchmark.training_report import Block, Report, model_of
from pipeline.config import Strict, nearest
from pipeline.data.datasets import AnyDataset
from pipeline.errors import ConfigError, DataError, VentralError
from pipeline.training.recipe import Recipe

KNOWN_TO_ALL = {"model", "loading", "optim", "precision", "channels_last", "compile"}
Session = Callable[[int], AbstractContextManager[str]]
"""Opens a Ray of so many CPUs for one block, and gives its address."""


class Case(Strict):
    """One thing that is trained.

    Attributes:
        recipe: of which the plain script knows `KNOWN_TO_ALL` only.
        device: that trains.
        data: that it is trained on, in turn.
        workers: numbers of workers.
        ways: to train it.
        threads: of torch in each worker; None: all of the machine's.
        tf32: let a GPU compute fp32 products in TF32.
    """

    recipe: Recipe
    device: Literal["cpu", "cuda"] = "cpu"
    data: tuple[Data, ...] = Field(default=("synthetic",), min_length=1)
    workers: tuple[int, ...] = Field(default=(1,), min_length=1)
    ways: tuple[Way, ...] = Field(default=("loop", "ray", "script"), min_length=1)
    threads: int | None = Field(default=1, ge=1)
    tf32: bool = False
    steps: Steps = Steps()

    @model_validator(mode="after")
    def _is_the_same_for_all(self) -> Self:
        if alien := self.recipe.model_fields_set - KNOWN_TO_ALL:
            raise ValueError(f"recipe: not every way to train knows {', '.join(sorted(alien))}; leave it out")
        if self.recipe.loading.reader != "local":
            raise ValueError("recipe.loading.reader: expected local, for not every way to train has Ray")
        return self

    @property
    def num_threads(self) -> int:
        """Of each worker."""
        return self.threads or os.cpu_count() or 1


class Config(Strict):
    """What is measured.

    Attributes:
        cases: by name.
        only: the cases that are measured; None: all.
        sources: JPEGs in class folders for `real`, repeated to as many as the longest block needs.
        short_side: to which they are resized before anyone stores them.
        rounds: blocks of each way of each case.
        quiet_share: of the machine's CPU time, that other processes may take before it is called busy.
    """

    cases: dict[str, Case] = Field(min_length=1)
    only: tuple[str, ...] | None = None
    sources: tuple[AnyDataset, ...] = ()
    short_side: int = Field(default=256, ge=8)
    rounds: int = Field(default=3, ge=1)
    quiet_share: float = Field(default=0.05, ge=0, le=1)


def run(config: Config, scratch: Path, session: Session | None, say: Say = lambda line: None) -> Report:
    """Write the photos, measure what can be measured, and clean up.

    What fails in one round is left out of all, with its reason.

    Args:
        config: what is measured.
        scratch: folder in which a folder is made, and removed at the end whatever happens.
        session: opens a Ray; None leaves out what needs one.
        say: told what begins.

    Raises:
        ConfigError: `only` names no case, or nothing can be measured here.
    """
    cases, load = _chosen(config), os.getloadavg()[0]
    wanted = {name: (block, cases[block.case]) for case in cases for name, block in _blocks(case, cases[case])}
    with rounds.workspace(scratch) as folder:
        left_out = _missing(wanted, session) | _write_photos(config, wanted, folder, say)
        names = [name for name in wanted if name not in left_out]
        found = _rounds(config, {name: wanted[name] for name in names}, folder, session, say, left_out)
    kept = [name for name in names if name not in left_out]
    if not kept:
        raise ConfigError("nothing could be measured: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    return Report(
        **rounds.facts(config, config.quiet_share, load),
        models={name: model_of(case.recipe.model) for name, case in cases.items()},
        blocks={name: wanted[name][0] for name in kept},
        rounds=tuple({name: blocks[name] for name in kept} for blocks in found),
        left_out=left_out,
    )


Wanted = dict[str, tuple[Block, Case]]


def _chosen(config: Config) -> dict[str, Case]:
    for name in config.only or ():
        if name not in config.cases:
            raise ConfigError(f"train.only: unknown case '{name}'; {nearest(name, list(config.cases))}")
    return {name: case for name, case in config.cases.items() if config.only is None or name in config.only}


def _blocks(name: str, case: Case) -> Iterator[tuple[str, Block]]:
    """Every way of a case; those that are compared stand together."""
    has_card, flop_per_image = case.device == "cuda" and torch.cuda.is_available(), flops.per_image(case.recipe.model)
    card = torch.cuda.get_device_name() if has_card else case.device
    number_format: flops.Format = "tf32" if case.recipe.precision == "fp32" and case.tf32 else case.recipe.precision
    for data in case.data:
        for num_workers in case.workers:
            for way in case.ways:
                block = Block(
                    case=name,
                    data=data,
                    way=way,
                    num_workers=num_workers,
                    device=card,
                    threads=case.num_threads,
                    number_format=number_format,
                    flop_per_image=flop_per_image,
                    peak=flops.peak(card, number_format) if has_card else None,
                )
                yield block.name, block


def _missing(wanted: Wanted, session: Session | None) -> dict[str, str]:
    """What cannot be measured here, and what it lacks."""
    num_cards = torch.cuda.device_count()
    found = {}
    for name, (block, case) in wanted.items():
        if case.device == "cuda" and num_cards < block.num_workers:
            found[name] = f"it needs {block.num_workers} GPUs and there are {num_cards}"
        elif block.way == "ray" and session is None:
            found[name] = "'ray' is not installed"
        elif block.way == "script" and block.data == "real" and find_spec("torchvision") is None:
            found[name] = "'torchvision' is not installed"
    return found


def _write_photos(config: Config, wanted: Wanted, folder: Path, say: Say) -> dict[str, str]:
    """Store the photos in both ways, where real ones are wanted; else why that cannot be."""
    real = {name: pair for name, pair in wanted.items() if pair[0].data == "real"}
    if not real:
        return {}
    say("prepare  photos")
    num_images = max(
        case.steps.total * case.recipe.loading.batch_size * block.num_workers for block, case in real.values()
    )
    try:
        photos.write(folder / "photos", config.sources, num_images, config.short_side)
    except DataError as error:
        return dict.fromkeys(real, f"there are no photos: {error}")
    found = photos.read(folder / "photos")
    ventral.write_shards(found, folder / "shards")
    photos.write_folders(found, folder / "folders")
    return {}


def _rounds(
    config: Config, wanted: Wanted, folder: Path, session: Session | None, say: Say, left_out: dict[str, str]
) -> tuple[dict[str, Figures | None], ...]:
    """Measure in turn; what fails is added to `left_out`."""

    def measure(name: str, number: str) -> Figures | None:
        if name in left_out:
            return None
        try:
            figures = _measured(*wanted[name], folder, session)
        except VentralError as error:
            left_out[name] = str(error)
            say(f"round {number}  {name}: {error}")
            return None
        say(f"round {number}  {name}: {figures.step_ms:.1f} ms, {figures.images_per_s:.0f} images/s")
        return figures

    return rounds.take_turns(list(wanted), config.rounds, measure) if wanted else ()


def _measured(block: Block, case: Case, folder: Path, session: Session | None) -> Figures:
    """Run one block in a folder of its own."""
    with _ray_of(block, session) as address, _scratch(folder) as scratch:
        task = Task(
            way=block.way,
            data=block.data,
            recipe=case.recipe,
            steps=case.steps,
            num_workers=block.num_workers,
            device=case.device,
            threads=block.threads,
            tf32=case.tf32,
            scratch=scratch,
            ray_address=address,
            began=time.time(),
        )
        # Ray sets it to a worker's CPUs, unless it finds one.
        env = {} if block.way == "ray" else {"OMP_NUM_THREADS": str(block.threads)}
        figures = rounds.in_process(main, task, Figures, scratch, env)
    assert figures is not None
    return figures


def _ray_of(block: Block, session: Session | None) -> AbstractContextManager[str | None]:
    """A Ray for the block that needs one, and for no other: also an idle one takes CPU time."""
    if block.way != "ray":
        return nullcontext(None)
    assert session is not None
    return session(block.num_workers * block.threads)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for one block, from which the photos can be reached."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for kind in ("shards", "folders"):
            (Path(name) / kind).symlink_to(folder.absolute() / kind)
        yield Path(name)
