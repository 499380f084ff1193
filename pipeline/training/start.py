"""What training starts from: the weights of another model, with a fresh output layer where the classes are others.

Transfer learning as in Oquab et al. 2014, "Learning and Transferring Mid-Level Image Representations": layers trained
on much data are kept, frozen or to be tuned, and a new last layer learns the classes of little data.

`prepare` is for the driver: it finds the weights once, and writes a whole initial state that every worker reads from
the run's folder. So a run can start again when the registry, the network or a cache is gone.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import models
from pipeline.config import Strict
from pipeline.errors import ConfigError
from pipeline.inference import bundle, importing
from pipeline.inference.bundle import Bundle
from pipeline.models import Model
from pipeline.models._contract import ModelConfig
from pipeline.models._detector import Detector
from pipeline.training.optim import NOTHING_TO_TRAIN, blocks
from pipeline.types import Spec

log = logging.getLogger("ventral.training")

Head = Literal["new", "zero", "keep"]
Part = Literal["all", "backbone"]
TORCHVISION, REGISTERED = "torchvision:", "models:/"
INITIAL = "initial.safetensors"


class Freeze(Strict):
    """Which parameters stay as they are.

    Attributes:
        first: so many blocks from the input on; a block is a convolution or full layer with its normalisation, a fire
            module, a residual block.
        names: patterns of parameter names, such as `network.features.*`.
    """

    first: int = Field(default=0, ge=0)
    names: tuple[str, ...] = ()


class Config(Strict):
    """Where the initial weights come from.

    Attributes:
        weights: `torchvision:<name>`, such as `torchvision:ResNet50_Weights.IMAGENET1K_V2`; `models:/name@alias` or
            `models:/name/3` in the registry; the folder of a bundle; or a file (.safetensors, or a PyTorch state dict).
            Relative paths lie in `data_root` or `storage`.
        part: what of the model the weights are for: `all` of it, or a detector's `backbone`, which a classifier's
            weights fit into; the rest is then initialised anew, and the classifier's own last layers are left out.
        head: of `all`. `new`: the last layer is initialised anew; `zero`: with zeros, so that with few images no chance
            weights stay where the features of the training images never point; `keep`: it comes with the weights, for
            the same classes. A detector's last layers are those whose size follows from the classes.
        freeze: what is not trained.
    """

    weights: str
    part: Part = "all"
    head: Head = "new"
    freeze: Freeze = Freeze()


@dataclass(frozen=True)
class Weights:
    """Found weights.

    Attributes:
        origin: where they were found, for people.
        state: names and values, as they were stored.
        classes: class names of the outputs, where they are known.
        spec: what they expect of an image, where it is known.
    """

    origin: str
    state: dict[str, Tensor]
    classes: tuple[str, ...] | None = None
    spec: Spec | None = None


def find(config: Config, roots: Sequence[Path], registered: Callable[[str], Bundle]) -> Weights:
    """Look the weights up.

    Args:
        config: says where.
        roots: folders that relative paths may lie in; the first one that has it.
        registered: gives the bundle of a registered model, `name@alias` or `name/3`.

    Raises:
        VentralError: there are none, or they cannot be read.
    """
    given = config.weights
    if given.startswith(TORCHVISION):
        return Weights(given, *importing.from_torchvision(given.removeprefix(TORCHVISION)))
    if given.startswith(REGISTERED):
        return _of_bundle(given, registered(given.removeprefix(REGISTERED)))
    path = next((root / given for root in roots if (root / given).exists()), roots[0] / given)
    if path.is_dir():
        return _of_bundle(given, bundle.load(path))
    return Weights(given, importing.read_state(path))


def initialise(model: Model, weights: Weights, head: Head, classes: tuple[str, ...], part: Part = "all") -> None:
    """Give a model the weights it starts from; with a new head the last layers stay as they are, or become zero.

    Raises:
        ConfigError: the head is to be kept, but its classes are others; a classifier has no backbone.
        ModelError: the weights do not fit the architecture; the message names the differences.
    """
    if part == "backbone":
        _initialise_backbone(model, weights)
    else:
        _initialise_all(model, weights, head, classes)
    mine, theirs = model.spec, weights.spec
    if theirs is not None and (mine.mean, mine.std) != (theirs.mean, theirs.std):
        log.warning(
            "%s was trained with input.mean %s and std %s, but this model has %s and %s",
            *(weights.origin, theirs.mean, theirs.std, mine.mean, mine.std),
        )


def _initialise_all(model: Model, weights: Weights, head: Head, classes: tuple[str, ...]) -> None:
    if head == "keep":
        _check_classes(weights, classes)
    heads = model.heads if isinstance(model, Detector) else (blocks(model)[-1][0],)
    fresh = set[str]()
    for path in heads if head != "keep" else ():
        layer = model.get_submodule(path)
        fresh |= {f"{path}.{name}" for name in layer.state_dict()}
        if head == "zero":
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    importing.load_state(model, weights.state, weights.origin, fresh)


def _initialise_backbone(model: Model, weights: Weights) -> None:
    if not isinstance(model, Detector):
        raise ConfigError("start.part: only a detector has a backbone; leave it out for a classifier")
    inside = {f"{model.backbone}.{name}" for name in model.get_submodule(model.backbone).state_dict()}
    for prefix in ("network.", "network.features.", "features."):  # a pyramid's body may be a classifier's `features`
        named = {f"{model.backbone}.{name.removeprefix(prefix)}": value for name, value in weights.state.items()}
        found = {name: value for name, value in named.items() if name in inside}
        if found:
            break
    importing.load_state(model, found, weights.origin, model.state_dict().keys() - inside)


def freeze(model: nn.Module, config: Freeze) -> None:
    """Exclude parameters from training; call it before the optimiser is built and DistributedDataParallel is wrapped.

    Raises:
        ConfigError: there are not so many blocks, a pattern matches nothing, or nothing is left to train.
    """
    parts = blocks(model)
    if config.first > len(parts):
        raise ConfigError(f"freeze.first: expected at most {len(parts)} blocks, got {config.first}")
    named = dict(model.named_parameters())
    first_kept = parts[config.first][0] if config.first < len(parts) else None
    for name in _before(named, first_kept) if config.first else []:
        named[name].requires_grad_(False)
    for pattern in config.names:
        matching = fnmatch.filter(named, pattern)
        if not matching:
            raise ConfigError(f"freeze.names: '{pattern}' matches no parameter; there are for example {[*named][:3]}")
        for name in matching:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(NOTHING_TO_TRAIN)


def hold_norms(model: nn.Module) -> None:
    """Keep the statistics of frozen batch normalisations frozen too; to be called after each `model.train()`."""
    for layer in model.modules():
        own = [*layer.parameters()]
        if isinstance(layer, _BatchNorm) and own and not any(parameter.requires_grad for parameter in own):
            layer.eval()


def prepare(
    path: Path, model: ModelConfig, weights: Weights, config: Config, seed: int, classes: tuple[str, ...]
) -> None:
    """Write the whole initial state of a model to `path`, whole or not at all; what is fresh in it follows from `seed`.

    Raises:
        VentralError: as `initialise`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = models.build(model)
    initialise(built, weights, config.head, classes, config.part)
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in built.state_dict().items()}, partial)
    partial.rename(path)


def restore(model: Model, path: Path) -> None:
    """Give a freshly built model the state that `prepare` wrote."""
    model.load_state_dict(load_file(path))


def build(model: ModelConfig, seed: int, config: Config | None, folder: Path) -> Model:
    """The model that a run in `folder` begins with: the same on every rank, and frozen as `config` says."""
    torch.manual_seed(seed)
    made = models.build(model)
    if config is not None:
        restore(made, folder / INITIAL)
        freeze(made, config.freeze)
    return made


def _of_bundle(origin: str, found: Bundle) -> Weights:
    card = found.card
    return Weights(origin, importing.read_state(found.path / bundle.WEIGHTS), card.classes, card.model.input)


def _before(names: dict[str, nn.Parameter], first_kept: str | None) -> list[str]:
    """The names, in the network's order, before those of the block `first_kept`; all of them without one."""
    kept = [at for at, name in enumerate(names) if first_kept is not None and name.startswith(f"{first_kept}.")]
    return [*names][: min(kept)] if kept else [*names]


def _check_classes(weights: Weights, classes: tuple[str, ...]) -> None:
    if weights.classes is None or weights.classes == classes:
        return
    if len(weights.classes) != len(classes):
        raise ConfigError(
            f"{weights.origin}: has {len(weights.classes)} classes, the dataset {len(classes)}; set start.head to new"
        )
    at = next(at for at, pair in enumerate(zip(weights.classes, classes, strict=True)) if pair[0] != pair[1])
    raise ConfigError(
        f"{weights.origin}: class {at} is '{weights.classes[at]}', in the dataset it is '{classes[at]}'; "
        "set start.head to new, or bring the classes into one order"
    )
