"""Checkpoints: whole or not there, the newest few kept, and a torn file is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.training import checkpoint


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "model": {"weight": torch.full((50,), float(epoch))}, "best": {}}


def test_save_and_load_give_the_state_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new", 3, state(3))
    assert path.name == "epoch-0003.pt"
    loaded = checkpoint.load(path, "cpu")
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["weight"], torch.full((50,), 3.0))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for epoch in range(1, 6):
        checkpoint.save(tmp_path, epoch, state(epoch), keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch-000{n}.pt" for n in range(6 - keep, 6)]


def test_latest_counts_as_numbers_beyond_four_digits(tmp_path: Path) -> None:
    for epoch in (9_999, 10_000):
        checkpoint.save(tmp_path, epoch, state(epoch))
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest, "cpu")["epoch"] == 10_000


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "gone") is None


def test_a_save_that_fails_leaves_the_last_checkpoint_the_newest(tmp_path: Path) -> None:
    before = checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(Exception, match=r"pickle|local"):
        checkpoint.save(tmp_path, 2, {"model": lambda: None})
    (tmp_path / "epoch-0003.partial").write_bytes(b"half")
    (tmp_path / "epoch-last.pt").write_bytes(b"somebody else's")
    assert checkpoint.latest(tmp_path) == before


@pytest.mark.parametrize("kept", [0, 1, 10, 500, -100, -1])
def test_load_of_a_torn_file_says_what_to_do(tmp_path: Path, kept: int) -> None:
    path = checkpoint.save(tmp_path, 1, state(1))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"epoch-0001\.pt: not a readable checkpoint .*; delete it to continue"):
        checkpoint.load(path, "cpu")


@pytest.mark.parametrize("data", [b"text that is no checkpoint", b"\x80\x02.", b"\x80\x02}q\x00.", b"(lp0\n."])
def test_load_of_other_bytes_is_a_data_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "epoch-0001.pt").write_bytes(data)
    with pytest.raises(DataError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "epoch-0001.pt", "cpu")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_load_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "epoch-0001.pt")
    with pytest.raises(DataError):
        checkpoint.load(tmp_path / "epoch-0001.pt", "cpu")
    assert not Path("executed").exists()
