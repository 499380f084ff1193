"""Locations on a local disk: odd names, links, folders that cannot be listed, byte ranges. Buckets: `test_s3`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.datasets import image_folder
from pipeline.errors import DataError


def put(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))  # noqa: PTH118  (bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))


def names(root: Path) -> list[str]:
    return [file.name for file in storage.walk(str(root))]


def test_walk_of_odd_names_gives_printable_distinct_names_and_locations_that_open(tmp_path: Path) -> None:
    odd: list[str | bytes] = [
        "with space.jpg",
        "new\nline.jpg",
        "tab\there.jpg",
        b"latin-\xe9.jpg",
        "ünï/日本.jpg",
        "%0A.jpg",
        "a\x7f",
    ]
    put(tmp_path, *odd)
    found = list(storage.walk(str(tmp_path)))
    assert {storage.read(file.uri) for file in found} == {os.fsencode(name) for name in odd}
    assert all(file.size_bytes == len(storage.read(file.uri)) for file in found)
    assert {file.name for file in found} == {
        *("with space.jpg", "new%0Aline.jpg", "tab%09here.jpg", "latin-%E9.jpg", "ünï/日本.jpg", "%0A.jpg", "a%7F"),
    }
    assert all(file.name.encode("utf-8") and file.name.isprintable() for file in found)


def test_halves_of_a_character_are_escaped_and_name_no_file(tmp_path: Path) -> None:
    assert storage.printable("\ud800\udfff.jpg") == "%ED%A0%80%ED%BF%BF.jpg"
    for name in ("\ud800.jpg", "a\0.jpg"):
        with pytest.raises(OSError, match=r"can't encode|null byte"):
            storage.read(str(tmp_path / name))


def test_walk_is_sorted_and_leaves_hidden_files_and_folders_out(tmp_path: Path) -> None:
    put(tmp_path, "b/2", "b/10", "a.x", "B", ".hidden", ".git/x", "b/.deep/y", "b/._2")
    assert names(tmp_path) == ["B", "a.x", "b/10", "b/2"]
    assert storage.folders(str(tmp_path)) == ["b"]


def test_walk_follows_links_but_not_in_a_circle(tmp_path: Path) -> None:
    put(tmp_path, "root/a/1", "elsewhere/2")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/a/self").symlink_to(tmp_path / "root/a")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/file").symlink_to(tmp_path / "elsewhere/2")
    (tmp_path / "root/broken").symlink_to(tmp_path / "nothing")
    assert names(tmp_path / "root") == ["a/1", "file", "linked/2"]


def test_walk_takes_a_folder_called_like_an_image_for_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "x.jpg/inside.jpg")
    (tmp_path / "empty.jpg").mkdir()
    assert names(tmp_path) == ["x.jpg/inside.jpg"]
    with pytest.raises(IsADirectoryError):
        storage.read(str(tmp_path / "x.jpg"))


def test_walk_passes_by_what_is_no_file(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    assert names(tmp_path) == ["1.jpg"]


@pytest.mark.parametrize(("byte_range", "expected"), [(None, b"0123456789"), ((0, 10), b"0123456789")])
def test_read_of_a_whole_file(tmp_path: Path, byte_range: tuple[int, int] | None, expected: bytes) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert storage.read(str(tmp_path / "a"), byte_range) == expected


def test_read_of_a_byte_range_gives_it_or_says_where_the_file_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    uri = str(tmp_path / "a")
    assert [storage.read(uri, part) for part in ((3, 4), (9, 1), (10, 0))] == [b"3456", b"9", b""]
    for offset, length in ((3, 8), (10, 1), (500, 5)):
        with pytest.raises(OSError, match=f"ends before byte {offset + length}"):
            storage.read(uri, (offset, length))


def test_join_puts_names_below_a_folder_and_lets_absolute_ones_replace_it() -> None:
    assert storage.join("/a/", "b", "c") == "/a/b/c"
    assert storage.join("/", "b") == "/b"
    assert storage.join("s3://bucket", "b") == "s3://bucket/b"
    assert storage.join("/a", "/b") == "/b"
    assert storage.join("/a", "gs://bucket/b") == "gs://bucket/b"


def test_unknown_scheme_is_refused_by_its_name() -> None:
    with pytest.raises(OSError, match=r"locations of the form ftp:// are not known, only s3 and gs"):
        storage.read("ftp://host/a")


def test_reason_is_short_and_without_the_tails_of_libraries() -> None:
    assert storage.reason(FileNotFoundError(2, "Path does not exist 'a'. Detail: [errno 2] No such file")) == (
        "Path does not exist 'a'"
    )
    assert storage.reason(OSError("No such\n bucket (Request ID: 1234)")) == "No such bucket"
    assert storage.reason(PermissionError()) == "PermissionError"
    assert len(storage.reason(OSError("x" * 1000))) == 200


def as_nobody(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user whom permissions hold for; the tests may run as root, whom they do not."""
    imports = "import os, sys; from pipeline.data import datasets; made = datasets.config_of('image_folder')"
    lowered = f"{imports}\nos.geteuid() or os.seteuid(65534)\n{code}"
    return subprocess.run([sys.executable, "-c", lowered, *args], capture_output=True, text=True, check=False)


def test_folder_without_permission_is_named_in_one_error(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):  # pytest's folders are for their owner only
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    put(tmp_path, "train/a/1", "train/b/1", "val/a/1", "val/b/1", "train/a/deep/2")
    code = (
        "config = made(root=sys.argv[1])\n"
        "try: print(len(list(datasets.records(config, 'train'))))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert as_nobody(code, str(tmp_path)).stdout == "3\n"
    locked = tmp_path / "train/a/deep"
    locked.chmod(0)
    try:
        done = as_nobody(code, str(tmp_path))
    finally:
        locked.chmod(0o755)
    assert done.stdout == f"DataError {locked}: cannot be listed: Permission denied\n", done.stderr


def test_file_that_vanishes_after_it_was_listed_is_an_error_with_its_reason(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    (file,) = storage.walk(str(tmp_path))
    Path(file.uri).unlink()
    with pytest.raises(FileNotFoundError) as error:
        storage.read(file.uri)
    assert storage.reason(error.value) == "No such file or directory"


def test_image_folder_with_undecodable_names_gives_ids_that_can_be_stored(tmp_path: Path) -> None:
    put(tmp_path, b"train/gar\xe7on/a\xff.jpg", "train/b/1", b"val/gar\xe7on/1", "val/b/1\n2")
    config = image_folder.Config(root=str(tmp_path))
    assert image_folder.class_names(config) == ("b", "gar%E7on")
    (_, record), (last, _) = (list(image_folder.records(config, split)) for split in config.splits)
    assert (record.image_id, last.image_id) == ("train/gar%E7on/a%FF.jpg", "val/b/1%0A2")
    assert storage.read(record.uri) == b"train/gar\xe7on/a\xff.jpg"


def test_walk_of_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: cannot be listed: No such file or directory"):
        list(image_folder.walk(str(tmp_path / "none")))
