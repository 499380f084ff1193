"""The endpoint's own document is true: what schemathesis makes of it, and its examples as they stand."""

from __future__ import annotations

import asyncio
import html
import json
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
