"""The ingest benchmark: what it measures, how it divides, what it says; contenders on small real pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import benchmark as door
from pipeline import imaging
from pipeline.benchmark import bare, photos, torch_loader, ventral
from pipeline.benchmark import ingest as plane
from pipeline.benchmark.block import Figures, Marks, summary
from pipeline.benchmark.contender import CONTENDERS, Contender, Decoder, Entry, Setting
from pipeline.benchmark.machine import OthersShare, peak_memory
from pipeline.benchmark.report import Report, peers, table
from pipeline.benchmark.rounds import rotated, spread
from pipeline.config import load
from pipeline.data.datasets import image_folder
from pipeline.errors import ConfigError, DataError
from tests.local_nodes import alone

BARE, OURS = "bare processes", "ventral local"
SAME, DOCUMENTED = "DataLoader, same decoder", "DataLoader, as documented"


def figures(rate: float, others_share: float = 0.0) -> Figures:
    return Figures(
        images_per_s=rate,
        epoch_images_per_s=rate,
        first_batch_s=0.5,
        restart_s=0.25,
        peak_bytes=3 * 2**20,
        spilled_bytes=0,
        others_share=others_share,
        load=(0.0, 2.0),
    )


def report(*rounds: dict[str, Figures], missing: dict[str, str] | None = None) -> Report:
    return Report(
        commit="c",
        versions={},
        machine={},
        config={},
        rounds=rounds,
        missing=missing or {},
        quiet_share=0.05,
        load=(0.0, 2.0),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 6 + 5 JPEGs whose short side is 300, and one PNG."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in {"a": 6, "b": 5}.items():
        for number in range(count):
            path = root / "train" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(imaging.encode_jpeg(rng.integers(0, 255, (300, 330 + number, 3), np.uint8)))
    (root / "train" / "b" / "z.png").write_bytes(imaging.encode_png(np.zeros((300, 300, 3), np.uint8)))
    return root


def stored(folder: Path, target: Path, num_photos: int = 20) -> list[photos.Photo]:
    source = image_folder.Config(root=str(folder), splits=("train",))
    photos.write(target, [source], num_photos, 256)
    return photos.read(target)


def test_photos_are_jpegs_of_short_side_256_and_repeat_without_more_memory(folder: Path, tmp_path: Path) -> None:
    found = stored(folder, tmp_path / "photos")
    assert len(found) == 20
    assert [photo.label for photo in found] == [0] * 6 + [1] * 5 + [0] * 6 + [1] * 3
    assert {min(imaging.probe(photo.data)) for photo in found} == {256}
    assert found[11].data is found[0].data
    assert len({photo.image_id for photo in found}) == 20


def test_photos_of_a_second_source_have_classes_of_their_own(folder: Path) -> None:
    source = image_folder.Config(root=str(folder), splits=("train",))
    assert {label for _, label in photos.collect([source, source])} == {0, 1, 2, 3}


def test_originals_leave_out_what_needs_no_resize(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small" / "train"
    for name in ("a", "b"):
        (small / name).mkdir(parents=True)
        (small / name / "0.jpg").write_bytes(imaging.encode_jpeg(np.zeros((256, 400, 3), np.uint8)))
    with pytest.raises(DataError, match="no JPEG to measure with"):
        photos.write(tmp_path / "out", [image_folder.Config(root=str(small.parent), splits=("train",))], 4, None)


def contest(name: str, decoder: Decoder, setting: Setting) -> Contender:
    entry = CONTENDERS[name]
    if not entry.is_here:
        pytest.skip(f"{entry.needs} is not installed: pip install 'ventral[bench]'")
    return entry.build(setting.model_copy(update={"decoder": decoder, "folder": setting.folder / decoder}))


# mosaicml-streaming takes a quarter of a minute to import, and its numpy is not ours: the benchmark itself runs it.
QUICK = [name for name, entry in CONTENDERS.items() if entry.reader == "local" and entry.needs != "streaming"]


@pytest.mark.parametrize("name", QUICK)
def test_contender_gives_whole_batches_of_the_photos_it_stored(name: str, folder: Path, tmp_path: Path) -> None:
    found = stored(folder, tmp_path / "photos")
    contender = contest(name, CONTENDERS[name].decoder, Setting(folder=tmp_path, batch_size=4, size=32))
    if name == BARE:
        contender.setting = contender.setting.model_copy(update={"folder": tmp_path / "own"})
    contender.prepare(found)
    for seed in range(2):
        batches = [(images.clone(), labels) for images, labels in contender.epoch(seed)]
        assert 3 <= len(batches) <= 5  # two processes may leave out a part of a batch each
        assert {(images.dtype, tuple(images.shape)) for images, _ in batches} == {(torch.uint8, (4, 3, 32, 32))}
        assert {label for _, labels in batches for label in labels.tolist()} == {0, 1}


@pytest.mark.parametrize("module", [torch_loader, ventral])
def test_epoch_of_one_seed_repeats_and_of_another_differs(module: object, folder: Path, tmp_path: Path) -> None:
    found = stored(folder, tmp_path / "photos")
    contender: Contender = module.Contestant(Setting(folder=tmp_path / "own", batch_size=10, size=32))  # type: ignore[attr-defined]
    contender.prepare(found)
    first, again, other = (torch.cat([images for images, _ in contender.epoch(seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bare_processes_decode_every_photo_once(folder: Path, tmp_path: Path) -> None:
    found = stored(folder, tmp_path / "photos")
    contender = bare.Contestant(Setting(folder=tmp_path / "own", batch_size=1, size=32))
    labels = sorted(label for _, labels in contender.epoch(0) for label in labels.tolist())
    assert labels == sorted(photo.label for photo in found)


def test_summary_leaves_out_first_batches_and_counts_waiting_between_epochs() -> None:
    first = Marks(started=0.0, at=(2.0, 3.0, 3.5, 4.0), sizes=(10, 10, 10, 10))
    second = Marks(started=4.5, at=(5.0, 6.0, 6.5, 7.0), sizes=(10, 10, 10, 10))
    found = summary([first, second], 2, peak_bytes=1, spilled_bytes=0, others_share=0.0, load=(0.0, 0.0))
    assert found.images_per_s == 20.0  # 2 x 20 images in 2 x 1 s after the second batch
    assert found.epoch_images_per_s == 80 / 6.5
    assert found.first_batch_s == 2.0
    assert found.restart_s == 1.0


def test_summary_of_too_few_batches_is_refused() -> None:
    marks = Marks(started=0.0, at=(1.0, 2.0), sizes=(1, 1))
    with pytest.raises(DataError, match="2 batches, 2 of which are skipped; take more num_images"):
        summary([marks, marks], 2)


def test_ratio_divides_within_a_round_by_the_fastest_other() -> None:
    slow = {BARE: figures(100), OURS: figures(80), SAME: figures(40), DOCUMENTED: figures(20)}
    fast = {BARE: figures(1000), OURS: figures(900), SAME: figures(300), DOCUMENTED: figures(600)}
    found = report(slow, fast)
    assert found.ratio(OURS, [BARE]) == spread([0.8, 0.9])
    assert found.ratio(OURS, [SAME, DOCUMENTED]) == spread([2.0, 1.5])
    assert found.ratio(BARE, [BARE]) is None


def test_table_has_a_line_for_each_contender_and_names_what_is_missing() -> None:
    text = table(report({BARE: figures(100), OURS: figures(90)}, missing={"webdataset, same decoder": "webdataset"}))
    lines = text.splitlines()
    assert lines[1].startswith(BARE)
    assert "90 (90..90)  0.90 (0.90..0.90)" in lines[2]
    assert "webdataset, same decoder: left out, 'webdataset' is not installed" in lines
    both = table(
        report({OURS: figures(100), "ventral ray": figures(94)}, {OURS: figures(50), "ventral ray": figures(43)})
    )
    assert "ventral ray / ventral local: 0.90 (0.86..0.94)" in both.splitlines()


@pytest.mark.parametrize(("share", "is_said"), [(0.04, False), (0.30, True)])
def test_table_says_when_the_machine_was_not_quiet(share: float, is_said: bool) -> None:
    text = table(report({BARE: figures(100), OURS: figures(90, others_share=share)}))
    assert ("not quiet" in text) is is_said


def test_peers_decode_alike_or_as_documented() -> None:
    assert set(peers("same")) & set(peers("documented")) == set()
    assert {CONTENDERS[name].module for name in peers("same")} == {
        CONTENDERS[name].module for name in peers("documented")
    }
    assert BARE not in peers("same")


def test_missing_library_is_found_out_without_importing() -> None:
    assert not Entry("webdataset", "peer", needs="no_such_library").is_here
    assert Entry("bare", "limit").is_here


def test_rounds_begin_with_another_contender_each_time() -> None:
    assert [rotated(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_unknown_contender_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    source = image_folder.Config(root=str(folder), splits=("train",))
    config = plane.Config(sources=(source,), contenders=("webdatset, same decoder",))
    with pytest.raises(ConfigError, match="did you mean 'webdataset, same decoder'"):
        plane.run(config, tmp_path / "scratch", "")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_run_measures_in_own_processes_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    source = image_folder.Config(root=str(folder), splits=("train",))
    config = plane.Config(
        sources=(source,),
        num_images=48,
        batch_size=4,
        size=32,
        rounds=1,
        skip_batches=2,
        contenders=(BARE, OURS),
        conversion=None,
    )
    found = plane.run(config, tmp_path, "")
    assert list(found.rounds[0]) == [BARE, OURS]
    assert all(block.images_per_s > 0 and block.peak_bytes > 2**24 for block in found.rounds[0].values())
    assert list(tmp_path.iterdir()) == []
    assert Report.model_validate_json(found.model_dump_json()) == found


def test_peak_memory_counts_what_this_process_holds() -> None:
    alone(_peak_memory_counts_what_this_process_holds, timeout_s=120)


def _peak_memory_counts_what_this_process_holds() -> None:
    # In a process without children: what those of a whole test run let go meanwhile would count too.
    with peak_memory(list, every_s=0.01) as before:
        pass
    held = np.ones(2**23)  # 64 MiB, touched
    with peak_memory(list, every_s=0.01) as peak:
        pass
    assert peak.num_bytes - before.num_bytes > 0.9 * held.nbytes


def test_others_share_leaves_out_this_process() -> None:
    alone(_others_share_leaves_out_this_process, timeout_s=120)


def _others_share_leaves_out_this_process() -> None:
    everything = OthersShare(list)
    deadline = os.times().user + 0.5
    while os.times().user < deadline:
        pass
    assert 0 <= everything.read() <= 1 - 0.5 / (os.cpu_count() or 1) / 2


def test_door_takes_the_committed_run_where_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["ingest", "ingest.rounds=2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "root: clothing10" in shown
    assert "rounds: 2" in shown
    committed = load(door.Benchmark, door.CONFIGS / "ingest.yaml").ingest
    assert committed is not None
    assert committed.num_processes == 2


def test_door_names_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["trainer"]) == 2
    assert "python -m jobs.benchmark ingest" in capsys.readouterr().err
