"""What Ray Serve makes of the ingress and of the reconciler: two deployments that tell each other what is served.

    Minder (one) ── roster, handles ──► Endpoint (one or more) ── images ──► replicas of versions

Neither holds a model. An endpoint keeps its last roster while the minder is away, and of one that is started anew what
it was told of a model until the minder serves that model again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

import ray.serve
from fastapi import FastAPI
from ray.serve.exceptions import DeploymentUnavailableError

from serve import scrape
from serve.gate import Gate
from serve.ingress import application
from serve.keys import Access
from serve.metrics import RayMeter
from serve.process import load_no_code
from serve.roster import Roster, Standing
from serve.schemas import AppArgs, Refused, Served, Told, Wanted
from serve.watching import Watch

GREET_S = 10.0
PAUSE_S = 1.0
_log = logging.getLogger("ray.serve")


class Minder:
    """The deployment that follows the registry."""

    def __init__(self, args: AppArgs) -> None:
        from serve.reconciler import Reconciler  # noqa: PLC0415  (the endpoint's processes need none of it)
        from serve.stage import RayStage  # noqa: PLC0415
        from serve.versions import Versions  # noqa: PLC0415

        load_no_code()
        stage = RayStage(ray.serve.get_replica_context().app_name, args.limits.answer_s)
        self._reconciler = Reconciler(args.models, Versions(args), stage, args.poll_s)
        self._reconciler.begin()

    async def roster(self, token: str) -> tuple[Roster, Mapping[str, Any]]:
        """News since a roster; see `Reconciler.roster`."""
        return await self._reconciler.roster(token)

    def check_health(self) -> None:
        """Raise where nobody follows the registry any more, so that Serve starts another."""
        self._reconciler.check()


class Endpoint:
    """The ingress deployment: the application over Ray's handles."""

    def __init__(self, args: AppArgs, access: Access, minder: Any) -> None:
        load_no_code()
        self.ring = access.ring()
        self.gate = Gate(Roster({model.name: Standing(model.name) for model in args.models}), args.limits, self)
        self._args = args
        self._minder = minder
        self._handles: Mapping[str, Any] = {}
        self._has_news = asyncio.Event()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, made where it runs."""
        watch = Watch(RayMeter(), self._args.log_requests, under_ray=True)
        app = application(self.gate, watch, self.ring, lifespan=self._following)
        scrape.install(app)
        return app

    async def predict(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        """Ask a replica of the version."""
        return cast(list[Told | Refused], await self._handle(served).predict.remote(images, wanted))

    async def ready(self, served: Served) -> bool:
        """Whether a replica of the version answers."""
        return cast(bool, await self._handle(served).ready.remote())

    def _handle(self, served: Served) -> Any:
        if served.app not in self._handles:
            raise DeploymentUnavailableError(served.app)
        return self._handles[served.app]

    @contextlib.asynccontextmanager
    async def _following(self, _: FastAPI) -> AsyncGenerator[None]:
        task = asyncio.get_running_loop().create_task(self._follow())
        first_s = max(model.load_s for model in self._args.models)  # to be told of every model
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_news.wait(), first_s)
        yield
        task.cancel()

    async def _follow(self) -> None:
        while True:
            try:
                roster, handles = await self._minder.roster.remote(self.gate.roster.token)
                if roster.token not in {"", self.gate.roster.token}:
                    await self._turn(roster, handles)
            except Exception as error:
                _log.warning("no news of what is served, the last holds: %s", error)
                await asyncio.sleep(PAUSE_S)

    async def _turn(self, roster: Roster, handles: Mapping[str, Any]) -> None:
        """Ask for what is in a roster from now on; versions that are new are greeted before a request meets them."""
        new = {served.app for served in roster.versions if not served.sleeps} & handles.keys() - self._handles.keys()
        await asyncio.gather(*(self._greet(handles[app]) for app in new), return_exceptions=True)
        asked = {served.app for served in self.gate.roster.versions}  # by requests that are on their way
        kept = {app: handle for app, handle in self._handles.items() if app in asked or app in handles}
        self._handles = {**handles, **kept}  # a handle that is in use knows its replicas
        self.gate.roster = roster.after(self.gate.roster)
        if all(one.live or one.troubles for one in roster.standings.values()):  # the reconciler has been everywhere
            self._has_news.set()

    async def _greet(self, handle: Any) -> None:
        async with asyncio.timeout(GREET_S):
            await handle.ready.remote()
