"""mosaicml-streaming: MDS shards read by a StreamingDataset in the worker processes of its StreamingDataLoader."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from pipeline.benchmark import views
from pipeline.benchmark.contender import Contender, Epoch, Setting
from pipeline.benchmark.photos import Photo


class Contestant(Contender):
    """`same`: a column of bytes, this project's decoder; `documented`: a `jpeg` column, which Pillow decodes."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._loader: StreamingDataLoader | None = None

    def prepare(self, photos: Sequence[Photo]) -> None:
        """One MDS dataset; the jpeg column keeps the bytes of a JPEG file as they are."""
        same = self.setting.decoder == "same"
        columns = {"image": "bytes" if same else "jpeg", "label": "int"}
        with MDSWriter(out=str(self.setting.folder), columns=columns) as writer:
            for photo in photos:
                image: Any = photo.data if same else Image.open(io.BytesIO(photo.data))
                writer.write({"image": image, "label": photo.label})

    def epoch(self, seed: int) -> Epoch:
        """Dataset and loader live through all epochs; the dataset shuffles by the first seed and its own count."""
        if self._loader is None:
            torch.manual_seed(seed)
            dataset = _Views(self.setting, seed)
            processes = self.setting.num_processes
            self._loader = StreamingDataLoader(
                dataset, batch_size=self.setting.batch_size, num_workers=processes, drop_last=True
            )
        return iter(self._loader)


class _Views(StreamingDataset):  # type: ignore[misc]  # untyped where it is installed at all
    """The photos of one epoch as tensors."""

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__(local=str(setting.folder), shuffle=True, shuffle_seed=seed, batch_size=setting.batch_size)
        self._same = setting.decoder == "same"
        self._view: Any = (
            views.Same(setting.spec) if self._same else views.torchvision_view(setting.size, from_pillow=True)
        )

    def __getitem__(self, at: Any) -> tuple[torch.Tensor, int]:
        """One view and its label."""
        row = super().__getitem__(at)
        image = row["image"] if self._same else row["image"].convert("RGB")
        return self._view(image), row["label"]
