"""Which trials a sweep consists of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import sweep
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.training import experiment, trials

TRAINING = {
    "shards": "shards/digits",
    "recipe": {"model": {"name": "alexnet", "variant": "two_towers"}, "optim": {"lr": 0.05}, "epochs": 3},
    "tracking": {"experiment": "digits"},
}
LR = "training.recipe.optim.lr"
SEED = "training.recipe.seed"


def expand(**config: Any) -> tuple[trials.Trial, ...]:
    base = parse(experiment.Config, TRAINING, "test")
    return trials.expand("try", base, parse(trials.Config, config, "test"))


def test_cases_are_crossed_with_the_grid_and_named() -> None:
    found = expand(
        cases={"relu": {}, "tanh": {"training.recipe.model.activation": "tanh", LR: 0.02}},
        space={SEED: {"grid": [0, 1]}},
    )
    assert [trial.name for trial in found] == ["try-relu-000", "try-relu-001", "try-tanh-002", "try-tanh-003"]
    assert [trial.training.recipe.seed for trial in found] == [0, 1, 0, 1]
    assert [trial.training.recipe.optim.lr for trial in found] == [0.05, 0.05, 0.02, 0.02]
    assert [getattr(trial.training.recipe.model, "activation") for trial in found] == ["relu", "relu", "tanh", "tanh"]  # noqa: B009
    assert found[2].changes == {"training.recipe.model.activation": "tanh", LR: 0.02, SEED: 0}


def test_without_a_space_a_case_is_one_trial_of_its_name() -> None:
    assert [trial.name for trial in expand(cases={"a": {}, "b": {SEED: 1}})] == ["try-a", "try-b"]


def test_what_was_left_out_of_the_training_still_follows_from_what_a_trial_changes() -> None:
    (one,) = expand(cases={"wide": {"training.recipe.model.variant": "one_tower"}})
    model = one.training.recipe.model
    assert model.model_dump()["norm"] == "none", "the default of one tower, not that of two"
    assert "num_classes" not in model.model_fields_set, "which the shards decide"


def test_draws_follow_from_the_seed_and_are_the_same_for_every_case() -> None:
    space = {
        LR: {"log_uniform": [1e-4, 1.0]},
        "training.recipe.epochs": {"int_uniform": [1, 3]},
        "training.recipe.optim.weight_decay": {"uniform": [0.0, 0.1]},
        "training.recipe.optim.nesterov": {"choice": [True, False]},
    }
    found = expand(cases={"a": {}, "b": {SEED: 1}}, space=space, num_samples=60)
    again = expand(cases={"a": {}, "b": {SEED: 1}}, space=space, num_samples=60)
    other = expand(cases={"a": {}, "b": {SEED: 1}}, space=space, num_samples=60, seed=1)
    assert found == again
    assert found[0].changes != other[0].changes
    rates = [trial.training.recipe.optim.lr for trial in found]
    assert rates[:60] == rates[60:]
    assert len(set(rates)) == 60
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert 15 < sum(rate < 1e-2 for rate in rates[:60]) < 45, "half of the decades, half of the draws"
    assert {trial.training.recipe.epochs for trial in found} == {1, 2, 3}
    assert all(0 <= trial.training.recipe.optim.weight_decay <= 0.1 for trial in found)


def test_every_trial_that_cannot_be_run_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        expand(cases={"typo": {"training.recipe.optim.lrr": 0.1}, "good": {}, "bad": {"training.recipe.epochs": 0}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("trial try-typo: training: recipe.optim.lrr: unknown key; did you mean 'lr'?")
    assert "trial try-bad" in lines[1]
    assert "recipe.epochs" in lines[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe.optim.lr": 0.1}, "expected keys of the training, such as training.recipe.seed"),
        ({"training.shards.x": 1}, "'shards' holds"),
        ({"training.recipe.watch.metric": "val/loss"}, "one watched metric for all trials"),
    ],
)
def test_keys_that_lead_elsewhere_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand(cases={"a": changes, "b": {}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "expected one of grid, choice"),
        ({"grid": [1], "choice": [1]}, "expected one of grid, choice"),
        ({"grid": []}, "at least 1"),
        ({"uniform": [1.0, 0.5]}, "the smaller end first"),
        ({"log_uniform": [0.0, 0.5]}, "ends above 0"),
        ({"int_uniform": [0.5, 2]}, "integer"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand(space={LR: values})


def test_a_logarithm_is_uniform() -> None:
    space = {LR: {"log_uniform": [1e-6, 1.0]}}
    logs = sorted(math.log10(trial.training.recipe.optim.lr) for trial in expand(space=space, num_samples=600))
    for share in (0.25, 0.5, 0.75):
        assert logs[int(600 * share)] == pytest.approx(-6 + 6 * share, abs=0.5)


def test_the_door_s_dry_run_lists_the_trials_and_a_mistake_in_one_is_found_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"name": "try", "training": TRAINING, "sweep": {"space": {SEED: {"grid": [0, 1]}}}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    assert sweep.main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["sweep"]["space"][SEED]["grid"] == [0, 1]
    assert printed.endswith(f'# trial try-000: {{"{SEED}": 0}}\n# trial try-001: {{"{SEED}": 1}}\n')

    assert sweep.main([str(path), "--dry-run", f"sweep.cases={{bad: {{{LR}: -1}}}}"]) == 2
    assert (
        "trial try-bad-000: training: recipe.optim.lr: input should be greater than 0, got -1"
        in capsys.readouterr().err
    )
