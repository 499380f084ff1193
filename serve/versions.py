"""From names to versions to bundles on disk: where an alias points to now, and that version's bundle, checked.

A folder's bundle is its own version. What is served is written down, so that a process that starts while the registry
is away serves what was served last; what nobody needs any more is removed. Nothing here knows Ray.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import storage
from pipeline.errors import BundleError, ConfigError, TrackingError
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from serve.pauses import Pauses
from serve.schemas import AppArgs, ModelArgs, Served
from serve.throttle import throttled

REGISTRY = "MLFLOW_TRACKING_URI"
MEMORY = "served.json"
UNUSED_S = 86400.0
"""So long nobody must have asked for a fetched bundle before it is removed. Jobs and other applications share the
folder, and what was asked for once may be loaded hours later, by a replica or an actor that is started anew."""
_log = logging.getLogger("ray.serve")


class Versions:
    """What the aliases of an application's models mean."""

    def __init__(self, args: AppArgs, clock: Callable[[], float] = time.monotonic) -> None:
        self._uri = args.registry or os.environ.get(REGISTRY)
        self._cache = args.cache.resolve()
        self._lock = threading.Lock()
        self._folders: dict[Any, Bundle] = {}
        self._checked: dict[Any, tuple[Bundle, str | None]] = {}
        self._pauses = Pauses(clock)
        self._unfetched: dict[Any, str] = {}

    def settle(self, model: ModelArgs, alias: str) -> Served:
        """What an alias of a model, or the model's folder, means now, its bundle on disk and its checksums right.

        Raises:
            ConfigError: no registry is known.
            RefusedError: the registry has no such model or alias.
            TrackingError: it does not answer.
            BundleError: the bundle is damaged, or there is no room for it; for a while no other try is made.
        """
        if model.bundle is not None:
            found = self._folder(model.bundle.resolve())
            return _served(model, found.card.weights_sha256[:12], None, found)
        uri = self._registry(model)
        from pipeline.tracking import registry  # noqa: PLC0415  (MLflow takes seconds to import; folders need none)

        return self._fetched(model, alias, registry.resolve(uri, f"{model.name}@{alias}"))

    def settle_if_any(self, model: ModelArgs, alias: str) -> Served | None:
        """What an alias means now; None where the model has none of the name."""
        from pipeline.tracking import registry  # noqa: PLC0415

        version = registry.holder(self._registry(model), model.name, alias)
        return None if version is None else self._fetched(model, alias, version)

    def last(self, model: ModelArgs, alias: str) -> Served | None:
        """What an alias meant when it was last served, from the copy on disk; None where it never was."""
        from pipeline.tracking.registry import Version  # noqa: PLC0415

        said = None if model.bundle is not None else self._memory().get(model.name, {}).get(alias)
        return said and self._fetched(model, alias, TypeAdapter(Version).validate_python(said))

    def remember(self, served: Served) -> None:
        """Write down that a version is served by its alias, beside what other applications write there.

        Raises:
            BundleError: it cannot be written; what was written before is as it was.
        """
        with self._lock:
            known = [key for key in self._checked if (key.name, key.version) == (served.name, served.version)]
        if not known:
            return  # a folder's
        path = self._cache / MEMORY
        try:
            with storage.alone_in(self._cache):  # the cache may be shared with another application's process
                memory = self._memory()
                memory.setdefault(served.name, {})[served.alias] = asdict(known[-1])
                storage.write(str(path), json.dumps(memory, indent=2).encode())
        except OSError as error:
            raise BundleError(
                f"what is served cannot be written to {path}: {storage.reason(error)}; make room there, for a start "
                "without the registry would not find it"
            ) from None

    def tidy(self, model: ModelArgs, needed: Collection[str]) -> None:
        """Remove fetched bundles of a model that nobody has asked for since `UNUSED_S`; raises nothing.

        Args:
            needed: versions that must stay; so does what was served last by any alias.
        """
        from pipeline.tracking import fetched  # noqa: PLC0415

        if model.bundle is not None:
            return
        try:
            fetched.remove_abandoned(self._cache, model.name, UNUSED_S)
        except OSError as error:
            _log.warning("%s: what a download of %s has left is not removed: %s", self._cache, model.name, error)
        try:
            known = fetched.versions(self._cache, model.name)
            last = [said["version"] for said in self._read().get(model.name, {}).values()]
        except Exception as error:  # what was served last is not known, so nothing is removed
            _log.warning("%s: unused bundles are not removed: %s", self._cache, error)
            return
        for version in known:
            if version in {*needed, *last}:
                fetched.use(self._cache, model.name, version)
            else:
                self._remove(model.name, version)

    def _folder(self, path: Path) -> Bundle:
        """A folder's bundle, looked at again when its files change."""
        files = [path / name for name in (bundle.CARD, bundle.WEIGHTS)]
        key = (path, *(file.stat().st_mtime_ns if file.exists() else 0 for file in files))
        if key not in self._folders:
            others = {old: one for old, one in self._folders.items() if old[0] != path}
            self._folders = {**others, key: bundle.load(path)}
        return self._folders[key]

    def _registry(self, model: ModelArgs) -> str:
        if not self._uri:
            raise ConfigError(
                f"model '{model.name}' is to come from the registry, but there is none: "
                f"set 'registry' in the application's args, or {REGISTRY}"
            )
        return self._uri

    def _remove(self, name: str, version: str) -> None:
        from pipeline.tracking import fetched  # noqa: PLC0415

        try:
            with self._lock:  # nobody is told of it meanwhile
                if fetched.remove_unused(self._cache, name, version, UNUSED_S):
                    self._checked = {
                        key: held for key, held in self._checked.items() if (key.name, key.version) != (name, version)
                    }
                    _log.info("%s version %s: its bundle, which nobody needs any more, is removed", name, version)
        except OSError as error:
            _log.warning("%s version %s: its bundle, which nobody needs, is not removed: %s", name, version, error)

    def _memory(self) -> dict[str, Any]:
        try:
            found = self._read()
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read(self) -> Any:
        path = self._cache / MEMORY
        return json.loads(path.read_text()) if path.exists() else {}

    def _fetched(self, model: ModelArgs, alias: str, version: Any) -> Served:
        from pipeline.tracking import fetched  # noqa: PLC0415

        version = replace(version, aliases=())  # which change without it
        with self._lock:
            checked = self._checked.get(version)
            fetched.use(self._cache, version.name, version.version)
        return _served(model, version.version, alias, *(checked or self._fetch(version, model.load_share)))

    def _fetch(self, version: Any, share: float) -> tuple[Bundle, str | None]:
        """A version's bundle and link. Weights are hundreds of megabytes: looking at them once is enough."""
        from pipeline.tracking import registry  # noqa: PLC0415

        if self._pauses.holds(version):
            raise BundleError(self._unfetched[version])
        try:
            with throttled(share):
                found = registry.fetch(self._uri or "", version, self._cache)
        except BundleError as error:
            self._pauses.note(version)
            self._unfetched[version] = str(error)
            raise
        self._pauses.end(version)
        link = registry.run_url(self._uri or "", version)
        with self._lock:
            self._checked[version] = found, link
        return found, link


def settle_all(args: AppArgs) -> list[Served]:
    """What every model's alias means now or, while the registry is away, meant when it was last served.

    Raises:
        As `Versions.settle`.
    """
    versions = Versions(args)
    return [_settled(versions, model) for model in args.models]


def _settled(versions: Versions, model: ModelArgs) -> Served:
    try:
        return versions.settle(model, model.alias)
    except TrackingError as error:
        last = None if _is_refused(error) else versions.last(model, model.alias)
        if last is None:
            raise
        return last


def _is_refused(error: TrackingError) -> bool:
    """Whether the registry has answered, that there is no such thing."""
    from pipeline.tracking.connection import RefusedError  # noqa: PLC0415

    return isinstance(error, RefusedError)


def _served(model: ModelArgs, version: str, alias: str | None, found: Bundle, run_url: str | None = None) -> Served:
    return Served(
        name=model.name,
        version=version,
        alias=alias,
        bundle=found.path,
        num_classes=len(found.card.classes),
        task=found.card.task,
        weights=found.card.weights_sha256[:12],
        sleeps=model.autoscaling.min_replicas == 0,
        run_url=run_url,
        engine=str(found.card.engine),
    )
