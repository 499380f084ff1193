"""The serving benchmark: this project's endpoint and its peers, with one model and the same JPEGs, round after round.

All servers are started at the beginning, and one at a time is pressed (`serving_block`) while the others are halted.
Peers come as their documentation shows them, with torchvision's fp32 network, and given this project's bundle and
predictor, so that what the model gains and what the serving gains can be told apart (`servers`). How servers are
started is the door's business; what comes out is in `serving_report`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, PositiveInt

from pipeline.benchmark import rounds, serving_block, serving_model
from pipeline.benchmark.machine import Halted
from pipeline.benchmark.rounds import Say
from pipeline.benchmark.servers.classifier import Form
from pipeline.benchmark.serving_block import Address, Block, Wire
from pipeline.benchmark.serving_model import Bare, BareTask
from pipeline.benchmark.serving_report import DOCUMENTED, GIVEN, NULL, OURS, Group, Report, Round
from pipeline.config import Strict, nearest
from pipeline.data.datasets import AnyDataset
from pipeline.errors import ConfigError
from pipeline.inference.engine import PLAIN, Engine


class Server(NamedTuple):
    """One line of the table: a file of `servers` and what it takes.

    Attributes:
        wire: how a JPEG is sent, to `path`.
        health: the path that answers as soon as the model is loaded.
        needs: package that must be installed.
    """

    module: str
    group: Group
    wire: Wire = "jpeg"
    path: str = "/predict"
    health: str = "/health"
    needs: str | None = None


SERVERS = {
    NULL: Server("null", "limit"),
    OURS: Server("ventral", "own", path="/predict/alexnet"),
    "FastAPI, as documented": Server("fastapi", "documented"),
    "LitServe, as documented": Server("litserve", "documented", needs="litserve"),
    "BentoML, as documented": Server("bentoml", "documented", "multipart", health="/readyz", needs="bentoml"),
    "MLflow, as documented": Server("mlflow", "documented", "base64", "/invocations", "/ping"),
    "Ray Serve, as documented": Server("ray_serve", "documented", path="/one_by_one"),
    "Ray Serve @batch, as documented": Server("ray_serve", "documented", path="/in_batches"),
    "FastAPI, our model": Server("fastapi", "given"),
    "LitServe, our model": Server("litserve", "given", needs="litserve"),
    "BentoML, our model": Server("bentoml", "given", "multipart", health="/readyz", needs="bentoml"),
    "MLflow, our model": Server("mlflow", "given", "base64", "/invocations", "/ping"),
    "Ray Serve @batch, our model": Server("ray_serve", "given", path="/given_in_batches"),
}


class Config(Strict):
    """What is measured.

    Attributes:
        sources: photos in class folders; where none is here, scikit-learn's sample images take their place.
        num_pictures: different JPEGs, of about `picture_bytes`.
        weights: a state dict of torchvision's AlexNet; where it is not here, weights are drawn with `seed`.
        engine: of the bundle that this project and the peers given our model serve, as `jobs.optimize` finds it.
        deployment: keys of the model in `serve/config.yaml`, over what is there.
        clients: at once.
        seconds: that each of these is timed in each round, after `warm_up_s`.
        rounds: blocks of each server.
        only: servers that are measured; all by default.
        peers_python: interpreters of the peers that cannot live beside this project, by the name of their package.
        quiet_share: of the machine's CPU time, that other processes may take before it is called busy.
    """

    sources: tuple[AnyDataset, ...] = ()
    num_pictures: int = Field(default=64, ge=1)
    picture_bytes: int = Field(default=46_000, ge=1000)
    weights: Path | None = None
    seed: int = Field(default=0, ge=0)
    engine: Engine = PLAIN
    deployment: dict[str, Any] = Field(default_factory=dict)
    clients: tuple[PositiveInt, ...] = Field(default=(1, 16, 64), min_length=1)
    seconds: float = Field(default=2.5, gt=0)
    warm_up_s: float = Field(default=0.3, ge=0)
    rounds: int = Field(default=3, ge=1)
    only: tuple[str, ...] = tuple(SERVERS)
    peers_python: dict[str, Path] = Field(default_factory=dict)
    quiet_share: float = Field(default=0.1, ge=0, le=1)

    def at(self, data_root: Path) -> Config:
        """The same with the weights below a folder."""
        return self.model_copy(update={"weights": None if self.weights is None else data_root / self.weights})


Start = Callable[[Sequence[str], Path], Mapping[str, Address]]
"""Starts servers by name, all with the model in a folder; who gives it stops them."""


def run(config: Config, scratch: Path, start: Start, say: Say = lambda line: None) -> Report:
    """Prepare the model and the pictures, have all servers started, press them in turn.

    Raises:
        ConfigError: a server is unknown, or an interpreter is not there.
        DataError: a block failed, or an answer names no class.
    """
    names, missing = _chosen(config)
    before = os.getloadavg()[0]
    with rounds.workspace(scratch) as folder:
        pictures = serving_model.draw(folder / "pictures", config.sources, config.num_pictures, config.picture_bytes)
        weights = config.weights if config.weights is not None and config.weights.exists() else None
        said = serving_model.prepare(folder / "model", folder / "pictures", weights, config.engine, config.seed)
        say(f"prepare  {said}; {pictures}")
        addresses = start(names, folder / "model")
        found = _rounds(config, addresses, folder, say)
    facts = rounds.facts(config, config.quiet_share, before)
    facts["versions"] |= _versions(config, names)
    groups = {name: SERVERS[name].group for name in names}
    return Report(**facts, weights=said, pictures=pictures, groups=groups, rounds=found, missing=missing)


def _chosen(config: Config) -> tuple[list[str], dict[str, str]]:
    """The servers that can run, and the package that each other one lacks."""
    for name in config.only:
        if name not in SERVERS:
            raise ConfigError(f"unknown server '{name}'; {nearest(name, list(SERVERS))}")
    for peer, python in config.peers_python.items():
        if not python.exists():
            raise ConfigError(f"peers_python.{peer}: there is no interpreter {python}")
    here = [name for name in config.only if _is_here(SERVERS[name], config)]
    return here, {name: SERVERS[name].needs or "" for name in config.only if name not in here}


def _is_here(server: Server, config: Config) -> bool:
    return server.needs is None or server.needs in config.peers_python or bool(importlib.util.find_spec(server.needs))


def _rounds(config: Config, addresses: Mapping[str, Address], folder: Path, say: Say) -> tuple[Round, ...]:
    def measure(name: str, number: str) -> Block | Bare:
        halted.all_but(name)
        found = _bare(config, name, folder) if name in (DOCUMENTED, GIVEN) else _press(config, name, addresses, folder)
        say(f"round {number}  {name}: {_shown(found)}")
        return found

    with Halted({name: address.roots for name, address in addresses.items()}) as halted:
        made = rounds.take_turns([*addresses, DOCUMENTED, GIVEN], config.rounds, measure)
    return tuple(
        Round(
            blocks={name: block for name, block in found.items() if isinstance(block, Block)},
            bare={name: bare for name, bare in found.items() if isinstance(bare, Bare)},
        )
        for found in made
    )


def _press(config: Config, name: str, addresses: Mapping[str, Address], folder: Path) -> Block:
    task = serving_block.Task(
        name=name,
        address=addresses[name],
        pictures=folder / "pictures",
        clients=config.clients,
        seconds=min(config.seconds, 1.0) if name == NULL else config.seconds,
        warm_up_s=config.warm_up_s,
    )
    found = rounds.in_process(serving_block.main, task, Block, folder)
    assert found is not None
    return found


def _bare(config: Config, name: str, folder: Path) -> Bare:
    form: Form = "given" if name == GIVEN else "documented"
    task = BareTask(form=form, model=folder / "model", pictures=folder / "pictures", seconds=config.seconds / 2)
    found = rounds.in_process(serving_model.main, task, Bare, folder)
    assert found is not None
    return found


def _shown(found: Block | Bare) -> str:
    if isinstance(found, Bare):
        return f"{found.whole_per_s:.0f} images/s"
    return ", ".join(f"{level.requests_per_s:.0f} requests/s at {clients}" for clients, level in found.levels.items())


def _versions(config: Config, names: Sequence[str]) -> dict[str, str]:
    """Of the peers' packages, each as its own interpreter has it."""
    needed = {SERVERS[name].needs for name in names} | {"fastapi", "uvicorn"}
    return {name: _version(name, config.peers_python.get(name)) for name in sorted(filter(None, needed))}


def _version(package: str, python: Path | None) -> str:
    if python is None:
        return importlib.metadata.version(package)
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    ended = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return ended.stdout.strip() or "unknown"
