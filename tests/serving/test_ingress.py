"""The endpoint's contract, through real HTTP: HAProxy, ingress, batching, model."""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from jobs._deploy import deploy
from jobs._process import LOOPBACK, Service, _members
from pipeline.errors import ClusterError
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Classification
from tests.serving.load import until

MAX_BODY_BYTES = 6 * 2**20


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]]) -> str:
    limits = {"max_body_bytes": MAX_BODY_BYTES}
    return deploy(ray_head, app_config(limits, batch={"max_size": 8, "wait_ms": 20.0}))


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@pytest.fixture(scope="module")
def post(url: str, session: requests.Session) -> Callable[..., requests.Response]:
    def send(data: Any, path: str = "/predict/tiny", **options: Any) -> requests.Response:
        return session.post(url + path, data=data, timeout=30, **options)

    return send


def expect_problem(response: requests.Response, status: int, code: str) -> str:
    """Check that it is a well-formed refusal, and return its sentence."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "code", "request_id"}
    assert body["code"] == code
    assert "Traceback" not in body["error"]
    assert "/site-packages" not in body["error"]
    return str(body["error"])


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
def test_predict_of_a_picture_answers_as_the_predictor(post: Any, picture: Any, tiny: Bundle, encoding: str) -> None:
    data = picture(1, encoding)
    body = post(data).json()
    expected = Predictor(tiny).predict([data])[0]
    assert isinstance(expected, Classification)
    assert [row["label"] for row in body["predictions"]] == expected.labels[:5].tolist()
    assert [row["score"] for row in body["predictions"]] == pytest.approx(expected.scores[:5].tolist(), abs=1e-6)
    assert [row["class_name"] for row in body["predictions"]] == [f"class {n}" for n in expected.labels[:5]]
    assert body["model"] == {"name": "tiny", "version": tiny.card.weights_sha256[:12], "alias": None}
    assert set(body["timing_ms"]) == {"decode", "queue", "infer"}
    assert min(body["timing_ms"].values()) >= 0


@pytest.mark.parametrize("content_type", ["image/jpeg", "text/plain", "application/octet-stream", None])
def test_predict_with_any_content_type_looks_at_the_bytes_only(post: Any, picture: Any, content_type: str) -> None:
    response = post(picture(2), headers={"Content-Type": content_type} if content_type else {})
    assert response.status_code == 200


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_predict_with_top_k_gives_that_many_classes_best_first(post: Any, picture: Any, top_k: int) -> None:
    rows = post(picture(3), params={"top_k": top_k}).json()["predictions"]
    assert len(rows) == top_k
    assert rows == sorted(rows, key=lambda row: -row["score"])


@pytest.mark.parametrize("top_k", ["0", "-1", "11", "many", "1e3"])
def test_predict_with_top_k_out_of_bounds_is_refused(post: Any, picture: Any, top_k: str) -> None:
    sentence = expect_problem(post(picture(), params={"top_k": top_k}), 422, "query")
    assert "top_k" in sentence


def test_predict_of_an_unknown_model_names_the_known_ones(post: Any, picture: Any) -> None:
    assert "tiny" in expect_problem(post(picture(), "/predict/tinny"), 404, "unknown_model")


def test_other_paths_and_methods_are_refused_as_problems(url: str) -> None:
    expect_problem(requests.get(f"{url}/nothing", timeout=10), 404, "not_found")
    response = requests.get(f"{url}/predict/tiny", timeout=10)
    expect_problem(response, 405, "method")
    assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "image_empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "image_format"),
        (b"GIF89a" + bytes(64), 415, "image_format"),
    ],
)
def test_predict_of_what_is_no_picture_is_refused(post: Any, data: bytes, status: int, code: str) -> None:
    expect_problem(post(data), status, code)


def test_predict_of_half_a_picture_is_refused_with_its_reason(post: Any, picture: Any) -> None:
    data = picture(4, hw=(200, 200))
    expect_problem(post(data[: len(data) // 2]), 422, "image_truncated")


def test_predict_of_a_body_at_the_limit_passes(url: str, picture: Any) -> None:
    # Bytes after a JPEG's end are no part of it; 4 MiB is where Ray's own messages between replicas would end.
    padded = picture(5).ljust(MAX_BODY_BYTES, b"\0")
    assert requests.post(f"{url}/predict/tiny", data=padded, timeout=60).status_code == 200


def test_predict_of_a_body_above_the_limit_is_refused_by_its_length_alone(url: str) -> None:
    # A client that is still sending may see the connection close before it reads the answer; this one waits first.
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/predict/tiny")
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (413, "too_large")
    connection.close()


def test_predict_of_a_body_of_unknown_length_is_cut_off_at_the_limit(url: str) -> None:
    # A client that looks for an answer while it sends; one that sends all first waits once nobody takes more of it.
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /predict/tiny HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    waiting, sent = memoryview(head), 0
    with socket.create_connection((host, int(port))) as connection:
        connection.setblocking(False)
        try:
            while not (ready := select.select([connection], [connection], [], 30))[0]:
                assert ready[1], f"neither an answer nor room for more for 30 s, after {sent} MiB"
                waiting = waiting[connection.send(waiting) :]
                if not waiting:
                    waiting, sent = memoryview(chunk), sent + 1
                assert sent < 64
            assert connection.recv(12) == b"HTTP/1.1 413"
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed before its answer could be read
    assert sent < 64


def test_request_id_of_the_client_comes_back_and_nonsense_is_replaced(post: Any, picture: Any) -> None:
    assert post(picture(), headers={"x-request-id": "try-1.a_B"}).json()["request_id"] == "try-1.a_B"
    assert post(b"", headers={"x-request-id": "try-2"}).json()["request_id"] == "try-2"
    fresh = [post(picture()).json()["request_id"] for _ in range(2)]
    assert fresh[0] != fresh[1]
    strange = post(picture(), headers={"x-request-id": "<b> " + "x" * 200}).json()["request_id"]
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", strange)
    long = post(picture(), headers={"x-request-id": "x" * 129})
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", long.headers["x-request-id"])
    assert long.headers["x-request-id"] == long.json()["request_id"]  # one header, and the same


def test_predict_by_many_clients_at_once_gives_each_its_own_answer(url: str, picture: Any, tiny: Bundle) -> None:
    pictures = [picture(seed) for seed in range(48)]
    pictures[7::12] = [b"not a picture"] * len(pictures[7::12])  # neighbours of a poisoned one still get theirs

    def ask(data: bytes) -> Any:
        return requests.post(f"{url}/predict/tiny", data=data, params={"top_k": 10}, timeout=30).json()

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, pictures))
    for expected, answer in zip(Predictor(tiny).predict(pictures), answers, strict=True):
        if isinstance(expected, Classification):
            assert [row["label"] for row in answer["predictions"]] == expected.labels.tolist()
            scores = [row["score"] for row in answer["predictions"]]
            assert scores == pytest.approx(expected.scores.tolist(), abs=1e-6)
        else:
            assert answer["code"] == "image_format"


def test_health_readiness_and_models_answer(url: str, tiny: Bundle) -> None:
    assert requests.get(f"{url}/healthz", timeout=10).text == "ok"
    ready = requests.get(f"{url}/readyz", timeout=10)
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "waiting_for": []})
    listed = requests.get(f"{url}/models", timeout=10).json()
    (model,) = listed["models"]
    version = tiny.card.weights_sha256[:12]
    told = {"name": "tiny", "version": version, "alias": None}
    also = {"task": "classification", "num_classes": 10, "engine": "eager-fp32", "run_url": None}
    assert model["versions"] == [told | also]
    assert {key: model[key] for key in told} == told
    assert (model["troubles"], model["challenger"]) == ({}, None)


def test_head_with_serve_running_listens_on_loopback_only(url: str, ray_head: Service) -> None:
    # Ray binds one port of every replica, for calls between replicas, to all interfaces; it asks for the token.
    listening = [
        (process.name(), found.laddr)
        for process in set(_members(ray_head))
        for found in process.net_connections()
        if found.status == psutil.CONN_LISTEN
    ]
    assert int(url.rpartition(":")[2]) in {address.port for _, address in listening}
    loopback = {LOOPBACK, f"::ffff:{LOOPBACK}", "::1"}
    open_to_all = [name for name, address in listening if address.ip not in loopback]
    assert len(open_to_all) == len(set(open_to_all))
    assert all(name.startswith("ray::ServeReplica") for name in open_to_all)


@pytest.mark.slow
def test_deploy_of_a_wrong_configuration_fails_with_its_sentence(
    url: str, ray_head: Service, app_config: Callable[..., dict[str, Any]]
) -> None:
    wrong = app_config(batch={"max_sise": 8})
    wrong["applications"][0] |= {"name": "wrong", "route_prefix": "/wrong"}
    right = app_config({"max_body_bytes": MAX_BODY_BYTES}, batch={"max_size": 8, "wait_ms": 20.0})
    wrong["applications"] += right["applications"]
    with pytest.raises(ClusterError, match=r"application 'wrong' did not come up: .*max_sise: unknown key"):
        deploy(ray_head, wrong)
    assert requests.get(f"{url}/healthz", timeout=10).text == "ok"


def test_metrics_show_every_request_once_ray_has_reported_them(
    url: str, post: Any, picture: Any, session: requests.Session
) -> None:
    count = 7

    def counted() -> float:
        answer = session.get(f"{url}/metrics", timeout=30)
        assert answer.status_code == 200, answer.text
        found = {family.name: family.samples for family in text_string_to_metric_families(answer.text)}
        wanted = {"model": "tiny", "route": "/invocations", "status": "2xx", "code": "ok"}
        samples = [one for one in found.get("ray_ventral_requests", []) if wanted.items() <= one.labels.items()]
        return float(sum(one.value for one in samples))

    before = counted()
    for seed in range(count):
        assert post(picture(seed), "/invocations").headers["x-model-version"]
    deadline = time.monotonic() + 60  # a report is due every 2 s
    while counted() < before + count and time.monotonic() < deadline:
        time.sleep(0.2)
    assert counted() == before + count


def test_a_request_is_logged_as_json_as_soon_as_it_is_answered(
    ray_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes]
) -> None:
    config = app_config()
    config["applications"][0]["args"]["log_requests"] = True
    url = deploy(ray_head, config)
    requests.post(f"{url}/predict/tiny", data=picture(), headers={"x-request-id": "logged-1"}, timeout=30)
    assert ray_head.scratch
    logs = ray_head.scratch / "r" / "session_latest" / "logs" / "serve"

    def lines() -> list[str]:
        texts = [path.read_text() for path in logs.glob("replica_ventral_ingress_*.log")]
        return [line for text in texts for line in text.splitlines() if "logged-1" in line]

    until(lambda: bool(lines()), 30)
    said = json.loads(lines()[0][lines()[0].index("{") :])
    assert (said["request_id"], said["model"], said["status"]) == ("logged-1", "tiny", 200)
