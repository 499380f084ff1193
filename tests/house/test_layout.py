"""The house rules that no linter knows: sizes, names, the top level, what importing does."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "jobs", "serve")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TOP_LEVEL = {"pyproject.toml", "pipeline", "jobs", "serve", "tests", "cluster.yaml"}
CUSTOMARY = {
    *("README.md", "Makefile", "LICENSE", "CHANGELOG.md", "DECISIONS.md", "requirements.lock"),
    *(".gitignore", ".rayignore", ".pre-commit-config.yaml", ".ci"),
}
MAX_FILE, MAX_FUNCTION, MAX_JOB = 500, 60, 80
NO_TORCH = (
    *("pipeline.errors", "pipeline.config", "pipeline.types", "pipeline.imaging", "pipeline.data.shards"),
    *("pipeline.data.ingest", "pipeline.inference.client", "pipeline.data.plan", "pipeline.data.rows"),
    *(f"pipeline.data.datasets.{path.stem}" for path in (ROOT / "pipeline/data/datasets").glob("[!_]*.py")),
)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return 1 + node.end_lineno - body[0].lineno if body and node.end_lineno else 0


def test_top_level_holds_what_the_user_fixed_and_customary_files_only() -> None:
    found = {name.split("/")[0] for name in tracked()}
    assert found >= TOP_LEVEL
    assert found - TOP_LEVEL - CUSTOMARY == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file_keeps_its_budget(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE
    if path.parent.name == "jobs" and not path.name.startswith("_"):
        assert lines <= MAX_JOB
    assert {node.name: length(node) for node in functions(path) if length(node) > MAX_FUNCTION} == {}


def test_no_file_is_a_dumping_ground() -> None:
    assert [path for path in SOURCES if path.stem.strip("_") in {"utils", "util", "misc", "common", "helpers"}] == []


def test_models_never_import_each_other() -> None:
    for path in (ROOT / "pipeline" / "models").glob("[a-z]*.py"):
        imported = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        others = [name for name in imported if name and name.startswith("pipeline.models.")]
        assert all(name.split(".")[2].startswith("_") for name in others), path


def test_package_inits_hold_docstrings_only() -> None:
    with_code = {ROOT / "pipeline" / "data" / "datasets", ROOT / "pipeline" / "models"}
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent not in with_code:
            assert len(ast.parse(path.read_text()).body) == 1, path


def test_torch_free_modules_import_without_torch() -> None:
    code = (
        f"import sys\nfor name in {NO_TORCH}: __import__(name)\nassert 'torch' not in sys.modules, 'torch came along'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_everything_changes_nothing() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    names.remove("pipeline.tracking.pyfunc")  # MLflow's model code: it registers itself when executed
    names.remove("pipeline.benchmark.servers.mlflow_model")  # the same
    for peer in (
        "mosaicml",
        "webdataset",
        "servers.bentoml",
        "servers.litserve",
    ):  # what an optional peer does when it is imported is its own affair
        names.remove(f"pipeline.benchmark.{peer}")
    code = f"""
import os, random, signal, threading, torch, torchvision, numpy
import ray, ray.data, ray.train.torch, ray.tune, ray.serve, mlflow.pyfunc
before = dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads()
handlers, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
for name in {names}: __import__(name)
assert before == (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads())
assert handlers is signal.getsignal(signal.SIGTERM) and threads == threading.active_count()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tracked_files_name_no_registry_host_and_no_shared_folder() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js"]
    for name in tracked():
        text = (ROOT / name).read_text(errors="ignore")
        assert not [host for host in hosts if host in text], name
        if name != ".ci/run":
            assert "../" + "shared" not in text, name


def test_readme_names_only_what_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "pipeline" / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    words = text.replace("`", " ").replace(",", " ").split()
    for command, name in itertools.pairwise(words):
        if command == "make" and name.isalpha() and name in {"quickstart", "up", "down", "test", "help", "lock"}:
            assert f"\n{name}:" in makefile, name
        if command == "-m" and name.startswith("jobs.") and "<" not in name:
            assert (ROOT / "jobs" / f"{name.removeprefix('jobs.')}.py").exists(), name
    for word in words:
        if word.startswith("jobs/configs/") and word.endswith(".yaml"):
            assert (ROOT / word).exists(), word
