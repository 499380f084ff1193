"""W3C Trace Context: a request's place in a trace that began elsewhere, as the headers `traceparent` and `tracestate`.

Nothing is sent to a collector: the trace's id stands in the log line and in the answer, so that the two are found from
what the caller has recorded.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

PARENT, STATE = b"traceparent", b"tracestate"
MAX_STATE, MAX_MEMBERS = 512, 32
_PARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-[ -~]*)?")
_MEMBER = re.compile(
    rb"[ \t]*(?:[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}|[a-z][a-z0-9_\-*/]{0,255})"
    rb"=[ -+\--<>-~]{0,255}[!-+\--<>-~][ \t]*"
)
_SAMPLED = 1


class Trace(NamedTuple):
    """The trace that a request belongs to, and this endpoint's span in it.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 of them, new for every request.
        is_sampled: whether the caller records it.
        state: the caller's `tracestate`; empty where there is none that is valid.
    """

    trace_id: str
    span_id: str
    is_sampled: bool = False
    state: bytes = b""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers to pass on."""
        parent = f"00-{self.trace_id}-{self.span_id}-{_SAMPLED * self.is_sampled:02x}".encode()
        return [(PARENT, parent), *([(STATE, self.state)] if self.state else [])]


def trace_of(headers: Iterable[tuple[bytes, bytes]]) -> Trace:
    """The trace of a request; a new one where `traceparent` is missing, given twice or not valid.

    Args:
        headers: names in lower case, and values, as ASGI has them.
    """
    parents, states = [], []
    for name, value in headers:
        if name == PARENT:
            parents.append(value)
        elif name == STATE:
            states.append(value)
    found = _PARENT.fullmatch(parents[0].strip(b" \t")) if len(parents) == 1 else None
    if found is None or (found[1] == b"00" and found[4]):  # only a later version may say more
        return Trace(secrets.token_hex(16), secrets.token_hex(8))
    is_sampled = bool(int(found[3], 16) & _SAMPLED)
    return Trace(found[2].decode(), secrets.token_hex(8), is_sampled, _state(b",".join(states)))


def _state(text: bytes) -> bytes:
    """The text, if it is valid and short; the standard has it dropped otherwise, and the trace kept."""
    if len(text) > MAX_STATE:
        return b""
    members = [member for member in text.split(b",") if member.strip(b" \t")]
    keys = {member.partition(b"=")[0].strip(b" \t") for member in members}
    if len(members) > MAX_MEMBERS or len(keys) < len(members) or not all(map(_MEMBER.fullmatch, members)):
        return b""
    return b",".join(member.strip(b" \t") for member in members)
