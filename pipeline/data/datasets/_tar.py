"""What lies where in an uncompressed tar, so that its files can be read one by one without unpacking it.

Only headers are read, one after the other, by the standard library's `tarfile` (long names and PAX records included);
a tar inside a tar is listed by the byte range that it takes. `tarfile` itself stops without a word at a damaged header
or a missing end mark: here both are errors, since images would be lost. Left out: links, devices, hidden files.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from pipeline import storage
from pipeline.errors import DataError

MAX_CONTENT_BYTES = 1 << 20
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_READ_AHEAD_BYTES = 1 << 16  # of a bucket: small members cost no request each


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its path in the tar, `/` between the parts, fit to be printed and stored.
        offset: where its bytes start in the outermost file.
        length: how many they are.
        content: the bytes themselves, where they were asked for.
    """

    name: str
    offset: int
    length: int
    content: bytes | None = None

    @property
    def byte_range(self) -> tuple[int, int]:
        """As a `Record` wants it."""
        return self.offset, self.length


def members(
    uri: str, within: tuple[int, int] | None = None, content_of: Callable[[str], bool] = lambda name: False
) -> Iterator[Member]:
    """Every visible regular file of a tar, in the order of the tar.

    Args:
        uri: the file that holds the tar.
        within: (offset, length) of the tar in that file, if it is one of the files in another tar.
        content_of: says by its name whether a member, of at most `MAX_CONTENT_BYTES`, is to be read as well.

    Raises:
        DataError: the file cannot be read, or is no tar, a compressed one or one that was cut off.
    """
    where = uri if within is None else f"{uri} (the tar inside it at byte {within[0]})"
    try:
        with storage.open_input(uri) as opened:
            file = io.BufferedReader(cast(Any, opened), _READ_AHEAD_BYTES) if storage.is_remote(uri) else opened
            start, length = within or (0, file.seek(0, os.SEEK_END))
            _refuse_packed(file, start, where)
            yield from _listed(file, (start, start + length), where, content_of)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {storage.reason(error)}; check that it is there") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: is no tar, or a damaged one ({error}); fetch or write it again") from None


def _listed(file: BinaryIO, bounds: tuple[int, int], where: str, content_of: Callable[[str], bool]) -> Iterator[Member]:
    start, end = bounds
    file.seek(start)
    archive: Any = tarfile.TarFile(fileobj=file)
    while (info := archive.next()) is not None:
        archive.members.clear()  # it would remember every one
        if info.size < 0 or (info.isreg() and info.offset_data + info.size > end):
            raise tarfile.ReadError(f"cut off in the file {storage.printable(info.name)!r}")
        name = _visible_name(info.name)
        if not info.isreg() or name is None:
            continue
        if info.issparse():
            raise DataError(
                f"{where}: {name!r} is stored with holes, which no byte range can read; write the tar again"
            )
        content = _content(file, info, where) if content_of(name) else None
        yield Member(name, info.offset_data, info.size, content)
    file.seek(min(archive.offset, end))
    if archive.offset + tarfile.BLOCKSIZE > end or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header and no end mark at byte {archive.offset}")


def _content(file: BinaryIO, info: tarfile.TarInfo, where: str) -> bytes:
    if info.size > MAX_CONTENT_BYTES:
        raise DataError(
            f"{where}: expected at most {MAX_CONTENT_BYTES} bytes in {storage.printable(info.name)!r}, got {info.size}"
        )
    file.seek(info.offset_data)
    return file.read(info.size)


def _refuse_packed(file: BinaryIO, start: int, where: str) -> None:
    file.seek(start)
    head = file.read(6)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise DataError(
                f"{where}: is compressed with {name}, so that no file in it can be read alone; unpack it to a plain tar"
            )


def _visible_name(name: str) -> str | None:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return storage.printable("/".join(parts)) if parts and not any(part.startswith(".") for part in parts) else None
