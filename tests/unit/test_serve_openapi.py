"""The endpoint's own document is true: what schemathesis makes of it, and its examples as they stand."""

from __future__ import annotations

import asyncio
import html
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipeline.inference import keys as kept
from pipeline.inference.keys import Keys
from serve.keys import Ring
from tests.asgi import Client, ranked
from tests.mutations import Sent
from tests.real_models import real_application
from tests.unit.test_serve_fuzz import answer_of

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with real_application(tmp_path_factory.mktemp("bundles"), max_body_bytes=2**20) as made:
        yield made


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def check_document(app: FastAPI, max_examples: int) -> int:
    """Send what schemathesis makes of each operation; how many requests it were."""
    count = 0

    def one(case: Any) -> None:
        nonlocal count
        count += 1
        case.call_and_validate(checks=CHECKS)

    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in document.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        rules = settings(max_examples=max_examples, deadline=None, database=None, derandomize=True)
        rules = settings(rules, suppress_health_check=list(HealthCheck))
        strategy = operation.as_strategy()
        rules(given(strategy)(one))()  # type: ignore[no-untyped-call]
    return count


def test_answers_are_those_of_the_document(app: FastAPI) -> None:
    assert check_document(app, 3) > 40


@pytest.mark.long
def test_answers_to_many_requests_are_those_of_the_document(app: FastAPI) -> None:
    assert check_document(app, 300) > 4000


def test_every_example_of_the_document_is_answered_as_it_says(app: FastAPI) -> None:
    for path, method, operation in operations(app.openapi()):
        address, query = path, []
        for one in operation["parameters"]:
            if one["in"] == "path":
                address = address.replace(f"{{{one['name']}}}", str(one["example"]))
            elif "example" in one:
                query.append(f"{one['name']}={one['example']}")
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        body = json.dumps(content["example"]).encode() if content else b""
        headers = (("content-type", "application/json"),) if body else ()
        status, _, said = asyncio.run(answer_of(app, Sent(method.upper(), address, "&".join(query), headers, body)))
        expected = 400 if path.endswith("load") else 200
        assert status == expected, (path, said)
        shown = [
            kind["example"]
            for kind in operation["responses"][str(expected)].get("content", {}).values()
            if "example" in kind
        ]
        assert shown or path == "/ping"
        for example in shown:
            assert_shaped(json.loads(said) if said[:1] in b"[{" else said.decode(), example)


def assert_shaped(found: Any, example: Any) -> None:
    """It has the example's keys, and values of their types."""
    assert type(found) is type(example), (found, example)
    if isinstance(example, dict):
        for key, value in example.items():
            if value is not None:
                assert_shaped(found[key], value)
    elif isinstance(example, list) and example:
        assert_shaped(found[0], example[0])


def test_page_for_people_shows_every_operation_and_loads_nothing(app: FastAPI) -> None:
    status, headers, body = asyncio.run(answer_of(app, Sent("GET", "/docs")))
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    text = html.unescape(body.decode())
    for path, method, _ in operations(app.openapi()):
        assert f"<h2>{method.upper()} {path}</h2>" in text
    assert "src=" not in text
    assert "href=" not in text
    assert "<script" not in text


# With keys on

INFER, INFER_TOKEN = kept.mint("phone")
ADMIN, ADMIN_TOKEN = kept.mint("boss", ("admin",))
SENT_AS = {"bearer": ("authorization", "Bearer "), "header": ("x-api-key", "")}
"""A header and what stands before the token in it."""


@pytest.fixture(scope="module")
def guarded() -> Client:
    return Client(ranked(1), ring=Ring(Keys(keys=(INFER, ADMIN))))


def sent(client: Client, method: str, address: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, Any]:
    status, said, _ = asyncio.run(client.send(method, address, client._body([body], 0.0), headers))
    return status, said


def commands(page: str) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """Method, address, headers and body of each command on the page, as a shell would have curl send them."""
    for text in re.findall(r"<pre>(curl .*?)</pre>", page, re.DOTALL):
        line = html.unescape(text).replace("$HOST", "").replace("$VENTRAL_KEY", ADMIN_TOKEN)
        curl, x, method, address, *options = shlex.split(line)
        assert (curl, x) == ("curl", "-X")
        given = list(zip(options[::2], options[1::2], strict=True))
        assert {option for option, _ in given} <= {"-H", "-d"}
        headers = dict(value.split(": ", 1) for option, value in given if option == "-H")
        yield method, address, headers, "".join(value for option, value in given if option == "-d").encode()


def test_every_command_of_the_page_works_as_it_stands_with_a_key_of_scope_admin(guarded: Client) -> None:
    status, page = sent(guarded, "GET", "/docs", {"authorization": f"Bearer {ADMIN_TOKEN}"})
    assert status == 200
    assert ", and VENTRAL_KEY, a key of scope admin" in page.decode().partition("<h2>")[0]
    tried = list(commands(page.decode()))
    assert len(tried) == len(list(operations(guarded.app.openapi())))
    for method, address, headers, body in tried:
        status, said = sent(guarded, method, address, headers, body)
        assert status == (400 if address.endswith("load") else 200), (address, said)


def test_each_operation_says_the_key_that_it_asks_for(guarded: Client) -> None:
    document = guarded.app.openapi()
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    scopes = set[str]()
    for path, method, operation in operations(document):
        address = path.format(model="digits", version="3")
        ways = {name: scope for way in operation["security"] for name, (scope,) in way.items()}
        assert ways.keys() in (set(), set(SENT_AS)), path
        said = f"a key of scope {ways['bearer']}" if ways else "no key"
        assert operation["description"].endswith(f"\n\nAsks for {said}.")
        opens = {"infer": [401, 200, 200], "admin": [401, 403, 200]}[ways["bearer"]] if ways else [200] * 3
        for header, before in SENT_AS.values():
            given = [{}, *({header: before + token} for token in (INFER_TOKEN, ADMIN_TOKEN))]
            found = [sent(guarded, method.upper(), address, one)[0] for one in given]
            assert [status if status in {401, 403} else 200 for status in found] == opens, path
        scopes |= set(ways.values()) or {"none"}
    assert scopes == {"none", "infer", "admin"}


def test_without_keys_nothing_is_said_of_them(app: FastAPI) -> None:
    text = json.dumps(app.openapi())
    assert [word for word in ("security", "scope", "Bearer") if word in text] == []
    _, _, page = asyncio.run(answer_of(app, Sent("GET", "/docs")))
    assert b"<p>Every command works as it stands; set HOST" in page
    assert b"VENTRAL_KEY" not in page
