"""The ingress over real replicas on no Ray at all: two small models, each as `serve.deployments` has it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI

from pipeline import models
from pipeline.inference import bundle
from serve.deployments import Replica
from serve.gate import Gate
from serve.ingress import application
from serve.roster import Roster, Standing
from serve.schemas import AppArgs, Limits, ModelArgs, Refused, Served, Told, Wanted
from serve.versions import settle_all
from tests import small_detection

T = TypeVar("T")


class Replicas:
    """Answers as replicas do, on an event loop of their own, as theirs is in another process."""

    def __init__(self, args: AppArgs) -> None:
        self.served = settle_all(args)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        made = zip(self.served, args.models, strict=True)
        self.replicas = {served.name: Replica(served, model) for served, model in made}

    async def predict(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        return await self._there(self.replicas[served.name].predict(images, wanted))

    async def ready(self, served: Served) -> bool:
        return await self._there(self.replicas[served.name].ready())

    async def _there(self, asked: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self.loop))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@contextmanager
def real_application(folder: Path, **limits: Any) -> Iterator[FastAPI]:
    """A LeNet-5 called tiny and a detector called boxes, neither of which has learnt anything."""
    torch.manual_seed(7)
    config = models.config_of("lenet5")(name="lenet5", num_classes=10)
    digits = bundle.save(folder / "tiny", models.build(config), config, classes=tuple(map(str, range(10))))
    boxes = small_detection.untaught(folder / "boxes", small_detection.CLASSES)
    named = (ModelArgs(name="tiny", bundle=digits.path), ModelArgs(name="boxes", bundle=boxes.path))
    replicas = Replicas(AppArgs(models=named))
    roster = Roster.of([Standing(served.name, served) for served in replicas.served])
    yield application(Gate(roster, Limits(**limits), replicas))
    replicas.close()
