"""What a run's folder remembers of its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse
from pipeline.training.recipe import Recipe
from pipeline.training.record import Record

RECIPE = {"model": {"name": "faster_rcnn", "backbone": "mobilenet_v3_320"}, "epochs": 3, "optim": {"lr": 0.1}}


def record(folder: Path, change: dict[str, Any], *gone: str) -> Record:
    """As it is read back of a run whose recipe was another, and lacked some keys."""
    told = parse(Recipe, RECIPE | change, "here").model_dump(mode="json")
    recipe = {key: value for key, value in told.items() if key not in gone}
    Record(run_id="1", run_url="here", recipe=recipe, is_finished=True).write(folder)
    found = Record.of(folder)
    assert found is not None
    return found


def test_recipe_is_known_again_also_where_keys_came_later(tmp_path: Path) -> None:
    recipe = parse(Recipe, RECIPE, "here")
    assert record(tmp_path, {}).began_with(recipe)
    assert record(tmp_path, {}, "ema", "keep_best").began_with(recipe)


@pytest.mark.parametrize("change", [{"epochs": 4}, {"optim": {"lr": 0.2}}, {"seed": 1}])
def test_another_recipe_is_told_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    assert not record(tmp_path, change).began_with(parse(Recipe, RECIPE, "here"))


def test_recipe_with_a_key_that_is_gone_is_another(tmp_path: Path) -> None:
    found = record(tmp_path, {})
    found.recipe["momentum_of_old"] = 1
    assert not found.began_with(parse(Recipe, RECIPE, "here"))
    assert not record(tmp_path, {}, "model").began_with(parse(Recipe, RECIPE, "here"))
