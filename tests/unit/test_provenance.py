"""Where results come from, in a checkout made for the test and outside of any."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline import provenance


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder of its own that the module believes to be."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    path = tmp_path / "provenance.py"
    path.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(path))
    return path


def test_versions_are_those_that_run() -> None:
    found = provenance.versions()
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__.split("+")[0])
    assert found.keys() <= {"python", *provenance.LIBRARIES}


def test_commit_is_marked_where_the_tree_differs(code: Path) -> None:
    git(code.parent, "init")
    git(code.parent, "add", ".")
    git(code.parent, "commit", "-m", "first")
    head = git(code.parent, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (code.parent / "untracked").write_text("does not count")
    assert provenance.commit() == head
    code.write_text("changed")
    assert provenance.commit() == head + "+"


def test_commit_outside_a_checkout_is_unknown(code: Path) -> None:
    assert provenance.commit() == "unknown"


def test_commit_without_git_is_unknown(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(code.parent))
    assert provenance.commit() == "unknown"
