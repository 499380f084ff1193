"""Every model of an application, its aliases followed (`serve.follower`), and whoever asks told what is served.

No model waits for another, and of each no alias for the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from serve.follower import Aliases, Follower, Stage
from serve.roster import Roster
from serve.schemas import ModelArgs

NEWS_S = 10.0
"""For so long an ingress process waits for news before it asks again."""


class Reconciler:
    """Every model of an application, each alias followed on its own; tells whoever asks what is served.

    Attributes:
        tasks: those that do it, once it has begun; none of them ends.
    """

    def __init__(self, models: Sequence[ModelArgs], aliases: Aliases, stage: Stage, poll_s: float) -> None:
        self._followers = [Follower(model, aliases, stage, self._publish) for model in models]
        self._stage = stage
        self._poll_s = poll_s
        self._roster = Roster({})
        self._news = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Start following, on the running loop."""
        steps = [step for one in self._followers for step in (one.follow_live, one.follow_challenger, one.tidy)]
        self.tasks = [asyncio.get_running_loop().create_task(self._repeat(step)) for step in steps]

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

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await step()
            await asyncio.sleep(self._poll_s)

    def _publish(self) -> None:
        """Make a new roster, and wake those who wait for it."""
        self._roster = Roster.of([follower.standing for follower in self._followers])
        self._news.set()
        self._news = asyncio.Event()
