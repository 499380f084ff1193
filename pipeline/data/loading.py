"""[Ray Data] From shards to batches of uint8: one order, one decode, two readers.

The order is `pipeline.data.order`'s; the pixels are `transforms.classify`'s; `read_batches` turns draws into columns of
batches and is the same code wherever it runs. With `reader: local` it runs in processes of a torch DataLoader beside
the one that trains; with `reader: ray` in Ray tasks, on any node with free CPUs. Both give the same batches. With
`decode: gpu` training pictures are decoded on the device instead, by `pipeline.data.gpu_decoding`.

Task t of n makes the batches t, t + n, t + 2n, ..., in one long run: short tasks leave a gap after each.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline import imaging
from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.data import gpu_decoding, order, shards
from pipeline.data.order import Sampling
from pipeline.data.pages import Pages
from pipeline.data.streams import Streams
from pipeline.data.transforms import classify
from pipeline.errors import DataError, ImageError, VentralError, own_cause
from pipeline.types import Frame, InputSpec, Int64Array, Split, UInt8Array

Columns = dict[str, Any]
"""The columns of one batch: image uint8 [B, C, H, W], label int64 [B], frame float64 [B, 6], id text [B]."""
Encoded = tuple[str, bytes, int]
"""Id, encoded image and label of one row."""
Empty = Callable[[tuple[int, ...]], UInt8Array]
"""Gives memory for pictures of a shape, uninitialised."""
_PREFETCH, _HELD = 2, 2  # batches of each process on their way, and in the hands of who asked for them


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
    """

    batch_size: int = Field(default=64, ge=1)
    reader: Literal["ray", "local"] = "ray"
    num_tasks: int = Field(default=1, ge=0)
    batches_per_read: int = Field(default=8, ge=1)
    decode_on: dict[str, str] = Field(default={"role": "ingest"})
    sampling: Sampling = Sampling()
    decode: Literal["cpu", "gpu"] = "cpu"

    @model_validator(mode="after")
    def _decodes_where_it_reads(self) -> Self:
        if self.decode == "gpu" and self.reader != "local":
            raise ValueError("decode: gpu decodes in the process that trains; set reader to local")
        return self


@dataclass(frozen=True)
class _Recipe:
    """All that `read_batches` needs beside the draws; travels to the tasks."""

    source: shards.Shards
    split: Split
    spec: InputSpec
    batches_per_read: int
    augment: classify.Augment | None = None
    seed: int = 0
    epoch: int = 0
    decoder: gpu_decoding.Decoder | None = None  # None decodes on the CPU

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one picture in a batch: channels, height, width."""
        return (self.spec.num_channels, *self.spec.size_hw)


class Loader:
    """What one rank reads of a dataset.

    Args:
        source: the dataset on disk.
        spec: what the model expects of an image.
        config: batch size and reader.
        augment: how training images are varied.
        seed: of the run; the order and the variation of the images follow from it and the epoch.
        rank: this worker's number, and `world_size` how many workers there are.
        device: that trains; only `decode: gpu` asks for it, and leaves its batches there.

    Raises:
        DataError: the images have another number of channels than the model takes.
        ConfigError: `decode: gpu` with an augmentation or a device that it does not support.
    """

    def __init__(
        self,
        source: shards.Shards,
        spec: InputSpec,
        config: Config,
        *,
        augment: classify.Augment | None = None,
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
        self.augment = augment or classify.Augment()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._labels: Int64Array | None = None
        self._decoder: gpu_decoding.Decoder | None = None
        if config.decode == "gpu":
            self._decoder = gpu_decoding.Decoder(spec, self.augment, source.manifest.decoding, device)

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
        """
        groups = [rows for shard in self.source.manifest.of("train") for rows in shard.row_groups]
        draws = order.training_order(groups, self.seed, epoch, self._sampled(epoch))[offset:]
        share = order.training_share(draws, self.config.batch_size, self.rank, self.world_size)
        recipe = replace(self._recipe("train", self.augment, epoch), decoder=self._decoder)
        return self._batches(recipe, share)

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """The part of a split that belongs to this rank, each image once, as the predictor would see it."""
        share = order.evaluation_share(self.source.manifest.num_rows(split), self.rank, self.world_size)
        return self._batches(self._recipe(split), share)

    def _sampled(self, epoch: int) -> Int64Array | None:
        if self.config.sampling.is_plain:
            return None
        if self._labels is None:
            self._labels = _labels(self.source)
        return order.sampled_rows(self.config.sampling, self._labels, self.seed, epoch)

    def _recipe(self, split: Split, augment: classify.Augment | None = None, epoch: int = 0) -> _Recipe:
        return _Recipe(self.source, split, self.spec, self.config.batches_per_read, augment, self.seed, epoch)

    def _batches(self, recipe: _Recipe, draws: Int64Array) -> Iterator[Batch]:
        batches = [draws[at : at + self.config.batch_size] for at in range(0, len(draws), self.config.batch_size)]
        if self.config.num_tasks == 0 or recipe.decoder is not None:
            columns = _read_in_thread(recipe, batches)
        elif self.config.reader == "local":
            columns = _read_in_processes(recipe, batches, self.config.num_tasks)
        else:
            columns = _read_in_ray(recipe, batches, self.config)
        return map(_to_batch, columns)


def _in_memory(shape: tuple[int, ...]) -> UInt8Array:
    return np.empty(shape, np.uint8)


def read_batches(recipe: _Recipe, batches: list[Int64Array], empty: Empty = _in_memory) -> Iterator[Columns]:
    """Read, decode and transform draws, in their order, as the columns of batches.

    Args:
        recipe: what to read and how.
        batches: draws of each.
        empty: makes the memory that the pictures of a batch are written to.

    Raises:
        DataError: a shard cannot be read, or holds an image that does not decode.
    """
    num_rows, streams = recipe.source.manifest.num_rows(recipe.split), Streams(recipe.seed, recipe.epoch)
    for at in range(0, len(batches), recipe.batches_per_read):
        together = batches[at : at + recipe.batches_per_read]
        encoded = _read_rows(recipe, np.unique(np.concatenate(together) % num_rows))
        for batch in together:
            yield _columns(recipe, batch, [encoded[row] for row in (batch % num_rows).tolist()], streams, empty)


def _read_rows(recipe: _Recipe, rows: Int64Array) -> dict[int, Encoded]:
    """What is stored of sorted rows."""
    files = recipe.source.manifest.of(recipe.split)
    file_starts = np.cumsum([0, *(shard.num_rows for shard in files)])
    encoded: dict[int, Encoded] = {}
    for shard, (start, stop) in zip(files, pairwise(file_starts.tolist()), strict=True):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        if not len(inside):
            continue
        group_starts = np.cumsum([0, *shard.row_groups])
        groups = np.unique(np.searchsorted(group_starts, inside, side="right") - 1)
        table = shards.read(recipe.source.path / shard.name, groups.tolist(), ["image_id", "image", "label"])
        held = np.concatenate([np.arange(*group_starts[group : group + 2]) for group in groups])
        places = np.searchsorted(held, inside).tolist()
        images = itertools.chain.from_iterable(map(_slices, table.column("image").chunks))
        wanted = set(places)
        found = [bytes(view) for at, view in enumerate(images) if at in wanted]
        ids, labels = table.column("image_id").to_pylist(), table.column("label").to_pylist()
        encoded |= {
            row: (ids[at], image, labels[at])
            for row, at, image in zip((inside + start).tolist(), places, found, strict=True)
        }
    return encoded


def _slices(images: Any) -> Iterator[memoryview]:
    """The bytes of an Arrow array of binaries, without a copy; a scalar of each would take longer than copying it."""
    _, offsets, data = images.buffers()
    bounds = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1].tolist()
    return (memoryview(data)[start:stop] for start, stop in pairwise(bounds))


def _read_in_thread(recipe: _Recipe, batches: list[Int64Array]) -> Iterator[Columns]:
    """Decode the next batch in a thread while the last one is used."""
    source = read_batches(recipe, batches)
    with ThreadPoolExecutor(1, thread_name_prefix="loading") as pool:
        pending = pool.submit(next, source, None)
        while (columns := pending.result()) is not None:
            pending = pool.submit(next, source, None)
            yield columns


class _Share(IterableDataset[Columns | VentralError]):
    """The batches of one process of a DataLoader, which asks its processes in turn and so keeps the order."""

    def __init__(self, recipe: _Recipe, batches: list[Int64Array], pages: list[Pages]) -> None:
        self.recipe, self.batches, self.pages = recipe, batches, pages

    def __iter__(self) -> Iterator[Columns | VentralError]:
        """Read this process's batches; errors travel as values, because torch would bury their message."""
        info = get_worker_info()
        assert info is not None
        pages, taken = self.pages[info.id], list[int | None]()

        def empty(shape: tuple[int, ...]) -> UInt8Array:
            taken.append(page := pages.take())
            return np.empty(shape, np.uint8) if page is None else pages.page(page)[: shape[0]]

        try:
            for columns in read_batches(self.recipe, self.batches[info.id :: info.num_workers], empty):
                page = taken.pop()
                yield columns | {"image": torch.from_numpy(columns["image"]) if page is None else (info.id, page)}
        except VentralError as error:
            yield error


def _read_in_processes(recipe: _Recipe, batches: list[Int64Array], num_tasks: int) -> Iterator[Columns]:
    """Decode in processes of a torch DataLoader; pixels come through shared memory."""
    if not batches:
        return
    num_tasks = min(num_tasks, len(batches))
    pages = [Pages(_PREFETCH + _HELD, (len(batches[0]), *recipe.image_shape)) for _ in range(num_tasks)]
    share = _Share(recipe, batches, pages)
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=num_tasks,
        prefetch_factor=_PREFETCH,
        collate_fn=_unchanged,  # torch would make tensors of small arrays, each a file of its own
        multiprocessing_context="fork",  # so that the pages are shared
    )
    for columns in loader:
        if isinstance(columns, VentralError):
            raise columns
        if isinstance(columns["image"], tuple):
            task, page = columns["image"]
            columns["image"] = pages[task].lend(page, len(columns["label"]))
        yield columns


def _unchanged(columns: Columns) -> Columns:
    return columns


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
    import ray  # noqa: PLC0415  (as in _read_in_ray)
    import ray.data  # noqa: PLC0415

    return [ray.remote(num_cpus=0)(_run_nothing).remote(config, config.num_tasks * num_workers)]


def _run_nothing(config: Config, num_tasks: int) -> None:
    """A pipeline like that of `_read_in_ray`, which starts the same processes and Ray Data's own actors."""
    import ray.data  # noqa: PLC0415

    _set_context(config, num_tasks, max_block_bytes=1)
    tasks = ray.data.from_items([{"first": number} for number in range(num_tasks)], override_num_blocks=num_tasks)
    tasks.map_batches(_unchanged, batch_size=1).materialize()


def _set_context(config: Config, num_tasks: int, max_block_bytes: int) -> None:
    """Set how Ray Data runs the pipelines of this process that are made from now on."""
    import ray.data  # noqa: PLC0415

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = max_block_bytes
    context.execution_options.preserve_order = False  # tasks take turns
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=num_tasks)
    context.execution_options.label_selector = _selector(ray.nodes(), config.decode_on)


def _read_in_ray(recipe: _Recipe, batches: list[Int64Array], config: Config) -> Iterator[Columns]:
    """Decode in Ray tasks; a block holds one batch, and what comes early waits for its turn."""
    import ray  # noqa: PLC0415  (so that the local reader needs no Ray)
    import ray.data  # noqa: PLC0415

    if not batches:
        return
    _set_context(config, config.num_tasks, max(len(batches[0]) * math.prod(recipe.image_shape), 1))  # else merged
    num_tasks = min(config.num_tasks, len(batches))
    work = ray.put((recipe, batches))

    def decode(task: dict[str, Any]) -> Iterator[Columns]:
        recipe, batches = ray.get(work)
        for first in task["first"].tolist():
            numbers = range(first, len(batches), num_tasks)
            for number, columns in zip(numbers, read_batches(recipe, batches[first::num_tasks]), strict=True):
                yield columns | {"number": np.full(len(columns["label"]), number)}

    tasks = ray.data.from_items([{"first": number} for number in range(num_tasks)], override_num_blocks=num_tasks)
    blocks = tasks.map_batches(decode, batch_size=1)
    try:
        yield from _in_order(blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None


def _in_order(blocks: Iterator[Columns]) -> Iterator[Columns]:
    """Hold back what came before its turn."""
    waiting: list[tuple[int, Columns]] = []
    turn = 0
    for columns in blocks:
        heapq.heappush(waiting, (int(columns["number"][0]), columns))
        while waiting and waiting[0][0] == turn:
            yield heapq.heappop(waiting)[1]
            turn += 1


def _selector(nodes: list[dict[str, Any]], wanted: dict[str, str]) -> dict[str, str] | None:
    """The labels to ask for, where a living node has them."""
    alive = (node["Labels"] for node in nodes if node["Alive"])
    return wanted if wanted and any(wanted.items() <= labels.items() for labels in alive) else None


def _columns(recipe: _Recipe, draws: Int64Array, encoded: list[Encoded], streams: Streams, empty: Empty) -> Columns:
    """One batch."""
    views = _views if recipe.decoder is None else _views_on_device
    pixels, frames = views(recipe, draws.tolist(), encoded, streams, empty)
    return {
        "image": pixels,
        "label": np.array([label for _, _, label in encoded], np.int64),
        "frame": np.array([(*frame.original_hw, *frame.scale_xy, *frame.offset_xy) for frame in frames], np.float64),
        "id": np.array([image_id for image_id, _, _ in encoded]),
    }


def _views(
    recipe: _Recipe, draws: list[int], encoded: list[Encoded], streams: Streams, empty: Empty
) -> tuple[UInt8Array, list[Frame]]:
    """Pixels and frames of one batch; each picture is written to its place once."""
    pixels, frames = empty((len(draws), *recipe.image_shape)), []
    for place, (draw, (image_id, data, _)) in enumerate(zip(draws, encoded, strict=True)):
        with _naming(recipe, image_id):
            pixels[place], frame = _view(recipe, streams, draw, data)
        frames.append(frame)
    return pixels, frames


def _view(recipe: _Recipe, streams: Streams, draw: int, data: bytes) -> tuple[UInt8Array, Frame]:
    decoding = recipe.source.manifest.decoding
    if recipe.augment is None:
        return classify.evaluation(data, recipe.spec, decoding)
    pixels = classify.training(data, recipe.spec, recipe.augment, streams.of(draw), decoding)
    return pixels, Frame(recipe.spec.size_hw, recipe.spec.size_hw)


def _views_on_device(
    recipe: _Recipe, draws: list[int], encoded: list[Encoded], streams: Streams, _: Empty
) -> tuple[torch.Tensor, list[Frame]]:
    """The same of a training batch, on the device."""
    decoder = recipe.decoder
    assert decoder is not None

    def on_cpu(place: int) -> UInt8Array:
        image_id, data, _ = encoded[place]
        with _naming(recipe, image_id):
            return imaging.decode(data, recipe.source.manifest.decoding, min_short=decoder.min_short)

    pixels = decoder.batch([data for _, data, _ in encoded], map(streams.of, draws), on_cpu)
    return pixels, [Frame(recipe.spec.size_hw, recipe.spec.size_hw)] * len(draws)


@contextmanager
def _naming(recipe: _Recipe, image_id: str) -> Iterator[None]:
    """Say which image it is that does not decode."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{recipe.source.path}: image '{image_id}' does not decode: {error}; run jobs.verify") from None


def _labels(source: shards.Shards) -> Int64Array:
    """The label of every training row."""
    files = source.manifest.of("train")
    tables = (shards.read(source.path / shard.name, list(range(len(shard.row_groups))), ["label"]) for shard in files)
    return np.concatenate([table.column("label").to_numpy() for table in tables])


def _to_batch(columns: Columns) -> Batch:
    images, targets = _tensor(columns["image"]), _tensor(columns["label"])
    size_hw = (images.shape[2], images.shape[3])
    frames = (
        Frame((int(h), int(w)), size_hw, (sx, sy), (ox, oy)) for h, w, sx, sy, ox, oy in columns["frame"].tolist()
    )
    return Batch(images=images, targets=targets, frames=tuple(frames), ids=tuple(map(str, columns["id"])))


def _tensor(values: Any) -> torch.Tensor:
    """Share the memory; but batches of Ray are read-only views of its store, which torch must not write to."""
    if isinstance(values, torch.Tensor) and values.is_cuda:
        values.record_stream(torch.cuda.current_stream(values.device))  # made on another stream than that of the caller
        return values
    if not isinstance(values, torch.Tensor):
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
    tensor: torch.Tensor = values.pin_memory() if torch.cuda.is_available() else values
    return tensor
