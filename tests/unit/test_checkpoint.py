"""Checkpoints on a local disk: whole or not there, the newest few kept, a damaged one skipped for the one before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.training.checkpoint import MARKER, Config, Position, Store

ROOT = Path(__file__).parents[2]


def parts(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((50,), value)}, "optimizer": {"state": {0: torch.tensor(value)}}}


def save(store: Store, *position: int) -> Path:
    at = Position(*position)
    store.save(at, parts(at.epoch + at.offset / 100), {"note": list(position)})
    return Path(store.folder) / at.name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weight(store: Store) -> float | None:
    found = store.newest("cpu")
    return float(found.parts["model"]["weight"][0]) if found else None


def test_newest_gives_back_what_was_saved_last(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new"))
    assert store.newest("cpu") is None
    save(store, 0, 800)
    path = save(store, 3, 12_800)
    assert path.name == "epoch-0003-offset-00012800"
    assert names(path) == [MARKER, "model.pt", "optimizer.pt", "progress.json"]
    found = store.newest("cpu")
    assert found is not None
    assert found.position == (3, 12_800)
    assert found.progress == {"note": [3, 12_800]}
    assert torch.equal(found.parts["model"]["weight"], torch.full((50,), 131.0))
    assert torch.equal(found.parts["optimizer"]["state"][0], torch.tensor(131.0))


def test_figures_come_back_bit_for_bit(tmp_path: Path) -> None:
    store, values = Store(str(tmp_path)), [0.1 + 0.2, 1 / 3, 1e-310, float("inf"), -0.0]
    store.save(Position(1), {}, {"values": values})
    found = store.newest("cpu")
    assert found is not None
    assert [value.hex() for value in found.progress["values"]] == [value.hex() for value in values]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    store = Store(str(tmp_path), Config(keep=keep))
    positions = [Position(0, 50), Position(1), Position(1, 50), Position(2), Position(2, 50)]
    for at in positions:
        save(store, *at)
    assert store.positions() == positions[-keep:]


def test_positions_are_sorted_as_numbers_beyond_their_digits(tmp_path: Path) -> None:
    store, order = Store(str(tmp_path), Config(keep=9)), [(9_999, 0), (9_999, 99_999_999), (9_999, 10**9), (10_000, 0)]
    for at in order:
        save(store, *at)
    assert store.positions() == order
    assert weight(store) == 10_000


def test_save_removes_what_lies_beyond_it(tmp_path: Path) -> None:
    """The one writer only moves forward: what lies ahead was damaged when it was skipped."""
    store = Store(str(tmp_path), Config(keep=9))
    for epoch in (1, 3, 2):
        save(store, epoch)
    assert store.positions() == [(1, 0), (2, 0)]


def test_what_is_not_named_as_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "epoch-last").mkdir()
    (tmp_path / "epoch-0009-offset-00000000").write_text("a file, not a folder")
    store = Store(str(tmp_path), Config(keep=1))
    save(store, 1)
    save(store, 2)
    assert store.positions() == [(2, 0)]
    assert (tmp_path / "epoch-last").is_dir()


def cut(name: str, kept: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt").write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no marker": (lambda folder: (folder / MARKER).unlink(), "its writing was interrupted"),
    "empty marker": (cut(MARKER, 0), "checkpoint.json is not readable"),
    "half a marker": (cut(MARKER, 100), "checkpoint.json is not readable"),
    "half a file": (cut("model.pt", 500), "model.pt has 500 bytes, not"),
    "no file": (lambda folder: (folder / "optimizer.pt").unlink(), "No such file or directory"),
    "a bit": (flip_a_bit, "model.pt has another sha256"),
    "progress": (cut("progress.json", 3), "progress.json has 3 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_skipped_for_the_one_before_it_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, reason = DAMAGES[kind]
    store = Store(str(tmp_path), Config(keep=3))
    for epoch in (1, 2, 3):
        path = save(store, epoch)
    damage(path)
    assert weight(store) == 2
    (record,) = caplog.records
    assert f"{path}: skipped: " in record.getMessage()
    assert reason in record.getMessage()
    with pytest.raises(DataError, match=r"epoch-0003-offset-00000000: not a whole checkpoint: .*; delete it to go on"):
        store.load(Position(3), "cpu")
    save(store, 2, 50)  # training goes on from 2: what is damaged must not count among the newest
    assert store.positions() == [(1, 0), (2, 0), (2, 50)]


def test_damage_of_every_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for epoch in (1, 2):
        flip_a_bit(save(store, epoch))
    with pytest.raises(DataError, match="every checkpoint is damaged; delete them to start anew"):
        store.newest("cpu")


def test_saving_again_at_the_same_position_replaces_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    flip_a_bit(save(store, 1))
    save(store, 1)
    assert weight(store) == 1


def test_save_of_what_cannot_be_stored_leaves_the_last_checkpoint_the_newest(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 1)
    with pytest.raises(Exception, match=r"pickle|local"):
        store.save(Position(2), {"model": {"weight": torch.ones(2)}, "other": lambda: None}, {})
    assert store.positions() == [(1, 0)]
    assert weight(store) == 1


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_reading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(str(tmp_path / "checkpoints"))
    store.save(Position(1), {"model": Evil()}, {})
    assert store.positions() == [(1, 0)]
    with pytest.raises(DataError, match="not a whole checkpoint: not readable"):
        store.load(Position(1), "cpu")
    assert not Path("executed").exists()


@pytest.mark.slow
def test_process_that_is_killed_while_it_writes_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """Three kills, each at another moment of a writer that does nothing but write."""
    code = (
        "import sys, torch\n"
        "from pipeline.training.checkpoint import Position, Store\n"
        "store = Store(sys.argv[1])\n"
        "for epoch in range(store.positions()[-1].epoch + 1 if store.positions() else 1, 10**9):\n"
        "    store.save(Position(epoch), {'model': torch.full((300_000,), float(epoch))}, {'epoch': epoch})\n"
        "    print(epoch, flush=True)\n"
    )
    store = Store(str(tmp_path))
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        told = [int(writer.stdout.readline()) for _ in range(2 + 3 * attempt)][-1]
        writer.kill()
        writer.communicate()
        found = store.newest("cpu")
        assert found is not None
        assert found.position.epoch >= told
        assert found.progress == {"epoch": found.position.epoch}
        assert torch.equal(found.parts["model"], torch.full((300_000,), float(found.position.epoch)))
        assert len(store.positions()) <= 2


def test_marker_names_every_file_with_its_size(tmp_path: Path) -> None:
    path = save(Store(str(tmp_path)), 1)
    files = json.loads((path / MARKER).read_text())["files"]
    assert {name: file["size_bytes"] for name, file in files.items()} == {
        name: (path / name).stat().st_size for name in ("model.pt", "optimizer.pt", "progress.json")
    }
