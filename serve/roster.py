"""Which versions of which models are served: settled by the reconciler, and what every ingress process turns to.

A model has a live version, perhaps a challenger beside it, and for a while versions that were live before. All of them
are loaded and can be asked; which one a request without a version means is said here.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve.schemas import Served


@dataclass(frozen=True, slots=True)
class Standing:
    """What is served under one name.

    Attributes:
        live: the version that the model's alias points to, or did while its successor is not served; None: none yet.
        challenger: the version of the second alias, where it is another.
        kept: versions that are still loaded, so that an alias that moves back finds them; newest first.
        share: of requests that the challenger answers, 0 to 1.
        shadow: of the live version's requests that the challenger is asked too, 0 to 1.
        also: further aliases that mean the live version now.
        troubles: by alias, why what it points to is not served; see also `serve.follower.UNWRITTEN`.
    """

    name: str
    live: Served | None = None
    challenger: Served | None = None
    kept: tuple[Served, ...] = ()
    share: float = 0.0
    shadow: float = 0.0
    also: tuple[str, ...] = ()
    troubles: Mapping[str, str] = field(default_factory=dict)

    @property
    def versions(self) -> tuple[Served, ...]:
        """Every version that can be asked, the live one first."""
        return tuple(one for one in (self.live, self.challenger, *self.kept) if one is not None)

    def find(self, alias: str, version: str | None) -> Served | None:
        """The version that an alias ("": any) and a number (None: any) mean, if it can be asked."""
        if alias in self.also and self.live and version in {None, self.live.version}:
            return self.live
        return next(
            (one for one in self.versions if version in {None, one.version} and alias in {"", one.alias}),
            None,
        )

    def pick(self, key: str) -> Served | None:
        """The version that answers a request which names none; the same for equal keys.

        Args:
            key: of the request; with "" it is the live version.
        """
        return self.challenger if self.challenger and key and _drawn(key) < self.share else self.live

    def copies(self, key: str) -> bool:
        """Whether a request is one that the challenger is asked too."""
        return self.challenger is not None and _drawn(f"shadow {key}") < self.shadow


@dataclass(frozen=True, slots=True)
class Roster:
    """Every model.

    Attributes:
        standings: by name.
        token: changes with them; no two rosters that differ have the same.
    """

    standings: Mapping[str, Standing]
    token: str = ""

    @classmethod
    def of(cls, standings: Sequence[Standing]) -> Roster:
        """A new one."""
        return cls({one.name: one for one in standings}, uuid.uuid4().hex)

    def after(self, last: Roster) -> Roster:
        """The same, but no model that was live in the last one is not: it keeps its versions, and its new troubles."""
        kept = {
            name: replace(last.standings[name], troubles=self.standings[name].troubles)
            for name in self.standings.keys() & last.standings.keys()
            if last.standings[name].live and self.standings[name].live is None
        }
        return replace(self, standings={**self.standings, **kept})

    @property
    def versions(self) -> tuple[Served, ...]:
        """Every version of every model."""
        return tuple(served for one in self.standings.values() for served in one.versions)


def _drawn(key: str) -> float:
    """A number in [0, 1) that follows from a text."""
    return zlib.crc32(key.encode()) / 2**32
