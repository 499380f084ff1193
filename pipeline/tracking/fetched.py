"""Bundles that were downloaded into a folder: which of them are ours to remove, and when.

For each there is a receipt, `<folder>/.fetched/<name>/<version>`. It holds the checksum of what was downloaded, and its
time is when the copy was last asked for, by whoever shares the folder: an endpoint, a job, another application. What
has no receipt, or is not what its receipt says, somebody else has put there, and it stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.inference import bundle

RECEIPTS = ".fetched"
_PARTIAL = ".partial-"


@contextmanager
def partial(folder: Path, name: str, version: str) -> Iterator[Path]:
    """A new folder beside the copies of a model, for one to be downloaded into; it goes with what is left in it.

    Raises:
        OSError: it cannot be made.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{version}{_PARTIAL}", dir=folder / name) as made:
        yield Path(made)


def note(folder: Path, name: str, version: str, digest: str) -> None:
    """Write the receipt of a copy that is about to stand at `folder/name/version`.

    Raises:
        OSError: it cannot be written.
    """
    receipt = _receipt(folder, name, version)
    receipt.parent.mkdir(parents=True, exist_ok=True)
    try:
        receipt.write_text(digest)
    except OSError:
        receipt.unlink(missing_ok=True)
        raise


def use(folder: Path, name: str, version: str) -> None:
    """Note that a copy is asked for now; nothing happens where it has no receipt, or none that can be changed."""
    with suppress(OSError):
        os.utime(_receipt(folder, name, version))


def versions(folder: Path, name: str) -> list[str]:
    """Versions of a model that have a receipt."""
    receipts = folder / RECEIPTS / name
    return sorted(receipt.name for receipt in receipts.iterdir()) if receipts.is_dir() else []


def remove_unused(folder: Path, name: str, version: str, unused_s: float) -> bool:
    """Remove a copy that nobody has asked for in so long, and say whether; for nobody it is there in part.

    Raises:
        OSError: it cannot be removed; what is left goes at the next call.
    """
    receipt, path = _receipt(folder, name, version), folder / name / version
    if time.time() - receipt.stat().st_mtime < unused_s:
        return False
    aside = path.with_name(f".{version}.removed")
    if aside.is_dir():  # an earlier call was interrupted
        shutil.rmtree(aside)
    is_ours = path.is_dir() and not path.is_symlink() and bundle.digest(path) == receipt.read_text()
    if is_ours:
        path.rename(aside)
        shutil.rmtree(aside)
    receipt.unlink()
    return is_ours


def remove_abandoned(folder: Path, name: str, abandoned_s: float) -> None:
    """Remove what downloads of a model have left that were killed, and that nobody has written to in so long.

    Raises:
        OSError: it cannot be removed; it goes at the next call.
    """
    for left in (folder / name).glob(f".*{_PARTIAL}*"):
        newest_s = max(path.lstat().st_mtime for path in (left, *left.rglob("*")))
        if time.time() - newest_s >= abandoned_s:
            shutil.rmtree(left)


def _receipt(folder: Path, name: str, version: str) -> Path:
    return folder / RECEIPTS / name / version
