"""`jobs.find`: what it tells to write into the YAML of a training, without Ray and without MLflow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from jobs import find
from pipeline import imaging
from pipeline.data import shards


@pytest.fixture
def config(stripes: shards.Shards, tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    recipe = {
        "model": {"name": "lenet5"},
        "loading": {"batch_size": 8, "num_tasks": 0},
        "mixing": {"mixup": 0.2},
        "ema": {"decay": 0.9},
        "optim": {"clip_norm": 1.0},
    }
    training = {"shards": str(stripes.path), "recipe": recipe, "tracking": {"experiment": "none"}}
    path.write_text(yaml.safe_dump({"name": "striped", "training": training}))
    return path


def test_a_rate_that_learns_and_a_batch_that_fits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"storage={config.parent}"
    assert find.main([str(config), where, "range_test.num_steps=60", "memory_gib=0.01"]) == 0
    said = capsys.readouterr().out
    (rate,) = re.findall(r"^rate +training\.recipe\.optim\.lr=(\S+)", said, re.MULTILINE)
    assert 1e-4 < float(rate) < 5, "neither one that learns nothing nor one that diverges"
    (small,) = re.findall(r"^batch +training\.recipe\.loading\.batch_size=(\d+)", said, re.MULTILINE)
    figure = imaging.decode((config.parent / "find" / "striped.png").read_bytes())
    assert figure.std() > 10, "something is drawn"

    assert find.main([str(config), where, "range_test=null", "memory_gib=0.04"]) == 0
    said = capsys.readouterr().out
    assert "rate" not in said
    (large,) = re.findall(r"batch_size=(\d+)", said)
    assert 2 < int(large) / int(small) < 12, "four times the memory, less what the weights take"


def test_what_cannot_be_found_is_said_in_one_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"storage={config.parent}"
    assert find.main([str(config), where, "range_test=null", "memory_gib=0.0001"]) == 2
    assert "not even one image fits into memory" in capsys.readouterr().err
    assert find.main([str(config), where, "training.recipe.loading.batch_size=41"]) == 3
    assert "40 training images do not fill one batch of 41" in capsys.readouterr().err
    assert find.main([str(config), where, "training.shards=nowhere"]) == 3
    assert "nowhere" in capsys.readouterr().err
