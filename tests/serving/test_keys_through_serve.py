"""Keys through real HTTP, on a Serve that is told to listen everywhere: without keys it does not come up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from jobs import _deploy, _stack
from jobs._process import LOOPBACK, Service, claim, stop
from pipeline.errors import ClusterError
from pipeline.inference import keys
from pipeline.inference.client import Client


@pytest.fixture
def open_head(tmp_path: Path) -> Iterator[Service]:
    """A head of its own: the address of a Serve that runs cannot be changed."""
    head = _stack.ray_head(tmp_path, num_cpus=4, timeout_s=300)
    yield head
    stop(head)


@pytest.mark.slow
def test_an_endpoint_on_every_address_asks_for_keys_or_does_not_come_up(
    open_head: Service, app_config: Callable[..., dict[str, Any]], picture: Callable[..., bytes], tmp_path: Path
) -> None:
    wanted, file, port = app_config(), tmp_path / "keys.json", claim(None, "Ray Serve")
    wanted["http_options"] |= {"host": "0.0.0.0", "port": port}
    url, args = f"http://{LOOPBACK}:{port}", wanted["applications"][0]["args"]
    _deploy._put(open_head, wanted)
    with pytest.raises(ClusterError, match=r"did not come up: .*ConfigError: Ray Serve listens on every address"):
        _deploy._wait_running(open_head, ["ventral"], 300)
    key, token = keys.mint("ci")
    keys.change(file, lambda _: (key,))
    _deploy._put(
        open_head, wanted | {"applications": [wanted["applications"][0] | {"args": args | {"keys": str(file)}}]}
    )
    _deploy._wait_running(open_head, ["ventral"], 300)
    refused = requests.post(f"{url}/predict/tiny", data=bytes(5 * 2**20), timeout=30)
    assert (refused.status_code, refused.json()["code"]) == (401, "no_key")
    with Client(url, key=token) as client:
        assert client.predict("tiny", picture()).model == "tiny"
    given = {"X-API-Key": token}
    assert requests.get(f"{url}/v2/models/stats", headers=given, timeout=30).status_code == 403
    assert requests.get(f"{url}/healthz", timeout=30).text == "ok"
    logs = "".join(path.read_text(errors="replace") for path in _logs(open_head))
    assert "ventral" in logs
    assert token[-64:] not in logs


def _logs(head: Service) -> list[Path]:
    assert head.scratch is not None
    return [path for path in head.scratch.rglob("*.log") if path.is_file()]
