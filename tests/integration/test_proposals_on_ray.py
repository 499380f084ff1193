"""Region proposals on a real Ray: each image has its own, nothing is made twice, another dataset is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from jobs import propose as job
from pipeline import imaging
from pipeline.data import proposals, regions, shards
from pipeline.data.proposals import Proposals
from pipeline.errors import DataError
from pipeline.types import Split

pytestmark = pytest.mark.usefixtures("cluster")

CONFIG = regions.Config(width=50, min_side=5, max_proposals=60)
NAME = "fast-60"


@pytest.fixture
def source(boxed_stripes: shards.Shards, tmp_path: Path) -> shards.Shards:
    return shards.load(Path(shutil.copytree(boxed_stripes.path, tmp_path / "shards" / "stripes")))


def rows_of(source: shards.Shards, split: str) -> Iterator[dict[str, Any]]:
    for shard in (shard for shard in source.manifest.shards if shard.split == split):
        yield from shards.read(source.path / shard.name, range(len(shard.row_groups))).to_pylist()


def best_of(found: Proposals, source: shards.Shards, split: str) -> torch.Tensor:
    """The best overlap of each object that counts, by torchvision."""
    best = [torch.zeros(0, dtype=torch.float64)]
    for row in rows_of(source, split):
        counts = ~(torch.tensor(row["difficult"]).bool() | torch.tensor(row["crowd"]).bool())
        truth = torch.tensor(row["boxes"], dtype=torch.float64).reshape(-1, 4)[counts]
        overlaps = box_iou(truth, torch.from_numpy(found.of(row["image_id"])).double())
        best.append(overlaps.max(dim=1).values if len(truth) else overlaps[:, 0])
    return torch.cat(best)


def written(found: Proposals) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in found.path.glob("part-*.parquet")}


def test_proposals_of_every_image_are_those_of_one_process(source: shards.Shards) -> None:
    seen: list[tuple[int, int]] = []
    found = proposals.make(source, CONFIG, progress=lambda done, total: seen.append((done, total)))
    assert found == proposals.read(source, NAME)
    assert (len(found), found.path) == (53, source.path / "proposals" / NAME)
    assert (seen[0], seen[-1]) == ((0, 53), (53, 53))
    counts: dict[Split, int] = {"train": 40, "val": 13}
    for split, num in counts.items():
        figures = found.made.splits[split]
        assert figures.num_images == num
        numbers = []
        for row in rows_of(source, split):
            alone = regions.selective_search(imaging.decode(row["image"]), CONFIG)
            assert np.array_equal(found.of(row["image_id"]), alone)
            numbers.append(len(alone))
        best = best_of(found, source, split)
        assert len(best) == figures.num_objects > 0
        assert figures.mean_regions == pytest.approx(np.mean(numbers))
        assert figures.recall_at_iou_0_5 == pytest.approx(float((best >= 0.5).double().mean()))
        assert figures.recall_at_iou_0_7 == pytest.approx(float((best >= 0.7).double().mean()))
        assert figures.mean_best_overlap == pytest.approx(float(best.mean()))
        assert figures.seconds_per_image > 0
    told = json.loads((found.path / proposals.INDEX).read_text())
    assert (told["digest"], told["search"]["width"]) == (source.manifest.digest, 50)
    assert set(told["tool_versions"]) >= {"opencv", "numpy"}
    assert {path.name for path in found.path.iterdir()} == {*written(found), proposals.PLAN, proposals.INDEX}
    first = next(rows_of(source, "val"))["image_id"]
    assert np.array_equal(pickle.loads(pickle.dumps(found)).of(first), found.of(first))
    found.of(first)[:] = 0  # one's own copy
    assert found.of(first).any()


def test_proposals_are_made_once_and_only_what_is_missing_again(source: shards.Shards) -> None:
    first = proposals.make(source, CONFIG, splits=["val"])
    val = written(first)
    assert len(val) == 2  # one for each row group
    with pytest.raises(DataError, match=r"has no proposals of image '.*', only of 13 images of the splits val; run"):
        first.of(next(rows_of(source, "train"))["image_id"])
    both = proposals.make(source, CONFIG, splits=["train"])
    assert (list(both.made.splits), len(both)) == (["val", "train"], 53)
    before = written(both)
    assert val.items() < before.items()
    assert written(proposals.make(source, CONFIG)) == before
    gone = both.path / "part-train-00000-00001.parquet"
    boxes = {row["image_id"]: both.of(row["image_id"]) for row in rows_of(source, "train")}
    gone.unlink()
    (both.path / f".{gone.name}.killed.partial").touch()
    with pytest.raises(DataError, match=f"{gone.name}: proposals cannot be read: .* run jobs.propose again"):
        proposals.read(source, NAME)
    again = proposals.make(source, CONFIG)
    after = written(again)
    assert {name for name in after if after[name] != before.get(name)} == {gone.name}
    assert all(np.array_equal(again.of(image_id), found) for image_id, found in boxes.items())
    assert not list(both.path.glob(".*"))


def test_proposals_of_another_dataset_or_search_are_refused(source: shards.Shards) -> None:
    with pytest.raises(DataError, match=r"no such proposals were made \(known: none\); run python -m jobs.propose sh"):
        proposals.read(source, NAME)
    found = proposals.make(source, CONFIG, splits=["val"], name="mine")
    with pytest.raises(DataError, match=r"no such proposals were made \(known: mine\)"):
        proposals.read(source, NAME)
    other = shards.Shards(source.path, source.manifest.model_copy(update={"digest": "1" * 64}))
    with pytest.raises(DataError, match=r"were made for a dataset of digest 000000000000, but .* has 111111111111"):
        proposals.read(other, "mine")
    with pytest.raises(DataError, match="were begun with another dataset; give another name"):
        proposals.make(other, CONFIG, splits=["val"], name="mine")
    wider = CONFIG.model_copy(update={"width": 60, "min_side": 6})
    with pytest.raises(DataError, match="were begun with another width, min_side; give another name"):
        proposals.make(source, wider, splits=["val"], name="mine")
    with pytest.raises(DataError, match="has no split 'test'"):
        proposals.make(source, CONFIG, splits=["test"])
    (found.path / proposals.INDEX).unlink()
    with pytest.raises(DataError, match="no such proposals were made to the end"):
        proposals.read(source, "mine")


def test_proposals_of_a_damaged_shard_are_refused(source: shards.Shards) -> None:
    path = source.path / source.manifest.of("val")[0].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path.name}: sha256 differs from the manifest"):
        proposals.make(source, CONFIG)


def test_propose_job_prints_where_the_regions_are_and_what_they_cover(
    source: shards.Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ray_session", lambda storage, num_cpus: nullcontext())  # this process is connected
    search = "search={width: 50, min_side: 5, max_proposals: 60}"
    assert job.main([f"storage={tmp_path}", "shards=shards/stripes", "splits=[val]", search]) == 0
    said = capsys.readouterr().out
    figures = proposals.read(source, NAME).made.splits["val"]
    assert f"val      recall {figures.recall_at_iou_0_5:.3f} at IoU 0.5, {figures.recall_at_iou_0_7:.3f} at" in said
    assert f"proposals {source.path / 'proposals' / NAME}\n" in said
    assert job.main([f"storage={tmp_path}", "shards=shards/stripes", "name=../mine"]) == 2
    assert job.main([f"storage={tmp_path}", "shards=shards/none"]) == 3
