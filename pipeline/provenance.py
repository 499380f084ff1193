"""Where a result came from: the commit, the versions, the machine. Facts for manifests, bundles, reports and runs."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    """The git commit of this code, with `+` where the working tree differs from it; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def hostname() -> str:
    """The name of this machine."""
    return socket.gethostname()
