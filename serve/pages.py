"""The page for people at `/`: the files of `serve/page`, sent as they are.

The page asks the endpoint as every client does, so nothing here knows a model. It needs nothing from elsewhere, and the
policy that goes with it has the browser refuse whatever is not of this origin; `blob:` is the picture that was chosen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag: a new release is seen at once
}


def install(app: FastAPI) -> None:
    """Add `/` and `/page/<file>` for each file of the folder."""
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            page = Page(path)
            app.add_route("/" if path.name == "index.html" else f"/page/{path.name}", page.answer, ["GET", "HEAD"])


def is_page(route: str) -> bool:
    """Whether a route is one of the page's, which anybody may see: the page asks for a key where one is needed."""
    return route == "/" or route.startswith("/page/")


class Page:
    """One file, read once."""

    def __init__(self, path: Path) -> None:
        self.body = path.read_bytes()
        self.etag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'
        self.headers = HEADERS | {"Content-Type": TYPES[path.suffix], "ETag": self.etag}

    async def answer(self, request: Request) -> Response:
        """Answer with the file, or with 304 to whom has it."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers={key: self.headers[key] for key in ("ETag", "Cache-Control")})
        return Response(self.body, headers=self.headers)
