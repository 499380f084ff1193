"""Between requests and models, in any protocol: which models there are, how many images are in hand, for how long.

A gate holds no model and knows no HTTP; `Ask` is how the replicas are reached. Refusals are `Problem`s.
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
from serve.problems import MAX_ECHO, Problem
from serve.schemas import Asked, Limits, Refused, Served, Told, Wanted

READY_S = 2.0
_MOST_KEYS = 20  # of so many one is unknown in any case


class Ask(Protocol):
    """How a model is reached."""

    def predict(self, name: str, images: tuple[bytes, ...], wanted: Wanted) -> Awaitable[list[Told | Refused]]:
        """What a model says of each encoded image."""

    def ready(self, name: str) -> Awaitable[bool]:
        """True as soon as a replica of the model is loaded."""


@dataclass(slots=True)
class Tally:
    """What a model has done here; times in milliseconds.

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
    """The models of one ingress process."""

    def __init__(self, served: Sequence[Served], limits: Limits, ask: Ask) -> None:
        self.served: Mapping[str, Served] = {model.name: model for model in served}
        self.limits = limits
        self.tallies: Mapping[str, Tally] = {name: Tally() for name in self.served}
        self._ask = ask
        self._inflight = 0

    def find(self, address: str, version: str | None = None) -> Served:
        """The model of a path `name` or `name@alias`, and perhaps a version.

        Raises:
            Problem: 404.
        """
        name, _, alias = address.partition("@")
        if name not in self.served:
            raise Problem(
                404, "unknown_model", f"no model is called '{name[:MAX_ECHO]}'; {nearest(name, list(self.served))}"
            )
        found = self.served[name]
        if (alias and alias != found.alias) or version not in {None, found.version}:
            wanted = f"version {version[:MAX_ECHO]}" if version else f"alias {alias[:MAX_ECHO]}"
            here = f"version {found.version}" + (f" ({found.alias})" if found.alias else "")
            raise Problem(404, "unknown_version", f"{name}: {wanted} is not served, {here} is.")
        return found

    @contextmanager
    def room(self, count: int = 1) -> Iterator[None]:
        """Count images in, and out.

        Raises:
            Problem: 429, too many are in hand.
        """
        if self._inflight + count > self.limits.max_inflight:
            raise problems.overloaded()
        self._inflight += count
        try:
            yield
        finally:
            self._inflight -= count

    async def ask(
        self, model: Served, images: tuple[bytes, ...], wanted: Wanted, within_s: float | None = None
    ) -> list[Told | Refused]:
        """What a model says of each image.

        Args:
            model: one of `served`.
            images: encoded.
            wanted: of the model.
            within_s: time that the client gives, if it is less than the limit.

        Raises:
            Problem: the images have too many pixels, or it does not say it, or not in time.
        """
        if len(images) > 1:  # of one alone the model's own limit holds
            await asyncio.to_thread(bodies.check_pixels, images, self.limits)
        tally, began = self.tallies[model.name], time.monotonic()
        try:
            async with asyncio.timeout(min(self.limits.answer_s, within_s or self.limits.answer_s)):
                answers = await self._ask.predict(model.name, images, wanted)
        except Exception as error:
            tally.note_failure(1000 * (time.monotonic() - began))
            raise problems.of_exception(error) from error
        tally.note(answers, 1000 * (time.monotonic() - began))
        return answers

    async def waiting_for(self) -> list[str]:
        """Names of the models that are not loaded."""
        names = list(self.served)
        ready = await asyncio.gather(*map(self.is_ready, names))
        return [name for name, loaded in zip(names, ready, strict=True) if not loaded]

    async def is_ready(self, name: str) -> bool:
        """Whether a replica of the model is loaded."""
        try:
            async with asyncio.timeout(READY_S):
                return await self._ask.ready(name)
        except Exception as error:
            return problems.of_exception(error).code == "overloaded"  # too busy to say so is ready enough


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
