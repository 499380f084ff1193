"""The registry: bundles under a name, numbered versions of it, and aliases such as `champion` that move between them.

A version holds the bundle and, around it, what `mlflow models serve` needs (`pipeline.tracking.pyfunc` and a copy of
the library's lower rooms). We ourselves only ever take the bundle back: `fetch` downloads no code and runs none.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.artifacts
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from pipeline import storage
from pipeline.config import nearest
from pipeline.errors import BundleError, ConfigError, TrackingError
from pipeline.inference import bundle, engine
from pipeline.inference.bundle import Bundle
from pipeline.tracking import connection, fetched, journal, runs
from pipeline.tracking.delivery import DIGEST_CHARS
from pipeline.tracking.predictions import PLAIN, identity
from pipeline.tracking.runs import Run
from pipeline.types import Task

CHAMPION = "champion"
DIGEST_TAG = "bundle_sha256"
REASON_TAG = "promotion"
"""With `.<alias>` behind it, the tag of a version that says when and why it was given that alias."""
NO_GATE = "no gate was asked"
MODEL_CODE = Path(__file__).with_name("pyfunc.py")
LIBRARY = Path(__file__).resolve().parents[1]
ABOVE = ("tracking", "evaluation", "explain", "training", "benchmark", "__pycache__", "README.md")
"""Rooms that the predictor cannot need, for they stand above it; they are not copied into a version."""

REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "simplejpeg",
    "pydantic",
    "pyyaml",
    "safetensors",
)
PROPOSES = "opencv-contrib-python-headless"  # for a model that judges regions
_IMAGE = Schema([ColSpec(DataType.binary, "image")])
_RANKED = [ColSpec(Array(DataType.string), "labels"), ColSpec(Array(DataType.double), "scores")]
SIGNATURES: dict[Task, ModelSignature] = {
    "classification": ModelSignature(_IMAGE, Schema(_RANKED), ParamSchema([ParamSpec("top_k", DataType.long, 5)])),
    "detection": ModelSignature(
        _IMAGE,
        Schema([*_RANKED, ColSpec(Array(Array(DataType.double)), "boxes")]),
        ParamSchema([ParamSpec("score_threshold", DataType.double, 0.25)]),
    ),
}

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a registered model may be called; it becomes a folder's name too."""
ALIAS = r"^[A-Za-z][A-Za-z0-9_-]*$"
"""What an alias may look like; words that read like versions are refused beside it."""
_OF_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_NAME = re.compile(NAME)
_ALIAS = re.compile(r"(?!(\d+|v\d+|latest)$)[a-z0-9][a-z0-9_-]*", re.IGNORECASE)  # MLflow itself takes digits
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True, slots=True)
class Version:
    """One registered version of a model.

    Attributes:
        version: its number, as text.
        run_id: the run that made it.
        source: where MLflow keeps it, for people.
        digest: sha256 over the bundle's files, as registered.
        aliases: those that pointed to it when it was asked for, sorted.
        weights_sha256: checksum of its weights; "" where it was not registered by this project.
        engine: that computes it.
    """

    name: str
    version: str
    run_id: str
    source: str
    digest: str
    aliases: tuple[str, ...] = ()
    weights_sha256: str = ""
    engine: str = PLAIN

    @property
    def identity(self) -> str:
        """By which evaluations name it; "" where it was not registered by this project."""
        return identity(self.weights_sha256, self.engine)


def publish(run: Run, made: Bundle, name: str) -> Version:
    """Register a bundle as the next version of `name`, with its figures; no alias moves.

    The version's tags carry the checksums and the card's provenance. If the provenance names a `dataset` and its
    `dataset_digest`, the figures `val/...` are tied to them, so that MLflow can rank models on exactly one evaluation
    set; its name is that of the run's input (`mnist/val`).

    Raises:
        ConfigError: the name does not suit, or the bundle's engine is not installed here, so that no version of it can
            be asked for where the model is served.
        TrackingError: the server does not answer, or refuses. No version exists then.
    """
    engine.check_installed(made.card.engine)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"model name '{name}': expected letters, digits, '.', '_' or '-', beginning with the former")
    connection.check(run.uri)
    tags = {
        **made.card.provenance,
        "weights_sha256": made.card.weights_sha256,
        "engine": str(made.card.engine),
        DIGEST_TAG: bundle.digest(made.path),
    }
    with connection.answers(run.uri) as client:
        logged = client.create_logged_model(run.experiment_id, name, run.id, tags, model_type=made.card.task)
        try:
            _upload(client, logged.model_id, run.id, made)
            _log_metrics(client, logged.model_id, run.id, made)
        except BaseException:
            with suppress(MlflowException):  # the server may be what failed
                client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        _create_model(client, name)
        source = f"models:/{logged.model_id}"
        return _version(
            client.create_model_version(name, source, run.id, tags, await_creation_for=0, model_id=logged.model_id)
        )


def published(uri: str, made: Bundle, name: str, where: str) -> Version | None:
    """The version of `name` that has just these weights and engine, if there is one; of several the newest.

    Args:
        where: what else holds of it, as MLflow's searches have it.

    Raises:
        TrackingError: the server does not answer.
    """
    connection.check(uri)
    model = identity(made.card.weights_sha256, str(made.card.engine))
    with connection.answers(uri) as client:
        found = map(
            _version, client.search_model_versions(f"name = '{name}' and {where}", order_by=["version_number DESC"])
        )
        return next((version for version in found if version.identity == model), None)


def promote(uri: str, name: str, version: str, alias: str = CHAMPION, reason: str = NO_GATE) -> Version:
    """Point an alias of `name` to a version; whoever resolves it from now on gets that one. `gate.promote` asks first.

    Time and reason are written to the version's tag `promotion.<alias>` before, so that no alias moves without.

    Raises:
        ConfigError: the alias could be mistaken for a version.
        TrackingError: there is no such version, or the server does not answer.
    """
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(
            f"alias '{alias}': expected letters, digits, '_' or '-', and no number, 'v1' or 'latest', "
            "which read like versions"
        )
    found = resolve(uri, f"{name}/{version}")
    with connection.answers(uri) as client:
        told = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {reason}"
        client.set_model_version_tag(name, found.version, f"{REASON_TAG}.{alias}", told)
        client.set_registered_model_alias(name, alias, found.version)
    return resolve(uri, f"{name}/{version}")


def holder(uri: str, name: str, alias: str) -> Version | None:
    """The version that an alias points to now, None where it points to none.

    Raises:
        TrackingError: there is no such model, or the server does not answer.
    """
    connection.check(uri)
    with connection.answers(uri) as client:
        try:
            held = client.get_registered_model(name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise connection.RefusedError(f"{uri}: {_missing(client, name, alias, None)}") from None
    return None if held is None else resolve(uri, f"{name}/{held}")


def resolve(uri: str, reference: str) -> Version:
    """The version that `name@alias` or `name/3` means now, with or without `models:/` before it.

    Raises:
        ConfigError: the reference is of neither form.
        RefusedError: there is no such model, alias or version; the message names those that exist.
        TrackingError: the server does not answer.
    """
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise ConfigError(f"model reference '{reference}': expected name@alias or name/3")
    name, alias, version = parts["name"], parts["alias"], parts["version"]
    connection.check(uri)
    with connection.answers(uri) as client:
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            raise connection.RefusedError(f"{uri}: {_missing(client, name, alias, version)}") from None
        return _version(found)


def fetch(uri: str, version: Version, destination: Path) -> Bundle:
    """The bundle of a version, under `destination/<name>/<version>`, where it stays for the next call.

    Only the bundle's own files are downloaded. They appear whole or not at all, also when several processes fetch the
    same version, and with a receipt (`pipeline.tracking.fetched`). A copy that is whole needs no server.

    Raises:
        BundleError: what was stored is not what was registered, or there is no room for it here; nothing is left of it.
        TrackingError: the server does not answer, or the version holds no bundle.
    """
    if not (_NAME.fullmatch(version.name) and version.version.isdigit()):
        raise ConfigError(f"'{version.name}' version '{version.version}' cannot be a folder's name")
    path = destination / version.name / version.version
    fetched.use(destination, version.name, version.version)
    if _is_whole(path, version.digest):
        return bundle.load(path)
    connection.check(uri)
    try:
        with fetched.partial(destination, version.name, version.version) as partial:
            downloaded = _download(uri, version, partial)
            fetched.note(destination, version.name, version.version, version.digest)
            _replace(path, downloaded, version.digest)
    except OSError as error:
        raise BundleError(
            f"the bundle of {version.name} version {version.version} cannot be kept in {destination}: "
            f"{storage.reason(error)}; make room there, or let it be written to"
        ) from None
    return bundle.load(path)


def run_url(uri: str, version: Version) -> str | None:
    """The page of the run that made a version, for a person; None where MLflow does not tell of such a run.

    A name and a password in the server's address are left out, for the link is shown to others.
    """
    try:
        parts = urlsplit(runs.attach(uri, version.run_id).url)
    except TrackingError:
        return None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def save(made: Bundle, path: Path, mlflow_model: Model | None = None) -> None:
    """Write the bundle as an MLflow model to a new folder, which `mlflow models serve` runs."""
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        shutil.copytree(LIBRARY, staging / "pipeline", ignore=shutil.ignore_patterns(*ABOVE))
        shutil.copytree(made.path, staging / "bundle")
        shutil.copy(MODEL_CODE, staging)
        with _quiet():
            mlflow.pyfunc.save_model(
                path,
                python_model=staging / MODEL_CODE.name,
                code_paths=[str(staging / "pipeline")],
                artifacts={"bundle": str(staging / "bundle")},
                signature=SIGNATURES[made.card.task],
                pip_requirements=_requirements(made),
                model_config={"device": "cpu"},
                mlflow_model=mlflow_model,
            )
        for cache in path.rglob("__pycache__"):
            shutil.rmtree(cache)


def _upload(client: MlflowClient, model_id: str, run_id: str, made: Bundle) -> None:
    """Store the bundle as an MLflow model: what `log_model` does, without its global state."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        save(made, path, Model(run_id=run_id, model_id=model_id, model_uuid=model_id))
        client.log_model_artifacts(model_id, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MLflow's advice about input examples and pip's version: both are left out on purpose."""
    logger = logging.getLogger("mlflow.utils.environment")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\.pyfunc")
            yield
    finally:
        logger.setLevel(before)


def _requirements(made: Bundle) -> list[str]:
    proposes = (PROPOSES,) if made.card.model.needs_proposals else ()
    return [_pinned(package) for package in (*REQUIREMENTS, *proposes, *made.card.engine.packages)]


def _pinned(package: str) -> str:
    # Without a local part such as +cpu, which no index knows.
    return f"{package}=={metadata.version(package).partition('+')[0]}"


def _log_metrics(client: MlflowClient, model_id: str, run_id: str, made: Bundle) -> None:
    dataset, content = made.card.provenance.get("dataset"), made.card.provenance.get("dataset_digest")
    known = (journal.input_name(dataset, "val"), content[:DIGEST_CHARS]) if dataset and content else (None, None)
    now_ms = time.time_ns() // 1_000_000
    metrics = []
    for key, value in made.card.metrics.items():
        if math.isfinite(value):
            measured_on = known if key.startswith("val/") else (None, None)
            # Under names of their own: the run's curves must not get a second point at step 0.
            metrics.append(Metric(f"model/{key}", value, now_ms, 0, model_id, *measured_on, run_id))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    client.log_batch(run_id, metrics=metrics)


def _create_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version(found: Any) -> Version:
    tags: Mapping[str, str] = found.tags
    aliases = tuple(sorted(found.aliases))
    return Version(
        name=found.name,
        version=str(found.version),
        run_id=found.run_id or "",
        source=found.source,
        digest=tags.get(DIGEST_TAG, ""),
        aliases=aliases,
        weights_sha256=tags.get("weights_sha256", ""),
        engine=tags.get("engine", PLAIN),
    )


def _missing(client: MlflowClient, name: str, alias: str | None, version: str | None) -> str:
    """Say which part of a reference does not exist, and what does."""
    names = sorted(model.name for model in client.search_registered_models(max_results=1000))
    if name not in names:
        return f"no model '{name}' is registered; {nearest(name, names) if names else 'none is'}"
    if alias is not None:
        known = sorted(client.get_registered_model(name).aliases)
        return f"model '{name}' has no alias '{alias}'; {nearest(alias, known) if known else 'it has none'}"
    versions = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
    return f"model '{name}' has no version {version}; it has: {', '.join(map(str, versions)) or 'none'}"


def _download(uri: str, version: Version, folder: Path) -> Path:
    """Download a version's bundle into `folder` and compare it with what was registered."""
    where = f"{uri}: {version.name}/{version.version}"
    if not version.digest:
        raise TrackingError(f"{where} was not registered by this project: it has no tag {DIGEST_TAG}")
    with connection.answers(uri) as client:
        stored = client.get_model_version_download_uri(version.name, version.version)
        try:
            mlflow.artifacts.download_artifacts(
                f"{stored}/artifacts/bundle", dst_path=str(folder), tracking_uri=uri, registry_uri=uri
            )
        except MlflowException as error:
            raise _of_disk(error) or error from None
    downloaded = folder / "bundle"
    found = bundle.digest(downloaded)
    if found != version.digest:
        raise BundleError(
            f"{where}: the stored bundle is not the registered one (expected sha256 {version.digest[:12]}, got "
            f"{found[:12]}); register the model again"
        )
    return downloaded


def _of_disk(error: MlflowException) -> OSError | None:
    """The error of a disk on this side, which MLflow tells as text among others'."""
    found = re.search(r"\[Errno (\d+)\]", str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in _OF_DISK else None


def _is_whole(path: Path, expected: str) -> bool:
    try:
        return path.is_dir() and bundle.digest(path) == expected
    except FileNotFoundError:  # it is just being removed
        return False


def _replace(path: Path, source: Path, expected: str) -> None:
    """Move a whole bundle to `path`, over a damaged one; another process may have been first."""
    try:
        source.rename(path)
    except OSError:
        if bundle.digest(path) == expected:
            return
        shutil.rmtree(path)
        source.rename(path)
