"""What becomes of the request in hand, written down by whoever knows it; `serve.watching` makes it known.

It travels with the request's context, so that neither the gate nor the problems take an argument for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from serve.schemas import Refused, Served, Told


@dataclass(slots=True)
class Seen:
    """One request.

    Attributes:
        model: that was asked for, once it is known that it is served.
        answers: of the model; None until it has answered.
        code: of the problem that was answered; None: none was.
    """

    model: Served | None = None
    answers: Sequence[Told | Refused] | None = None
    code: str | None = None


CURRENT: ContextVar[Seen | None] = ContextVar("seen", default=None)


def seen() -> Seen:
    """The request in hand; where nobody watches, one that nobody reads."""
    return CURRENT.get() or Seen()
