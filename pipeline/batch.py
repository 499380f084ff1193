"""Stacked samples as tensors: what a model is asked about. The first place on the road where torch appears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.types import Frame, Objects, Sample, UInt8Array

ItemT = TypeVar("ItemT")
PADDING = 114  # grey, as around a picture in a letterbox


@dataclass(frozen=True, slots=True, eq=False)
class BoxTargets:
    """The objects of the B images of a batch, N in all, in the order of the images.

    Attributes:
        boxes_xyxy: float32 [N, 4], in pixels of the model's input.
        labels: int64 [N].
        of_image: int64 [N], the place of each object's image in the batch; ascending.
        num_images: B.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    of_image: Tensor
    num_images: int

    @classmethod
    def of(cls, objects: Sequence[Objects], frames: Sequence[Frame]) -> BoxTargets:
        """What a detector learns from: every object but crowds, which are no single ones."""
        kept = [~one.crowd for one in objects]
        found = [frame.to_input(one.boxes_xyxy[keep]) for one, frame, keep in zip(objects, frames, kept, strict=True)]
        labels = [one.labels[keep] for one, keep in zip(objects, kept, strict=True)]
        counts = torch.tensor([len(one) for one in labels], dtype=torch.int64)
        return cls(
            boxes_xyxy=torch.from_numpy(np.concatenate([np.zeros((0, 4), np.float32), *found])),
            labels=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *labels])),
            of_image=torch.arange(len(objects)).repeat_interleave(counts),
            num_images=len(objects),
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return self.num_images

    def to(self, device: torch.device | str) -> BoxTargets:
        """Return them on `device`."""
        boxes, labels, of_image = (
            part.to(device, non_blocking=True) for part in (self.boxes_xyxy, self.labels, self.of_image)
        )
        return BoxTargets(boxes, labels, of_image, self.num_images)

    def part(self, start: int, stop: int) -> BoxTargets:
        """Those of the images `start` to `stop`."""
        kept = (self.of_image >= start) & (self.of_image < stop)
        return BoxTargets(self.boxes_xyxy[kept], self.labels[kept], self.of_image[kept] - start, stop - start)

    def chosen(self, places: Sequence[int]) -> BoxTargets:
        """Those of some images, in this order."""
        found = self.per_image()
        boxes, labels = ([found[place][part] for place in places] for part in (0, 1))
        counts = torch.tensor([len(one) for one in labels], dtype=torch.int64)
        numbers = torch.arange(len(places)).repeat_interleave(counts).to(self.of_image.device)
        return BoxTargets(torch.cat(boxes), torch.cat(labels), numbers, len(places))

    def per_image(self) -> list[tuple[Tensor, Tensor]]:
        """Boxes [n, 4] and labels [n] of each image."""
        counts = self.of_image.bincount(minlength=self.num_images).tolist()
        return list(zip(torch.split(self.boxes_xyxy, counts), torch.split(self.labels, counts), strict=True))


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model answers about.

    Attributes:
        images: uint8 or floating [B, C, H, W], values 0..255, RGB; images smaller than the largest are padded at the
            right and the bottom.
        targets: int64 [B] class indices, or float32 [B, num_classes] soft targets, or the objects to be found; None
            where the truth is unknown.
        frames: B frames, how each image maps to its original.
        ids: B image ids.
        objects: what is in each image, in the pixels that its frame maps from (those of the original in evaluation, of
            the varied picture in training): what detections are judged by.
        proposals: for each image float32 [P, 4], regions that may hold an object, in pixels of the model's input; empty
            where none were made.
    """

    images: Tensor
    targets: Tensor | BoxTargets | None = None
    frames: tuple[Frame, ...] = ()
    ids: tuple[str, ...] = ()
    objects: tuple[Objects, ...] = ()
    proposals: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def sizes_hw(self) -> list[tuple[int, int]]:
        """Height and width of each image without its padding."""
        if not self.frames:
            return [(self.images.shape[2], self.images.shape[3])] * len(self.images)
        return [frame.input_hw for frame in self.frames]

    @property
    def labels(self) -> Tensor:
        """The targets of a classifier.

        Raises:
            ValueError: there are none, or they are of another kind.
        """
        if not isinstance(self.targets, Tensor):
            raise ValueError(f"expected a class for each image as targets, got {type(self.targets).__name__}")
        return self.targets

    @property
    def boxes(self) -> BoxTargets:
        """The targets of a detector.

        Raises:
            ValueError: there are none, or they are of another kind.
        """
        if not isinstance(self.targets, BoxTargets):
            raise ValueError(f"expected the objects of each image as targets, got {type(self.targets).__name__}")
        return self.targets

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`; the copy overlaps with compute where the source is pinned."""
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = targets.to(device, non_blocking=True)
        elif targets is not None:
            targets = targets.to(device)
        proposals = tuple(regions.to(device, non_blocking=True) for regions in self.proposals)
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets, proposals=proposals)

    def part(self, start: int, stop: int) -> Batch:
        """The images `start` to `stop` with all that belongs to them; views, no pixel is copied."""
        targets = self.targets
        if isinstance(targets, BoxTargets):
            targets = targets.part(start, stop)
        elif targets is not None:
            targets = targets[start:stop]
        return Batch(
            images=self.images[start:stop],
            targets=targets,
            frames=self.frames[start:stop],
            ids=self.ids[start:stop],
            objects=self.objects[start:stop],
            proposals=self.proposals[start:stop],
        )


def of_equal_size(batch: Batch) -> list[tuple[list[int], Batch]]:
    """A batch of detection in parts whose pictures are of one size and need no padding, with their places in it.

    What a network says of a picture depends on the padding around it, and so on its neighbours; of these parts it does
    not.
    """
    sizes = batch.sizes_hw
    if len(set(sizes)) == 1:
        return [([*range(len(batch))], batch)]
    groups = {size: [place for place, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
    return [(places, _chosen(batch, places, size)) for size, places in groups.items()]


def _chosen(batch: Batch, places: Sequence[int], size_hw: tuple[int, int]) -> Batch:
    def of(column: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
        return tuple(column[place] for place in places) if column else ()

    return Batch(
        images=batch.images[list(places), :, : size_hw[0], : size_hw[1]],
        targets=batch.targets.chosen(places) if isinstance(batch.targets, BoxTargets) else None,
        frames=of(batch.frames),
        ids=of(batch.ids),
        objects=of(batch.objects),
        proposals=of(batch.proposals),
    )


def to_batch(samples: Sequence[Sample]) -> Batch:
    """Stack samples; targets are there only if every sample has a label, or every one its objects, and so proposals."""
    labels = [sample.label for sample in samples]
    known = [label for label in labels if label is not None]
    frames = tuple(sample.frame for sample in samples)
    objects = tuple(sample.objects for sample in samples if sample.objects is not None)
    has_objects = len(objects) == len(samples) > 0
    proposals = [sample.proposals for sample in samples if sample.proposals is not None]
    targets: Tensor | BoxTargets | None = None
    if has_objects:
        targets = BoxTargets.of(objects, frames)
    elif len(known) == len(labels):
        targets = torch.tensor(known, dtype=torch.int64)
    return Batch(
        images=torch.from_numpy(stacked([sample.image for sample in samples])),
        targets=targets,
        frames=frames,
        ids=tuple(sample.image_id for sample in samples),
        objects=objects if has_objects else (),
        proposals=tuple(map(torch.from_numpy, proposals)) if len(proposals) == len(samples) else (),
    )


def stacked(images: Sequence[UInt8Array], empty: Callable[[tuple[int, ...]], UInt8Array] | None = None) -> UInt8Array:
    """Pictures [C, h, w] as one array [B, C, H, W], the smaller ones padded with grey at the right and the bottom.

    Args:
        empty: gives the memory for it, uninitialised.

    Raises:
        ValueError: they have different numbers of channels.
    """
    if len({image.shape[0] for image in images}) > 1:
        raise ValueError(f"expected images of the same channels, got {[image.shape[0] for image in images]}")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    shape = (len(images), images[0].shape[0], height, width)
    canvas = np.empty(shape, np.uint8) if empty is None else empty(shape)
    for place, image in zip(canvas, images, strict=True):
        if image.shape[1:] != (height, width):
            place[:] = PADDING
        place[:, : image.shape[1], : image.shape[2]] = image
    return canvas
