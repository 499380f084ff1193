"""The files of `jobs.call` in parcels, of which each is one request.

An endpoint refuses a body that is too large, by default one of more than 10 MiB, and a few photos of a phone are that.
What is in the files is for the endpoint to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError

MOST_BYTES = 8 * 2**20
"""Of a parcel; the request adds less than 200 bytes for each image."""


class Parcel(NamedTuple):
    """What is sent together: files, and what is in them, in the same order."""

    paths: tuple[Path, ...]
    images: tuple[bytes, ...]


def packed(folder: Path, paths: Iterable[Path], most_images: int) -> Iterator[Parcel]:
    """Read files as they are asked for, in their order; a file that is larger than a parcel goes alone.

    Args:
        folder: relative paths lie in it.
        paths: the files.
        most_images: of a parcel, at least 1.

    Raises:
        DataError: a file cannot be read.
    """
    parcel = Parcel((), ())
    for path in paths:
        image = _read(folder / path)
        size = sum(map(len, parcel.images)) + len(image)
        if parcel.images and (len(parcel.images) == most_images or size > MOST_BYTES):
            yield parcel
            parcel = Parcel((), ())
        parcel = Parcel((*parcel.paths, path), (*parcel.images, image))
    if parcel.images:
        yield parcel


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
