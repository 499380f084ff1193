"""The serving benchmark end to end, for seconds: this project's endpoint and peers, all on one machine."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from jobs import benchmark as door
from pipeline.benchmark.serving import SERVERS
from pipeline.benchmark.serving_report import DOCUMENTED, OURS


@pytest.mark.long
def test_endpoint_and_peers_answer_alike_and_nothing_is_left_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [name for name in ("FastAPI, as documented", "LitServe, our model") if _is_here(name)]
    keys = {"only": [OURS, *peers], "rounds": 1, "seconds": 1, "clients": [1, 16], "num_pictures": 8, "sources": []}
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    words = [f"serve.{key}={json.dumps(value)}" for key, value in keys.items()]
    assert door.main(["serve", f"storage={tmp_path}", *words]) == 0
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before
    found = json.loads((tmp_path / "benchmarks" / "serve.json").read_text())
    (only,) = found["rounds"]
    right = only["bare"][DOCUMENTED]["top1"]
    assert len(set(right)) > 1, "a model that always says the same shows nothing"
    for name in (OURS, *peers):
        assert only["blocks"][name]["top1"] == right
        for level in only["blocks"][name]["levels"].values():
            assert level["num_errors"] == 0
            assert level["requests_per_s"] > 0
            assert level["cpu_ms"] > 1  # a forward pass takes more
    assert "2.5 is the goal" in capsys.readouterr().out
    assert list((tmp_path / "benchmarks" / "scratch").iterdir()) == []


def _is_here(name: str) -> bool:
    needed = SERVERS[name].needs
    return needed is None or find_spec(needed) is not None
