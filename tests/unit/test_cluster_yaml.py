"""cluster.yaml, as far as it can be known without a cloud: Ray's own validator, and what our jobs rely on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]  # comes with Ray
import pytest
import yaml
from mlflow.cli import server as mlflow_server
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from jobs import _stack

ROOT = Path(__file__).parents[2]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
LOCAL_SWITCHES = {  # nobody else calls a local endpoint; on a cluster a request under way must be let finish
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
}


@pytest.fixture
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.fixture
def prepared(raw: dict[str, Any]) -> dict[str, Any]:
    """What the launcher makes of it: defaults filled in, common setup put before that of each kind of node."""
    config: dict[str, Any] = prepare_config(raw)
    return config


def command(config: dict[str, Any], key: str, words: str) -> str:
    """The one command of a list that holds some words."""
    (found,) = [line for line in config[key] if words in line]
    return str(found)


def exported(line: str) -> dict[str, str]:
    """The variables that a command exports."""
    exports = re.findall(r"\bexport ((?:\w+=(?:\$\([^)]*\)|[^\s;])+ ?)+)", line)
    pairs = re.findall(r"(\w+)=((?:\$\([^)]*\)|[^\s;])+)", " ".join(exports))
    return dict(pairs)


def unknown_options(line: str, program: str, known: click.Command) -> set[str]:
    """The options that a command line gives a program and that it does not have."""
    given = re.findall(r"(?<!\S)(--[a-z-]+)", line.split(program, 1)[1])
    assert given
    return set(given) - {option for parameter in known.params for option in parameter.opts}


def test_cluster_file_passes_ray_own_validator(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_cluster_file_with_an_unknown_key_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_machines"):
        validate_config(prepare_config(raw | {"max_machines": 3}))


def test_cluster_file_with_half_a_processor_is_refused(raw: dict[str, Any]) -> None:
    raw["available_node_types"]["ingest"]["resources"]["CPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match=r"0\.5"):
        validate_config(prepare_config(raw))


def test_cluster_file_with_more_least_workers_than_workers_is_refused(raw: dict[str, Any]) -> None:
    raw["available_node_types"]["ingest"]["min_workers"] = raw["max_workers"] + 1
    with pytest.raises(ValueError, match="smaller than the sum of `min_workers`"):
        validate_config(prepare_config(raw))


def test_bounds_of_the_workers_agree_with_the_whole(prepared: dict[str, Any]) -> None:
    workers = [kind for name, kind in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    assert len(workers) == 2
    assert all(0 <= kind["min_workers"] < kind["max_workers"] for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) == prepared["max_workers"]


def test_kinds_of_node_are_labelled_and_only_training_has_gpus(prepared: dict[str, Any]) -> None:
    kinds = prepared["available_node_types"]
    assert {name: kind["labels"] for name, kind in kinds.items()} == {name: {"role": name} for name in kinds}
    for kind in kinds.values():
        validate_node_labels(kind["labels"])
    assert set(kinds) == {"head", "ingest", "training"}
    assert [name for name, kind in kinds.items() if kind["resources"].get("GPU")] == ["training"]
    assert kinds["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("key", STARTS)
def test_start_command_asks_for_the_mounted_token(prepared: dict[str, Any], key: str) -> None:
    variables = exported(command(prepared, key, "ray start"))
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_AUTH_TOKEN_PATH"].replace("$HOME", "~") in prepared["file_mounts"]


@pytest.mark.parametrize("key", STARTS)
def test_start_command_sets_the_switches_of_a_local_head(prepared: dict[str, Any], key: str) -> None:
    line = command(prepared, key, "ray start")
    variables = {name: value for name, value in exported(line).items() if name in _stack.RAY_ENV}
    assert variables == {name: value for name, value in _stack.RAY_ENV.items() if name not in LOCAL_SWITCHES}
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert line.startswith("ulimit -n 65536;")


def test_start_commands_agree_on_storage_and_on_the_tracking_server(prepared: dict[str, Any]) -> None:
    head, worker = (exported(command(prepared, key, "ray start")) for key in STARTS)
    different = {name for name in head | worker if head.get(name) != worker.get(name)}
    assert different == {"MLFLOW_TRACKING_URI"}
    assert head["MLFLOW_TRACKING_URI"].endswith(":5000")
    assert worker["MLFLOW_TRACKING_URI"] == "http://$RAY_HEAD_IP:5000"
    mount = command(prepared, "worker_setup_commands", "mount -t nfs4")
    assert head["VENTRAL_STORAGE"] in mount


def test_tracking_server_has_allowed_hosts_and_no_address_for_everyone(prepared: dict[str, Any]) -> None:
    line = command(prepared, "head_start_ray_commands", "mlflow server")
    assert "--host=$ADDRESS " in line
    assert "--allowed-hosts=$ADDRESS:5000," in line
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    assert unknown_options(line, "mlflow server", mlflow_server) == set()


@pytest.mark.parametrize("key", STARTS)
def test_start_command_gives_ray_options_that_it_has(prepared: dict[str, Any], key: str) -> None:
    assert unknown_options(command(prepared, key, "ray start"), "ray start", ray_start) == set()


@pytest.mark.parametrize("key", ["head_setup_commands", "worker_setup_commands"])
def test_every_node_installs_the_pinned_requirements(prepared: dict[str, Any], key: str) -> None:
    assert command(prepared, key, "pip install --quiet -r ~/requirements.lock")
    assert prepared["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all("==" in line for line in lines)
    assert any(line.startswith("ray==2.60.") for line in lines)


def test_commands_are_sound_shell(prepared: dict[str, Any]) -> None:
    for key in (*STARTS, "head_setup_commands", "worker_setup_commands"):
        for line in prepared[key]:
            subprocess.run(["bash", "-n", "-c", f"({line})"], check=True)  # in parentheses, as the launcher runs it
