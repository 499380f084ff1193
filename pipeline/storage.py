"""Where encoded files lie: a local path or an object in a bucket (`s3://`, `gs://`), behind a few verbs.

A location is text: an absolute local path, or a URL. Local files are read by Python, which takes every name a file can
have; buckets through pyarrow's filesystems, with credentials and endpoint from the environment as their makers define
it (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...). Nothing here knows about images.
Writing is for checkpoints and notes that must not be lost; shards are written by pyarrow itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, cast

from pydantic import BeforeValidator

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_SETTINGS = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

Location = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
"""A configuration field that takes a path or a URL."""


class File(NamedTuple):
    """A file that was found.

    Attributes:
        uri: its location.
        name: its path below the folder that was walked, `/` between the parts, fit to be printed and stored.
        size_bytes: as listed.
    """

    uri: str
    name: str
    size_bytes: int


def is_remote(location: str) -> bool:
    """Whether the location is a URL, not a local path."""
    return bool(_URL.match(location))


def join(folder: str, *names: str) -> str:
    """The location of something below a folder; a name that is absolute itself, or a URL, replaces the folder."""
    for name in names:
        folder = (
            name if is_remote(name) or name.startswith("/") else f"{folder.rstrip('/') if folder != '/' else ''}/{name}"
        )
    return folder


def absolute(location: str, base: Path) -> str:
    """A relative local path put below `base`, `~` expanded; URLs and absolute paths as they are."""
    if is_remote(location):
        return location.rstrip("/")
    return str((base.expanduser() / Path(location).expanduser()).absolute())


def printable(name: str) -> str:
    """A name without control characters and what is no text: undecodable bytes, halves of a character of JSON.

    Each of their bytes becomes `%XX`.
    """
    return _UNPRINTABLE.sub(_escaped, name)


def is_folder(location: str) -> bool:
    """Whether there is a folder; in a bucket, whether anything lies below this prefix."""
    if not is_remote(location):
        return Path(location).is_dir()
    return bool(_info(location).type == _fs().FileType.Directory)


def is_file(location: str) -> bool:
    """Whether there is a file."""
    if not is_remote(location):
        return Path(location).is_file()
    return bool(_info(location).type == _fs().FileType.File)


def folders(location: str) -> list[str]:
    """Names of the folders directly below one, sorted as text, hidden ones left out.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not is_remote(location):
        with os.scandir(location) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    found = (info.base_name for info in _list(location, recursive=False) if info.type == _fs().FileType.Directory)
    return sorted(name for name in found if not name.startswith("."))


def walk(location: str) -> Iterator[File]:
    """Every file below a folder in a stable order; hidden ones, and all in hidden folders, are left out.

    Links to folders are followed, except to one that the walk came through.

    Raises:
        OSError: a folder cannot be listed.
    """
    yield from _walk_bucket(location) if is_remote(location) else _walk_local(location, "", ())


def read(uri: str, byte_range: tuple[int, int] | None = None) -> bytes:
    """The bytes of a file, or (offset, length) of them.

    Raises:
        OSError: it cannot be read, or ends before the range does.
    """
    with open_input(uri) as file:
        if byte_range is None:
            return file.read()
        offset, length = byte_range
        file.seek(min(offset, file.seek(0, os.SEEK_END)))  # pyarrow refuses to go beyond the end
        data = file.read(length)
    if len(data) != length:
        raise OSError(None, f"ends before byte {offset + length}", uri)
    return data


def open_input(uri: str) -> BinaryIO:
    """Open a file for reading, seekable, as a context manager.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        if not is_remote(uri):
            return Path(uri).open("rb")
        filesystem, path = _filesystem(uri)
        return cast(BinaryIO, filesystem.open_input_file(path))
    except ValueError as error:  # a NUL, or half a character: no file can have this name
        raise OSError(errno.EINVAL, str(error), uri) from None


def write(uri: str, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all, and on the disk when this returns; missing folders are made.

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    if is_remote(uri):
        filesystem, path = _filesystem(uri)
        with filesystem.open_output_stream(path) as stream:  # appears when it is closed
            stream.write(data)
        return
    local = Path(uri)
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(local)
        _sync_folder(local.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else on this machine, thread or process, changes files of a local folder this way.

    Whoever reads a file and writes it anew would lose what another writes in between.

    Raises:
        OSError: there is no such folder, or it cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove(location: str) -> None:
    """Remove a file, or a folder with all that it holds; nothing happens where there is nothing.

    Raises:
        OSError: it cannot be removed.
    """
    if not is_remote(location):
        if Path(location).is_dir():
            shutil.rmtree(location)
        else:
            Path(location).unlink(missing_ok=True)
        return
    filesystem, path = _filesystem(location)
    if is_file(location):
        filesystem.delete_file(path)
    elif is_folder(location):
        filesystem.delete_dir(path)


def reason(error: OSError) -> str:
    """Why a file could not be had, in a few words."""
    text = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return text.split(". Detail: ")[0].split(" (Request ID: ")[0][:200]  # the tails that pyarrow and S3 add


def _escaped(found: re.Match[str]) -> str:
    undecodable = "\udc80" <= found[0] <= "\udcff"  # a byte of a file's name, as Python keeps it
    data = found[0].encode("utf-8", "surrogateescape" if undecodable else "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in data)


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk_local(folder: str, prefix: str, came_through: tuple[tuple[int, int], ...]) -> Iterator[File]:
    here = Path(folder).stat()
    if (here.st_dev, here.st_ino) in came_through:
        return
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk_local(
                entry.path, f"{prefix}{printable(entry.name)}/", (*came_through, (here.st_dev, here.st_ino))
            )
        elif entry.is_file():
            yield File(entry.path, prefix + printable(entry.name), entry.stat().st_size)


def _walk_bucket(location: str) -> Iterator[File]:
    _, root = _filesystem(location)
    found = [info for info in _list(location, recursive=True) if info.type == _fs().FileType.File]
    for info in sorted(found, key=lambda info: cast(str, info.path).split("/")):
        name = info.path[len(root.rstrip("/")) + 1 :]
        if not any(part.startswith(".") for part in name.split("/")):
            yield File(join(location, name), printable(name), info.size)


def _list(location: str, *, recursive: bool) -> Any:
    filesystem, path = _filesystem(location)
    return filesystem.get_file_info(_fs().FileSelector(path, recursive=recursive))


def _info(location: str) -> Any:
    filesystem, path = _filesystem(location)
    return filesystem.get_file_info(path)


def _filesystem(location: str) -> tuple[Any, str]:
    scheme, path = location.split("://", 1)
    if scheme == "file":
        return _connected("file", ()), path
    settings = tuple((name, os.environ.get(name, "")) for name in _SETTINGS)
    return _connected(scheme, settings), path.rstrip("/")


@lru_cache(maxsize=8)
def _connected(scheme: str, settings: tuple[tuple[str, str], ...]) -> Any:
    """The filesystem of pyarrow, one for each scheme, process and state of the environment."""
    if scheme == "s3":
        return _s3(dict(settings))
    made = {"gs": "GcsFileSystem", "gcs": "GcsFileSystem", "file": "LocalFileSystem"}
    if scheme not in made:
        raise OSError(None, f"cannot be read: locations of the form {scheme}:// are not known, only s3 and gs", scheme)
    return getattr(_fs(), made[scheme])()


def _s3(settings: dict[str, str]) -> Any:
    """S3 with the endpoint and the region told.

    pyarrow takes no endpoint from the environment (arrow issue 49643), and for a region that it is not told it asks a
    metadata server, which few machines have.
    """
    endpoint = settings["AWS_ENDPOINT_URL_S3"] or settings["AWS_ENDPOINT_URL"]
    region = settings["AWS_REGION"] or settings["AWS_DEFAULT_REGION"] or ("us-east-1" if endpoint else "")
    told = {"endpoint_override": endpoint} if endpoint else {}
    told |= {"region": region} if region else {}
    filesystem = _fs()
    return filesystem.S3FileSystem(
        connect_timeout=5,
        request_timeout=20,
        retry_strategy=filesystem.AwsStandardS3RetryStrategy(max_attempts=3),
        **told,
    )


def _fs() -> Any:
    import pyarrow.fs  # noqa: PLC0415  (a quarter of a second that local files do not need)

    return pyarrow.fs
