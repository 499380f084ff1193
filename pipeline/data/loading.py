"""From shards to batches of uint8: one order, one decode, two readers.

The order is `pipeline.data.order`'s; `pipeline.data.reading` turns draws into batches, and `pipeline.data.readers` has
that done elsewhere meanwhile: with `reader: local` in processes of a torch DataLoader beside the one that trains, with
`reader: ray` in Ray tasks, on any node with free CPUs. Both give the same batches. With `decode: gpu` training pictures
are decoded on the device instead, by `pipeline.data.gpu_decoding`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from pipeline.batch import Batch, BoxTargets
from pipeline.config import Strict
from pipeline.data import gpu_decoding, order, readers, regions, shards
from pipeline.data import proposals as made
from pipeline.data.order import Sampling
from pipeline.data.reading import Columns, Reading
from pipeline.data.transforms import classify, detect
from pipeline.errors import ConfigError, DataError
from pipeline.types import Frame, InputSpec, Int64Array, Spec, Split

Augment = classify.Augment | detect.Augment


class Config(Strict):
    """How batches are read.

    Attributes:
        batch_size: images per step and worker.
        reader: `ray` decodes in Ray tasks on any node; `local` in processes beside the one that trains.
        num_tasks: of those tasks or processes for one worker; 0 decodes in a thread of the training process.
        batches_per_read: batches whose bytes are read from the shards at once.
        decode_on: labels of the nodes that decode for `ray`, as long as there is such a node; GPU nodes are for
            training.
        sampling: which images make an epoch.
        decode: `gpu` decodes training images on the device that trains, read in a thread beside it; for `reader: local`
            with crop and flip only. Written for nvJPEG, but not measured on a GPU; on the CPU there is no reason for
            it. Evaluation decodes on the CPU in any case, so that its scores are those of the endpoint.
        proposals: name of the region proposals, made by `jobs.propose` beside the shards, that a detector is given in
            training and evaluation; not with `augment.mosaic`. None: none are read.
    """

    batch_size: int = Field(default=64, ge=1)
    reader: Literal["ray", "local"] = "ray"
    num_tasks: int = Field(default=1, ge=0)
    batches_per_read: int = Field(default=8, ge=1)
    decode_on: dict[str, str] = Field(default={"role": "ingest"})
    sampling: Sampling = Sampling()
    decode: Literal["cpu", "gpu"] = "cpu"
    proposals: made.Name | None = None

    @model_validator(mode="after")
    def _decodes_where_it_reads(self) -> Self:
        if self.decode == "gpu" and self.reader != "local":
            raise ValueError("decode: gpu decodes in the process that trains; set reader to local")
        return self


class Loader:
    """What one rank reads of a dataset.

    Args:
        source: the dataset on disk.
        spec: what the model expects of an image.
        config: batch size and reader.
        augment: how training images are varied, as the task of `spec` has it. A mosaic takes its other pictures from
            the same batch, so they are others on another number of workers.
        seed: of the run; the order and the variation of the images follow from it and the epoch.
        rank: this worker's number, and `world_size` how many workers there are.
        device: that trains; only `decode: gpu` asks for it, and leaves its batches there.

    Raises:
        DataError: the images have another number of channels than the model takes; the dataset has no proposals of
            that name, or those of another one.
        ConfigError: `decode: gpu` with an augmentation or a device that it does not support; what a classifier can do
            and a detector cannot, or the other way round; proposals with a mosaic.
    """

    def __init__(
        self,
        source: shards.Shards,
        spec: Spec,
        config: Config,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        bands = source.manifest.decoding.num_channels
        if bands != spec.num_channels:
            raise DataError(
                f"{source.path}: holds images of {bands} channels, but the model takes {spec.num_channels}; choose "
                "another model, or make the shards again with ingest.decoding.num_channels"
            )
        self.source = source
        self.spec = spec
        self.config = config
        self.augment = augment or (classify.Augment() if isinstance(spec, InputSpec) else detect.Augment())
        _check_task(spec, self.augment, config)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._proposals = None if config.proposals is None else made.read(source, config.proposals)
        self._labels: Int64Array | None = None
        self._decoder: gpu_decoding.Decoder | None = None
        if config.decode == "gpu" and isinstance(spec, InputSpec) and isinstance(self.augment, classify.Augment):
            self._decoder = gpu_decoding.Decoder(spec, self.augment, source.manifest.decoding, device)

    @property
    def search(self) -> regions.Config | None:
        """How the proposals were made that it reads; None: it reads none."""
        return None if self._proposals is None else self._proposals.made.search

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in one epoch, the same on every rank.

        Raises:
            DataError: the split does not fill one batch on every rank.
        """
        num_rows = self.source.manifest.num_rows("train")
        if num_rows < self.global_batch_size:
            raise DataError(
                f"{self.source.path}: {num_rows} training images do not fill one batch of {self.config.batch_size} on "
                f"each of {self.world_size} workers; take a smaller loading.batch_size"
            )
        return num_rows // self.global_batch_size

    @property
    def global_batch_size(self) -> int:
        """Images per step on all workers together; after s steps a position has moved on by s times this."""
        return self.config.batch_size * self.world_size

    def train(self, epoch: int, offset: int = 0) -> Iterator[Batch]:
        """The training batches of one epoch, varied by `augment`.

        Args:
            epoch: counted from 0.
            offset: draws of this epoch that are behind us, on any number of workers.

        Raises:
            DataError: the split has no proposals, though they were asked for.
        """
        groups = [rows for shard in self.source.manifest.of("train") for rows in shard.row_groups]
        draws = order.training_order(groups, self.seed, epoch, self._sampled(epoch))[offset:]
        share = order.training_share(draws, self.config.batch_size, self.rank, self.world_size)
        reading = replace(self._reading("train", self.augment, epoch), decoder=self._decoder)
        return self._batches(reading, share)

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """The part of a split that belongs to this rank, each image once, as the predictor would see it.

        Raises:
            DataError: as for `train`.
        """
        share = order.evaluation_share(self.source.manifest.num_rows(split), self.rank, self.world_size)
        return self._batches(self._reading(split), share)

    def _sampled(self, epoch: int) -> Int64Array | None:
        if self.config.sampling.is_plain:
            return None
        if self._labels is None:
            self._labels = _labels(self.source)
        return order.sampled_rows(self.config.sampling, self._labels, self.seed, epoch)

    def _reading(self, split: Split, augment: Augment | None = None, epoch: int = 0) -> Reading:
        if self._proposals is not None:
            check_proposals(self._proposals, [split])
        batches_per_read, given = self.config.batches_per_read, self._proposals
        return Reading(self.source, split, self.spec, batches_per_read, augment, self.seed, epoch, proposals=given)

    def _batches(self, reading: Reading, draws: Int64Array) -> Iterator[Batch]:
        batches = [draws[at : at + self.config.batch_size] for at in range(0, len(draws), self.config.batch_size)]
        if self.config.num_tasks == 0 or reading.decoder is not None:
            columns = readers.in_thread(reading, batches)
        elif self.config.reader == "local":
            columns = readers.in_processes(reading, batches, self.config.num_tasks)
        else:
            columns = readers.on_ray(reading, batches, self.config.num_tasks, self.config.decode_on)
        return map(_to_batch, columns)


def warm_up(config: Config, num_workers: int = 1) -> list[Any]:
    """Have Ray start the processes that are going to decode, in the background, where the reader is `ray`.

    Starting Python and importing take seconds, which the first batch then need not wait for. Needs an initialised Ray.

    Args:
        config: of the loaders.
        num_workers: how many loaders there will be.

    Returns:
        What `ray.get` waits for until they have started.
    """
    if config.reader == "local" or config.num_tasks == 0:
        return []
    return readers.warm_up(config.num_tasks * num_workers, config.decode_on)


def check_proposals(found: made.Proposals, splits: Iterable[Split]) -> None:
    """Make sure that all images of some splits have proposals.

    Raises:
        DataError: those of a split were not made.
    """
    for split in splits:
        if split not in found.made.splits:
            raise DataError(
                f"{found.path}: has no proposals of the split '{split}', only of {', '.join(found.made.splits)}; run "
                f"python -m jobs.propose for it, with name={found.path.name}"
            )


def _labels(source: shards.Shards) -> Int64Array:
    """The label of every training row."""
    files = source.manifest.of("train")
    tables = (shards.read(source.path / shard.name, list(range(len(shard.row_groups))), ["label"]) for shard in files)
    return np.concatenate([table.column("label").to_numpy() for table in tables])


def _check_task(spec: Spec, augment: Augment, config: Config) -> None:
    if isinstance(spec, InputSpec) != isinstance(augment, classify.Augment):
        raise ConfigError(f"expected the augmentation of the model's task, got one of {type(augment).__module__}")
    if isinstance(spec, InputSpec) or isinstance(augment, classify.Augment):
        if config.proposals is not None:
            raise ConfigError("loading.proposals are for a detector, a classifier is shown no regions; leave them out")
        return
    detect.check(augment, spec.num_channels)
    if augment.mosaic > 0 and config.proposals is not None:
        raise ConfigError(
            "augment.mosaic cannot be used with loading.proposals, which were made for single pictures; set it to 0"
        )
    if augment.mosaic > 0 and config.batch_size < detect.MOSAIC:
        raise ConfigError(
            f"augment.mosaic takes {detect.MOSAIC} pictures of a batch, but loading.batch_size is {config.batch_size}; "
            "take a larger one, or leave the mosaic out"
        )
    if config.decode == "gpu":
        raise ConfigError("loading.decode: gpu knows no boxes; set it to cpu for a detector")
    if config.sampling.balance:
        raise ConfigError("loading.sampling.balance needs one class for each image; leave it out for a detector")


def _to_batch(columns: Columns) -> Batch:
    images = _tensor(columns["image"])
    frames = tuple(
        Frame((int(h), int(w)), (int(height), int(width)), (sx, sy), (ox, oy))
        for h, w, height, width, sx, sy, ox, oy in columns["frame"].tolist()
    )
    ids = tuple(map(str, columns["id"]))
    if "objects" in columns:
        objects, proposals = tuple(columns["objects"]), tuple(map(_tensor, columns.get("proposals", ())))
        return Batch(images, BoxTargets.of(objects, frames), frames, ids, objects, proposals)
    return Batch(images, _tensor(columns["label"]), frames, ids)


def _tensor(values: Any) -> torch.Tensor:
    """Share the memory; but batches of Ray are read-only views of its store, which torch must not write to."""
    if isinstance(values, torch.Tensor) and values.is_cuda:
        values.record_stream(torch.cuda.current_stream(values.device))  # made on another stream than that of the caller
        return values
    if not isinstance(values, torch.Tensor):
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
    tensor: torch.Tensor = values.pin_memory() if torch.cuda.is_available() else values
    return tensor
