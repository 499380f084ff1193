"""Keys in front of every route, on no server at all: what each asks for, what is refused, how it is counted."""

from __future__ import annotations

import asyncio
import hmac
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.inference import keys as kept
from pipeline.inference.keys import Key, Keys
from serve import exposure, keys, pages
from serve.keys import Access, Ring
from serve.schemas import AppArgs
from tests.asgi import Client, ranked

INFER, INFER_TOKEN = kept.mint("phone")
ADMIN, ADMIN_TOKEN = kept.mint("boss", ("admin",))
NEEDED = {
    **dict.fromkeys(["/healthz", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready", "/"]),
    **{f"/page/{path.name}": None for path in pages.FOLDER.iterdir() if path.name != "index.html"},
    "/models": "infer",
    "/predict/{model}": "infer",
    "/predict/{model}/versions/{version}": "infer",
    "/invocations": "infer",
    "/v2": "infer",
    "/v2/": "infer",
    "/v2/models": "infer",
    "/v2/models/{model}": "infer",
    "/v2/models/{model}/ready": "infer",
    "/v2/models/{model}/infer": "infer",
    "/v2/models/{model}/versions/{version}": "infer",
    "/v2/models/{model}/versions/{version}/ready": "infer",
    "/v2/models/{model}/versions/{version}/infer": "infer",
    "/v2/models/{model}/stats": "admin",
    "/v2/models/{model}/versions/{version}/stats": "admin",
    "/v2/models/stats": "admin",
    "/v2/repository/index": "admin",
    "/v2/repository/models/{model}/load": "admin",
    "/v2/repository/models/{model}/unload": "admin",
    "/openapi.json": "admin",
    "/docs": "admin",
}
"""Every route of the application: a new one is to be decided here too."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.3

    def __call__(self) -> float:
        return self.now_s


class Asker(Client):
    """A client whose bodies may not be read where it says so."""

    def __init__(self, *found: Key, clock: Clock | None = None, source: Path | None = None, answer: Any = None) -> None:
        ring = Ring(source or Keys(keys=found), clock or Clock())
        super().__init__(ranked(1) if answer is None else answer, ring=ring)

    def ask(self, token: str | None = None, path: str = "/models", method: str = "GET", **headers: str) -> Any:
        given = {} if token is None else {"authorization": f"Bearer {token}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        return asyncio.run(self.send(method, path, self._body([b"x"], 0.0), given))

    def status(self, token: str | None = None, path: str = "/models", method: str = "GET") -> int:
        return int(self.ask(token, path, method)[0])


BOTH = Asker(INFER, ADMIN)


class Read(Exception):  # noqa: N818
    """A body was read."""


class Unreadable(AsyncIterator[dict[str, Any]]):
    """A body that nobody may look at."""

    async def __anext__(self) -> dict[str, Any]:
        raise Read


def method_of(route: Any) -> str:
    return str(min(route.methods - {"HEAD"}))


def test_every_route_asks_for_what_was_decided() -> None:
    asker = BOTH
    assert {route.path for route in asker.app.routes} == set(NEEDED)  # type: ignore[attr-defined]
    for route in asker.app.routes:
        path = route.path.format(model="digits", version="3")  # type: ignore[attr-defined]
        needed, method = NEEDED[route.path], method_of(route)  # type: ignore[attr-defined]
        refused = [asker.status(token, path, method) in {401, 403} for token in (None, INFER_TOKEN, ADMIN_TOKEN)]
        assert refused == [needed is not None, needed == "admin", False], (method, path)


@pytest.mark.parametrize(
    "path", ["/nothing", "/healthz/", "/metrics", "/admin/drain", "/predict", "/page/none", "//healthz", "/x/healthz"]
)
def test_what_has_no_route_needs_admin(path: str) -> None:
    asker = BOTH
    assert [asker.status(token, path) for token in (None, INFER_TOKEN, ADMIN_TOKEN)] == [401, 403, 404]


def test_a_path_that_begins_like_a_public_one_is_not_public() -> None:
    for path in ("/healthz/../metrics", "/healthzz", "/ping/x", "/HEALTHZ", "/v2/health/live/../../models/stats"):
        assert BOTH.status(None, path) == 401, path


def test_another_method_of_a_route_needs_what_the_route_needs() -> None:
    asker = Asker(INFER)
    assert asker.status(None, "/healthz", "DELETE") == 405
    assert asker.status(None, "/predict/digits", "GET") == 401
    assert asker.status(INFER_TOKEN, "/predict/digits", "GET") == 405


def test_without_keys_nothing_is_asked_for() -> None:
    client = Client(ranked(1))
    for path in ("/models", "/v2/models/stats", "/openapi.json"):
        assert asyncio.run(client.send("GET", path, client._body([b""], 0.0), {}))[0] == 200


def test_both_headers_carry_a_key_and_the_scheme_has_no_case() -> None:
    asker = Asker(INFER)
    assert asker.ask(x_api_key=INFER_TOKEN)[0] == 200
    assert asker.ask(authorization=f"bEARER  {INFER_TOKEN} ")[0] == 200
    assert asker.ask(INFER_TOKEN, x_api_key=INFER_TOKEN)[0] == 200
    assert asker.ask(authorization="Basic eDp5", x_api_key=INFER_TOKEN)[0] == 200


def test_two_keys_that_disagree_are_refused_though_both_are_good() -> None:
    status, body, _ = BOTH.ask(ADMIN_TOKEN, x_api_key=INFER_TOKEN)
    assert (status, body["code"]) == (401, "wrong_key")


@pytest.mark.parametrize(
    "token",
    [
        "",
        "vk_",
        INFER_TOKEN[:-1],
        INFER_TOKEN + "0",
        INFER_TOKEN[:-1] + ("0" if INFER_TOKEN[-1] != "0" else "1"),
        INFER_TOKEN.upper(),
        f"vk_{INFER.id}_{INFER.hash}",
        f"vk_unknown_{INFER_TOKEN[-64:]}",
        f"vk_nobody_{'0' * 64}",
        f"vk_{ADMIN.id}_{INFER_TOKEN[-64:]}",
        "\u0661" * 64,
        "vk_" * 100_000,
    ],
    ids=range(12),
)
def test_a_token_that_is_not_a_key_is_refused_and_not_repeated(token: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    status, body, headers = BOTH.ask(token, x_request_id="r1")
    assert (status, body["code"], body["request_id"]) == (401, "wrong_key", "r1")
    assert headers["www-authenticate"] == 'Bearer realm="ventral", error="invalid_token"'
    assert len(body["error"]) < 100
    assert len(token) < 4 or (token not in str(body) and token not in caplog.text)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"Authorization"]), st.binary()), max_size=4)
)
def test_random_headers_are_refused_with_401(headers: list[tuple[bytes, bytes]]) -> None:
    for raw in (headers, [(name, b"Bearer " + value) for name, value in headers]):
        status, body, _ = asyncio.run(BOTH.send("GET", "/models", Unreadable(), raw))
        assert (status, body["code"] in {"no_key", "wrong_key"}) == (401, True)


@pytest.mark.parametrize(
    "token", [INFER_TOKEN, f"vk_unknown_{INFER_TOKEN[-64:]}", "nonsense"], ids=["good", "unknown", "nonsense"]
)
def test_each_token_costs_one_comparison_in_constant_time(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = list[tuple[int, int]](), hmac.compare_digest

    def noted(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert Asker(INFER).status(token) == (200 if token == INFER_TOKEN else 401)
    assert compared == [(64, 64)]


@pytest.mark.parametrize("path", ["/predict/digits", "/v2/models/digits/infer", "/invocations"])
def test_a_refused_request_is_answered_before_its_body_is_read(path: str) -> None:
    asker = Asker(ADMIN)
    status, body, headers = asyncio.run(asker.send("POST", path, Unreadable(), {}))
    assert (status, body["code"], set(body)) == (401, "no_key", {"error", "code", "request_id"})
    assert headers["www-authenticate"] == 'Bearer realm="ventral"'
    assert not asker.models.asked


def test_what_is_behind_the_keys_never_sees_one() -> None:
    asker, seen = Asker(INFER), list[Any]()

    async def tell(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    guard = keys.Guard(tell, Ring(Keys(keys=(INFER,)), Clock()))
    raw = [
        (b"authorization", f"Bearer {INFER_TOKEN}".encode()),
        (b"x-api-key", INFER_TOKEN.encode()),
        (b"accept", b"*/*"),
    ]
    scope = {"type": "http", "method": "GET", "path": "/models", "headers": raw, "app": asker.app}
    asyncio.run(guard(scope, Unreadable().__anext__, None))  # type: ignore[arg-type]
    assert seen == [(b"accept", b"*/*")]


def test_a_websocket_without_a_key_is_closed() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/anything", "headers": []}
    asyncio.run(BOTH.app(scope, Unreadable().__anext__, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_rate_lets_a_burst_through_and_then_one_for_each_period() -> None:
    clock = Clock()
    key, token = kept.mint("ci", requests_per_s=0.5, burst=3)
    asker = Asker(key, clock=clock)
    assert [asker.status(token) for _ in range(4)] == [200, 200, 200, 429]
    status, body, headers = asker.ask(token)
    assert (status, body["code"]) == (429, "rate")
    shown = {name: headers[name] for name in headers if name.startswith(("retry", "ratelimit"))}
    assert shown == {
        "retry-after": "2",
        "ratelimit-limit": "3",
        "ratelimit-remaining": "0",
        "ratelimit-reset": "2",
    }
    clock.now_s += 1.9
    assert asker.status(token) == 429
    clock.now_s += 0.1
    assert [asker.status(token) for _ in range(2)] == [200, 429]
    clock.now_s += 1000
    assert [asker.status(token) for _ in range(4)] == [200, 200, 200, 429]
    assert asker.status(None, "/healthz") == 200


def test_a_request_out_of_scope_costs_nothing_of_the_rate() -> None:
    key, token = kept.mint("ci", requests_per_s=1.0)
    asker = Asker(key)
    assert [asker.status(token, "/openapi.json") for _ in range(3)] == [403] * 3
    assert [asker.status(token) for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("answer", [0.05, ValueError("broken")])
def test_requests_in_hand_are_bounded_and_room_comes_back(answer: float | Exception) -> None:
    key, token = kept.mint("ci", max_concurrent=2)
    asker = Asker(key, ADMIN, answer=answer)
    headers = {"x-api-key": token}

    async def three_then_one() -> list[tuple[int, Any, dict[str, str]]]:
        first = await asyncio.gather(*(asker.post("/predict/digits", [b"x"], 0.01, headers) for _ in range(3)))
        return [*first, await asker.post("/predict/digits", [b"x"], 0.0, headers)]

    told = asyncio.run(three_then_one())
    done = 200 if isinstance(answer, float) else 500
    assert [status for status, *_ in told] == [done, done, 429, done]
    assert (told[2][1]["code"], told[2][2]["retry-after"], told[2][2]["ratelimit-limit"]) == ("concurrency", "1", "2")


def test_a_revoked_key_stops_and_a_new_one_begins_without_a_restart(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    slow, slow_token = kept.mint("slow", requests_per_s=0.001)
    kept.change(file, lambda _: (INFER, slow))
    asker = Asker(source=file, clock=clock)
    assert [asker.status(token) for token in (INFER_TOKEN, slow_token, ADMIN_TOKEN)] == [200, 200, 401]
    kept.change(file, lambda before: (*before[1:], ADMIN))
    clock.now_s += keys.LOOK_AGAIN_S
    assert [asker.status(token) for token in (INFER_TOKEN, slow_token, ADMIN_TOKEN)] == [401, 429, 200]  # still slow


def test_keys_of_a_secret_that_is_rotated_by_its_link_are_taken_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotate(version: str, *found: Key) -> None:
        """As Kubernetes does: keys.json -> ..data/keys.json, ..data -> a folder, which is led elsewhere in one step."""
        kept.change(tmp_path / version / "keys.json", lambda _: found)
        (tmp_path / "..data_tmp").symlink_to(version)
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")

    rotate("..1", INFER)
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    source, clock = keys.settle(args(keys="keys.json")).keys, Clock()
    monkeypatch.chdir("/")
    assert isinstance(source, Path)
    asker = Asker(source=source, clock=clock)
    assert [asker.status(token) for token in (INFER_TOKEN, ADMIN_TOKEN)] == [200, 401]
    rotate("..2", ADMIN)
    shutil.rmtree(tmp_path / "..1")
    clock.now_s += keys.LOOK_AGAIN_S
    assert [asker.status(token) for token in (INFER_TOKEN, ADMIN_TOKEN)] == [401, 200]


@pytest.mark.parametrize("damage", ["{", '{"keys": [{"id": "x"}]}', None])
def test_a_damaged_file_leaves_the_keys_as_they_are_and_is_told_once(
    damage: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    kept.change(file, lambda _: (INFER,))
    asker = Asker(source=file, clock=clock)
    file.unlink() if damage is None else file.write_text(damage)
    for _ in range(3):
        clock.now_s += keys.LOOK_AGAIN_S
        assert asker.status(INFER_TOKEN) == 200
    assert [record.message.count("the keys stay as they were") for record in caplog.records] == [1]
    kept.change(tmp_path / "new", lambda _: (ADMIN,))
    (tmp_path / "new").replace(file)
    clock.now_s += keys.LOOK_AGAIN_S
    assert [asker.status(token) for token in (INFER_TOKEN, ADMIN_TOKEN)] == [401, 200]


ARGS = {"models": [{"name": "digits"}]}


def args(**more: Any) -> AppArgs:
    return config.parse(AppArgs, ARGS | more, "args")


def test_keys_are_settled_from_the_arguments_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    assert keys.settle(args()) == Access()
    file = tmp_path / "keys.json"
    with pytest.raises(ConfigError, match=r"keys\.json: the keys cannot be read \(No such file"):
        keys.settle(args(keys=str(file)))
    kept.change(file, lambda _: (INFER,))
    assert keys.settle(args(keys=str(file))) == Access(file)
    monkeypatch.setenv(keys.VARIABLE, file.read_text())
    assert keys.settle(args()) == Access(Keys(keys=(INFER,)))
    with pytest.raises(ConfigError, match="leave one out"):
        keys.settle(args(keys=str(file)))
    monkeypatch.setenv(keys.VARIABLE, "")
    with pytest.raises(ConfigError, match=r"VENTRAL_KEYS: expected JSON"):
        keys.settle(args())
    with pytest.raises(ConfigError, match="expected one of them, got both"):
        args(keys=str(file), allow_anyone=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_an_endpoint_without_keys_may_listen_on_loopback(host: str) -> None:
    exposure.refuse_open(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", None, "10.0.0.7", "example.org", "localhost.example.org"])
def test_an_endpoint_without_keys_is_refused_elsewhere(host: str | None) -> None:
    with pytest.raises(ConfigError, match=r"listens on .* and the endpoint has no keys.*allow_anyone: true"):
        exposure.refuse_open(host)


def test_the_address_is_asked_for_only_where_anyone_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure, "refuse_open_on_this_cluster", lambda: exposure.refuse_open("0.0.0.0"))
    with pytest.raises(ConfigError, match="every address"):
        Access().ring()
    assert Access(allow_anyone=True).ring() is None
    assert Access(Keys(keys=())).ring() is not None
