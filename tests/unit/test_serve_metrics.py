"""What is counted, logged and traced of the endpoint's requests, on no server at all; and the dashboard."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics, scrape
from serve.metrics import (
    IMAGES,
    IN_HAND,
    REJECTS,
    REQUESTS,
    SERVED,
    SPENT,
    STAGE,
    TROUBLE,
    WAITING,
    Load,
    Metric,
    Reading,
)
from serve.roster import Standing
from serve.schemas import Refused
from serve.tracing import Trace, trace_of
from serve.watching import LOGGER, Watch
from tests.asgi import SERVED as MODELS
from tests.asgi import Client, ranked

DASHBOARD = Path(__file__).parents[2] / "serve" / "grafana.json"
RAYS_OWN = {"ray_serve_deployment_replica_healthy", "ray_serve_autoscaling_target_replicas"}
"""Seen on an agent of Ray 2.60's."""
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
DIGITS = ("digits", "3")


class Counted:
    """Keeps everything in this process."""

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, ...]] = Counter()
        self.seen: Counter[tuple[str, ...]] = Counter()
        self.sources: list[Callable[[], Iterable[Reading]]] = []

    def note(self, metric: Metric, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels)
        self.sums[metric.name, *labels] += value  # type: ignore[assignment]  # seconds too
        self.seen[metric.name, *labels] += 1

    def watch(self, source: Callable[[], Iterable[Reading]]) -> None:
        self.sources.append(source)

    def of(self, metric: Metric) -> dict[tuple[str, ...], float]:
        return {
            labels: value
            for (name, *labels_), value in self.sums.items()
            if name == metric.name
            for labels in [tuple(labels_)]
        }

    def gauges(self) -> dict[tuple[str, ...], float]:
        return {(metric.name, *labels): value for source in self.sources for metric, value, labels in source()}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def lines() -> Iterator[list[str]]:
    handler, logger = Lines(), logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def shared() -> tuple[Client, Counted]:
    """For properties: making an application takes longer than many requests."""
    return watched()


def watched(answer: Any = None, **limits: Any) -> tuple[Client, Counted]:
    meter = Counted()
    return Client(ranked(2) if answer is None else answer, watch=Watch(meter, log=True), **limits), meter


def post(client: Client, path: str, body: bytes = b"x", **headers: str) -> tuple[int, Any, dict[str, str]]:
    return asyncio.run(
        client.post(path, [body], headers={key.replace("_", "-"): value for key, value in headers.items()})
    )


def several(*images: str) -> bytes:
    return json.dumps({"images": images}).encode()


def test_requests_are_counted_by_route_version_outcome_and_code() -> None:
    client, meter = watched()
    for _ in range(3):
        post(client, "/predict/digits")
    post(client, "/predict/digits?top_k=99")
    post(client, "/predict/digits/versions/3", b"bad")
    post(client, "/predict/nobody")
    post(client, "/nowhere/at/all")
    predict, version = "/predict/{model}", "/predict/{model}/versions/{version}"
    assert meter.of(REQUESTS) == {
        (predict, *DIGITS, "2xx", "ok"): 3,
        (predict, *DIGITS, "4xx", "query"): 1,
        (version, *DIGITS, "4xx", "image_truncated"): 1,
        (predict, "-", "-", "4xx", "unknown_model"): 1,
        ("-", "-", "-", "4xx", "not_found"): 1,
    }


def test_images_and_stages_of_one_request_are_counted_for_each_image() -> None:
    client, meter = watched()
    post(client, "/predict/digits", several("eA==", "eQ==", "eg=="), content_type="application/json")
    assert meter.of(IMAGES) == {DIGITS: 3}
    assert {labels[-1]: count for labels, count in meter.seen.items() if labels[0] == STAGE.name} == {
        "decode": 3,
        "queue": 3,
        "infer": 3,
        "total": 1,
    }
    total_s = meter.of(STAGE)[*DIGITS, "total"]
    assert 0 < total_s < 30
    expected = {"decode": 0.003, "queue": 0.006, "infer": 0.009, "total": total_s}
    assert meter.of(STAGE) == pytest.approx({(*DIGITS, stage): value for stage, value in expected.items()})
    assert meter.of(SPENT) == pytest.approx(meter.of(STAGE))


def test_images_that_are_none_are_counted_by_reason_and_their_request_has_no_total() -> None:
    client, meter = watched()
    client.models.by_image[b"huge"] = Refused("pixels", "too many")
    post(client, "/predict/digits", several("YmFk", "YmFk", "aHVnZQ==", "eA=="), content_type="application/json")
    assert meter.of(REJECTS) == {(*DIGITS, "truncated"): 2, (*DIGITS, "pixels"): 1}
    assert meter.of(IMAGES) == {DIGITS: 1}
    assert (*DIGITS, "total") not in meter.of(STAGE)


def test_request_that_no_model_answered_in_time_is_a_timeout_and_no_image() -> None:
    client, meter = watched(60.0, answer_s=0.01)
    _, _, headers = post(client, "/predict/digits")
    assert meter.of(REQUESTS) == {("/predict/{model}", *DIGITS, "5xx", "timeout"): 1}
    assert not meter.of(IMAGES)
    assert "x-model-version" not in headers


def test_error_that_nobody_foresaw_is_answered_counted_and_given_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    client, meter = watched()
    monkeypatch.setattr("serve.ingress._shown", lambda *_: 1 / 0)
    status, body, headers = post(client, "/predict/digits", x_request_id="r1")
    assert (status, body["code"], headers["x-request-id"]) == (500, "internal", "r1")
    assert meter.of(REQUESTS) == {("/predict/{model}", *DIGITS, "5xx", "internal"): 1}


def test_client_that_goes_away_is_counted_as_gone() -> None:
    client, meter = watched(60.0)

    async def give_up() -> None:
        task = asyncio.create_task(client.post("/predict/digits", [b"x"]))
        while not client.models.asked:
            await asyncio.sleep(0)
        assert meter.gauges()[IN_HAND.name,] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert meter.of(REQUESTS) == {("/predict/{model}", *DIGITS, "4xx", "disconnected"): 1}
    assert meter.gauges()[IN_HAND.name,] == 0


def test_gauges_name_every_version_that_is_served() -> None:
    _, meter = watched()
    found = {labels for labels in meter.gauges() if labels[0] == SERVED.name}
    assert found == {(SERVED.name, model.name, model.version, model.alias or "") for model in MODELS}


@bounded(max_examples=20)
@given(name=st.text(min_size=1).filter(lambda text: "/" not in text and "?" not in text), id_=st.text())
def test_text_of_clients_never_becomes_a_label(shared: tuple[Client, Counted], name: str, id_: str) -> None:
    client, meter = shared
    meter.sums.clear()
    path = f"/predict/{name}-x/versions/{name}?model={name}"
    headers = {"x-request-id": id_, "traceparent": id_, "content-type": id_, "X-Amzn-SageMaker-Target-Model": name}
    asyncio.run(client.send(name, path, Client._body([b"x"], 0.0), headers))
    asyncio.run(client.send("POST", path, Client._body([b"x"], 0.0), headers))
    asyncio.run(client.send("POST", "/invocations", Client._body([b"x"], 0.0), headers))
    known = {"-", "/predict/{model}/versions/{version}", "/invocations", "4xx", "not_found", "unknown_model", "query"}
    assert {label for labels in meter.of(REQUESTS) for label in labels} <= known | {"method"}


def test_log_line_says_who_answered_what_and_how_long_it_took(lines: list[str]) -> None:
    client, _ = watched()
    post(client, "/predict/digits?top_k=2", b"secret", x_request_id="r1", traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    said = json.loads(lines[-1])
    assert said.pop("time").endswith("+00:00")
    assert said.pop("bytes_out") > 100
    assert said["ms"].pop("total") > 0
    assert said == {
        "request_id": "r1",
        "trace_id": TRACE_ID,
        "method": "POST",
        "path": "/predict/{model}",
        "model": "digits",
        "version": "3",
        "status": 200,
        "code": "ok",
        "images": 1,
        "ms": {"decode": 1.0, "queue": 2.0, "infer": 3.0},
        "bytes_in": 6,
    }


@bounded(max_examples=40)
@given(text=st.text(), head=st.text(), method=st.text(min_size=1))
def test_log_line_of_a_hostile_request_is_one_short_line_of_json(
    shared: tuple[Client, Counted], lines: list[str], text: str, head: str, method: str
) -> None:
    client, _ = shared
    headers = {"x-request-id": head + "\n", "traceparent": head, "tracestate": head, "authorization": "Bearer k3y"}
    hostile = f"/{text}\r\n\x85\u2028{text * 99}?key=k3y"
    _, _, answered = asyncio.run(client.send(method, hostile, Client._body([b"k3y"], 0.0), headers))
    line = lines[-1]
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 2500
    assert "k3y" not in line
    said = json.loads(line)
    assert said["status"] in {404, 405}
    assert said["request_id"] == answered["x-request-id"]
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", answered["x-request-id"])


def test_application_that_is_not_to_log_logs_nothing(lines: list[str]) -> None:
    before = len(lines)
    post(Client(ranked(1), watch=Watch(Counted())), "/predict/digits")
    assert len(lines) == before


def test_every_answer_names_its_request_and_a_model_that_answered_its_version() -> None:
    client, _ = watched()
    for path, version in (("/predict/digits", "3"), ("/predict/nobody", None), ("/nowhere", None)):
        _, body, headers = post(client, path, x_request_id="a-1")
        assert (body["request_id"], headers["x-request-id"]) == ("a-1", "a-1")
        assert headers.get("x-model-version") == version
    _, body, headers = post(client, "/predict/digits", x_request_id="no id\x85")
    assert body["request_id"] == headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", body["request_id"])


def test_id_that_ray_sends_back_itself_is_not_sent_twice() -> None:
    client = Client(ranked(1), watch=Watch(under_ray=True))
    assert "x-request-id" not in post(client, "/predict/digits", x_request_id="a-1")[2]
    assert "x-request-id" in post(client, "/predict/digits", x_request_id="no id")[2]


@pytest.mark.parametrize(
    ("given_", "is_sampled"),
    [
        (f"00-{TRACE_ID}-{PARENT_ID}-01", True),
        (f"00-{TRACE_ID}-{PARENT_ID}-00", False),
        (f"00-{TRACE_ID}-{PARENT_ID}-ff", True),
        (f"00-{TRACE_ID}-{PARENT_ID}-02", False),
        (f" 00-{TRACE_ID}-{PARENT_ID}-01\t", True),
        (f"cc-{TRACE_ID}-{PARENT_ID}-01", True),
        (f"cc-{TRACE_ID}-{PARENT_ID}-01-what-the-future-will-be-like", True),
    ],
)
def test_traceparent_that_is_valid_is_continued_by_a_new_span(given_: str, is_sampled: bool) -> None:
    _, _, headers = post(watched()[0], "/predict/digits", traceparent=given_)
    version, trace_id, span_id, flags = headers["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE_ID, "01" if is_sampled else "00")
    assert span_id not in {PARENT_ID, "0" * 16}
    assert len(span_id) == 16


@pytest.mark.parametrize(
    "given_",
    [
        "",
        "hello",
        f"00-{TRACE_ID}-{PARENT_ID}",
        f"00-{TRACE_ID}-{PARENT_ID}-1",
        f"00-{TRACE_ID}-{PARENT_ID}-01-",
        f"00-{TRACE_ID}-{PARENT_ID}-01-more",
        f"cc-{TRACE_ID}-{PARENT_ID}-01.more",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        f"0-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{TRACE_ID.upper()}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID.upper()}-01",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[1:]}-{PARENT_ID}-01",
        f"00-{TRACE_ID}0-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-0g",
        f"00_{TRACE_ID}_{PARENT_ID}_01",
    ],
)
def test_traceparent_that_is_not_valid_begins_a_new_trace(given_: str) -> None:
    found = trace_of([(b"traceparent", given_.encode()), (b"tracestate", b"a=1")])
    assert re.fullmatch("[0-9a-f]{32}", found.trace_id)
    assert found.trace_id != TRACE_ID
    assert (found.is_sampled, found.state) == (False, b"")


def test_traceparent_given_twice_begins_a_new_trace() -> None:
    parent = (b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode())
    assert trace_of([parent]).trace_id == TRACE_ID
    assert trace_of([parent, parent]).trace_id != TRACE_ID


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1", "b=2"], "a=1,b=2"),
        (["a=1 , ,b=2"], "a=1,b=2"),
        (["fw529a3039@dt=FfAAA_bc*d/e"], "fw529a3039@dt=FfAAA_bc*d/e"),
        ([",".join(f"k{at}=v" for at in range(32))], ",".join(f"k{at}=v" for at in range(32))),
        ([",".join(f"k{at}=v" for at in range(33))], None),
        ([f"a={'x' * 256}"], f"a={'x' * 256}"),
        ([f"a={'x' * 257}"], None),
        ([f"a={'x' * 200},b={'x' * 200},c={'x' * 200}"], None),
        (["a=1,a=2"], None),
        (["A=1"], None),
        (["a"], None),
        (["a=1=2"], None),
        (["a=\x01"], None),
        (["a=\xe9"], None),
    ],
)
def test_tracestate_is_passed_on_if_it_is_valid_and_short(given_: list[str], kept: str | None) -> None:
    parent = (b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode())
    found = trace_of([parent, *((b"tracestate", text.encode()) for text in given_)])
    assert found.trace_id == TRACE_ID
    assert dict(found.headers()).get(b"tracestate") == (None if kept is None else kept.encode())


def test_two_requests_have_two_traces() -> None:
    assert trace_of([])[:2] != trace_of([])[:2]
    assert Trace("1" * 32, "2" * 16, True).headers() == [(b"traceparent", f"00-{'1' * 32}-{'2' * 16}-01".encode())]


def test_replica_counts_images_that_wait_but_not_those_in_a_batch() -> None:
    meter = Counted()
    load = Load(meter, MODELS[0])

    def waiting() -> float:
        return meter.gauges()[WAITING.name, *DIGITS]

    with load.image(), load.image(), load.image():
        assert waiting() == 3
        with load.batch(2):
            assert waiting() == 1
        assert meter.sums["ventral_batch_images", *DIGITS] == 2
    assert waiting() == 0


def test_ray_is_given_sums_of_counters_each_observation_and_gauges_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    given_: list[tuple[Any, ...]] = []
    monkeypatch.setattr(metrics, "HAND_OVER_S", 3600.0)
    monkeypatch.setattr(metrics, "_writer", lambda metric: lambda value, labels: given_.append((metric, value, labels)))
    meter = metrics.RayMeter()
    meter.watch(lambda: [(IN_HAND, 7, ())])
    for value in (1, 2, 0):
        meter.note(IMAGES, value, *DIGITS)
    meter.note(IMAGES, 0, "flowers", "1")
    meter.note(STAGE, 0.5, *DIGITS, "total")
    meter.hand_over()
    meter.hand_over()
    gauge = (IN_HAND, 7, ())
    assert given_ == [(STAGE, 0.5, (*DIGITS, "total")), (IMAGES, 3, DIGITS), gauge, gauge]


AGENT = """# HELP ray_other_total x
# TYPE ray_other_total counter
ray_other_total{a="1"} 3.0
# HELP ray_ventral_images_total x
# TYPE ray_ventral_images_total counter
ray_ventral_images_total{WorkerId="%(id)s"} 5.0
# HELP ray_ventral_stage_seconds x
# TYPE ray_ventral_stage_seconds histogram
ray_ventral_stage_seconds_bucket{WorkerId="%(id)s",le="+Inf"} 2.0
ray_ventral_stage_seconds_count{WorkerId="%(id)s"} 2.0
ray_ventral_stage_seconds_sum{WorkerId="%(id)s"} 55.0
"""


def test_scrape_of_two_agents_is_one_text_without_estimates() -> None:
    text = scrape.merged([AGENT % {"id": "a"}, AGENT % {"id": "b"}])
    assert text.count("# TYPE") == text.count("# HELP") == 2
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    assert [sample.value for sample in found["ray_ventral_images"]] == [5, 5]
    assert [sample.name for sample in found["ray_ventral_stage_seconds"]] == [
        f"ray_ventral_stage_seconds_{part}" for part in ("bucket", "count") * 2
    ]
    assert scrape.merged([]) == ""


def test_metrics_are_named_as_prometheus_has_it() -> None:
    for metric in metrics.METRICS:
        assert re.fullmatch("ventral_[a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def expressions(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from (value for key, value in node.items() if key in {"expr", "query"} and isinstance(value, str))
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from expressions(child)


def test_dashboard_asks_only_for_metrics_that_there_are() -> None:
    exported = set(RAYS_OWN)
    for metric in metrics.METRICS:
        exported |= {f"ray_{metric.name}{part}" for part in (["_bucket", "_count"] if metric.buckets else [""])}
    asked = {name for text in expressions(json.loads(DASHBOARD.read_text())) for name in re.findall(r"\bray_\w+", text)}
    assert asked - exported == set()
    assert asked >= RAYS_OWN
    assert {name.removeprefix("ray_") for name in asked - RAYS_OWN} >= {
        metric.name for metric in metrics.METRICS if not metric.buckets
    }


def test_dashboard_shows_the_replicas_of_versions_which_are_applications_of_their_own() -> None:
    asked = [text for text in expressions(json.loads(DASHBOARD.read_text())) if "ray_serve_" in text]
    for text in asked:
        (pattern,) = re.findall(r'application=~"(.*?)"', text)
        assert all(
            re.fullmatch(pattern, name) for name in ("ventral", "ventral+digits+12+0a1b2c3d")
        )  # as Prometheus does
        assert not re.fullmatch(pattern, "another")


def test_aliases_that_are_not_followed_are_a_gauge() -> None:
    meter = Counted()
    standing = Standing("digits", MODELS[0], troubles={"champion": "the bundle is damaged"})
    Client(ranked(1), watch=Watch(meter), standings=(standing, Standing("flowers", MODELS[1])))
    told = [reading for source in meter.sources for reading in source() if reading[0] == TROUBLE]
    assert told == [(TROUBLE, 1, ("digits", "champion"))]


def test_dashboard_names_no_data_source_but_its_variable() -> None:
    board = json.loads(DASHBOARD.read_text())
    sources = [panel["datasource"]["uid"] for panel in board["panels"]]
    assert set(sources) == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
