"""MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, ink bright on black, read from its IDX files with NumPy.

Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits" (CC BY-SA 3.0). Layout as torchvision leaves
it: `<root>/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`. It is downloaded, through torchvision, only with
`download: true`. The last 5,000 training digits are the validation split, so that choices never touch the test set.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.datasets import ArraysConfig, folder_of
from pipeline.data.datasets._arrays import write_once
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Location
from pipeline.types import Record, Split, UInt8Array

NUM_VAL = 5_000


class Config(ArraysConfig):
    """`root` holds `raw/`.

    Attributes:
        download: fetch the files into `root`, which must be called MNIST then, if they are missing.
    """

    name: Literal["mnist"] = "mnist"
    root: Location | None = "MNIST"
    splits: tuple[Split, ...] = ("train", "val", "test")
    png: Path = Path("mnist")
    download: bool = False


def class_names(config: Config) -> tuple[str, ...]:
    """The ten digits."""
    return tuple(str(digit) for digit in range(10))


def records(config: Config, split: Split) -> Iterator[Record]:
    """Write the PNG files of one split where they are missing, and name them."""
    if config.download and config.root is not None:
        if Path(config.root).name != "MNIST":
            raise ConfigError(f"dataset.root {config.root}: a download goes to a folder called MNIST; name it so")
        from torchvision.datasets import MNIST  # noqa: PLC0415  (brings torch, which ingest must not import)

        MNIST(str(Path(config.root).parent), download=True)
    raw = Path(folder_of(config)) / "raw"
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(raw / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(raw / f"{prefix}-labels-idx1-ubyte").astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{raw}: {len(images)} {prefix} images but {len(labels)} labels; fetch the files again")
    part = {"train": slice(None, -NUM_VAL), "val": slice(-NUM_VAL, None), "test": slice(None)}[split]
    return write_once(config.png, split, images[part], labels[part])


def read_idx(path: Path) -> UInt8Array:
    """Read an IDX file of bytes, plain or as `.gz`: big-endian magic `00 00 08 <rank>`, the sizes, then the values.

    Raises:
        DataError: it is missing or not what its header says.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}[.gz] is missing; copy MNIST's files there or set dataset.download=true") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed}: not a readable gzip file ({error}); fetch it again") from None
    whole = len(data) >= 4 and data[:3] == b"\0\0\x08" and len(data) >= 4 + 4 * data[3]
    rank = data[3] if whole else 0
    shape = tuple(int(size) for size in np.frombuffer(data[4 : 4 + 4 * rank], ">u4"))
    if rank == 0 or len(data) != 4 + 4 * rank + math.prod(shape):
        raise DataError(f"{path}: expected an IDX file of bytes, got {len(data)} bytes with header {data[:4].hex()}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
