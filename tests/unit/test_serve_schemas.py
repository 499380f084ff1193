"""The application's arguments: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config
from pipeline.errors import ConfigError
from serve.schemas import AppArgs

CONFIG = Path(__file__).parents[2] / "serve" / "config.yaml"


def parse(**args: Any) -> AppArgs:
    return config.parse(AppArgs, {"models": [{"name": "digits"}]} | args, "args")


def test_args_with_only_a_name_take_the_champion_and_one_replica() -> None:
    model = parse().models[0]
    assert (model.alias, model.bundle) == ("champion", None)
    assert (model.autoscaling.min_replicas, model.autoscaling.max_replicas) == (1, 1)


def test_args_of_the_committed_config_are_valid() -> None:
    document = yaml.safe_load(CONFIG.read_text())
    assert document["http_options"]["host"] == "127.0.0.1"
    for application in document["applications"]:
        assert application["import_path"] == "serve.app:build"
        assert config.parse(AppArgs, application["args"], str(CONFIG)).models


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "a/b"}, r"models\.0\.name"),
        ({"name": ""}, r"models\.0\.name"),
        ({"name": "a", "batch": {"max_size": 0}}, r"models\.0\.batch\.max_size: .*greater than or equal to 1, got 0"),
        ({"name": "a", "batch": {"max_size": "16"}}, r"models\.0\.batch\.max_size: .*integer"),
        ({"name": "a", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas 2 is smaller"),
        ({"name": "a", "autoscaling": {"max_replica": 2}}, r"models\.0\.autoscaling\.max_replica: unknown key"),
        ({"name": "a", "num_cpus": -1}, r"models\.0\.num_cpus"),
    ],
)
def test_args_with_an_impossible_model_are_refused_by_path(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(models=[model])


def test_args_without_models_or_with_a_name_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="models"):
        parse(models=[])
    with pytest.raises(ConfigError, match="two models are called digits"):
        parse(models=[{"name": "digits"}, {"name": "digits", "alias": "challenger"}])
    with pytest.raises(ConfigError, match="'stats' is a path of the Open Inference Protocol"):
        parse(models=[{"name": "stats"}])


def test_args_with_several_mistakes_report_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(ingress_replicas=0, limits={"max_body_bytes": 0}, cash="x")
    assert all(key in str(caught.value) for key in ("ingress_replicas", "limits.max_body_bytes", "cash"))
