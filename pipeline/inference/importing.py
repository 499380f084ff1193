"""Weights trained elsewhere, as a bundle: torchvision's by name, or a state dict in a local file.

A file may be safetensors or a PyTorch state dict; the latter is read with `weights_only=True`, so nothing in it is
executed. torchvision's weights are downloaded by torchvision, once, into torch's own cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from pipeline import models, provenance
from pipeline.config import Strict
from pipeline.errors import BundleError, ConfigError, ModelError
from pipeline.inference import bundle


class Config(Strict):
    """Where weights come from and what they are for; exactly one of `torchvision` and `weights` is given.

    Attributes:
        model: the architecture; its parameters must be those of the weights.
        torchvision: a weights name such as `AlexNet_Weights.IMAGENET1K_V1`; it brings the class names too.
        weights: a local file.
        classes: class names in the order of the outputs; a text file with one a line is `classes_file`.
    """

    model: models.AnyModel
    torchvision: str | None = None
    weights: Path | None = None
    classes: tuple[str, ...] = Field(default=())
    classes_file: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.torchvision is None) == (self.weights is None):
            raise ValueError("expected exactly one of torchvision and weights")
        if self.weights is not None and bool(self.classes) == (self.classes_file is not None):
            raise ValueError("expected exactly one of classes and classes_file beside weights")
        return self


def bundle_from(config: Config, data_root: Path, path: Path) -> bundle.Bundle:
    """Write the bundle to `path`.

    Raises:
        ConfigError: unknown torchvision weights, or a number of classes that the model does not have.
        ModelError: the weights do not fit the architecture; the message names the first difference.
    """
    if config.torchvision is not None:
        state, classes = _from_torchvision(config.torchvision)
    else:
        assert config.weights is not None
        state, classes = _read(data_root / config.weights), _class_names(config, data_root)
    if len(classes) != config.model.num_classes:
        raise ConfigError(f"model.num_classes is {config.model.num_classes}, but there are {len(classes)} class names")
    model = models.build(config.model)
    _load(model, state, config.torchvision or str(config.weights))
    origin = {"imported_from": config.torchvision or str(config.weights), "commit": provenance.commit()}
    return bundle.save(path, model, config.model, classes=classes, provenance=origin)


def _from_torchvision(name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    import torchvision  # noqa: PLC0415  (slow to import)

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError):
        raise ConfigError(
            f"torchvision has no weights '{name}'; expected for example AlexNet_Weights.IMAGENET1K_V1"
        ) from None
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise BundleError(
            f"{weights.url}: cannot be downloaded ({error}); fetch it by hand and give it as weights"
        ) from None
    return state, tuple(weights.meta["categories"])


def _read(path: Path) -> dict[str, Tensor]:
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


def _load(model: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict whose names are the model's, with or without the leading `network.`."""
    named = {name if name.startswith("network.") else f"network.{name}": value for name, value in state.items()}
    own = model.state_dict()
    for name in sorted(own.keys() | named.keys()):
        expected, found = own.get(name), named.get(name)
        if expected is None or found is None or expected.shape != found.shape:
            describe = {
                key: "nothing" if value is None else str(list(value.shape))
                for key, value in (("expected", expected), ("found", found))
            }
            raise ModelError(
                f"{where}: {name}: the model expects {describe['expected']}, the weights hold {describe['found']}; "
                "choose the architecture that they were trained with"
            )
    model.load_state_dict(named)


def _class_names(config: Config, data_root: Path) -> tuple[str, ...]:
    if config.classes_file is None:
        return config.classes
    path = data_root / config.classes_file
    try:
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the class names ({error})") from None
