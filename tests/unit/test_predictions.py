"""Predictions image by image: ranking by hand, merging in any order, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.inference import engine
from pipeline.tracking import predictions
from pipeline.tracking.predictions import SCHEMA, TOP_K, Origin, Predictions, merge, read


def origin_of(num_classes: int) -> Origin:
    classes = tuple(f"class {label}" for label in range(num_classes))
    return Origin(split="val", dataset="made up", dataset_digest="d" * 64, weights_sha256="w" * 64, classes=classes)


def made_up(num_images: int, num_classes: int, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(num_classes), num_images).astype(np.float32)
    ids = [f"{seed}/{number}" for number in rng.permutation(num_images)]
    return Predictions.of(origin_of(num_classes), ids, rng.integers(0, num_classes, num_images), scores)


def test_predictions_of_a_batch_rank_best_first_and_ties_by_class() -> None:
    scores = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], np.float32)
    found = Predictions.of(origin_of(3), ["b", "a"], np.array([2, 1]), scores)
    assert found.ranked.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert found.predicted.tolist() == [1, 0]
    np.testing.assert_array_equal(found.confidence, np.array([0.5, 0.4], np.float32))
    np.testing.assert_array_equal(found.label_scores, np.array([0.3, 0.4], np.float32))
    assert (found.right().tolist(), found.right(top=2).tolist()) == ([False, False], [True, True])


def test_predictions_of_many_classes_keep_the_best_five_and_the_score_of_the_label() -> None:
    found = made_up(30, 50)
    assert found.ranked.shape == (30, TOP_K)
    assert not found.ranks_all
    assert made_up(30, 20).ranks_all
    in_top = found.right(TOP_K)
    assert (found.label_scores[~in_top] <= found.scores[~in_top, -1]).all()


@given(st.permutations(range(4)), st.lists(st.integers(1, 20), min_size=4, max_size=4))
def test_merge_in_any_order_and_grouping_is_the_same_table(order: list[int], sizes: list[int]) -> None:
    parts = [made_up(size, 3, seed) for seed, size in enumerate(sizes)]
    whole = merge(parts)
    assert list(whole.ids) == sorted(whole.ids)
    assert len(whole) == sum(sizes)
    pairwise = merge([merge([parts[order[0]], parts[order[1]]]), merge([parts[order[2]], parts[order[3]]])])
    assert pairwise.table().equals(whole.table(), check_metadata=True)


def test_merge_of_nothing_or_of_one_image_twice_is_refused() -> None:
    with pytest.raises(DataError, match="at least one image"):
        merge([])
    with pytest.raises(DataError, match="image '0/0' was predicted twice"):
        merge([made_up(3, 4), made_up(3, 4)])


@pytest.mark.parametrize("num_classes", [3, 40])
def test_write_then_read_gives_the_same_and_equal_bytes(num_classes: int, tmp_path: Path) -> None:
    found = merge([made_up(25, num_classes)])
    for name in ("new/a.parquet", "b.parquet"):
        found.write(tmp_path / name)
    assert (tmp_path / "new/a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    again = read(tmp_path / "b.parquet")
    assert again.origin == found.origin
    assert again.table().equals(found.table())
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[0]
    assert row["top_labels"][0] == row["predicted"]
    assert row["top_scores"][0] == row["predicted_score"]


def test_read_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(made_up(3, 3).table().replace_schema_metadata(None), other)
    (tmp_path / "text.parquet").write_text("no")
    for name in ("other", "text", "none"):
        with pytest.raises(DataError, match=rf"{name}.parquet: expected a table of predictions"):
            read(tmp_path / f"{name}.parquet")


def test_identity_tells_engines_apart_and_leaves_the_plain_one_unsaid() -> None:
    assert str(engine.PLAIN) == predictions.PLAIN
    assert predictions.identity("abc", predictions.PLAIN) == "abc"
    assert predictions.identity("abc", "openvino-bf16") == "abc on openvino-bf16"
    assert predictions.identity("", "openvino-bf16") == ""
