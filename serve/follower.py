"""Follows the aliases of one model: brings what is served to what they point to, and keeps it there.

    an alias moves ──► bundle fetched, checksums compared ──► loaded beside the live version ──► golden images answered
                   ──► live ──► the version before stays loaded for `keep_s`: an alias that moves back finds it there

On any failure the live version stays, the newcomer is unloaded, and the reason is in the model's standing; it is tried
again after a while that doubles. What is served is written down, and what nobody needs any more is unloaded and its
bundle removed. How versions are loaded is the `Stage`'s affair (on Ray Serve: `serve.stage`), what aliases mean that of
`Versions`; neither is needed to see what is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pipeline.errors import ModelError, VentralError, last_raised
from serve.pauses import Pauses
from serve.roster import Standing
from serve.schemas import ModelArgs, Served

UNWRITTEN = "served.json"
"""Among the troubles, beside the aliases, none of which has a dot: why what is served is not written down."""
TURN_S = 15.0
"""Within so long every ingress process has turned to what it is told; so long nothing that it may ask is unloaded."""
TIDY_S = 600.0
"""Between two looks for bundles that nobody needs."""
MAX_UNFORESEEN = 200
"""Characters that are told of an error nobody has thought of: its log may be gone with its machine."""
_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[\w.@+-]+/)+")
_log = logging.getLogger("ray.serve")


class Aliases(Protocol):
    """What aliases mean; see `serve.versions.Versions`."""

    def settle(self, model: ModelArgs, alias: str) -> Served:
        """What an alias means now."""

    def settle_if_any(self, model: ModelArgs, alias: str) -> Served | None:
        """What it means now; None where the registry knows no such alias."""

    def last(self, model: ModelArgs, alias: str) -> Served | None:
        """What it meant when it was last served, if it ever was."""

    def remember(self, served: Served) -> None:
        """Note that a version is served; raises why it could not be."""

    def tidy(self, model: ModelArgs, needed: Collection[str]) -> None:
        """Let bundles go that are not of these versions, nor were served last; raises nothing."""


class Stage(Protocol):
    """Where versions are loaded."""

    def place(self, served: Served, model: ModelArgs) -> str:
        """The place that a version is loaded in, or would be."""

    async def find(self, served: Served, model: ModelArgs) -> Served | None:
        """A version that is loaded, with its place; None: it is not, and nothing is done about it."""

    async def load(self, served: Served, model: ModelArgs) -> Served:
        """Load a version; the same with its place. Raises why it could not be, and leaves nothing of it."""

    async def rehearse(self, served: Served, model: ModelArgs) -> None:
        """Have a loaded version answer the golden images of its bundle; raises what it answered otherwise."""

    async def unload(self, app: str) -> None:
        """Let what is loaded in a place go, once what it has been asked is answered; does not wait for it."""

    async def loaded(self, model: ModelArgs) -> Sequence[str]:
        """Every place that a version of a model is loaded in."""

    def handles(self) -> Mapping[str, Any]:
        """How replicas are reached, by place."""


class Follower:
    """One model: goes where its aliases point to, a step at a time.

    Attributes:
        standing: what is served now; `publish` is called when it has changed.
    """

    def __init__(
        self,
        model: ModelArgs,
        aliases: Aliases,
        stage: Stage,
        publish: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        rival = model.challenger
        self.standing = Standing(model.name, share=rival.share if rival else 0, shadow=rival.shadow if rival else 0)
        self._aliases = aliases
        self._stage = stage
        self._publish = publish
        self._clock = clock
        self._refused = Pauses(clock)
        self._noted: Served | None = None
        self._tidied_s = -math.inf
        self._left_s: dict[Served, float] = {}
        self._gone_s: dict[str, float] = {}
        self._loading: list[str] = []
        self._is_swept = False

    async def follow_live(self) -> None:
        """Look where the model's alias points to, and go there; raises nothing."""
        alias, now = self.model.alias, self.standing.live
        found = await self._follow(alias, now, self._own)
        if found is None:  # what a predecessor served, rather than nothing
            found = await self._follow_last(alias)
        if found and found != now:
            self._turn(live=found)
        await self._remember()

    async def follow_challenger(self) -> None:
        """The same for the second alias, if there is one, beside a live version."""
        if self.model.challenger is None or self.standing.live is None:
            return
        found = await self._follow(self.model.challenger.alias, self.standing.challenger, self._rival)
        live = self.standing.live  # which may have become the same meanwhile
        self._turn(challenger=None if found and is_same(found, live) else found)

    async def tidy(self) -> None:
        """Unload what is kept no longer, after nobody has been told of it for a while; raises nothing."""
        now_s = self._clock()
        for one in [one for one, at_s in self._left_s.items() if now_s - at_s >= max(self.model.keep_s, TURN_S)]:
            del self._left_s[one]
            self._gone_s[one.app] = now_s
        self._keep()
        try:
            await self._find_strays()
            late = [app for app, at_s in self._gone_s.items() if self._clock() - at_s >= TURN_S]
            for app in late:
                if app not in self._loading:  # what is being loaded may need the room of the others
                    await self._stage.unload(app)
                    self._gone_s.pop(app, None)
        except Exception:
            _log.exception("%s: what is kept no longer could not be unloaded; it is tried again", self.model.name)
            self._is_swept = False
        await self._tidy_bundles()

    async def _remember(self) -> None:
        """Have the live version written down, tried at each step until it is: it is served all the same."""
        live = self.standing.live
        if live is None or live == self._noted:
            return
        try:
            await asyncio.to_thread(self._aliases.remember, live)
        except Exception as error:
            self._complain(UNWRITTEN, _reason(error))
        else:
            self._noted = live
            self._complain(UNWRITTEN, None)

    async def _tidy_bundles(self) -> None:
        """Let bundles go at a quiet time: nothing is being loaded, and nothing is loaded but what is shown."""
        is_busy = self._loading or self.standing.live is None
        if is_busy or self._clock() - self._tidied_s < TIDY_S:
            return
        try:
            loaded = await self._stage.loaded(self.model)
            seen = self.standing.versions
            if {one.app for one in seen}.issuperset(loaded):
                await asyncio.to_thread(self._aliases.tidy, self.model, {one.version for one in seen})
                self._tidied_s = self._clock()
        except Exception:
            _log.exception("%s: unused bundles could not be removed; it is tried again", self.model.name)

    async def _follow(
        self, alias: str, now: Served | None, settled: Callable[[], Awaitable[Served | None]]
    ) -> Served | None:
        """What an alias stands for from now on: what it points to or, if that cannot be taken, the present one."""
        try:
            wanted = await settled()
            if wanted is None or (now and is_same(wanted, now)):
                self._complain(alias, None)
                return wanted and now
            if self._refused.holds(_key(wanted)):
                return now
            taken = await self._take(wanted)
        except Exception as error:
            self._complain(alias, _reason(error))
            return now
        try:
            again = await settled()
            self._complain(alias, None)
        except Exception as error:
            self._complain(alias, _reason(error))
            again = None
        if again and is_same(again, taken):
            return taken
        self._keep(taken)  # it has moved on meanwhile, or nobody knows: the next step finds it loaded
        return now

    async def _follow_last(self, alias: str) -> Served | None:
        last: Served | None = None
        try:
            last = await asyncio.to_thread(self._aliases.last, self._args, alias)
            if last and not self._refused.holds(_key(last, is_proven=True)):
                return await self._take(last, is_proven=True)
        except Exception as error:
            _log.warning("%s@%s: what was served last cannot be either: %s", self.model.name, alias, error)
        return None

    @property
    def _args(self) -> ModelArgs:
        """The model's arguments; while there is nobody to disturb a version is loaded as quickly as it can be."""
        return self.model if self.standing.live else self.model.model_copy(update={"load_share": 1.0})

    async def _own(self) -> Served:
        return await asyncio.to_thread(self._aliases.settle, self._args, self.model.alias)

    async def _rival(self) -> Served | None:
        assert self.model.challenger is not None
        alias = self.model.challenger.alias
        found = await asyncio.to_thread(self._aliases.settle_if_any, self.model, alias)
        live = self.standing.live
        is_live = bool(found and live and is_same(found, live))
        self._stand(also=(alias,) if is_live else ())
        return None if is_live else found

    async def _take(self, wanted: Served, *, is_proven: bool = False) -> Served:
        """Load a version and see that it answers as it should; nothing is left of one that was loaded in vain.

        One that is served already, or was by a predecessor, has shown that before.
        """
        known = next((one for one in self.standing.versions if is_same(one, wanted)), None)
        if known is not None:
            return replace(wanted, app=known.app)
        live = self.standing.live
        if live and live.task != wanted.task:
            self._refused.note(_key(wanted))
            raise ModelError(
                f"version {wanted.version} is for {wanted.task}, version {live.version}, which is served, for "
                f"{live.task}; register it under another name"
            )
        place = self._stage.place(wanted, self.model)
        self._loading.append(place)
        try:
            found = await self._stage.find(wanted, self.model)
            loaded = found or await self._stage.load(wanted, self._args)
            self._gone_s.pop(loaded.app, None)
            if not is_proven:
                await self._rehearse(loaded, is_new=found is None)
        except Exception:
            self._refused.note(_key(wanted, is_proven=is_proven))
            raise
        finally:
            self._loading.remove(place)
        self._refused.end(_key(wanted, is_proven=is_proven))
        return loaded

    async def _rehearse(self, loaded: Served, *, is_new: bool) -> None:
        try:
            await self._stage.rehearse(loaded, self.model)
        except Exception:
            if is_new:
                await self._stage.unload(loaded.app)
            raise

    async def _find_strays(self) -> None:
        """Let go, once, what an earlier reconciler has left and nobody asks for."""
        if self._is_swept or self._loading or self.standing.live is None:
            return
        wanted = {served.app for served in self.standing.versions}
        strays = [app for app in await self._stage.loaded(self.model) if app not in wanted]
        self._gone_s |= {app: self._clock() for app in strays if app not in self._gone_s}
        self._is_swept = True

    def _turn(self, **to: Served | None) -> None:
        """Let versions take their places; what stood there stays loaded for a while."""
        before = self.standing
        after = replace(before, **to)  # type: ignore[arg-type]
        places = {one.app for one in (after.live, after.challenger) if one}
        self._left_s = {one: at_s for one, at_s in self._left_s.items() if one.app not in places}
        self._left_s |= self._leaving(one for one in (before.live, before.challenger) if one and one.app not in places)
        self._stand(**to, kept=self._kept())

    def _keep(self, *left: Served) -> None:
        """Keep versions loaded that no alias points to, and show which are."""
        held = {one.app for one in (self.standing.live, self.standing.challenger) if one}
        self._left_s |= self._leaving(one for one in left if one.app not in held)
        self._stand(kept=self._kept())

    def _leaving(self, left: Iterable[Served]) -> dict[Served, float]:
        return {replace(one, alias=None): self._clock() for one in left}

    def _kept(self) -> tuple[Served, ...]:
        return tuple(sorted(self._left_s, key=lambda one: -self._left_s[one]))

    def _stand(self, **to: Any) -> None:
        after = replace(self.standing, **to)
        if after != self.standing:
            self.standing = after
            self._publish()

    def _complain(self, about: str, reason: str | None) -> None:
        """Note, or forget, why an alias is not followed, or what is served not written down."""
        if self.standing.troubles.get(about) == reason:
            return
        if reason:
            what = "is not written" if about == UNWRITTEN else "is not followed"
            _log.warning("%s@%s %s: %s", self.model.name, about, what, reason)
        others = {key: text for key, text in self.standing.troubles.items() if key != about}
        self._stand(troubles=others | ({about: reason} if reason else {}))


def is_same(one: Served, other: Served) -> bool:
    """Whether two are the same version, whatever aliases they are known by and wherever they are loaded."""
    return (one.version, one.weights) == (other.version, other.weights)


def shown(text: str) -> str:
    """A reason as whoever may ask the endpoint may read it: without passwords in addresses, and without folders."""
    return _FOLDERS.sub("", _PASSWORD.sub("", text))


def _reason(error: Exception) -> str:
    """Why an alias is not followed, for whoever may ask the endpoint."""
    if isinstance(error, VentralError):
        return shown(str(error))
    _log.error("unforeseen", exc_info=error)
    said = last_raised(shown(str(error)))[:MAX_UNFORESEEN]
    return f"an unforeseen {type(error).__name__} ({said}); the reconciler's log tells more"


def _key(served: Served, *, is_proven: bool = False) -> tuple[str, str, bool]:
    return served.version, served.weights, is_proven
