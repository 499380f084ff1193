"""What has failed is not tried again at once: after a pause that doubles, for each thing on its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""Until something is tried again for the first time, and at most."""


class Pauses:
    """Which things are not to be tried now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses: dict[Hashable, tuple[float, float]] = {}  # how long, and until when

    def holds(self, key: Hashable) -> bool:
        """Whether a thing has failed, and not long enough ago."""
        return key in self._pauses and self._clock() < self._pauses[key][1]

    def note(self, key: Hashable) -> None:
        """Note that it has failed, once more perhaps."""
        before_s, _ = self._pauses.get(key, (FIRST_PAUSE_S / 2, 0.0))
        pause_s = min(2 * before_s, LONGEST_PAUSE_S)
        self._pauses[key] = pause_s, self._clock() + pause_s

    def end(self, key: Hashable) -> None:
        """Note that it has not."""
        self._pauses.pop(key, None)
