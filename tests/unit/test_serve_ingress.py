"""The house's own routes on no server at all: limits and words."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import json
import zlib
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from serve.schemas import Refused, Wanted
from tests.asgi import Client, ranked


def test_predict_joins_the_body_and_names_the_version_that_answered() -> None:
    client = Client(ranked(2))
    status, body, _ = asyncio.run(client.post("/predict/digits?top_k=2", [b"ab", b"", b"c"]))
    assert status == 200
    assert client.models.asked == [("digits", (b"abc",), Wanted(top_k=2))]
    assert body["model"] == {"name": "digits", "version": "3", "alias": "champion"}
    assert body["predictions"][1] == {"label": 1, "class_name": "1", "score": 0.1}
    assert body["timing_ms"] == {"decode": 1.0, "queue": 2.0, "infer": 3.0}


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_predict_of_any_number_of_objects_answers_with_all_of_them(count: int) -> None:
    found = dataclasses.replace(ranked(count), boxes=tuple((float(at), 0.5, at + 1.5, 9.0) for at in range(count)))
    status, body, _ = asyncio.run(Client(found).post("/predict/boxes", [b"x"]))
    assert (status, len(body["predictions"])) == (200, count)
    assert [row["box"] for row in body["predictions"]] == [[at, 0.5, at + 1.5, 9] for at in range(count)]


@pytest.mark.parametrize("wanted", ["2000", "0"])
def test_predict_of_more_objects_than_a_request_may_ask_for_is_refused(wanted: str) -> None:
    client = Client(ranked(0))
    status, body, _ = asyncio.run(client.post(f"/predict/boxes?max_detections={wanted}", [b"x"]))
    assert (status, body["code"]) == (422, "query")
    assert "max_detections" in body["error"]
    assert not client.models.asked


def test_predict_without_top_k_asks_for_five_or_all_classes() -> None:
    client = Client(ranked(3))
    asyncio.run(client.post("/predict/digits", [b"x"]))
    asyncio.run(client.post("/predict/flowers", [b"x"]))
    assert [wanted.top_k for *_, wanted in client.models.asked] == [5, 3]


@pytest.mark.parametrize(
    ("answer", "status", "code", "retry"),
    [
        (Refused("format", "no"), 415, "image_format", None),
        (Refused("pixels", "no"), 422, "image_pixels", None),
        (BackPressureError(9, 8), 429, "overloaded", "1"),
        (ValueError("secret /srv/path"), 500, "internal", None),
        (TimeoutError(), 504, "timeout", "1"),
    ],
)
def test_predict_that_a_model_does_not_answer_becomes_a_problem(
    answer: Refused | Exception, status: int, code: str, retry: str | None
) -> None:
    found, body, headers = asyncio.run(Client(answer).post("/predict/digits", [b"x"], headers={"x-request-id": "r1"}))
    assert (found, body["code"], body["request_id"]) == (status, code, "r1")
    assert headers.get("retry-after") == retry
    assert "secret" not in body["error"]


def test_predict_of_a_too_large_body_is_refused_before_the_rest_is_read() -> None:
    client = Client(ranked(1), max_body_bytes=4)
    assert asyncio.run(client.post("/predict/digits", [b"abcd"]))[0] == 200
    endless = [b"abc"] * 10_000
    status, body, _ = asyncio.run(client.post("/predict/digits", endless, pause_s=0.01))  # 100 s, were it read
    assert (status, body["code"]) == (413, "too_large")
    status, *_ = asyncio.run(client.post("/predict/digits", [b"x"] * 100, headers={"content-length": "5"}))
    assert status == 413
    assert len(client.models.asked) == 1


def test_predict_of_a_body_that_does_not_arrive_ends_in_time() -> None:
    client = Client(ranked(1), body_s=0.05)
    status, body, _ = asyncio.run(client.post("/predict/digits", [b"x"] * 100, pause_s=0.02))
    assert (status, body["code"]) == (408, "slow_body")


def test_predict_of_a_model_that_takes_too_long_ends_in_time() -> None:
    status, body, _ = asyncio.run(Client(60.0, answer_s=0.05).post("/predict/digits", [b"x"]))
    assert (status, body["code"]) == (504, "timeout")


def test_predict_beyond_the_requests_in_hand_is_refused_and_room_comes_back() -> None:
    client = Client(0.05, max_inflight=2)

    async def three_then_one() -> list[int]:
        first = await asyncio.gather(*(client.post("/predict/digits", [b"x"]) for _ in range(3)))
        last = await client.post("/predict/digits", [b"x"])
        return [status for status, *_ in (*first, last)]

    assert asyncio.run(three_then_one()) == [200, 200, 429, 200]


@pytest.mark.parametrize(
    ("error", "status", "waiting"), [(TimeoutError(), 503, ["flowers"]), (BackPressureError(9, 8), 200, [])]
)
def test_readyz_names_models_that_are_not_loaded_but_not_those_that_are_busy(
    error: Exception, status: int, waiting: list[str]
) -> None:
    client = Client(error)
    found, body, _ = asyncio.run(client.send("GET", "/readyz", Client._body([b""], 0.0), {}))
    assert (found, body) == (status, {"ready": not waiting, "waiting_for": waiting})


JSON = {"content-type": "application/json; charset=utf-8"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


def as_json(*images: bytes) -> list[bytes]:
    return [json.dumps({"images": [base64.b64encode(data).decode() for data in images]}).encode()]


def form(*parts: tuple[str, bytes]) -> list[bytes]:
    """Each with what follows its name; sent byte by byte."""
    text = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="image"' + more.encode() + b"\r\n\r\n" + data + b"\r\n"
        for more, data in parts
    )
    return [bytes([one]) for one in text + b"--b--\r\n"]


def as_files(*images: bytes) -> list[bytes]:
    return form(*(('; filename="a.jpg"', data) for data in images))


@pytest.mark.parametrize(("pack", "headers"), [(as_json, JSON), (as_files, FORM)])
def test_several_images_are_answered_in_their_order(pack: Any, headers: dict[str, str]) -> None:
    client = Client(ranked(2))
    for images in ((b"\x00\xff", b"two\r\n", b"3"), (b"alone",)):
        status, body, _ = asyncio.run(client.post("/predict/digits?top_k=2", pack(*images), headers=headers))
        assert (status, client.models.asked[-1][1]) == (200, images)
        assert [len(result["predictions"]) for result in body["results"]] == [2] * len(images)
        assert body["model"]["version"] == "3"
        assert set(body["results"][0]) == {"predictions", "timing_ms"}


@pytest.mark.parametrize(("pack", "headers"), [(as_json, JSON), (as_files, FORM)])
def test_one_bad_image_of_several_is_named(pack: Any, headers: dict[str, str]) -> None:
    status, body, _ = asyncio.run(Client(ranked(1)).post("/predict/digits", pack(b"a", b"bad"), headers=headers))
    assert (status, body["code"], body["error"]) == (422, "image_truncated", "images.1: ends early")
    status, body, _ = asyncio.run(Client(ranked(1)).post("/predict/digits", [b"bad"]))
    assert (status, body["error"]) == (422, "ends early")


@pytest.mark.parametrize(
    ("chunks", "headers", "status", "code", "words"),
    [
        (as_json(), JSON, 400, "image_empty", "got none"),
        (as_json(b"a", b""), JSON, 422, "base64", "images.1"),
        (as_json(*[b"a"] * 5), JSON, 413, "too_many_images", "at most 4 images in a request, got 5"),
        ([b'{"images": [' + b"0," * 60_000 + b"0]}"], JSON, 413, "too_many_images", "got 60001"),
        ([b'{"images": ["YQ=="], "' + b"x" * 100_000 + b'": 0}'], JSON, 400, "json", "no other key"),
        ([b"[]"], JSON, 400, "json", "expected a JSON object"),
        ([b'{"images": NaN}'], JSON, 400, "json", "body"),
        ([b'{"images": ["&&&&"]}'], JSON, 422, "base64", "images.0"),
        ([b'{"images": ["YQ==", "YQ"]}'], JSON, 422, "base64", "images.1"),
        ([b'{"images": ["YQ==", 3]}'], JSON, 422, "base64", "images.1"),
        ([b'{"images": ["YQ=="], "top_k": 3}'], JSON, 400, "json", "no other key"),
        ([b"[" * 100_000], JSON, 400, "json", "body"),
        ([b'{"images": ["\xff"]}'], JSON, 400, "json", "body"),
        ([b"{"], JSON, 400, "json", "body"),
        ([b""], JSON, 400, "json", "body"),
        (form(), FORM, 400, "image_empty", "got no part"),
        (as_files(b"a", b""), FORM, 400, "image_empty", "an empty one"),
        (as_files(*[b"a"] * 5), FORM, 413, "too_many_images", "at most 4"),
        (form(("", b"a")), FORM, 400, "multipart", "all files"),
        (as_files(b"a", b"b")[:-8], FORM, 400, "multipart", "cut short"),
        (as_files(b"a"), {"content-type": FORM["content-type"] + "; charset=undefined"}, 400, "multipart", "charset"),
        ([b"no boundary in it"], FORM, 400, "multipart", "all files"),
        ([b"x"], {"content-type": "multipart/form-data"}, 400, "multipart", "boundary"),
        ([b"x"], {"content-encoding": "br"}, 415, "encoding", "expected gzip, deflate or a plain body"),
        ([b"x"], {"content-encoding": "gzip"}, 400, "encoding", "not in its Content-Encoding"),
        ([gzip.compress(b"xyz")[:-3]], {"content-encoding": "gzip"}, 400, "encoding", "cut short"),
        ([gzip.compress(b"xyz"), b"more"], {"content-encoding": "gzip"}, 400, "encoding", "cut short"),
        ([gzip.compress(b"")], {"content-encoding": "gzip"}, 400, "image_empty", "no bytes"),
        ([zlib.compress(b"0" * 10**8)], {"content-encoding": "deflate"}, 413, "too_large", "larger than 200000 bytes"),
    ],
)
def test_body_that_is_not_what_it_says_is_refused(
    chunks: list[bytes], headers: dict[str, str], status: int, code: str, words: str
) -> None:
    client = Client(ranked(1), max_images=4, max_body_bytes=200_000)
    found, body, _ = asyncio.run(client.post("/predict/digits", chunks, headers=headers))
    assert (found, body["code"]) == (status, code)
    assert words in body["error"]
    assert len(body["error"]) < 300
    assert not client.models.asked


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZip", gzip.compress)]
)
def test_compressed_body_is_read_as_what_it_holds(encoding: str, pack: Any) -> None:
    client, image = Client(ranked(1)), bytes(range(256)) * 400
    chunks = [bytes([one]) for one in pack(image)]
    assert asyncio.run(client.post("/predict/digits", chunks, headers={"content-encoding": encoding}))[0] == 200
    assert client.models.asked[0][1] == (image,)


def test_images_of_all_requests_are_counted_against_the_room() -> None:
    client = Client(0.05, max_inflight=4)

    async def three_and_two_then_four() -> list[int]:
        posts = (client.post("/predict/digits", as_json(*[b"a"] * count), headers=JSON) for count in (3, 2))
        first = await asyncio.gather(*posts)
        last = await client.post("/predict/digits", as_json(*[b"a"] * 4), headers=JSON)
        return [status for status, *_ in (*first, last)]

    assert asyncio.run(three_and_two_then_four()) == [200, 429, 200]


def test_version_and_alias_in_the_path_are_those_that_are_served() -> None:
    client = Client(ranked(1))

    def ask(path: str) -> tuple[int, str]:
        status, body, _ = asyncio.run(client.post(path, [b"x"]))
        return status, body.get("error", "")

    for path in ("digits@champion", "digits/versions/3", "digits@champion/versions/3", "flowers/versions/1"):
        assert ask(f"/predict/{path}")[0] == 200
    said = "digits: {} is not served, version 3 (champion) is."
    assert ask("/predict/digits@challenger") == (404, said.format("alias challenger"))
    assert ask("/predict/digits/versions/2") == (404, said.format("version 2"))
    assert ask("/predict/flowers@champion") == (404, "flowers: alias champion is not served, version 1 is.")
    assert ask("/predict/digit@champion")[0] == 404


def test_what_a_detector_is_asked_for_reaches_it() -> None:
    client = Client(dataclasses.replace(ranked(0), boxes=()))
    asyncio.run(client.post("/predict/boxes?iou_threshold=0.3&score_threshold=0&max_detections=7", [b"x"]))
    asyncio.run(client.post("/predict/boxes", [b"x"]))
    assert [wanted for *_, wanted in client.models.asked] == [Wanted(3, 0.0, 0.3, 7), Wanted(3)]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("digits?iou_threshold=0.3", "query.iou_threshold: digits is for classification"),
        ("boxes?top_k=1", "query.top_k: boxes is for detection"),
        ("boxes?iou_threshold=1.5", "query.iou_threshold"),
        ("boxes?score_threshold=nan", "query.score_threshold"),
        ("boxes?threshold=0.3", "query.threshold"),
    ],
)
def test_query_that_a_model_has_no_use_for_is_refused(path: str, words: str) -> None:
    status, body, _ = asyncio.run(Client(ranked(1)).post(f"/predict/{path}", [b"x"]))
    assert (status, body["code"]) == (422, "query")
    assert words in body["error"]


ACCEPTED = {
    "image/png": True,
    "image/png;q=1, */*": True,
    "image/png, application/json": False,
    "image/png, application/json; q=0.9": True,
    "IMAGE/PNG;Q=0.2,application/json;charset=utf-8;q=0.3": False,
    "image/png;q=0": False,
    "image/png;q=0.1, */*": False,
    "image/png;q=0.2, application/*;q=0.9": False,
    "image/png, */*;q=0.5, application/json;q=0.9": True,
    "image/png;q=much, */*": False,
    "image/*": False,
    "": False,
}


def test_picture_is_answered_where_it_is_wanted_more_than_json() -> None:
    client = Client(dataclasses.replace(ranked(0), boxes=(), picture=b"PNG"))
    for accept, wanted in ACCEPTED.items():
        status, body, headers = asyncio.run(client.post("/predict/boxes", [b"x"], headers={"accept": accept}))
        assert (status, client.models.asked[-1][2].picture) == (200, wanted)
        assert (headers["content-type"] == "image/png") == wanted == (body == b"PNG")


@pytest.mark.parametrize(
    ("model", "chunks", "headers", "words"),
    [("digits", [b"x"], {}, "has no boxes to draw"), ("boxes", as_json(b"a", b"b"), JSON, "got 2")],
)
def test_picture_that_cannot_be_drawn_is_refused(model: str, chunks: Any, headers: Any, words: str) -> None:
    post = Client(ranked(1)).post(f"/predict/{model}", chunks, headers=headers | {"accept": "image/png"})
    status, body, _ = asyncio.run(post)
    assert (status, body["code"]) == (406, "picture")
    assert words in body["error"]
