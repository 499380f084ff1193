"""The artefact: a folder with everything needed to use a model, and nothing that is executed when it is read.

`weights.safetensors` holds the tensors, `model.json` the card: which architecture of this project, its configuration
(with the `InputSpec`), the class names, how images are decoded, what computes it, the checksum of the weights, and
where it came from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import models
from pipeline.config import Strict
from pipeline.data import regions
from pipeline.errors import BundleError
from pipeline.imaging import Decoding
from pipeline.inference import engine
from pipeline.inference.engine import Engine
from pipeline.models import Model
from pipeline.models._contract import ModelConfig
from pipeline.types import Task

WEIGHTS = "weights.safetensors"
CARD = "model.json"


class Card(Strict):
    """What `model.json` says.

    Attributes:
        classes: class names; a label is an index into them.
        search: how regions are proposed for an image that brings none, to a model that judges given ones.
        engine: what computes it where it answers; cards that do not say so are of the plain one.
        metrics: figures by name (`val/top1`, ...), as measured when the bundle was made.
        provenance: where it came from: commit, dataset and its digest, run.
    """

    schema_version: Literal[1] = 1
    task: Task = "classification"
    model: models.AnyModel
    classes: tuple[str, ...]
    decoding: Decoding = Decoding()
    search: regions.Config = regions.Config()
    engine: Engine = engine.PLAIN
    weights_sha256: str
    metrics: dict[str, float] = Field(default={})
    provenance: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _task_is_the_models(self) -> Self:
        if self.task != self.model.task:
            raise ValueError(f"task is {self.task}, but {self.model.name} is for {self.model.task}")
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle on disk."""

    path: Path
    card: Card

    def build(self, device: torch.device | str = "cpu") -> Model:
        """The model as it was trained, in evaluation mode on `device`, in the layout of quick convolutions.

        Raises:
            BundleError: the weights do not fit the architecture.
        """
        model = models.build(self.card.model)
        try:
            model.load_state_dict(load_file(self.path / WEIGHTS))
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise BundleError(
                f"{self.path / WEIGHTS}: the weights do not fit {self.card.model.name}: {reason}"
            ) from None
        model.to(device).to(memory_format=torch.channels_last)
        return model.eval()

    def start(self, device: torch.device | str = "cpu") -> Model:
        """The model as it answers: `build`, on the card's engine.

        Raises:
            BundleError: the weights do not fit the architecture.
            ConfigError: this machine cannot run the engine.
        """
        model = self.build(device)
        engine.start(model, self.card.model, self.card.engine, device)
        return model


def save(
    path: Path,
    model: Model,
    config: ModelConfig,
    *,
    classes: tuple[str, ...],
    decoding: Decoding | None = None,
    search: regions.Config | None = None,
    metrics: dict[str, float] | None = None,
    provenance: dict[str, str] | None = None,
) -> Bundle:
    """Write a bundle; it appears under `path` whole or not at all, replacing a bundle that was there."""
    with _appearing(path) as partial:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, partial / WEIGHTS
        )
        card = Card(
            task=config.task,
            model=config,
            classes=classes,
            decoding=decoding or Decoding(),
            search=search or regions.Config(),
            weights_sha256=sha256_file(partial / WEIGHTS),
            metrics=metrics or {},
            provenance=provenance or {},
        )
        _write(card, partial)
    return Bundle(path, card)


def on_engine(
    path: Path, made: Bundle, chosen: Engine, *, metrics: dict[str, float], provenance: dict[str, str]
) -> Bundle:
    """Write a bundle as `made` is, but on another engine and with more figures; it appears as that of `save` does."""
    told = {"metrics": made.card.metrics | metrics, "provenance": made.card.provenance | provenance}
    card = made.card.model_copy(update={"engine": chosen, **told})
    with _appearing(path) as partial:
        shutil.copytree(made.path, partial, dirs_exist_ok=True)  # with its golden images
        _write(card, partial)
    return load(path)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` at the end."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def _write(card: Card, folder: Path) -> None:
    # Left out where it is the plain one: such a card is read by versions that know no engines.
    plain = {"engine"} if card.engine == engine.PLAIN else None
    (folder / CARD).write_text(card.model_dump_json(indent=2, exclude=plain) + "\n")


def load(path: Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        BundleError: it is missing, of another version, or its weights are not the ones the card vouches for.
    """
    try:
        card = Card.model_validate_json((path / CARD).read_bytes(), strict=True)
    except OSError:
        raise BundleError(f"{path}: expected a bundle with {CARD} and {WEIGHTS}, found no readable {CARD}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path / CARD}: not a card this version reads: {where}: {first['msg']}") from None
    if not (path / WEIGHTS).is_file():
        raise BundleError(f"{path}: {WEIGHTS} is missing; copy or download the bundle again")
    found = sha256_file(path / WEIGHTS)
    if found != card.weights_sha256:
        raise BundleError(
            f"{path / WEIGHTS}: sha256 differs from {CARD} (expected {card.weights_sha256[:12]}, got {found[:12]}); "
            "copy or download the bundle again"
        )
    return Bundle(path, card)


def digest(path: Path) -> str:
    """Sha256 over the names and contents of a bundle's files."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
