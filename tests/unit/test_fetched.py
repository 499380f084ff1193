"""Copies of registered bundles: what is removed, what stays, and what an interruption leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.inference import bundle
from pipeline.tracking import fetched

DAY_S = 86400.0
ROOT = Path(__file__).parents[2]
DOWNLOAD = """
import sys, time
from pathlib import Path
from pipeline.tracking import fetched
with fetched.partial(Path(sys.argv[1]), "digits", "2") as folder:
    (folder / "weights").write_text("half of it")
    print(folder, flush=True)
    time.sleep(600)
"""


def copy_of(folder: Path, version: str, age_s: float = 2 * DAY_S) -> Path:
    """A copy with its receipt, last asked for so long ago."""
    path = folder / "digits" / version
    path.mkdir(parents=True)
    (path / "weights").write_text(f"of version {version}")
    fetched.note(folder, "digits", version, bundle.digest(path))
    then_s = time.time() - age_s
    os.utime(folder / fetched.RECEIPTS / "digits" / version, (then_s, then_s))
    return path


def test_a_copy_that_nobody_has_asked_for_is_removed_with_its_receipt(tmp_path: Path) -> None:
    gone, other = copy_of(tmp_path, "1"), copy_of(tmp_path, "2")
    assert fetched.versions(tmp_path, "digits") == ["1", "2"]
    assert fetched.remove_unused(tmp_path, "digits", "1", DAY_S)
    assert not gone.exists()
    assert other.exists()
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["2"]
    assert fetched.versions(tmp_path, "digits") == ["2"]
    assert fetched.versions(tmp_path, "flowers") == []


def test_a_copy_that_somebody_has_asked_for_stays(tmp_path: Path) -> None:
    path = copy_of(tmp_path, "1")
    fetched.use(tmp_path, "digits", "1")
    assert not fetched.remove_unused(tmp_path, "digits", "1", DAY_S)
    assert path.exists()


def changed(path: Path) -> None:
    (path / "weights").write_text("of somebody else")


def added_to(path: Path) -> None:
    (path / "notes.txt").write_text("do not lose this")


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("alter", [changed, added_to, linked])
def test_what_the_receipt_does_not_vouch_for_stays(tmp_path: Path, alter: Callable[[Path], None]) -> None:
    path = copy_of(tmp_path, "1")
    alter(path)
    before = {file.name: file.read_text() for file in path.iterdir()}
    assert not fetched.remove_unused(tmp_path, "digits", "1", DAY_S)
    assert {file.name: file.read_text() for file in path.iterdir()} == before
    assert fetched.versions(tmp_path, "digits") == []  # it is not looked at again


def test_what_was_removed_in_part_goes_at_the_next_call(tmp_path: Path) -> None:
    path = copy_of(tmp_path, "1")
    path.rename(path.with_name(".1.removed"))
    assert not fetched.remove_unused(tmp_path, "digits", "1", DAY_S)
    assert list((tmp_path / "digits").iterdir()) == []
    assert fetched.versions(tmp_path, "digits") == []


def test_what_a_killed_download_has_left_is_removed_once_nobody_writes_to_it(tmp_path: Path) -> None:
    download = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert download.stdout
    left = Path(download.stdout.readline().strip())
    download.kill()
    download.communicate()
    assert (left / "weights").is_file()
    copy = copy_of(tmp_path, "1")
    fetched.remove_abandoned(tmp_path, "digits", DAY_S)
    assert left.exists()
    then_s = time.time() - 2 * DAY_S
    os.utime(left, (then_s, then_s))
    fetched.remove_abandoned(tmp_path, "digits", DAY_S)  # a file in it is new: it is being written to
    assert left.exists()
    os.utime(left / "weights", (then_s, then_s))
    fetched.remove_abandoned(tmp_path, "digits", DAY_S)
    assert sorted((tmp_path / "digits").iterdir()) == [copy]


def test_a_folder_for_a_download_goes_with_what_is_left_in_it(tmp_path: Path) -> None:
    with fetched.partial(tmp_path, "digits", "3") as folder:
        (folder / "weights").write_text("half of it")
        (folder / "bundle").mkdir()
        (folder / "bundle").rename(tmp_path / "digits" / "3")
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["3"]
