"""Keys as they are kept, and the door that keeps them."""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs import keys as door
from pipeline.errors import ConfigError
from pipeline.inference import keys
from pipeline.inference.keys import Keys

KEY, TOKEN = keys.mint("ci")
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
ROW: dict[str, Any] = json.loads(KEY.model_dump_json(exclude_none=True))


def test_a_minted_key_is_found_by_its_token_and_keeps_no_secret() -> None:
    known = {KEY.id: KEY}
    assert re.fullmatch(rf"vk_{KEY.id}_[0-9a-f]{{64}}", TOKEN)
    assert keys.find(known, TOKEN.encode()) is KEY
    assert keys.find({}, TOKEN.encode()) is None
    assert TOKEN[-64:] not in KEY.model_dump_json()
    assert KEY.hash not in str(KEY)
    assert keys.mint("ci")[0].salt != KEY.salt


def test_admin_includes_infer_and_infer_nothing_else() -> None:
    admin, _ = keys.mint("boss", ("admin",))
    assert [key.opens(scope) for key in (KEY, admin) for scope in ("infer", "admin")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hash": TOKEN}, "keys.0.hash"),
        ({"salt": "00"}, "keys.0.salt"),
        ({"id": "a_b"}, "keys.0.id"),
        ({"name": ""}, "keys.0.name"),
        ({"scopes": []}, "keys.0.scopes"),
        ({"scopes": ["root"]}, "keys.0.scopes.0"),
        ({"token": TOKEN}, "keys.0.token: Extra inputs"),
        ({"requests_per_s": 0}, "requests_per_s"),
        ({"requests_per_s": float("nan")}, "requests_per_s"),
        ({"requests_per_s": "2"}, "requests_per_s"),
        ({"burst": 2}, "burst: of no importance without requests_per_s"),
        ({"max_concurrent": 0}, "max_concurrent"),
    ],
)
def test_a_key_that_is_none_is_refused_with_its_place_and_without_its_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: keys\.0") as caught:
        keys.parse(json.dumps({"keys": [ROW | change]}), "here")
    assert words in str(caught.value)
    assert TOKEN[-64:] not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"keys": {}}', "{}", "[" * 100_000, '{"keys": ["\ud800"]}', TOKEN]
)
def test_what_holds_no_keys_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: ") as caught:
        keys.parse(text, "here")
    assert TOKEN[-64:] not in str(caught.value)


def test_two_keys_of_one_id_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"two keys have the id {KEY.id}"):
        keys.parse(json.dumps({"keys": [ROW, ROW]}), "here")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        keys.load(tmp_path / "k")


def test_a_change_that_fails_leaves_the_file_and_its_owner_alone_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    assert keys.change(file, lambda before: (*before, KEY)) == keys.load(file) == Keys(keys=(KEY,))
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="two keys"):
        keys.change(file, lambda before: (*before, KEY))
    assert keys.load(file) == Keys(keys=(KEY,))
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


def test_a_change_through_links_changes_the_file_that_they_lead_to(tmp_path: Path) -> None:
    real, folder, link = tmp_path / "real" / "keys.json", tmp_path / "..data", tmp_path / "keys.json"
    folder.symlink_to("real")
    link.symlink_to("..data/keys.json")
    assert keys.change(link, lambda _: (KEY,)) == keys.load(real)  # the link led nowhere yet
    keys.change(link, lambda _: ())
    assert keys.load(real) == Keys(keys=())
    assert (link.is_symlink(), folder.is_symlink(), real.is_symlink()) == (True, True, False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["..data", "keys.json", "keys.json", "real"]


def test_links_in_a_circle_are_refused_and_stay(tmp_path: Path) -> None:
    link = tmp_path / "keys.json"
    link.symlink_to("keys.json")
    with pytest.raises(ConfigError, match=r"cannot be written \(Too many levels of symbolic links\)"):
        keys.change(link, lambda _: (KEY,))
    assert [path.is_symlink() for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize("mode", [0o640, 0o400])
def test_a_change_keeps_who_may_read_the_file(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys.change(file, lambda _: (KEY,))
    file.chmod(mode)
    keys.change(file, lambda _: ())
    assert (file.stat().st_mode & 0o7777, keys.load(file)) == (mode, Keys(keys=()))


@as_root
def test_a_change_by_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys.change(file, lambda _: (KEY,))
    os.chown(file, 12345, 23456)
    file.chmod(0o640)
    keys.change(file, lambda _: ())
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (12345, 23456, 0o640)
    assert keys.load(file) == Keys(keys=())


@as_root
def test_a_change_by_who_cannot_keep_the_owner_is_refused_and_changes_nothing() -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's are for their owner only
        folder, file = Path(temporary), Path(temporary) / "keys.json"
        keys.change(file, lambda _: (KEY,))
        os.chown(file, 12345, 23456)
        file.chmod(0o644)
        folder.chmod(0o777)
        before = file.stat()
        os.seteuid(NOBODY)
        try:
            with pytest.raises(ConfigError) as caught:
                keys.change(file, lambda _: ())
        finally:
            os.seteuid(0)
        assert str(caught.value) == (
            f"{file}: belongs to user 12345 and group 23456, which it would lose (Operation not permitted); change its "
            "keys as that user, in that group, or as root"
        )
        after = file.stat()
        assert (after.st_ino, after.st_mtime_ns, after.st_uid) == (before.st_ino, before.st_mtime_ns, 12345)
        assert list(folder.iterdir()) == [file]


def test_a_change_that_the_disk_does_not_take_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys.change(file, lambda _: (KEY,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # fails as a full disk does, with another number
    try:
        with pytest.raises(ConfigError, match=r"the keys cannot be written \(File too large\)"):
            keys.change(file, lambda _: ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert keys.load(file) == Keys(keys=(KEY,))
    assert list(tmp_path.iterdir()) == [file]


def test_changes_at_once_all_count(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    made = [keys.mint(str(number))[0] for number in range(8)]
    threads = [
        threading.Thread(target=keys.change, args=(file, lambda before, key=key: (*before, key))) for key in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.id for key in keys.load(file).keys} == {key.id for key in made}


def test_the_door_adds_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"storage={tmp_path}"
    assert door.main(["add", "name=ci", where]) == 0
    limits = ["requests_per_s=2", "burst=5", "max_concurrent=3"]
    assert door.main(["add", "name=boss", "scopes=[infer, admin]", *limits, where]) == 0
    tokens = re.findall(r"^token    (vk_\S+)$", capsys.readouterr().out, re.MULTILINE)
    known = {key.id: key for key in keys.load(tmp_path / "keys.json").keys}
    found = [keys.find(known, token.encode()) for token in tokens]
    assert [key and key.name for key in found] == ["ci", "boss"]
    assert door.main(["list", where]) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[1].endswith("  boss  infer,admin  requests_per_s=2.0  burst=5  max_concurrent=3")
    assert door.main(["revoke", f"id={next(iter(known))}", where]) == 0
    assert [key.name for key in keys.load(tmp_path / "keys.json").keys] == ["boss"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected add, list, revoke"),
        (["rotate"], "expected add, list, revoke"),
        (["add", "name=x", "burst=2"], "burst: of no importance"),
        (["add", "name=x", "scopes=[root]"], "'infer' or 'admin'"),
        (["revoke", "id=zz"], "cannot be read"),
    ],
)
def test_the_door_refuses_what_it_does_not_know(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.main([*argv, f"storage={tmp_path}"] if argv else argv) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "keys.json").exists()
