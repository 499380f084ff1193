"""Datasets in a bucket: a real S3 server on loopback (moto's), reached by the environment as in production."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline import storage
from pipeline.config import parse
from pipeline.data import datasets
from pipeline.data.datasets import DatasetConfig, _tar, coco, image_folder, imagenet, uri_list, voc, webdataset, yolo
from pipeline.errors import DataError
from pipeline.types import Record

BUCKET = "photos"
KEYS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
BOUND_S = 20.0  # in which a server that is not there is an error: three attempts, on a busy machine


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server with one empty bucket."""
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the bucket, which is emptied afterwards; the environment leads there."""
    leads_to(server, monkeypatch)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=server)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
    client.delete_bucket(Bucket=BUCKET)


def leads_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def put(client: Any, **objects: bytes) -> None:
    for key, data in objects.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=data)


def packed(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def content(record: Record) -> bytes:
    return storage.read(record.uri, record.byte_range)


def refused(config: DatasetConfig) -> str:
    """What the one error says that reading raises."""
    with pytest.raises(DataError) as error:
        list(datasets.records(config, config.splits[0]))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_walk_of_a_bucket_is_that_of_a_folder_with_the_same_files(bucket: Any, tmp_path: Path) -> None:
    names = ("b/2", "b/10", "a x.jpg", "a/ü.jpg", "a-b/1", ".hidden", ".git/x", "b/.deep/y", "100%25.jpg", "a+b?c#d")
    for name in names:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(name.encode())
        put(bucket, **{f"top/{name}": name.encode()})
    put(bucket, **{"topmost/other": b""})
    root = f"s3://{BUCKET}/top"
    remote, local = list(storage.walk(root)), list(storage.walk(str(tmp_path / "top")))
    assert [(file.name, file.size_bytes) for file in remote] == [(file.name, file.size_bytes) for file in local]
    assert [storage.read(file.uri) for file in remote] == [file.name.encode() for file in remote]
    assert storage.folders(root) == storage.folders(str(tmp_path / "top")) == ["a", "a-b", "b"]
    assert (storage.is_folder(root), storage.is_file(root), storage.is_file(f"{root}/b/2")) == (True, False, True)
    assert not storage.is_folder(f"s3://{BUCKET}/to")


def test_byte_ranges_of_an_object_are_those_of_a_file(bucket: Any) -> None:
    put(bucket, digits=b"0123456789")
    uri = f"s3://{BUCKET}/digits"
    assert [storage.read(uri, part) for part in ((3, 4), (0, 10), (9, 1))] == [b"3456", b"0123456789", b"9"]
    for offset, length in ((3, 8), (10, 1), (500, 5)):
        with pytest.raises(OSError, match=f"ends before byte {offset + length}"):
            storage.read(uri, (offset, length))
    with pytest.raises(FileNotFoundError) as error:
        storage.read(f"s3://{BUCKET}/none")
    assert storage.reason(error.value) == f"Path does not exist '{BUCKET}/none'"


def test_image_folder_in_a_bucket_is_read(bucket: Any) -> None:
    names = ("train/a/1.jpg", "train/b/deep/2.jpg", "train/b/.x", "val/a/1.jpg", "val/b/1.jpg")
    put(bucket, **{f"set/{name}": name.encode() for name in names})
    raw = {"root": f"s3://{BUCKET}/set/"}
    config = parse(image_folder.Config, raw, "here").at(Path("/elsewhere"), Path("/elsewhere"))
    assert datasets.class_names(config) == ("a", "b")
    records = list(datasets.records(config, "train"))
    assert [(record.image_id, record.label) for record in records] == [("train/a/1.jpg", 0), ("train/b/deep/2.jpg", 1)]
    assert [content(record) for record in records] == [b"train/a/1.jpg", b"train/b/deep/2.jpg"]
    assert [record.size_bytes for record in records] == [13, 18]


def test_webdataset_in_a_bucket_is_read_by_byte_ranges(bucket: Any) -> None:
    big = os.urandom(200_000)  # more than is read ahead
    files = [("0.jpg", big), ("0.cls", b"1"), ("1.cls", b"0"), ("1.jpg", b"small"), ("2.jpg", b""), ("2.cls", b"1")]
    put(bucket, **{"wds/train-000.tar": packed(*files), "wds/train-001.tar": packed(*files[2:4]), "wds/other": b""})
    config = webdataset.Config(root=f"s3://{BUCKET}/wds", splits=("train",))
    records = list(webdataset.records(config, "train"))
    assert [content(record) for record in records] == [big, b"small", b"", b"small"]
    assert [record.label for record in records] == [1, 0, 1, 0]
    assert [record.image_id for record in records][-1] == "train/train-001/1"


def test_tar_in_a_bucket_that_was_cut_off_is_named(bucket: Any) -> None:
    whole = packed(("0.jpg", bytes(3000)), ("0.cls", b"1"))
    for length in (1000, 512 + 3072, 512 + 3072 + 100):
        put(bucket, **{"cut.tar": whole[:length]})
        with pytest.raises(DataError, match=r"s3://photos/cut\.tar: is no tar, or a damaged one"):
            list(_tar.members(f"s3://{BUCKET}/cut.tar"))


def test_imagenet_tars_in_a_bucket_are_read_in_place(bucket: Any) -> None:
    wnids = ("n01440764", "n02018795")
    inner = [(f"{wnid}.tar", packed((f"{wnid}_0.JPEG", wnid.encode() * 9))) for wnid in wnids]
    put(bucket, **{f"in/{imagenet.TRAIN_TAR}": packed(*inner)})
    config = imagenet.Config(root=f"s3://{BUCKET}/in", splits=("train",))
    records = list(imagenet.records(config, "train"))
    assert [content(record) for record in records] == [wnid.encode() * 9 for wnid in wnids]


def test_detection_layouts_in_a_bucket_are_read(bucket: Any) -> None:
    xml = "<annotation><filename>1.jpg</filename><size><width>9</width><height>9</height></size>{}</annotation>"
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 9, "width": 9}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    files = {
        "voc/ImageSets/Segmentation/train.txt": "1",
        "voc/Annotations/1.xml": xml.format(f"<object><name>dog</name>{box}</object>"),
        "voc/JPEGImages/1.jpg": "pixels",
        "voc/SegmentationClass/1.png": "mask",
        "coco/annotations/instances_train2017.json": json.dumps(instances),
        "coco/train2017/1.jpg": "pixels",
        "yolo/data.yaml": "names: [dog]",
        "yolo/images/train/1.jpg": "pixels",
        "yolo/labels/train/1.txt": f"0 {3 / 9} {3 / 9} {4 / 9} {4 / 9}",
    }
    put(bucket, **{name: text.encode() for name, text in files.items()})
    root, found = f"s3://{BUCKET}", dict[str, Record]()
    configs = [
        voc.Config(root=f"{root}/voc", splits=("train",), masks=True, classes=("dog",)),
        coco.Config(root=f"{root}/coco", splits=("train",)),
        yolo.Config(root=f"{root}/yolo", splits=("train",)),
    ]
    for config in configs:
        assert datasets.class_names(config) == ("dog",)
        (found[config.name],) = datasets.records(config, "train")
    assert [(content(record), record.size_bytes) for record in found.values()] == [(b"pixels", 6)] * 3
    assert (found["voc"].mask_uri, found["voc"].mask_bytes) == (f"{root}/voc/SegmentationClass/1.png", 4)
    for record in found.values():
        assert record.objects is not None
        scale = 9 if record.objects.frame_hw == (1, 1) else 1
        assert (record.objects.boxes_xyxy * scale).round(4).tolist() == [[1, 1, 5, 5]]


@pytest.mark.parametrize("where", ["bucket", "disk"])
def test_table_with_uris_in_a_bucket_is_read(bucket: Any, tmp_path: Path, where: str) -> None:
    put(bucket, **{"set/a 1.jpg": b"first", "far/2.jpg": b"second"})
    text = f"uri,label,split\ns3://{BUCKET}/set/a 1.jpg,x,train\ns3://{BUCKET}/far/2.jpg,y,train\n"
    if where == "bucket":
        text = text.replace(f"s3://{BUCKET}/set/", "")  # relative: beside the table
    put(bucket, **{"set/images.csv": text.encode()})
    (tmp_path / "images.csv").write_text(text)
    root = f"s3://{BUCKET}/set" if where == "bucket" else str(tmp_path)
    records = list(uri_list.records(uri_list.Config(root=root, splits=("train",)), "train"))
    assert [content(record) for record in records] == [b"first", b"second"]


def test_parquet_table_in_a_bucket_is_read(bucket: Any, tmp_path: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    rows = [{"uri": f"{name}.jpg", "class_name": name, "split": "val"} for name in "ba"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    put(bucket, **{"set/t.parquet": (tmp_path / "t.parquet").read_bytes()})
    config = uri_list.Config(root=f"s3://{BUCKET}/set", tables="t.parquet", splits=("val",))
    assert [record.uri for record in uri_list.records(config, "val")] == [f"s3://{BUCKET}/set/{n}.jpg" for n in "ba"]


def test_missing_bucket_or_folder_is_one_clear_error(bucket: Any) -> None:
    put(bucket, **{"set/train/a/1": b""})
    for root in ("s3://nowhere/set", f"s3://{BUCKET}/none"):
        assert f"dataset 'image_folder': {root} is not a folder; set dataset.root" in refused(
            image_folder.Config(root=root)
        )
    assert f"s3://{BUCKET}/set/val is not a folder" in refused(
        image_folder.Config(root=f"s3://{BUCKET}/set", splits=("val", "train"))
    )
    with pytest.raises(DataError, match=r"s3://nowhere/a\.tar: cannot be read: Path does not exist"):
        list(_tar.members("s3://nowhere/a.tar"))


def test_server_that_is_down_is_one_clear_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        leads_to(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
    began = time.monotonic()
    said = refused(image_folder.Config(root=f"s3://{BUCKET}/set"))
    assert time.monotonic() - began < BOUND_S
    assert f"s3://{BUCKET}/set cannot be reached" in said
    assert "check the address, the credentials and the endpoint in the environment" in said


def test_endpoint_that_changes_in_the_environment_is_noticed(
    bucket: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, key=b"there")
    assert storage.read(f"s3://{BUCKET}/key") == b"there"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # the narrower one wins
    with pytest.raises(OSError, match="onnect"):
        storage.read(f"s3://{BUCKET}/key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    assert storage.read(f"s3://{BUCKET}/key") == b"there"


def test_bucket_without_region_in_the_environment_is_reached_without_asking_the_network(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, key=b"there")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    began = time.monotonic()
    assert storage.read(f"s3://{BUCKET}/key") == b"there"
    assert time.monotonic() - began < BOUND_S
