"""Checkpoints in a bucket: a real S3 server on loopback (moto's), and one that is not there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from pipeline import storage
from pipeline.config import parse
from pipeline.errors import ConfigError, DataError
from pipeline.training import launch
from pipeline.training.checkpoint import MARKER, Config, Position, Store

BUCKET = "checkpoints"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with one empty bucket; the environment leads there."""
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    for key in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    yield client
    started.stop()


def save(store: Store, *at: int) -> None:
    store.save(Position(*at), {"model": {"weight": torch.full((3_000_000,), float(sum(at)))}}, {"at": list(at)})


def keys(client: Any) -> set[str]:
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {entry["Key"] for entry in found if not entry["Key"].endswith("/")}


def test_checkpoints_in_a_bucket_behave_as_on_a_disk(server: Any, tmp_path: Path) -> None:
    config = parse(Config, {"folder": f"s3://{BUCKET}/team/runs", "keep": 2}, "here")
    store = launch.store_of(tmp_path / "first", config)
    launch.check_folder(tmp_path / "first", config, resume=False)
    assert (store.folder, store.positions(), store.newest("cpu")) == (f"s3://{BUCKET}/team/runs/first", [], None)
    for at in ((0, 64), (1,), (1, 64)):  # 12 MB each: several parts of an upload
        save(store, *at)
    assert store.positions() == [(1, 0), (1, 64)]
    names = ("model.pt", "progress.json", MARKER)
    assert keys(server) == {f"team/runs/first/{at.name}/{name}" for at in store.positions() for name in names}
    newest = store.newest("cpu")
    assert newest is not None
    assert newest.progress == {"at": [1, 64]}
    assert torch.equal(newest.parts["model"]["weight"], torch.full((3_000_000,), 65.0))
    with pytest.raises(ConfigError, match=f"s3://{BUCKET}/team/runs/first: holds an earlier run; choose another name"):
        launch.check_folder(tmp_path / "first", config, resume=False)
    launch.check_folder(tmp_path / "first", config, resume=True)

    torn = f"team/runs/first/{Position(1, 64).name}"
    data = storage.read(f"s3://{BUCKET}/{torn}/model.pt")
    server.put_object(Bucket=BUCKET, Key=f"{torn}/model.pt", Body=data[:1000])
    before = store.newest("cpu")
    assert before is not None
    assert before.position == (1, 0)
    server.delete_object(Bucket=BUCKET, Key=f"{torn}/{MARKER}")  # what a killed process leaves
    assert store.positions() == [(1, 0)]
    save(store, 1, 32)
    assert store.positions() == [(1, 0), (1, 32)]
    assert not any(key.startswith(torn) for key in keys(server))


def test_bucket_that_cannot_be_reached_is_one_clear_error(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    store = Store(f"s3://{BUCKET}/run")
    with pytest.raises(DataError, match=f"s3://{BUCKET}/run: cannot be listed: .*; check the path") as listing:
        store.newest("cpu")
    with pytest.raises(DataError, match=r"epoch-0001-offset-00000000: cannot be written: .*resume=true") as writing:
        save(store, 1)
    assert [len(str(error.value).splitlines()) for error in (listing, writing)] == [1, 1]
