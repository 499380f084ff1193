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
    """The root of a tree of its own that the module believes to be in."""
    monkeypatch.delenv(provenance.COMMIT, raising=False)
    path = tmp_path / "pipeline" / "provenance.py"
    path.parent.mkdir()
    path.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(path))
    return tmp_path


def test_versions_are_those_that_run() -> None:
    found = provenance.versions()
    assert (found["python"], found["torch"]) == (platform.python_version(), torch.__version__.split("+")[0])
    assert found.keys() <= {"python", *provenance.LIBRARIES}


def test_commit_is_marked_where_the_tree_differs(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.COMMIT, "not asked in a checkout")
    git(code, "init")
    git(code, "add", ".")
    git(code, "commit", "-m", "first")
    head = git(code, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (code / "untracked").write_text("does not count")
    assert provenance.commit() == head
    (code / "pipeline" / "provenance.py").write_text("changed")
    assert provenance.commit() == head + "+"


def test_commit_outside_a_checkout_is_that_of_the_environment_or_unknown(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.commit() == "unknown"
    monkeypatch.setenv(provenance.COMMIT, "abc")
    assert provenance.commit() == "abc"


def test_commit_without_git_is_unknown(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(code, "init")
    monkeypatch.setenv("PATH", str(code))
    assert provenance.commit() == "unknown"
