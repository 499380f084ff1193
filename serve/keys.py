"""Who may ask the endpoint, and how often: a layer in front of every route, also of those that are still to come.

A path is judged by the route that will answer it, as the router finds it. What is neither in `PUBLIC` nor in `INFER`
asks for the scope admin, also where there is no route. A refusal reads no body. What is behind this layer never sees a
token. The counts are of one ingress replica: with N of them a key can do up to N times as much. How keys are kept is
in `pipeline.inference.keys`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from pipeline.errors import ConfigError
from pipeline.inference import keys as kept
from pipeline.inference.keys import Key, Keys, Scope
from serve import exposure, pages, problems
from serve.problems import Problem
from serve.schemas import AppArgs

VARIABLE = "VENTRAL_KEYS"
PUBLIC = frozenset({"/healthz", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"})
_MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
INFER = frozenset(
    {
        *("/models", "/predict/{model}", "/predict/{model}/versions/{version}", "/invocations"),
        *("/v2", "/v2/", "/v2/models"),
        *(model + verb for model in _MODELS for verb in ("", "/ready", "/infer")),
    }
)
LOOK_AGAIN_S = 1.0
_REALM = 'Bearer realm="ventral"'
_ENOUGH = 1 - 1e-6  # of a token: sums of floats are not exact
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask, as it is settled where the application is built.

    Attributes:
        keys: a key file, read again when it changes, or keys that stay; None: anyone may ask.
        allow_anyone: anyone may ask on any address.
    """

    keys: Path | Keys | None = None
    allow_anyone: bool = False

    def ring(self) -> Ring | None:
        """The keys, in the process that asks for them; None: anyone may ask.

        Raises:
            ConfigError: the file is none, or others could reach an endpoint without keys.
        """
        if self.keys is None:
            if not self.allow_anyone:
                exposure.refuse_open_on_this_cluster()
            return None
        return Ring(self.keys)


def settle(args: AppArgs) -> Access:
    """Find the keys that the arguments or the environment name, and look at them once.

    Raises:
        ConfigError: they are none, come from both, or are missing on an address that others can reach.
    """
    text = os.environ.get(VARIABLE)
    if text is not None and args.keys is not None:
        raise ConfigError(f"keys come from {VARIABLE} and from 'keys' in the application's args; leave one out")
    # Links are followed at each look: a secret that is mounted is one, and led elsewhere when it is rotated.
    keys = kept.parse(text, VARIABLE) if text is not None else args.keys and args.keys.absolute()
    access = Access(keys, args.allow_anyone)
    access.ring()
    return access


@dataclass(slots=True)
class Use:
    """What a key has left and in hand; times in seconds of the ring's clock."""

    key: Key
    left: float
    filled_s: float
    in_hand: int = 0

    def enter(self, now_s: float) -> None:
        """Count a request in; `leave` counts it out.

        Raises:
            Problem: 429.
        """
        most, rate = self.key.max_concurrent, self.key.requests_per_s
        if most is not None and self.in_hand >= most:
            raise _too_many("concurrency", f"This key may have {most} requests in hand", most, 0, 1)
        if rate is not None:
            burst = burst_of(self.key)
            self.left = min(burst, self.left + (now_s - self.filled_s) * rate)
            self.filled_s = now_s
            if self.left < _ENOUGH:
                wait_s = max(1, math.ceil((_ENOUGH - self.left) / rate))
                raise _too_many("rate", f"This key may make {rate:g} requests a second", burst, int(self.left), wait_s)
            self.left -= 1
        self.in_hand += 1

    def leave(self) -> None:
        """Count it out."""
        self.in_hand -= 1


class Ring:
    """The keys that are good now.

    Args:
        source: a key file or a link to one, looked at again once a second, or keys that stay.
        clock: seconds that never go back.

    Raises:
        ConfigError: the file is none; later a damaged one leaves the keys as they are.
    """

    def __init__(self, source: Path | Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = source if isinstance(source, Path) else None
        self._clock = clock
        self._uses: dict[str, Use] = {}
        self._keys: dict[str, Key] = {}
        self._seen = _signature(self._file)
        self._look_s = clock() + LOOK_AGAIN_S
        self._take(kept.load(source) if isinstance(source, Path) else source)

    def admit(self, tokens: Iterable[bytes], needed: Scope) -> Use:
        """Count a request in that comes with these tokens.

        Raises:
            Problem: 401, 403 or 429.
        """
        self._look_again()
        found = set(tokens)
        if not found:
            ask = "This endpoint asks for a key: send it as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'."
            raise Problem(401, "no_key", ask, {"WWW-Authenticate": _REALM})
        key = kept.find(self._keys, found.pop())
        if key is None or found:
            wrong = "Two different keys came; send one." if found else "The key is not one of this endpoint's."
            raise Problem(401, "wrong_key", wrong, {"WWW-Authenticate": f'{_REALM}, error="invalid_token"'})
        if not key.opens(needed):
            raise Problem(
                403, "scope", f"This path asks for a key of scope {needed}; yours has {' and '.join(key.scopes)}."
            )
        use = self._uses[key.id]
        use.enter(self._clock())
        return use

    def _look_again(self) -> None:
        now_s = self._clock()
        if self._file is None or now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_AGAIN_S
        seen = _signature(self._file)
        if seen == self._seen:
            return
        self._seen = seen  # a damaged file is told once
        try:
            self._take(kept.load(self._file))
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error)
        else:
            _log.info("%s: %d keys from now on", self._file, len(self._keys))

    def _take(self, found: Keys) -> None:
        """Keep what a key has in hand, and what is left of it, where it stays."""
        before, now_s = self._uses, self._clock()
        self._keys = {key.id: key for key in found.keys}
        self._uses = {}
        for key in found.keys:
            use = before.get(key.id) or Use(key, burst_of(key), now_s)
            use.key = key
            self._uses[key.id] = use


class Guard:
    """The layer itself, in ASGI."""

    def __init__(self, app: ASGIApp, ring: Ring) -> None:
        self.app = app
        self.ring = ring

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        needed, tokens = required(scope), _taken(scope)
        if needed is None:
            await self.app(scope, receive, send)
            return
        try:
            use = self.ring.admit(tokens, needed)
        except Problem as problem:
            await _refuse(problem, scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            use.leave()


def required(scope: Connection) -> Scope | None:
    """What a request needs; None: nothing."""
    path = _route(scope)
    if path in PUBLIC or pages.is_page(path):
        return None
    return "infer" if path in INFER else "admin"


def burst_of(key: Key) -> int:
    """Requests that a key may make at once after a pause."""
    return key.burst or max(1, math.ceil(key.requests_per_s or 1))


def _route(scope: Mapping[str, Any]) -> str:
    """The path of the route that the router will take; empty: none."""
    partly = ""
    for route in scope["app"].routes:
        match, _ = route.matches(dict(scope))
        path = getattr(route, "path", "")
        if match is Match.FULL:
            return str(path)
        if match is Match.PARTIAL:
            partly = partly or str(path)
    return partly


def _taken(scope: Connection) -> list[bytes]:
    """The tokens that came; the headers lose them."""
    found = [(header, _token(*header)) for header in scope["headers"]]
    scope["headers"] = [header for header, token in found if token is None]
    return [token for _, token in found if token is not None]


def _token(name: bytes, value: bytes) -> bytes | None:
    name = name.lower()
    if name == b"x-api-key":
        return value.strip()
    scheme, _, rest = value.strip().partition(b" ")
    return rest.strip() if name == b"authorization" and scheme.lower() == b"bearer" else None


def _too_many(code: str, limit: str, most: int, left: int, wait_s: int) -> Problem:
    headers = {"Retry-After": wait_s, "RateLimit-Limit": most, "RateLimit-Remaining": left, "RateLimit-Reset": wait_s}
    sentence = f"{limit}; try again in {wait_s} s."
    return Problem(429, code, sentence, {name: str(value) for name, value in headers.items()})


async def _refuse(problem: Problem, scope: Connection, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a server says 403
        return
    await problems.respond(Request(scope), problem)(scope, receive, send)


def _signature(file: Path | None) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if found else None
