"""A file system of a few megabytes, which fills up as a disk does; mounting it takes root's rights."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CAP_SYS_ADMIN = 1 << 21


def _can_mount() -> bool:
    (found,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    return bool(int(found.split()[1], 16) & CAP_SYS_ADMIN)


needs_mounting = pytest.mark.skipif(
    not _can_mount(), reason="mounting a small file system needs rights that this process lacks"
)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A new folder that holds `size`, such as "2m", and no more."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def enlarge(path: Path, size: str) -> None:
    """Let it hold so much from now on."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)
