"""The page's files as they are sent, on no server at all; what a browser makes of them is in `tests/page`."""

from __future__ import annotations

import asyncio
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from serve import pages
from tests.asgi import Client, ranked

FILES = sorted(path.name for path in pages.FOLDER.iterdir())
VOID = {"meta", "link", "img", "input", "br"}


def get(path: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    return asyncio.run(Client(ranked(1)).send(method, path, Client._body([b""], 0.0), headers or {}))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_sent_as_what_it_is_under_the_strict_policy(name: str) -> None:
    status, body, headers = get("/" if name == "index.html" else f"/page/{name}")
    assert (status, body) == (200, (pages.FOLDER / name).read_bytes())
    kind = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert headers["content-type"].startswith(kind[name.rpartition(".")[2]])
    assert headers["content-length"] == str(len(body))
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' blob:"
    assert all(value == "'none'" for key, value in policy.items() if key not in {"default-src", "img-src"})
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-cache")


def test_file_that_a_browser_has_is_not_sent_again() -> None:
    tag = get("/page/page.js")[2]["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        status, body, headers = get("/page/page.js", headers={"if-none-match": known})
        assert (status, body, headers["etag"]) == (304, b"", tag)
    assert get("/page/page.js", headers={"if-none-match": '"other"'})[0] == 200
    assert get("/page/page.css")[2]["etag"] != tag


def test_head_tells_the_same_as_get() -> None:
    changes = {"x-request-id", "traceparent"}
    head, whole = (
        {key: text for key, text in get("/", verb)[2].items() if key not in changes} for verb in ("HEAD", "GET")
    )
    assert head == whole
    assert "etag" in head


@pytest.mark.parametrize("path", ["/page", "/page/", "/page/none.js", "/page/index.html", "/page/../pages.py", "/x"])
def test_path_that_is_no_file_is_refused_as_before(path: str) -> None:
    status, body, _ = get(path)
    assert (status, body["code"]) == (404, "not_found")


def test_page_is_no_part_of_the_described_interface() -> None:
    assert {path for path in get("/openapi.json")[1]["paths"] if path == "/" or path.startswith("/page")} == set()


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_an_address_elsewhere(name: str) -> None:
    text = (pages.FOLDER / name).read_text()
    found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*|@import|url\(", text))
    assert found <= {"http://www.w3.org/2000/svg"}  # a name of a language, which no browser opens


def test_every_file_is_packaged() -> None:
    pyproject = tomllib.loads((pages.FOLDER.parents[1] / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["serve"]
    packaged = {path for pattern in patterns for path in pages.FOLDER.parent.glob(pattern)}
    assert packaged >= set(pages.FOLDER.iterdir())
    assert {Path(name).suffix for name in FILES} <= set(pages.TYPES)


class Outline(HTMLParser):
    """The elements of a document and their attributes; what is opened has to be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_document_is_whole_its_inputs_have_labels_and_nothing_is_inline() -> None:
    outline = Outline()
    outline.feed((pages.FOLDER / "index.html").read_text())
    assert outline.opened == []
    ids = [about["id"] for _, about in outline.elements if "id" in about]
    assert len(ids) == len(set(ids))
    labelled = {about["for"] for tag, about in outline.elements if tag == "label"}
    inputs = {about["id"] for tag, about in outline.elements if tag in {"input", "select"}}
    assert len(inputs) == 5
    assert inputs <= labelled <= set(ids)
    named = {
        one
        for _, about in outline.elements
        for key in ("aria-labelledby", "aria-describedby")
        for one in (about.get(key) or "").split()
    }
    assert named <= set(ids)
    assert not [about for tag, about in outline.elements if tag == "script" and "src" not in about]
    assert "style" not in {tag for tag, _ in outline.elements} | {key for _, about in outline.elements for key in about}
    assert not [key for _, about in outline.elements for key in about if key.startswith("on")]
    links = {about.get("src") or about.get("href") for _, about in outline.elements} - {None}
    assert links == {"page/icon.svg", "page/page.css", "page/page.js"}


def test_scripts_set_no_text_as_html() -> None:
    for name in FILES:
        if name.endswith(".js"):
            words = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
            assert not re.findall(words, (pages.FOLDER / name).read_text()), name
