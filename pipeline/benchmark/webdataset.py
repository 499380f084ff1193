"""webdataset: tars read in order, mixed in a buffer, decoded in worker processes. Also its two-process conversion."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image

from pipeline.benchmark import views
from pipeline.benchmark.contender import Contender, Epoch
from pipeline.benchmark.photos import Photo

PHOTOS_PER_TAR = 1024
BUFFER = 1000  # photos that are mixed with each other, as the documentation has it


class Contestant(Contender):
    """`same`: this project's decoder on the bytes; `documented`: `decode("pil")` and torchvision's v2 transforms."""

    def prepare(self, photos: Sequence[Photo]) -> None:
        """Tars of 1,024 photos, or of fewer so that each process has one."""
        self.setting.folder.mkdir(parents=True)
        per_tar = min(PHOTOS_PER_TAR, -(-len(photos) // self.setting.num_processes))
        with wds.ShardWriter(f"{self.setting.folder}/%05d.tar", maxcount=per_tar, verbose=0) as writer:
            for photo in photos:
                writer.write({"__key__": photo.image_id, "jpg": photo.data, "cls": photo.label})

    def epoch(self, seed: int) -> Epoch:
        """The tars are shuffled by seed, then what is in the buffer."""
        tars = sorted(map(str, self.setting.folder.glob("*.tar")))
        random.Random(seed).shuffle(tars)
        read = wds.WebDataset(tars, shardshuffle=False, seed=seed).shuffle(BUFFER, rng=random.Random(seed))
        if self.setting.decoder == "same":
            view: Any = views.Same(self.setting.spec)
        else:
            read = read.decode("pil")
            view = views.torchvision_view(self.setting.size, from_pillow=True)
        to_label = int if self.setting.decoder == "same" else _unchanged
        batches = read.to_tuple("jpg", "cls").map_tuple(view, to_label).batched(self.setting.batch_size, partial=False)
        torch.manual_seed(seed)
        return iter(wds.WebLoader(batches, batch_size=None, num_workers=self.setting.num_processes))


def _unchanged(label: int) -> int:
    return label


def convert(files: Sequence[tuple[Path, int]], pattern: str, short_side: int, quality: int) -> None:
    """Files to tars in the usual way: Pillow decodes, resizes the short side and encodes, one after the other."""
    with wds.ShardWriter(pattern, maxcount=PHOTOS_PER_TAR, verbose=0) as writer:
        for path, label in files:
            image = Image.open(path).convert("RGB")
            short = min(image.size)
            if short > short_side:
                size = (image.width * short_side // short, image.height * short_side // short)
                image = image.resize(size, Image.Resampling.BILINEAR)
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=quality)
            writer.write({"__key__": path.stem, "jpg": encoded.getvalue(), "cls": label})
