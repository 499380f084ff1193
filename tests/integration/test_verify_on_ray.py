"""Verification as a job on a real Ray: what ingest made is sound, and what is damaged ends with a table and code 3."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs import verify as job
from pipeline.data import shards
from pipeline.data.findings import Config
from pipeline.data.verify import conclude, verify, verify_shard

pytestmark = pytest.mark.usefixtures("cluster")


def test_verify_on_ray_finds_what_one_process_finds(stripes: shards.Shards, tmp_path: Path) -> None:
    path = Path(shutil.copytree(stripes.path, tmp_path / "damaged"))
    damaged = path / stripes.manifest.shards[1].name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 0xFF
    damaged.write_bytes(data)
    source, config = shards.load(path), Config()
    seen: list[tuple[int, int]] = []
    found = verify(source, config, lambda done, total: seen.append((done, total)))
    classes, decoding = len(source.manifest.classes), source.manifest.decoding
    alone = [verify_shard(path / shard.name, shard, classes, decoding, config) for shard in source.manifest.shards]
    assert found == conclude(source, alone, config)
    assert found.counts["shard_checksum"] == 1
    assert found.num_images == 53
    assert seen[-1] == (53, 53)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_verify_job_tells_by_its_exit_code(
    stripes: shards.Shards,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(stripes.path, tmp_path / "shards" / "stripes")
    monkeypatch.setattr(job, "ray_session", lambda storage, num_cpus: nullcontext())  # this process is connected
    arguments = [f"storage={tmp_path}", "shards=shards/stripes"]
    assert job.main(arguments) == 0
    report = tmp_path / "shards" / "stripes.verify.json"
    assert json.loads(report.read_text())["num_images"] == 53
    (tmp_path / "shards" / "stripes" / "notes.txt").touch()
    assert job.main([*arguments, "report=stray.json"]) == 0
    capsys.readouterr()
    assert job.main([*arguments, "verify.strict=true"]) == 3
    said = capsys.readouterr()
    assert "error    stray_file" in said.out
    assert "notes.txt: no manifest names it" in said.out
    assert said.err.startswith("error: ")
    assert json.loads((tmp_path / "stray.json").read_text())["counts"]["stray_file"] == 1
    assert job.main([f"storage={tmp_path}", "shards=shards/none"]) == 3
