"""From what should be served to what will be: aliases become versions, versions become bundles on disk.

It runs before anything is deployed, so that every replica, also one that the autoscaler adds days later, serves the
version that was meant. Following an alias that moves comes later.
"""

from __future__ import annotations

import os

from pipeline.errors import ConfigError
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from serve.schemas import AppArgs, ModelArgs, Served

REGISTRY = "MLFLOW_TRACKING_URI"


def reconcile(args: AppArgs) -> list[Served]:
    """Settle every model's version and have its bundle on disk.

    Raises:
        ConfigError: no registry is known.
        TrackingError: the registry does not answer or has no such model.
        BundleError: a bundle is damaged.
    """
    return [_local(model) if model.bundle is not None else _registered(model, args) for model in args.models]


def _local(model: ModelArgs) -> Served:
    assert model.bundle is not None
    found = bundle.load(model.bundle.resolve())
    return _served(model, found.card.weights_sha256[:12], None, found, None)


def _registered(model: ModelArgs, args: AppArgs) -> Served:
    from pipeline.tracking import registry  # noqa: PLC0415  (MLflow takes seconds to import; local bundles need none)

    uri = args.registry or os.environ.get(REGISTRY)
    if not uri:
        raise ConfigError(
            f"model '{model.name}' is to come from the registry, but there is none: "
            f"set 'registry' in the application's args, or {REGISTRY}"
        )
    version = registry.resolve(uri, f"{model.name}@{model.alias}")
    found = registry.fetch(uri, version, args.cache.resolve())
    return _served(model, version.version, model.alias, found, registry.run_url(uri, version))


def _served(model: ModelArgs, version: str, alias: str | None, found: Bundle, run_url: str | None) -> Served:
    return Served(model.name, version, alias, found.path, len(found.card.classes), found.card.task, run_url)
