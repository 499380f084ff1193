"""Configuration: what a mistake reads like, and what survives a round trip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pipeline import models
from pipeline.config import Strict, changed, dump, flatten, load, nearest, parse
from pipeline.errors import ConfigError


class Optim(Strict):
    lr: float = Field(default=0.1, gt=0)
    schedule: Literal["cosine", "step"] = "cosine"
    at: tuple[float, ...] = (0.5,)


class Run(Strict):
    name: str
    optim: Optim = Optim()
    model: models.AnyModel | None = None
    folder: Path | None = None
    epochs: int = 1


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_load_takes_yaml_numbers_lists_and_paths(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\noptim: {lr: 1e-4, at: [0.25, 1]}\nfolder: some/where\n")
    run = load(Run, path)
    assert run == Run(name="a", optim=Optim(lr=0.0001, at=(0.25, 1.0)), folder=Path("some/where"))


def test_overrides_win_over_the_file_and_make_missing_mappings(tmp_path: Path) -> None:
    run = load(Run, written(tmp_path, "name: a\nepochs: 2\n"), ["epochs=3", "optim.lr=2e-1", "model.name=lenet5"])
    assert (run.epochs, run.optim.lr) == (3, 0.2)
    assert run.model is not None
    assert run.model.num_classes == 10


def test_load_without_file_takes_overrides_only() -> None:
    assert load(Run, None, ["name=b"]) == Run(name="b")


def test_mistakes_are_all_reported_each_with_its_path(tmp_path: Path) -> None:
    path = written(tmp_path, "optim: {lr: -1, shedule: step}\nepochs: '3'\nmodel: {name: lenet5, poolin: max}\n")
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"{path}: ") for line in lines)
    found = {line.removeprefix(f"{path}: ").split(":")[0]: line for line in lines}
    assert found.keys() == {"name", "optim.lr", "optim.shedule", "epochs", "model.poolin"}
    assert "did you mean 'schedule'? (known: lr, schedule, at)" in found["optim.shedule"]
    assert "did you mean 'pooling'?" in found["model.poolin"]
    assert "greater than 0, got -1" in found["optim.lr"]
    assert "got '3'" in found["epochs"]
    assert "missing" in found["name"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\nmodel: {name: lenet55}", "unknown model 'lenet55'; did you mean 'lenet5'? (known: "),
        ("name: a\nmodel: {}", "expected a mapping with a key 'name' (known: alexnet, "),
        ("name: a\nmodel: {name: lenet5, input: {size_hw: [28, 28], sized: 1}}", "model.input.sized: unknown key"),
        ("name: true", "name: input should be a valid string, got True"),
        ("- name", "expected a mapping of keys at the top, got list"),
        ("name: [", "not valid YAML"),
    ],
)
def test_load_refuses_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(Run, path)
    assert str(path) in str(caught.value)
    assert sentence in str(caught.value)


def test_load_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the configuration \(No such file"):
        load(Run, tmp_path / "none.yaml")


def test_load_of_bytes_that_are_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(Run, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("epochs", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("optim..lr=3", "expected key.path=value"),
        ("name.part=1", "'name' holds 'a', not a mapping"),
        ("epochs=[", "not a YAML value"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Run, None, ["name=a", override])
    assert f"override '{override}'" in str(caught.value)
    assert sentence in str(caught.value)


def test_changed_is_a_copy_with_other_values_at_some_paths() -> None:
    raw = {"a": {"b": 1, "c": [1]}}
    assert changed(raw, {"a.b": 2, "d.e": "new", "a.c": [3]}) == {"a": {"b": 2, "c": [3]}, "d": {"e": "new"}}
    assert raw == {"a": {"b": 1, "c": [1]}}
    with pytest.raises(ConfigError, match=r"'a\.b\.x': 'b' holds 1, not a mapping"):
        changed(raw, {"a.b.x": 1})


def test_dump_spells_out_defaults_and_loads_again(tmp_path: Path) -> None:
    run = load(Run, None, ["name=a", "model.name=lenet5", "folder=x"])
    text = dump(run)
    assert "schedule: cosine" in text
    assert load(Run, written(tmp_path, text)) == run


def test_flatten_gives_text_under_dotted_paths() -> None:
    flat = flatten(Run(name="a", folder=Path("x")))
    expected = {"optim.lr": "0.1", "optim.schedule": "cosine", "optim.at": "[0.5]"}
    assert flat == expected | {"name": "a", "model": "null", "folder": "x", "epochs": "1"}


def test_a_configuration_is_frozen() -> None:
    run = Run(name="a")
    with pytest.raises(ValueError, match="frozen"):
        setattr(run, "epochs", 2)  # noqa: B010  (mypy refuses the plain assignment, too)


def test_nearest_names_nothing_where_nothing_is_near() -> None:
    assert nearest("xyz", ["alpha", "beta"]) == "(known: alpha, beta)"


def test_parse_names_the_origin() -> None:
    with pytest.raises(ConfigError, match=r"^the card: name: missing, a value is required$"):
        parse(Run, {}, "the card")


class Figures(Strict):
    values: dict[str, float]


def test_numbers_that_are_none_come_back_too() -> None:
    given = Figures(values={"loss": math.inf, "recall": math.nan, "lr": 1e-310})
    back = Figures.model_validate_json(given.model_dump_json(), strict=True)
    assert str(back) == str(given)
    assert str(parse(Figures, given.model_dump(mode="json"), "here")) == str(given)
