"""Ingest before any work is given to Ray: what is refused, in one sentence, and that nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse
from pipeline.data import ingest, plan, rows, shards, work
from pipeline.data.datasets import image_folder, uri_list
from pipeline.errors import ConfigError, DataError
from pipeline.types import Split

CONFIG = ingest.Config(rows_per_group=4)
HOLD = """
import sys, time
from pathlib import Path
from pipeline.data import work
with work.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("key", ["seed", "rows_per_shard", "rows_per_group", "max_reject_share", "train_short_side"])
def test_impossible_values_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: input should be greater than or equal to"):
        parse(ingest.Config, {key: -1}, "here")


def test_folder_that_is_no_dataset_is_not_touched(stripes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="shards: is there already and is no dataset; choose another folder"):
        ingest.ingest(image_folder.Config(root=stripes_folder), ingest.Config(), tmp_path / "shards")
    assert [path.name for path in tmp_path.rglob("*")] == ["shards", "thesis.txt"]


def test_collection_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        ingest.ingest(image_folder.Config(root=tmp_path / "none"), ingest.Config(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_training_split_without_a_class_is_found_before_anything_is_decoded(tmp_path: Path) -> None:
    rows = "uri,class_name,split\n1.jpg,cat,train\n2.jpg,cat,val\n3.jpg,dog,val\n"
    (tmp_path / "images.csv").write_text(rows)  # there is none of these files
    with pytest.raises(DataError, match=r"'train': 1 of 2 classes have no image, the first is 'dog'; add some, or lea"):
        ingest.ingest(uri_list.Config(root=tmp_path), ingest.Config(), tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["images.csv"]


def test_image_id_in_two_splits_is_found_before_anything_is_decoded(tmp_path: Path) -> None:
    rows = "uri,class_name,split,image_id\n1.jpg,cat,train,a\n2.jpg,dog,train,b\n3.jpg,dog,val,a\n"
    (tmp_path / "images.csv").write_text(rows)
    with pytest.raises(DataError, match="image id 'a' is in the splits 'train' and 'val'"):
        ingest.ingest(uri_list.Config(root=tmp_path), ingest.Config(), tmp_path / "shards")


def test_destination_below_a_file_is_one_sentence(stripes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be written: (Not a directory|File exists); mend that"):
        ingest.ingest(image_folder.Config(root=stripes_folder), ingest.Config(), tmp_path / "file" / "shards")


def test_lock_keeps_a_second_job_away_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "shards")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(DataError, match="shards: another job is making it; wait until that ends"),
            work.locked(tmp_path / "shards"),
        ):
            pass
        with work.locked(tmp_path / "other"):
            pass
        holder.kill()
        holder.wait(30)
    with work.locked(tmp_path / "shards"):
        assert (tmp_path / ".shards.lock").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def listed(stripes_folder: Path, tmp_path: Path) -> uri_list.Config:
    """A table of the training pictures of stripes."""
    table = tmp_path / "table" / "images.csv"
    table.parent.mkdir()
    lines = [f"{path},{path.parent.name},train" for path in sorted((stripes_folder / "train").rglob("*.*"))]
    table.write_text("\n".join(["uri,class_name,split", *lines, ""]))
    return uri_list.Config(root=str(table.parent), splits=("train",))


@pytest.fixture
def before(listed: uri_list.Config, tmp_path: Path) -> shards.Shards:
    """A dataset that an earlier release made of it, which knew no `max_bytes`."""
    path = tmp_path / "shards"
    path.mkdir()
    made = rows.make_shard(path / "train-00000.parquet", "train", uri_list.records(listed, "train"), CONFIG)
    assert made.shard
    pq.write_table(pa.Table.from_pylist([], schema=shards.REJECT_SCHEMA), path / shards.REJECTS)
    manifest = shards.Manifest(
        dataset="uri_list",
        classes=("across", "down"),
        class_counts={"train": (20, 20)},
        num_rejects=0,
        shards=(made.shard,),
        digest=made.digest,
        decoding=CONFIG.decoding,
        config={
            "dataset": listed.model_dump(mode="json"),
            "ingest": CONFIG.model_dump(mode="json", exclude={"max_bytes"}),
        },
        tool_versions={},
    )
    (path / shards.MANIFEST).write_text(manifest.model_dump_json())
    return shards.load(path)


@pytest.mark.parametrize("append", [False, True])
def test_finished_dataset_of_the_same_images_is_left_alone(
    before: shards.Shards, listed: uri_list.Config, append: bool
) -> None:
    assert ingest.ingest(listed, CONFIG, before.path, append=append) == before
    with pytest.raises(DataError, match="made with another configuration"):
        ingest.ingest(listed, CONFIG.model_copy(update={"max_bytes": 10**6}), before.path, append=append)


@pytest.mark.parametrize("append", [False, True])
def test_image_with_another_label_now_is_refused_by_its_name(
    before: shards.Shards, listed: uri_list.Config, append: bool
) -> None:
    table = Path(str(listed.root)) / "images.csv"
    header, first, second, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, first.replace(",across,", ",down,"), second, *lines]))
    with pytest.raises(
        DataError,
        match=r"^1 images have changed since .*00\.png: has another label.*make a new dataset in another folder",
    ):
        ingest.ingest(listed, CONFIG, before.path, append=append)
    assert shards.load(before.path) == before


@pytest.mark.parametrize("rest", [0, 20], ids=["at the end of a line", "within a line"])
def test_plan_that_was_cut_makes_no_shard_and_is_written_anew(stripes_folder: Path, tmp_path: Path, rest: int) -> None:
    dataset = image_folder.Config(root=stripes_folder)
    listings: dict[Split, plan.Listing] = {
        "val": plan.write_listing(tmp_path / "listing", image_folder.records(dataset, "val"))
    }
    place = work.Work(tmp_path / "shards", {})
    first, second = place.plan(listings, 7, 0)
    place.make(first, ingest.Config())
    path = place.folder / "plan" / f"{second.name}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:rest])
    with pytest.raises(
        DataError, match=rf"{second.name}\.jsonl: expected 6 records, got 5: .* delete (\S+) and"
    ) as error:
        place.make(second, ingest.Config())
    assert not place.is_done(second)
    assert [found.name for found in place.dataset.iterdir()] == [f"{first.name}.parquet"]
    Path(str(error.value).split(" delete ")[1].split()[0]).unlink()
    assert place.plan(listings, 7, 0) == [first, second]
    assert place.is_done(first)
    assert place.make(second, ingest.Config()).num_records == 6
