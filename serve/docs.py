"""`/docs`: what `/openapi.json` says, as a page for people; one file without scripts, so it works where no internet is.

Each operation with its parameters, a command that can be pasted into a shell, and the answer to expect.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.75rem;overflow:auto;white-space:pre-wrap;word-break:break-all}"
    "h2{border-top:1px solid #ccc;padding-top:1rem}"
)
_FIRST = "Every command works as it stands; set HOST, for example http://127.0.0.1:8000"
_KEY = ", and VENTRAL_KEY, a key of scope admin or of the one that is asked for"
_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def install(app: FastAPI) -> None:
    """Add the page."""

    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), str(request.scope.get("root_path", ""))), headers=_POLICY)

    app.get("/docs", include_in_schema=False)(docs)


def page(document: Mapping[str, Any], root: str = "") -> str:
    """The document as HTML."""
    title = escape(document["info"]["title"])
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"]
    has_keys = "securitySchemes" in document["components"]
    parts.append(f"<h1>{title}</h1><p>{_FIRST}{_KEY if has_keys else ''}.")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{root}{path}", method.upper(), operation)
    return "\n".join(parts)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2>{method} {escape(path)}</h2><p>{escape(operation.get('description', ''))}"
    parameters = operation.get("parameters", [])
    if parameters:
        said = (f"<li><code>{escape(one['name'])}</code> in the {escape(one['in'])}" for one in parameters)
        yield f"<ul>{''.join(said)}</ul>"
    kinds = operation.get("requestBody", {}).get("content", {})
    if kinds:
        yield f"<p>Body: {escape(', '.join(kinds))}"
    yield f"<pre>{escape(command(path, method, operation))}</pre>"
    for status, answer in operation["responses"].items():
        for content in answer.get("content", {}).values():
            if "example" in content:
                yield f"<p>{status}<pre>{escape(_text(content['example']))}</pre>"


def command(path: str, method: str, operation: Mapping[str, Any]) -> str:
    """The example's request for a shell."""
    query = []
    for one in operation.get("parameters", []):
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", str(one["example"]))
        elif "example" in one:
            query.append(f"{one['name']}={one['example']}")
    address = path + ("?" + "&".join(query) if query else "")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    line = f'curl -X {method} "$HOST{address}"'
    if operation.get("security"):
        line += ' -H "Authorization: Bearer $VENTRAL_KEY"'
    return line if body is None else f"{line} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _text(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example, indent=2)
