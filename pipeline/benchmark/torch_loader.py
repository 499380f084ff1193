"""torch's own DataLoader over files in class folders: a map-style dataset, decoding in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.benchmark import photos, views
from pipeline.benchmark.contender import Contender, Epoch, Setting
from pipeline.benchmark.photos import Photo


class Contestant(Contender):
    """`same`: this project's decoder per file; `documented`: `torchvision.io.decode_image` and v2 transforms."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._files: Dataset[tuple[torch.Tensor, int]] | None = None

    def prepare(self, found: Sequence[Photo]) -> None:
        """One file per photo, in class folders."""
        photos.write_folders(found, self.setting.folder)

    def epoch(self, seed: int) -> Epoch:
        """Shuffled by a seeded generator, which also seeds the workers."""
        if self._files is None:
            self._files = (_SameFiles if self.setting.decoder == "same" else _DocumentedFiles)(self.setting)
        return iter(
            DataLoader(
                self._files,
                batch_size=self.setting.batch_size,
                shuffle=True,
                num_workers=self.setting.num_processes,
                drop_last=True,
                generator=torch.Generator().manual_seed(seed),
            )
        )


class _Files(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, setting: Setting) -> None:
        folders = sorted((setting.folder / "train").iterdir())
        self.files = [(str(path), label) for label, found in enumerate(folders) for path in sorted(found.iterdir())]

    def __len__(self) -> int:
        return len(self.files)


class _SameFiles(_Files):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.view = views.Same(setting.spec)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        return self.view(Path(path).read_bytes()), label


class _DocumentedFiles(_Files):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.view = views.torchvision_view(setting.size, from_pillow=False)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image  # noqa: PLC0415  (as in views)

        path, label = self.files[index]
        return self.view(decode_image(path, ImageReadMode.RGB)), label
