"""Keys of an endpoint as they are kept: `jobs.keys` writes them, `serve.keys` asks for them.

A token is `vk_<id>_<secret>`; of its secret, 256 random bits, only a salted SHA-256 is kept. Slow hashes are for what
people make up: nobody can try 2**256 secrets at any speed, while a slow one would let whoever sends wrong keys keep the
endpoint busy. A key file is JSON, `{"keys": [...]}`, each key as in `Key`. Not here: what a scope opens, and counting.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pipeline import config, storage
from pipeline.config import Strict
from pipeline.errors import ConfigError

Scope = Literal["infer", "admin"]
_TOKEN = re.compile(rb"vk_([0-9a-z]{1,32})_([0-9a-f]{64})")


class Key(Strict):
    """One key.

    Attributes:
        id: what a token begins with; no secret.
        name: for people: whose it is.
        salt, hash: of the secret, in hexadecimal.
        scopes: what it opens; admin includes infer.
        requests_per_s: on average; None: any number.
        burst: requests at once after a pause; None: those of a second, at least one.
        max_concurrent: requests in hand; None: any number.
    """

    id: str = Field(pattern=r"^[0-9a-z]{1,32}$")
    name: str = Field(min_length=1, max_length=128)
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(default=("infer",), min_length=1)
    requests_per_s: float | None = Field(default=None, gt=0, le=1e6)
    burst: int | None = Field(default=None, ge=1, le=10**6)
    max_concurrent: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_s is None:
            raise ValueError("burst: of no importance without requests_per_s; give both")
        return self

    def __str__(self) -> str:
        """What people may see of it."""
        limits = self.model_dump(include={"requests_per_s", "burst", "max_concurrent"}, exclude_none=True)
        shown = (f"{name}={value}" for name, value in limits.items())
        return "  ".join([self.id, self.name, ",".join(self.scopes), *shown])

    def opens(self, scope: Scope) -> bool:
        """Whether it is enough for what asks for `scope`."""
        return scope in self.scopes or "admin" in self.scopes


class Keys(Strict):
    """All keys; none of them opens anything where there are none."""

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _each_id_once(self) -> Self:
        ids = [key.id for key in self.keys]
        twice = sorted({one for one in ids if ids.count(one) > 1})
        if twice:
            raise ValueError(f"two keys have the id {', '.join(twice)}; each may be there once")
        return self


_NOBODY = Key(id="nobody", name="nobody", salt="0" * 32, hash="0" * 64)


def mint(name: str, scopes: tuple[Scope, ...] = ("infer",), **limits: Any) -> tuple[Key, str]:
    """A new key, and its token, which is kept nowhere; `limits` are keys of `Key`.

    Raises:
        ConfigError: they are none that a key can have.
    """
    salt, secret = secrets.token_hex(16), secrets.token_hex(32)
    raw = {"id": f"k{secrets.token_hex(6)}", "name": name, "salt": salt, "hash": _hash(salt, secret.encode())}
    key = config.parse(Key, raw | {"scopes": scopes} | limits, "key")
    return key, f"vk_{key.id}_{secret}"


def find(keys: Mapping[str, Key], token: bytes) -> Key | None:
    """The key of a token, if it is one of `keys`, by their ids; what is none costs the same comparison."""
    match = _TOKEN.fullmatch(token)
    of, secret = (match[1].decode(), match[2]) if match else ("", b"")
    key = keys.get(of, _NOBODY)
    is_same = hmac.compare_digest(_hash(key.salt, secret), key.hash)
    return key if is_same and key is not _NOBODY else None


def parse(text: str, where: str) -> Keys:
    """Read keys from JSON; no error repeats a value, for it may be a token in the wrong place.

    Raises:
        ConfigError: with every mistake found, one line each.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f'{where}: expected JSON, {{"keys": [...]}}, as python -m jobs.keys writes it') from None
    try:
        return config.validate(Keys, raw)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        lines = [f"{where}: {'.'.join(map(str, one['loc'])) or '(top)'}: {one['msg']}" for one in found]
        raise ConfigError("\n".join(lines)) from None


def load(path: Path) -> Keys:
    """Read a key file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the keys cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the keys cannot be read (not UTF-8)") from None
    return parse(text, str(path))


def change(path: Path, by: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> Keys:
    """Write a key file anew, in one step; one that is missing is empty, and then readable by its owner only.

    A link stays one: the file that it leads to is written. Who owns a file and who may read it stays as it was.

    Raises:
        ConfigError: it cannot be read or written, or is none, or would have another owner; it is as it was.
    """
    file = Path(os.path.realpath(path))  # Path.resolve ends in a RuntimeError where links go in a circle
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with storage.alone_in(file.parent):  # what was just revoked must not come back with a key that is added
            before = _stat_if_any(file)
            now = Keys(keys=by(load(file).keys if before else ()))
            _replace(file, json.dumps(now.model_dump(mode="json", exclude_none=True), indent=2) + "\n", before)
    except OSError as error:
        raise ConfigError(f"{path}: the keys cannot be written ({error.strerror})") from None
    return now


def _replace(file: Path, text: str, before: os.stat_result | None) -> None:
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # of mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as written:
            if before is not None:
                _keep_owner(handle, file, before)
                shutil.copystat(file, partial)  # after the owner, or a group that may not read it could open it
            written.write(text)
            written.flush()
            os.fsync(handle)
        Path(partial).replace(file)
    finally:
        Path(partial).unlink(missing_ok=True)


def _keep_owner(handle: int, file: Path, before: os.stat_result) -> None:
    made = os.fstat(handle)
    if (made.st_uid, made.st_gid) == (before.st_uid, before.st_gid):
        return
    try:
        os.fchown(handle, before.st_uid, before.st_gid)
    except OSError as error:
        raise ConfigError(
            f"{file}: belongs to user {before.st_uid} and group {before.st_gid}, which it would lose "
            f"({error.strerror}); change its keys as that user, in that group, or as root"
        ) from None


def _stat_if_any(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _hash(salt: str, secret: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret).hexdigest()
