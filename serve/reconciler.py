"""Brings what is served to what the registry's aliases point to, and keeps it there.

    an alias moves ──► bundle fetched, checksums compared ──► loaded beside the live version ──► golden images answered
                   ──► live ──► the version before stays loaded for `keep_s`: an alias that moves back finds it there

On any failure the live version stays, the newcomer is unloaded, and the reason is in the model's standing; it is tried
again after a while that doubles. A `Follower` minds one model. How versions are loaded is the `Stage`'s affair (on Ray
Serve: `serve.stage`), what aliases mean that of `Versions`; neither is needed to see what is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.errors import VentralError
from serve.roster import Roster, Standing
from serve.schemas import ModelArgs, Served

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""Until a version that could not be taken is tried again; it doubles."""
NEWS_S = 10.0
"""For so long an ingress process waits for news before it asks again."""
TURN_S = 15.0
"""Within so long every ingress process has turned to what it is told; so long nothing that it may ask is unloaded."""
Settled = Callable[[], Awaitable[Served | None]]
_log = logging.getLogger("ray.serve")


class Aliases(Protocol):
    """What aliases mean; see `serve.versions.Versions`."""

    def settle(self, model: ModelArgs, alias: str) -> Served:
        """What an alias means now."""

    def settle_or_last(self, model: ModelArgs, alias: str) -> Served:
        """What it means now or, while the registry is away, meant when it was last served."""

    def settle_if_any(self, model: ModelArgs, alias: str) -> Served | None:
        """What it means now; None where the registry knows no such alias."""

    def remember(self, served: Served) -> None:
        """Note that a version is served."""


class Stage(Protocol):
    """Where versions are loaded."""

    async def load(self, served: Served, model: ModelArgs) -> Served:
        """Load a version, or find it loaded; the same with its place. Raises why it could not be."""

    async def rehearse(self, served: Served) -> None:
        """Have a loaded version answer the golden images of its bundle; raises what it answered otherwise."""

    async def unload(self, app: str) -> None:
        """Let what is loaded in a place go, once what it has been asked is answered."""

    async def loaded(self) -> Sequence[str]:
        """Every place that something of this application is loaded in."""

    def handles(self) -> Mapping[str, Any]:
        """How replicas are reached, by place."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that could not be taken, and until when it is not tried again."""

    pause_s: float
    again_s: float


class Follower:
    """One model: goes where its aliases point to, a step at a time.

    Attributes:
        standing: what is served now.
    """

    def __init__(
        self, model: ModelArgs, aliases: Aliases, stage: Stage, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model = model
        rival = model.challenger
        self.standing = Standing(model.name, share=rival.share if rival else 0, shadow=rival.shadow if rival else 0)
        self._aliases = aliases
        self._stage = stage
        self._clock = clock
        self._refused: dict[tuple[str, str], Refusal] = {}
        self._left_s: dict[Served, float] = {}
        self._gone: list[str] = []

    async def step(self) -> None:
        """Look where the aliases point to, and go there; raises nothing."""
        live = await self._follow(self.model.alias, self.standing.live, self._own)
        if live and live != self.standing.live:
            self._turn(live=live)
            await asyncio.to_thread(self._aliases.remember, live)
        if self.model.challenger and live:
            rival = await self._follow(self.model.challenger.alias, self.standing.challenger, self._rival)
            self._turn(challenger=rival)
        late = [one for one, at_s in self._left_s.items() if self._clock() - at_s >= max(self.model.keep_s, TURN_S)]
        for one in late:
            del self._left_s[one]
            self._gone.append(one.app)
        self._keep()

    async def let_go(self) -> None:
        """Unload what is kept no longer: to be called once nobody is told of it any more; raises nothing."""
        while self._gone:
            app = self._gone.pop()
            try:
                await self._stage.unload(app)
            except Exception:
                _log.exception("%s could not be unloaded", app)

    async def _follow(self, alias: str, now: Served | None, settled: Settled) -> Served | None:
        """What an alias stands for from now on: what it points to or, if that cannot be taken, the present one."""
        wanted: Served | None = None
        try:
            wanted = await settled()
            if wanted is None or (now and is_same(wanted, now)):
                self._complain(alias, None)
                return wanted and now
            if self._is_refused(wanted):
                return now
            taken = await self._take(wanted)
            again = await settled()
            if again is None or not is_same(again, taken):
                self._keep(taken)
                return now  # it has moved on meanwhile; the next step goes after it
        except Exception as error:
            reason = str(error) if isinstance(error, VentralError) else f"{type(error).__name__}: {error}"
            self._complain(alias, reason)
            if wanted:
                self._refuse(wanted, reason)
            return now
        self._complain(alias, None)
        return taken

    async def _own(self) -> Served:
        ask = self._aliases.settle if self.standing.live else self._aliases.settle_or_last
        return await asyncio.to_thread(ask, self.model, self.model.alias)

    async def _rival(self) -> Served | None:
        assert self.model.challenger is not None
        found = await asyncio.to_thread(self._aliases.settle_if_any, self.model, self.model.challenger.alias)
        return None if found and self.standing.live and is_same(found, self.standing.live) else found

    async def _take(self, wanted: Served) -> Served:
        """Load a version and see that it answers as it should; else nothing of it is left.

        One that is loaded has shown that already.
        """
        known = next((one for one in self.standing.versions if is_same(one, wanted)), None)
        if known is not None:
            return replace(wanted, app=known.app)
        loaded = await self._stage.load(wanted, self.model)
        try:
            await self._stage.rehearse(loaded)
        except Exception:
            await self._stage.unload(loaded.app)
            raise
        self._refused.pop(_key(wanted), None)
        return loaded

    def _turn(self, **to: Served | None) -> None:
        """Let versions take their places; what stood there stays loaded for a while."""
        before, self.standing = self.standing, replace(self.standing, **to)  # type: ignore[arg-type]
        places = {one.app for one in (self.standing.live, self.standing.challenger) if one}
        self._left_s = {one: at_s for one, at_s in self._left_s.items() if one.app not in places}
        self._keep(*(one for one in (before.live, before.challenger) if one and one.app not in places))

    def _keep(self, *left: Served) -> None:
        """Keep versions loaded that no alias points to any more, and show which are."""
        self._left_s |= {replace(one, alias=None): self._clock() for one in left}
        newest_first = sorted(self._left_s, key=lambda one: -self._left_s[one])
        self.standing = replace(self.standing, kept=tuple(newest_first))

    def _is_refused(self, wanted: Served) -> bool:
        refusal = self._refused.get(_key(wanted))
        return refusal is not None and self._clock() < refusal.again_s

    def _refuse(self, wanted: Served, reason: str) -> None:
        before = self._refused.get(_key(wanted))
        pause_s = min(2 * before.pause_s, LONGEST_PAUSE_S) if before else FIRST_PAUSE_S
        self._refused[_key(wanted)] = Refusal(pause_s, self._clock() + pause_s)

    def _complain(self, alias: str, reason: str | None) -> None:
        """Note, or forget, why an alias is not followed."""
        if self.standing.troubles.get(alias) == reason:
            return
        if reason:
            _log.warning("%s@%s is not followed: %s", self.model.name, alias, reason)
        others = {key: text for key, text in self.standing.troubles.items() if key != alias}
        self.standing = replace(self.standing, troubles=others | ({alias: reason} if reason else {}))


class Reconciler:
    """Every model of an application, each followed on its own; tells whoever asks what is served.

    Attributes:
        tasks: those that do it, once it has begun; none of them ends.
    """

    def __init__(self, models: Sequence[ModelArgs], aliases: Aliases, stage: Stage, poll_s: float) -> None:
        self._followers = [Follower(model, aliases, stage) for model in models]
        self._stage = stage
        self._poll_s = poll_s
        self._roster = Roster({})
        self._news = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Start following, on the running loop."""
        self.tasks = [asyncio.get_running_loop().create_task(self._mind())]

    def check(self) -> None:
        """Raise where a task has ended, which none should."""
        for task in self.tasks:
            if task.done():
                raise RuntimeError(f"the reconciler has stopped: {task.exception()}")

    async def roster(self, token: str) -> tuple[Roster, Mapping[str, Any]]:
        """What is served and how it is reached, as soon as it is not what `token` stands for; by then at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWS_S):
                while self._roster.token in {"", token}:
                    await self._news.wait()
        return self._roster, self._stage.handles()

    async def _mind(self) -> None:
        await asyncio.gather(self._sweep(), *map(self._follow, self._followers))

    async def _follow(self, follower: Follower) -> None:
        while True:
            await follower.step()
            self._publish()
            await follower.let_go()
            await asyncio.sleep(self._poll_s)

    def _publish(self) -> None:
        """Make a new roster where a standing has changed, and wake those who wait for it."""
        standings = {follower.model.name: follower.standing for follower in self._followers}
        if standings != self._roster.standings:
            self._roster = Roster.of(list(standings.values()))
            self._news.set()
            self._news = asyncio.Event()

    async def _sweep(self) -> None:
        """Unload, once, what an earlier reconciler has left and nobody asks for, after everything is live."""
        while not all(follower.standing.live for follower in self._followers):
            await asyncio.sleep(self._poll_s)
        wanted = {served.app for served in self._roster.versions}
        for app in await self._stage.loaded():
            if app not in wanted:
                await self._stage.unload(app)


def is_same(one: Served, other: Served) -> bool:
    """Whether two are the same version, whatever aliases they are known by and wherever they are loaded."""
    return (one.version, one.weights) == (other.version, other.weights)


def _key(served: Served) -> tuple[str, str]:
    return served.version, served.weights
