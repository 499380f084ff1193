"""HAProxy as this project wants it where Ray has no setting: a wrapper that edits the configuration which Ray renders.

Its statistics and metrics stay on loopback, the head of a request has ten seconds, headers that Ray stumbles over are
dropped, every request has an id, and what Ray or HAProxy say in the endpoint's place is JSON as the endpoint's own.
Only what cannot be read as a request at all is refused in HAProxy's own words.
"""

from __future__ import annotations

from pathlib import Path

CODE = "proxy"
"""Of refusals that are not the endpoint's: a question that got one may be asked again."""


def _said(sentence: str, code: str) -> str:
    """A body, as HAProxy's log-format string."""
    return f"""'{{"error": "{sentence}", "code": "{code}", "request_id": "%[var(txn.request_id)]"}}'"""


def _instead(status: int, sentence: str, code: str) -> str:
    """The rule that takes the place of an answer in text; the endpoint itself gives none with such a status."""
    is_text = f"{{ status {status} }} {{ res.hdr(content-type) -m beg text/plain }}"
    return f"    http-response return status {status} {_JSON} lf-string {_said(sentence, code)} if {is_text}"


_JSON = "content-type application/json"
_AGAIN = "The endpoint failed on this request, or is not there; try again."
_NOWHERE = _said("There is no path.", "not_found")
RULES = f"""\
    http-request del-header x-request-timeout-seconds
    http-request del-header x-request-disconnect-disabled
    http-request del-header serve_multiplexed_model_id
    http-request del-header x-request-id if {{ req.hdr(x-request-id) -m reg [^A-Za-z0-9._-]|.{{129}} }}
    http-request set-header x-request-id %[uuid()] if !{{ req.hdr(x-request-id) -m found }}
    http-request set-var(txn.request_id) req.hdr(x-request-id)
    acl has_path path_beg /
    http-request return status 404 {_JSON} lf-string {_NOWHERE} if METH_CONNECT or !has_path
{_instead(408, "The request took too long.", "timeout")}
{_instead(500, _AGAIN, CODE)}
"""
"""Of the frontend. Ray answers some headers with 500 where they are no text, and two would lift its limits."""

DEFAULTS = "    timeout http-request 10s\n" + "".join(
    f"    http-error status {status} {_JSON} hdr Retry-After 1 lf-string {_said(_AGAIN, CODE)}\n"
    for status in (502, 503, 504)
)
"""Of every section; Ray's own files for these three statuses are text."""

WRAPPER = """#!/bin/sh
# What Ray has no setting for. It renders two `bind` lines (statistics, metrics) for all interfaces.
for argument; do
    case "$argument" in *.cfg)
        sed -i 's/^\\( *bind \\)\\**:\\([0-9]\\)/\\1127.0.0.1:\\2/' "$argument"
        grep -q 'timeout http-request' "$argument" || sed -i -e '/^ *errorfile 50[234] /d' \\
            -e '/^defaults$/r {defaults}' -e '/^frontend http_frontend$/r {rules}' "$argument"
    esac
done
exec '{binary}' "$@"
"""


def wrap(binary: str, folder: Path) -> Path:
    """Write the wrapper, and what it puts into the configuration, to a folder that stays."""
    path, rules, defaults = (folder / name for name in ("haproxy.sh", "haproxy.rules", "haproxy.defaults"))
    rules.write_text(RULES)
    defaults.write_text(DEFAULTS)
    path.write_text(WRAPPER.format(binary=binary, rules=rules, defaults=defaults))
    path.chmod(0o700)
    return path
