"""Where a result came from: the commit, the versions, the machine. Facts for manifests, bundles, reports and runs."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMIT = "VENTRAL_COMMIT"
LIBRARIES = ("ray", "torch", "torchvision", "mlflow", "pyarrow", "numpy", "pillow", "simplejpeg")


def versions() -> dict[str, str]:
    """Python's version and those of the installed libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this code, with `+` where the working tree differs from it.

    Outside a checkout, as in a submitted job, it is what the environment variable VENTRAL_COMMIT says, else `unknown`.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return os.environ.get(COMMIT, "unknown")
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + "+" * bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT, "unknown")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def hostname() -> str:
    """The name of this machine."""
    return socket.gethostname()
