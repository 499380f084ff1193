"""What takes part in the ingest benchmark: one small class per library, all with the same two verbs.

`prepare` writes the photos once in the library's own format; `epoch` gives what a training loop would take from it:
batches of uint8 pixels, RandomResizedCrop and flip done. How long that takes is `block`'s business. Each contender
lives in its own file, which alone imports its library; `CONTENDERS` names them without importing anything.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from pydantic import Field

from pipeline.benchmark.photos import Photo
from pipeline.config import Strict
from pipeline.types import InputSpec

Epoch = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Batches: uint8 [B, 3, size, size] and int64 [B]."""
Decoder = Literal["same", "documented"]
"""`same`: this project's decoder and crop, for all; `documented`: what the library's documentation shows."""
Group = Literal["limit", "peer", "own"]
Reader = Literal["local", "ray"]
Stored = Literal["jpeg", "decoded"]


class Setting(Strict):
    """What is asked of every contender.

    Attributes:
        folder: where `prepare` puts the contender's own files.
        num_processes: that decode.
        ray_address: of the Ray head, for those that need one.
    """

    folder: Path
    decoder: Decoder = "same"
    reader: Reader = "local"
    stored: Stored = "jpeg"
    batch_size: int = Field(default=128, ge=1)
    size: int = Field(default=224, ge=8)
    num_processes: int = Field(default=2, ge=1)
    seed: int = 0
    ray_address: str | None = None

    @property
    def spec(self) -> InputSpec:
        """The input that the batches are for."""
        return InputSpec((self.size, self.size), resize_short=None)


class Contender(ABC):
    """One way from stored photos to batches; one instance lives through all epochs of a block.

    Args:
        setting: the same for all, but for folder, decoder and reader.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def prepare(self, photos: Sequence[Photo]) -> None:
        """Write the photos in the contender's own format into its folder."""

    @abstractmethod
    def epoch(self, seed: int) -> Epoch:
        """All whole batches of one epoch, in an order and with crops that follow from the seed."""

    def spilled_bytes(self) -> int:
        """What was moved from shared memory to disk so far."""
        return 0

    def other_processes(self) -> list[int]:
        """Processes that work for the contender and are not children of this one; their children count as well."""
        return []


class Entry(NamedTuple):
    """One line of the table: a file of this package, how it is set, and what must be installed for it."""

    module: str
    group: Group
    decoder: Decoder = "same"
    reader: Reader = "local"
    stored: Stored = "jpeg"
    needs: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether its library is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def build(self, setting: Setting) -> Contender:
        """Import the file and make the contender."""
        module = importlib.import_module(f"pipeline.benchmark.{self.module}")
        make = cast(Callable[[Setting], Contender], module.Contestant)
        return make(setting)


LIMIT, LOCAL, RAY = "bare processes", "ventral local", "ventral ray"
CONTENDERS = {
    LIMIT: Entry("bare", "limit"),
    LOCAL: Entry("ventral", "own"),
    RAY: Entry("ventral", "own", reader="ray"),
    "ventral local, decoded shards": Entry("ventral", "own", stored="decoded"),
    "DataLoader, same decoder": Entry("torch_loader", "peer"),
    "DataLoader, as documented": Entry("torch_loader", "peer", "documented"),
    "webdataset, same decoder": Entry("webdataset", "peer", needs="webdataset"),
    "webdataset, as documented": Entry("webdataset", "peer", "documented", needs="webdataset"),
    "mosaicml-streaming, same decoder": Entry("mosaicml", "peer", needs="streaming"),
    "mosaicml-streaming, as documented": Entry("mosaicml", "peer", "documented", needs="streaming"),
}
