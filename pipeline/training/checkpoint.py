"""Checkpoints of a run: folders on a local disk, on shared storage or in a bucket; whole or not there, the newest kept.

A checkpoint is named by its position, `epoch-0003-offset-00012800`: three epochs are finished, and 12,800 draws of the
fourth. It holds one file for each part of the state (`model.pt`, `optimizer.pt`, ...), `progress.json`, and last of all
the commit marker `checkpoint.json` with the size and sha256 of every file: a folder without it is what an interrupted
write has left. Files are read with `weights_only=True`: nothing is executed. What is in the parts is the loop's
business.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field, ValidationError

from pipeline import storage
from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.storage import Location

MARKER = "checkpoint.json"
PROGRESS = "progress.json"

log = logging.getLogger("ventral.training")


class Config(Strict):
    """When and where the state of a run is stored. There is always a checkpoint after each epoch.

    Attributes:
        every_steps: and one inside the epoch after so many steps.
        every_s: and one inside the epoch when the last is so many seconds old.
        keep: so many of the newest.
        folder: below which each run has its folder, a path or a URL (`s3://bucket/checkpoints`); None: in the folder of
            the run.
    """

    every_steps: int | None = Field(default=None, ge=1)
    every_s: float | None = Field(default=300, gt=0)
    keep: int = Field(default=2, ge=1)
    folder: Location | None = None

    def store(self, run: str, name: str) -> Store:
        """The checkpoints of the run called `name` whose other files lie in the folder `run`."""
        inside = storage.join(run, "checkpoints")
        return Store(inside if self.folder is None else storage.join(self.folder, name), self)


class Position(NamedTuple):
    """How far a run is: finished epochs, and draws of the next one, over all workers."""

    epoch: int
    offset: int = 0

    @property
    def name(self) -> str:
        """Of the checkpoint there."""
        return f"epoch-{self.epoch:04d}-offset-{self.offset:08d}"

    @classmethod
    def of(cls, name: str) -> Position | None:
        """The position in the name of a checkpoint; None for other names."""
        found = re.fullmatch(r"epoch-(\d{4,})-offset-(\d{8,})", name)
        return cls(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read.

    Attributes:
        position: where it was taken.
        parts: the state of each part by name, tensors on the device that was asked for.
        progress: what the loop knew of the run; JSON.
    """

    position: Position
    parts: dict[str, Any]
    progress: dict[str, Any]


class _File(Strict):
    size_bytes: int
    sha256: str


class _Marker(Strict):
    files: dict[str, _File]


class _NotWholeError(Exception):
    """A checkpoint that is torn or damaged; the text says how."""


class Store:
    """The checkpoints of one run. One process writes, any number read.

    Args:
        folder: a path or a URL; need not exist.
        config: how many stay.
    """

    def __init__(self, folder: str, config: Config | None = None) -> None:
        self.folder, self.config = folder, config or Config()

    def positions(self) -> list[Position]:
        """Of all checkpoints that were finished, the oldest first; not yet whether they are undamaged.

        Raises:
            DataError: the folder cannot be listed.
        """
        return [position for position, is_finished in self._listed() if is_finished]

    def save(self, position: Position, parts: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest `keep`.

        Raises:
            DataError: it cannot be written; those before it are as they were.
        """
        here = storage.join(self.folder, position.name)
        try:
            self._remove(position)
            files = {name: _write(here, name, data) for name, data in _files(parts, progress)}
            storage.write(self._marker(position), _Marker(files=files).model_dump_json(indent=2).encode())
        except OSError as error:
            with suppress(OSError):
                self._remove(position)  # the disk is full enough
            raise DataError(
                f"{here}: cannot be written: {storage.reason(error)}; free some space or repair the storage, then go "
                "on with resume=true"
            ) from None
        self._prune(position)

    def newest(self, device: torch.device | str) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where none was ever finished; a warning names what is skipped.

        Raises:
            DataError: some were finished, but all are damaged; or the storage cannot be read.
        """
        found = self._listed()
        for position, _ in reversed(found):
            try:
                return self._read(position, device)
            except _NotWholeError as error:
                log.warning("%s: skipped: %s", storage.join(self.folder, position.name), error)
        if any(is_finished for _, is_finished in found):
            raise DataError(f"{self.folder}: every checkpoint is damaged; delete them to start anew")
        return None

    def load(self, position: Position, device: torch.device | str) -> Checkpoint:
        """The checkpoint at a position.

        Raises:
            DataError: it is not there, or not whole.
        """
        try:
            return self._read(position, device)
        except _NotWholeError as error:
            raise DataError(
                f"{storage.join(self.folder, position.name)}: not a whole checkpoint: {error}; delete it to go on from "
                "the one before"
            ) from None

    def _read(self, position: Position, device: torch.device | str) -> Checkpoint:
        here = storage.join(self.folder, position.name)
        try:
            marker = _Marker.model_validate_json(storage.read(self._marker(position)), strict=True)
            contents = {name: _verified(here, name, file) for name, file in marker.files.items()}
        except FileNotFoundError as error:
            raise _NotWholeError(
                f"{storage.reason(error)}: its writing was interrupted, or files were deleted"
            ) from None
        except ValidationError:
            raise _NotWholeError(f"{MARKER} is not readable") from None
        except OSError as error:
            raise DataError(f"{here}: cannot be read: {storage.reason(error)}; repair the storage and go on") from None
        progress = json.loads(contents.pop(PROGRESS))
        parts = {name.removesuffix(".pt"): _parse(data, device) for name, data in contents.items()}
        return Checkpoint(position, parts, progress)

    def _prune(self, newest: Position) -> None:
        """Remove what is not kept. The one writer is at `newest`: what lies beyond was damaged when it was skipped."""
        found = self._listed()
        whole = [position for position, is_finished in found if is_finished and position <= newest]
        kept = whole[-self.config.keep :]
        try:
            for position, _ in found:
                if position not in kept:
                    self._remove(position)
        except OSError as error:
            log.warning("%s: old checkpoints cannot be removed: %s", self.folder, storage.reason(error))

    def _remove(self, position: Position) -> None:
        storage.remove(self._marker(position))  # first: half of a checkpoint must not look whole
        storage.remove(storage.join(self.folder, position.name))

    def _marker(self, position: Position) -> str:
        return storage.join(self.folder, position.name, MARKER)

    def _listed(self) -> list[tuple[Position, bool]]:
        """Everything that is named as a checkpoint, the oldest first, and whether it was finished."""
        try:
            names = storage.folders(self.folder) if storage.is_folder(self.folder) else []
            found = sorted(position for name in names if (position := Position.of(name)))
            return [(position, storage.is_file(self._marker(position))) for position in found]
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be listed: {storage.reason(error)}; check the path, the credentials and the "
                "endpoint in the environment"
            ) from None


def _files(parts: Mapping[str, Any], progress: Mapping[str, Any]) -> Iterable[tuple[str, memoryview]]:
    """Name and content of every file but the marker, one at a time in memory."""
    for name, state in parts.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield f"{name}.pt", buffer.getbuffer()
    yield PROGRESS, memoryview(json.dumps(progress, indent=2).encode())


def _write(folder: str, name: str, data: memoryview) -> _File:
    storage.write(storage.join(folder, name), data)
    return _File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _verified(folder: str, name: str, expected: _File) -> bytes:
    """The content of a file that is what the marker says."""
    data = storage.read(storage.join(folder, name))
    if len(data) != expected.size_bytes:
        raise _NotWholeError(f"{name} has {len(data)} bytes, not {expected.size_bytes}")
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise _NotWholeError(f"{name} has another sha256 than {MARKER} says")
    return data


def _parse(data: bytes, device: torch.device | str) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # whatever torch's reader makes of bytes that somebody else has written
        raise _NotWholeError(f"not readable: {' '.join(str(error).split())[:200]}") from None
