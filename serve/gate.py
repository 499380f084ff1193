"""Between requests and models, in any protocol: which version answers, how many images are in hand, for how long.

A gate holds no model and knows no HTTP; `Ask` is how the replicas are reached, `Roster` what there is to ask. Refusals
are `Problem`s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from pydantic import ValidationError

from pipeline.config import nearest
from serve import bodies, problems
from serve.agreement import Agreement
from serve.metrics import IN_HAND, SERVED, STARTED, TROUBLE, Reading
from serve.problems import MAX_ECHO, Problem
from serve.roster import Roster, Standing
from serve.schemas import Asked, Limits, Refused, Served, Told, Wanted
from serve.seen import seen

READY_S = 2.0
MOST_COMPARED = 100
"""Detections in an image that a challenger's are compared with."""
_MOST_KEYS = 20  # of so many one is unknown in any case


class Ask(Protocol):
    """How a model is reached."""

    def predict(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> Awaitable[list[Told | Refused]]:
        """What a version says of each encoded image."""

    def ready(self, served: Served) -> Awaitable[bool]:
        """True as soon as a replica of the version is loaded."""


@dataclass(slots=True)
class Tally:
    """What a version has done here; times in milliseconds.

    Attributes:
        requests, images: that were answered, of those that reached the model.
        failed: requests that reached it and were not, whoever was to blame.
        total_ms: of answered requests.
        failed_ms: of the others.
        decode_ms, queue_ms, infer_ms: over all images.
        last_ms: when the last answer was given, in milliseconds since 1970.
    """

    requests: int = 0
    images: int = 0
    failed: int = 0
    total_ms: float = 0.0
    failed_ms: float = 0.0
    decode_ms: float = 0.0
    queue_ms: float = 0.0
    infer_ms: float = 0.0
    last_ms: int = 0

    def note(self, answers: Sequence[Told | Refused], ms: float) -> None:
        """Count a request whose images were all looked at; one that is no image makes it a failure."""
        told = [answer for answer in answers if isinstance(answer, Told)]
        if len(told) < len(answers):
            self.note_failure(ms)
            return
        self.requests += 1
        self.images += len(told)
        self.total_ms += ms
        self.decode_ms += sum(answer.decode_ms for answer in told)
        self.queue_ms += sum(answer.queue_ms for answer in told)
        self.infer_ms += sum(answer.infer_ms for answer in told)
        self.last_ms = round(1000 * time.time())

    def note_failure(self, ms: float) -> None:
        """Count a request without an answer."""
        self.failed += 1
        self.failed_ms += ms


class Gate:
    """The models of one ingress process.

    Attributes:
        roster: what there is to ask; whoever follows the reconciler sets it.
    """

    def __init__(self, roster: Roster, limits: Limits, ask: Ask) -> None:
        self.roster = roster
        self.limits = limits
        self._ask = ask
        self._began_s = time.time()
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._agreements: dict[tuple[str, str, str], Agreement] = {}
        self._inflight = 0
        self._shadowed = 0
        self._shadows: set[asyncio.Task[None]] = set()

    @property
    def standings(self) -> Mapping[str, Standing]:
        """What is served under each name."""
        return self.roster.standings

    def tally(self, served: Served) -> Tally:
        """What a version has done here."""
        return self._tallies.setdefault((served.name, served.version), Tally())

    def agreement(self, live: Served, rival: Served) -> Agreement:
        """How often two versions of a model have said the same here."""
        return self._agreements.setdefault((live.name, live.version, rival.version), Agreement())

    def find(self, address: str, version: str | None = None, key: str = "") -> Served:
        """The version that a path `name` or `name@alias` means, and perhaps a version's number.

        Args:
            key: of the request; by it a challenger gets its share of those that say neither alias nor version.

        Raises:
            Problem: 404, or 503 where none is loaded yet.
        """
        name, _, alias = address.partition("@")
        if name not in self.standings:
            known = nearest(name, list(self.standings))
            raise Problem(404, "unknown_model", f"no model is called '{name[:MAX_ECHO]}'; {known}")
        standing = self.standings[name]
        if standing.live is None:
            raise problems.loading(name)
        served = standing.pick(key) if version is None and not alias else standing.find(alias, version)
        if served is not None:
            seen().model = served
            return served
        wanted = f"version {version[:MAX_ECHO]}" if version else f"alias {alias[:MAX_ECHO]}"
        raise Problem(404, "unknown_version", f"{name}: {wanted} is not served, {_here(standing)}.")

    @contextmanager
    def room(self, count: int = 1) -> Iterator[None]:
        """Count images in, and out.

        Raises:
            Problem: 429, too many are in hand.
        """
        if self._inflight + count > self.limits.max_inflight:
            raise problems.overloaded()
        with self.in_hand(count):
            yield

    @contextmanager
    def in_hand(self, count: int = 1) -> Iterator[None]:
        """Count images, or answers on their way, in and out; not they are refused for want of room, but others."""
        self._inflight += count
        try:
            yield
        finally:
            self._inflight -= count

    async def ask(
        self, served: Served, images: tuple[bytes, ...], wanted: Wanted, within_s: float | None = None, key: str = ""
    ) -> list[Told | Refused]:
        """What a version says of each image.

        Args:
            served: one that `find` gave.
            images: encoded.
            wanted: of the model.
            within_s: time that the client gives, if it is less than the limit.
            key: of the request, by which it is drawn whether the challenger is asked too.

        Raises:
            Problem: the images have too many pixels, or it does not say it, or not in time.
        """
        if len(images) > 1:  # of one alone the model's own limit holds
            await asyncio.to_thread(bodies.check_pixels, images, self.limits)
        tally, began = self.tally(served), time.monotonic()
        patience_s = min(self.limits.answer_s, within_s or self.limits.answer_s)
        try:
            async with asyncio.timeout(patience_s):
                until_s = time.time() + patience_s
                answers = await self._asked(served, images, replace(wanted, until_s=until_s))
        except Exception as error:
            tally.note_failure(1000 * (time.monotonic() - began))
            raise problems.of_exception(error) from error
        tally.note(answers, 1000 * (time.monotonic() - began))
        seen().model, seen().answers = served, answers
        standing = self.standings.get(served.name)
        if standing and standing.live == served and standing.copies(key):
            self._shadow(served, standing.challenger, images, wanted, answers)
        return answers

    async def _asked(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        """Ask, and once more where the replica goes away meanwhile: asking changes nothing."""
        try:
            return await self._ask.predict(served, images, wanted)
        except problems.GONE:
            return await self._ask.predict(served, images, wanted)

    async def waiting_for(self) -> list[str]:
        """Names of the models that are not loaded."""
        names = list(self.standings)
        ready = await asyncio.gather(*(self.is_ready(standing.live) for standing in self.standings.values()))
        return [name for name, loaded in zip(names, ready, strict=True) if not loaded]

    async def is_ready(self, served: Served | None) -> bool:
        """Whether a replica of a version is loaded, or would be when it is asked; of none there is not."""
        if served is None or served.sleeps:
            return served is not None
        try:
            async with asyncio.timeout(READY_S):
                return await self._ask.ready(served)
        except Exception as error:
            return problems.of_exception(error).code == "overloaded"  # too busy to say so is ready enough

    def readings(self) -> list[Reading]:
        """The gauges of an ingress process."""
        versions = self.roster.versions
        served: list[Reading] = [(SERVED, 1, (one.name, one.version, one.alias or "")) for one in versions]
        troubles: list[Reading] = [
            (TROUBLE, 1, (standing.name, alias)) for standing in self.standings.values() for alias in standing.troubles
        ]
        return [(IN_HAND, self._inflight, ()), (STARTED, self._began_s, ("ingress",)), *served, *troubles]

    def _shadow(
        self,
        live: Served,
        rival: Served | None,
        images: tuple[bytes, ...],
        wanted: Wanted,
        answers: list[Told | Refused],
    ) -> None:
        """Ask a challenger the same behind the client's back, unless too much is asked already."""
        is_small = wanted.max_detections <= MOST_COMPARED  # comparing takes this process's time
        if rival is None or not is_small or self._shadowed + len(images) > self.limits.max_shadowed:
            return
        task = asyncio.get_running_loop().create_task(self._compare(live, rival, images, wanted, answers))
        self._shadows.add(task)  # the loop itself keeps tasks by weak references only
        self._shadowed += len(images)  # now: many answers come at once, before one task has begun

        def end(task: asyncio.Task[None]) -> None:
            self._shadows.discard(task)
            self._shadowed -= len(images)

        task.add_done_callback(end)

    async def _compare(
        self, live: Served, rival: Served, images: tuple[bytes, ...], wanted: Wanted, answers: list[Told | Refused]
    ) -> None:
        try:
            async with asyncio.timeout(self.limits.answer_s):
                others = await self._ask.predict(rival, images, replace(wanted, picture=False))
        except Exception as error:
            problems.of_exception(error)  # nobody waits for it; what nobody foresaw is logged
            return
        both = self.agreement(live, rival)  # of those that were asked, whichever is live by now
        for one, other in zip(answers, others, strict=True):
            both.note(one, other)


def _here(standing: Standing) -> str:
    """The versions that are served, for a sentence."""
    numbered = [f"version {one.version}" + (f" ({one.alias})" if one.alias else "") for one in standing.versions]
    return f"{', '.join(numbered)} {'is' if len(numbered) == 1 else 'are'}"


def asked_of(keys: Mapping[str, Any], where: str) -> Asked:
    """The keys that stand in a part of a request's body.

    Raises:
        Problem: one is unknown or impossible.
    """
    try:
        return Asked.model_validate(dict(islice(keys.items(), _MOST_KEYS)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Problem(400, where, f"{where}.{str(first['loc'][0])[:MAX_ECHO]}: {first['msg']}.") from None


def wanted_of(
    found: Served, asked: Asked, *, where: str = "query", picture: bool = False, pixels: bool = False
) -> Wanted:
    """What a request asks of a model.

    Args:
        found: the model.
        asked: the keys of a request.
        where: its part that holds them; the query's are refused with 422, those of a body with 400.
        picture: see `Wanted`.
        pixels: see `Wanted`.

    Raises:
        Problem: a key is not one of its task, or there are no boxes to draw.
    """
    plain, given, status = Wanted(), asked.model_dump(exclude_none=True), 422 if where == "query" else 400
    for key in given:
        if (key == "top_k") != (found.task == "classification"):
            raise Problem(status, where, f"{where}.{key}: {found.name} is for {found.task}, leave it out.")
    if asked.top_k is not None and asked.top_k > found.num_classes:
        raise Problem(status, where, f"{where}.top_k: {found.name} has {found.num_classes} classes, got {asked.top_k}.")
    if picture and found.task != "detection":
        raise Problem(406, "picture", f"{found.name} is for {found.task} and has no boxes to draw; accept JSON.")
    return replace(plain, **{"top_k": min(plain.top_k, found.num_classes)} | given, picture=picture, pixels=pixels)


def told_of(answers: Sequence[Told | Refused], *, is_plain: bool) -> list[Told]:
    """What was answered, if it is about every image.

    Raises:
        Problem: one is no image that is accepted.
    """
    for at, answer in enumerate(answers):
        if isinstance(answer, Refused):
            raise problems.of_image(answer, "" if is_plain else f"images.{at}: ")
    return [answer for answer in answers if isinstance(answer, Told)]
