"""One file per model; the file name is the model's name. Files that begin with an underscore are shared parts.

A model file holds `Config` (a `ClassifierConfig` or `DetectorConfig` with `name: Literal["<file name>"]`) and
`build(config)`. Nothing else needs to be edited: it is imported when its name is asked for, and the contract tests pick
it up.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, SerializeAsAny

from pipeline.config import ByName, nearest
from pipeline.errors import ConfigError
from pipeline.models._contract import Classifier, ModelConfig
from pipeline.models._detector import Detector

Model = Classifier | Detector


def names() -> list[str]:
    """Every model's name, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def config_of(name: str) -> type[ModelConfig]:
    """The `Config` of the model called `name`."""
    return cast(type[ModelConfig], _module(name).Config)


def build(config: ModelConfig) -> Model:
    """A freshly initialised model; seed torch first for a reproducible one."""
    return cast(Model, _module(config.name).build(config))


def build_classifier(config: ModelConfig) -> Classifier:
    """The same, for what only a classifier can do.

    Raises:
        ConfigError: the model is none.
    """
    model = build(config)
    if not isinstance(model, Classifier):
        raise ConfigError(f"expected a classifier, but '{config.name}' is for {config.task}; name another model")
    return model


def _module(name: str) -> Any:
    if name not in names():
        raise ConfigError(f"unknown model '{name}'; {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


AnyModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(ByName("model", names, config_of))]
"""A configuration field that takes any model by its `name`."""
