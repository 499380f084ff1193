"""Starts what the serving benchmark presses: this project's endpoint as `make up` deploys it, and its peers.

Each peer is a process of its own, of another interpreter where it is told one; Ray Serve's two ways share a head with
Ray's own defaults. All listen on loopback, on free ports, and end with the stack.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from jobs import _deploy
from jobs._process import LOOPBACK, Service, answers, free_ports
from jobs._stack import MLFLOW_ENV, Stack, start
from pipeline.benchmark import serving
from pipeline.benchmark.rounds import Say
from pipeline.benchmark.serving import SERVERS, Config, Server
from pipeline.benchmark.serving_block import Address
from pipeline.benchmark.serving_report import Report
from pipeline.errors import ClusterError

NUM_CPUS = 4  # of each Ray head, as `make up` has them at least
DEFAULTS = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
"""Ray's own, which our heads depart from."""
FOLDER = "VENTRAL_PEER_FOLDER"
BENTOML = {"documented": "AsDocumented", "given": "WithOurs"}
TIMEOUT_S = 300.0


def measure(config: Config, storage: Path, scratch: Path, say: Say) -> Report:
    """Start the servers, press them, and stop them whatever happens.

    Raises:
        ClusterError: one did not start.
        VentralError: as `serving.run`.
    """
    with Stack(storage) as stack:
        return serving.run(config, scratch, partial(start_all, stack, config, say), say)


def start_all(stack: Stack, config: Config, say: Say, names: Sequence[str], model: Path) -> dict[str, Address]:
    """The addresses of servers, once they answer.

    Raises:
        ClusterError: one did not start.
    """
    found = dict[str, Address]()
    on_ray = [name for name in names if SERVERS[name].module == "ray_serve"]
    for name in names:
        if name not in found:
            say(f"start    {name}")
        if SERVERS[name].module == "ventral":
            found[name] = _own(stack, config, SERVERS[name], model)
        elif name in on_ray:
            found |= {} if name in found else _ray_serve(stack, on_ray, model)
        else:
            found[name] = _peer(stack, config, name, model)
    return {name: found[name] for name in names}


def _own(stack: Stack, config: Config, server: Server, model: Path) -> Address:
    """The endpoint of `serve/config.yaml`, with one model from a folder."""
    wanted: dict[str, Any] = yaml.safe_load(_deploy.CONFIG.read_text())
    args = wanted["applications"][0]["args"]
    name = server.path.rpartition("/")[2]
    args["models"] = [args["models"][0] | {"name": name, "bundle": str(model / "bundle")} | config.deployment]
    head = stack.ray(num_cpus=NUM_CPUS)
    return _address(server, _deploy.deploy(head, wanted), head)


def _ray_serve(stack: Stack, names: Sequence[str], model: Path) -> dict[str, Address]:
    head = stack.ray(num_cpus=NUM_CPUS, env=DEFAULTS)
    applications = [
        {
            "name": SERVERS[name].path[1:],
            "route_prefix": SERVERS[name].path,
            "import_path": f"pipeline.benchmark.servers.ray_serve:{SERVERS[name].path[1:].removeprefix('given_')}",
            "args": {"form": SERVERS[name].group, "folder": str(model)},
        }
        for name in names
    ]
    url = _deploy.deploy(head, {"proxy_location": "HeadOnly", "applications": applications})
    return {name: _address(SERVERS[name], url, head) for name in names}


def _peer(stack: Stack, config: Config, name: str, model: Path) -> Address:
    server, (port,) = SERVERS[name], free_ports(1)
    python = str(config.peers_python.get(server.module, Path(sys.executable)))
    url, log = f"http://{LOOPBACK}:{port}", stack.storage / "logs" / f"{server.module}-{server.group}.log"
    draft = Service(name, 0, 0.0, url, log.resolve())
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # MLflow calls uvicorn by name
    env = {**os.environ, **MLFLOW_ENV, "PATH": path, FOLDER: str(model), "BENTOML_DO_NOT_TRACK": "True"}
    ready = partial(answers, f"{url}{server.health}")
    command = [python, "-m", *_command(server, model, port)]
    return _address(server, url, stack.add(partial(start, draft, command, env, ready, TIMEOUT_S, ClusterError)))


def _command(server: Server, model: Path, port: int) -> list[str]:
    module, where = f"pipeline.benchmark.servers.{server.module}", ["--host", LOOPBACK, "--port", str(port)]
    if server.module == "bentoml":
        return ["bentoml", "serve", f"{module}:{BENTOML[server.group]}", *where]
    return [module, "--form", server.group, "--folder", str(model), *where]


def _address(server: Server, url: str, service: Service) -> Address:
    at = urlsplit(url)
    assert at.hostname is not None
    assert at.port is not None
    return Address(host=at.hostname, port=at.port, path=server.path, wire=server.wire, roots=(service.pid,))
