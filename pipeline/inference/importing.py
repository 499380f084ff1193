"""Weights trained elsewhere, as a bundle: torchvision's by name, or a state dict in a local file.

A file may be safetensors or a PyTorch state dict; the latter is read with `weights_only=True`, so nothing in it is
executed. torchvision's weights are downloaded by torchvision, once, into torch's own cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import models, provenance
from pipeline.config import Strict
from pipeline.errors import BundleError, ConfigError, ModelError
from pipeline.inference import bundle

SHOWN = 3
"""Differences between weights and architecture that an error names."""


class Config(Strict):
    """Where weights come from and what they are for; exactly one of `torchvision` and `weights` is given.

    Attributes:
        model: the architecture; its parameters must be those of the weights.
        torchvision: a weights name such as `AlexNet_Weights.IMAGENET1K_V1`; it brings the class names too.
        weights: a local file.
        classes: class names in the order of the outputs, for a local file.
        classes_file: or a text file of them, one a line.
        classes_of: or torchvision's weights that have the same classes; nothing is downloaded.
    """

    model: models.AnyModel
    torchvision: str | None = None
    weights: Path | None = None
    classes: tuple[str, ...] = Field(default=())
    classes_file: Path | None = None
    classes_of: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.torchvision is None) == (self.weights is None):
            raise ValueError("expected exactly one of torchvision and weights")
        named = [bool(self.classes), self.classes_file is not None, self.classes_of is not None]
        if self.weights is not None and sum(named) != 1:
            raise ValueError("expected exactly one of classes, classes_file and classes_of beside weights")
        return self


def bundle_from(config: Config, data_root: Path, path: Path) -> bundle.Bundle:
    """Write the bundle to `path`.

    Raises:
        ConfigError: unknown torchvision weights, or a number of classes that the model does not have.
        ModelError: the weights do not fit the architecture; the message names the differences.
    """
    if config.torchvision is not None:
        state, classes = from_torchvision(config.torchvision)
    else:
        assert config.weights is not None
        state, classes = read_state(data_root / config.weights), _class_names(config, data_root)
    if len(classes) != config.model.num_classes:
        raise ConfigError(f"model.num_classes is {config.model.num_classes}, but there are {len(classes)} class names")
    model = models.build(config.model)
    load_state(model, state, config.torchvision or str(config.weights))
    origin = {"imported_from": config.torchvision or str(config.weights), "commit": provenance.commit()}
    return bundle.save(path, model, config.model, classes=classes, provenance=origin)


def from_torchvision(name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict of torchvision's weights of this name, and their class names; downloaded if need be.

    Raises:
        ConfigError: there are no such weights.
        BundleError: they cannot be downloaded.
    """
    weights = _weights_of_torchvision(name)
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise BundleError(
            f"{weights.url}: cannot be downloaded ({error}); fetch it by hand and give it as weights"
        ) from None
    return state, tuple(weights.meta["categories"])


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a local file, safetensors or PyTorch's format, by itself or under the key `state_dict`.

    Raises:
        BundleError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch's reader raises whatever other bytes make of it
        raise BundleError(
            f"{path}: expected a state dict or safetensors: {' '.join(str(error).split())[:200]}"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise BundleError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise BundleError(f"{path}: expected a state dict of tensors, got {type(value).__name__} under {name!r}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, fresh: Collection[str] = ()) -> None:
    """Load weights whose names are the model's, with or without the leading `network.`.

    Counters of batches that old files lack stay at 0.

    Args:
        model: it is left alone if the weights do not fit.
        state: the weights.
        where: they come from, for errors.
        fresh: names in the model that keep their values, whatever the weights hold under them.

    Raises:
        ModelError: the weights do not fit the architecture; the message names the differences.
    """
    named = {f"network.{_renamed(name.removeprefix('network.'))}": value for name, value in state.items()}
    own = {name: value for name, value in model.state_dict().items() if name not in fresh}
    found = {name: value for name, value in named.items() if name not in fresh}
    lacking = {name for name in own.keys() - found.keys() if name.endswith(".num_batches_tracked")}
    wrong = [
        _difference(name, own.get(name), found.get(name)) for name in sorted((own.keys() | found.keys()) - lacking)
    ]
    differences = [text for text in wrong if text is not None]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ModelError(
            f"{where}: {'; '.join(differences[:SHOWN])}{more}; choose the architecture that they were trained with"
        )
    model.load_state_dict(found, strict=False)


def _renamed(name: str) -> str:
    """The name that a layer of torchvision's detectors has had since their weights were published."""
    name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", name)
    return re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", name)


def _difference(name: str, expected: Tensor | None, found: Tensor | None) -> str | None:
    if expected is not None and found is not None and expected.shape == found.shape:
        return None
    shapes = ["nothing" if value is None else str(list(value.shape)) for value in (expected, found)]
    return f"{name}: the model expects {shapes[0]}, the weights hold {shapes[1]}"


def _weights_of_torchvision(name: str) -> Any:
    import torchvision  # noqa: PLC0415  (slow to import)

    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError):
        raise ConfigError(
            f"torchvision has no weights '{name}'; expected for example AlexNet_Weights.IMAGENET1K_V1"
        ) from None


def _class_names(config: Config, data_root: Path) -> tuple[str, ...]:
    if config.classes_of is not None:
        return tuple(_weights_of_torchvision(config.classes_of).meta["categories"])
    if config.classes_file is None:
        return config.classes
    path = data_root / config.classes_file
    try:
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the class names ({error})") from None
