"""Every error the library raises on purpose.

A message says, in one sentence or two, what was expected, what came, where, and what to do. Doors print it and exit
with `exit_code`; the serving ingress turns it into a 4xx or 5xx. Anything that is not a `VentralError` is a bug.
"""

from __future__ import annotations

import re
from typing import ClassVar


class VentralError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what a job ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(VentralError):
    """A configuration that cannot be run: unknown key, wrong type, impossible value, missing file."""

    exit_code = 2


class DataError(VentralError):
    """A dataset, shard or manifest that is missing, damaged or contradicts itself."""

    exit_code = 3


class ImageError(DataError):
    """Bytes that are not an image this project accepts.

    `reason` is a stable short word for tables and HTTP problems (`"truncated"`, `"format"`, `"pixels"`, ...); the
    message explains it to a person.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        """Keep both arguments when the error travels between processes."""
        return type(self), (self.reason, str(self))


class ModelError(VentralError):
    """A model that cannot be built, trained or applied: wrong shape, loss not finite, weights that do not fit."""

    exit_code = 4


class BundleError(VentralError):
    """A model artefact that is missing, damaged or of another version."""

    exit_code = 5


class TrackingError(VentralError):
    """MLflow does not answer, or does not hold what was asked for."""

    exit_code = 6


class ClusterError(VentralError):
    """Ray, a port or a local server that could not be had."""

    exit_code = 7


_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception)): ", re.MULTILINE)


def last_raised(text: str) -> str:
    """The sentence of the last exception in a trace that came as text, in one line; the text where it holds none."""
    found = list(_RAISED.finditer(text))
    return " ".join((text[found[-1].start() :] if found else text).split())


def own_cause(error: BaseException) -> BaseException:
    """The error that our code raised on another process, if one hides in what Ray made of it; else `error` itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, VentralError):
            inner = getattr(cause, "cause", None)  # Ray raises one of both types, whose text is a traceback
            return inner if isinstance(inner, VentralError) else cause
        cause = cause.__cause__ or getattr(cause, "cause", None)
    return error
