"""MLflow's and SageMaker's shapes on no server at all."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from typing import Any

import pytest

from serve.schemas import Wanted
from tests.asgi import SERVED, Client, ranked

JSON = {"content-type": "application/json"}
A, B = (base64.b64encode(data).decode() for data in (b"a", b"b"))
BOTH: list[dict[str, Any]] = [
    {"dataframe_records": [{"image": A}, {"image": B}]},
    {"dataframe_split": {"columns": ["image"], "index": [0, 1], "data": [[A], [B]]}},
    {"instances": [{"image": A}, {"image": B}]},
    {"instances": [A, B]},
    {"inputs": [A, B]},
    {"inputs": {"image": [A, B]}},
]


def post(client: Client, body: Any, path: str = "/invocations?model=digits", **headers: str) -> Any:
    chunks = [body if isinstance(body, bytes) else json.dumps(body).encode()]
    given = {key.replace("_", "-"): value for key, value in headers.items()}
    return asyncio.run(client.post(path, chunks, headers=given or JSON))


@pytest.mark.parametrize("said", BOTH)
def test_mlflows_json_in_any_form_is_answered_as_mlflow_does(said: dict[str, Any]) -> None:
    client = Client(ranked(2))
    status, body, _ = post(client, said | {"params": {"top_k": 2}})
    assert (status, body) == (200, {"predictions": [{"labels": ["0", "1"], "scores": [0.1, 0.1]}] * 2})
    assert client.models.asked == [("digits", (b"a", b"b"), Wanted(top_k=2))]


def test_an_image_as_it_is_is_answered_with_its_boxes() -> None:
    client = Client(dataclasses.replace(ranked(1), boxes=((1.0, 2.0, 3.0, 4.0),)))
    for path, headers in (
        ("/invocations?model=boxes", {"content_type": "image/jpeg"}),
        ("/invocations", {"X_Amzn_SageMaker_Target_Model": "boxes", "content_type": "application/x-image"}),
    ):
        status, body, _ = post(client, b"jpeg", path, **headers)
        assert status == 200
        assert body == {"predictions": [{"labels": ["0"], "scores": [0.1], "boxes": [[1, 2, 3, 4]]}]}
        assert client.models.asked[-1][:2] == ("boxes", (b"jpeg",))


def test_the_only_model_needs_no_name() -> None:
    status, body, _ = post(Client(ranked(1)), {"inputs": [A]}, "/invocations")
    assert (status, body["code"]) == (400, "which_model")
    assert "one of digits, flowers, boxes" in body["error"]
    assert post(Client(ranked(1), served=SERVED[:1]), {"inputs": [A]}, "/invocations")[0] == 200


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (b"{", 400, "body"),
        ({}, 400, "Expected one of dataframe_records"),
        ({"inputs": [A], "instances": [A]}, 400, "Expected one of dataframe_records"),
        ({"inputs": [A], "param": {}}, 400, "Expected one of dataframe_records"),
        ({"inputs": [A], "params": []}, 400, "params as an object"),
        ({"inputs": []}, 400, "at least one"),
        ({"instances": 3}, 400, "instances: expected images"),
        ({"inputs": ["&"]}, 422, "images.0"),
        ({"inputs": [3]}, 422, "images.0"),
        ({"inputs": {"picture": [A]}}, 400, "inputs: expected images in a column 'image'"),
        ({"instances": [A, {"picture": A}]}, 422, "images.1"),
        ({"dataframe_split": {"columns": ["picture"], "data": [[A]]}}, 400, "dataframe_split: expected images"),
        ({"dataframe_split": {"columns": ["image"], "data": [[]]}}, 422, "images.0"),
        ({"dataframe_split": {"columns": ["image"]}}, 400, "dataframe_split: expected images"),
        ({"inputs": [A], "params": {"top_k": 0}}, 400, "params.top_k"),
        ({"inputs": [A], "params": {"temperature": 1}}, 400, "params.temperature"),
        ({"inputs": [A], "params": {"x" * 10_000: 1}}, 400, "params.x"),
        ({"inputs": [A], "params": {"score_threshold": 0.5}}, 400, "params.score_threshold: digits is for"),
        ({"inputs": [A] * 5}, 413, "at most 4 images"),
    ],
)
def test_json_that_is_none_of_mlflows_is_refused(said: Any, status: int, words: str) -> None:
    client = Client(ranked(1), max_images=4)
    found, body, _ = post(client, said)
    assert found == status
    assert words in body["error"]
    assert len(body["error"]) < 300
    assert not client.models.asked


@pytest.mark.parametrize(("answer", "status"), [(ranked(1), 200), (TimeoutError(), 503)])
def test_ping_says_whether_every_model_is_loaded(answer: Any, status: int) -> None:
    client = Client(answer)
    found, body, _ = asyncio.run(client.send("GET", "/ping", Client._body([b""], 0.0), {}))
    assert (found, body) == (status, b"")


def test_a_key_of_the_query_that_is_unknown_is_refused() -> None:
    status, body, _ = post(Client(ranked(1)), {"inputs": [A]}, "/invocations?mdl=digits")
    assert (status, body["code"]) == (422, "query")
    assert "mdl" in body["error"]
