"""From names to versions to bundles: local folders, and aliases in a real registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs._process import Service
from pipeline import config, models
from pipeline.errors import BundleError, ConfigError, TrackingError
from pipeline.inference import bundle
from pipeline.tracking import registry, runs
from serve import versions
from serve.schemas import AppArgs


def make_bundle(path: Path, seed: int) -> bundle.Bundle:
    torch.manual_seed(seed)
    architecture = models.config_of("lenet5")(name="lenet5", num_classes=3)
    return bundle.save(path, models.build_classifier(architecture), architecture, classes=("a", "b", "c"))


def args(*served: dict[str, Any], **more: Any) -> AppArgs:
    return config.parse(AppArgs, {"models": list(served)} | more, "args")


def test_settle_all_of_an_alias_settles_its_version_until_it_is_asked_again(
    mlflow_server: Service, tmp_path: Path
) -> None:
    uri = mlflow_server.address
    with runs.start(uri, runs.Config(experiment="reconciler"), params={}, tags={}) as run:
        made = [registry.publish(run, make_bundle(tmp_path / str(seed), seed), "reconciled") for seed in (1, 2)]
    wanted = args({"name": "reconciled"}, registry=uri, cache=str(tmp_path / "cache"))
    for version, seed in zip(made, (1, 2), strict=True):
        registry.promote(uri, "reconciled", version.version)
        (served,) = versions.settle_all(wanted)
        assert (served.name, served.version, served.alias) == ("reconciled", version.version, "champion")
        assert (served.num_classes, served.run_url) == (3, run.url)
        assert bundle.load(served.bundle).card == bundle.load(tmp_path / str(seed)).card
        assert served.bundle.is_relative_to(tmp_path / "cache")


def test_link_to_a_run_gives_no_password_away_and_none_is_made_up(mlflow_server: Service, tmp_path: Path) -> None:
    uri = mlflow_server.address
    with runs.start(uri, runs.Config(experiment="reconciler"), params={}, tags={}) as run:
        version = registry.publish(run, make_bundle(tmp_path / "made", 5), "linked")
    assert registry.run_url(uri.replace("//", "//me:secret@"), version) == run.url
    assert registry.run_url(uri, replace(version, run_id="0" * 32)) is None
    assert registry.run_url(uri, replace(version, run_id="")) is None


def test_settle_all_of_an_unknown_model_says_which_are_known(mlflow_server: Service, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no model 'nobody' is registered"):
        versions.settle_all(args({"name": "nobody"}, registry=mlflow_server.address, cache=str(tmp_path)))


def test_settle_all_without_a_registry_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="model 'digits' is to come from the registry, but there is none: set"):
        versions.settle_all(args({"name": "digits"}))


def test_settle_all_of_a_folder_needs_no_registry_and_takes_the_weights_checksum_for_a_version(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "made", 3)
    (served,) = versions.settle_all(args({"name": "local", "bundle": str(made.path)}))
    assert (served.version, served.alias, served.run_url) == (made.card.weights_sha256[:12], None, None)
    assert served.bundle == made.path


def test_settle_all_of_a_damaged_folder_deploys_nothing(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "made", 4)
    weights = made.path / bundle.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="sha256 differs"):
        versions.settle_all(args({"name": "local", "bundle": str(made.path)}))
