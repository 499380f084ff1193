"""[Ray Data] From shards to batches of uint8: one order, one decode, two readers.

The order is `pipeline.data.order`'s; the pixels are `transforms.classify`'s; `read_batches` turns rows into the columns
of batches and is the same code wherever it runs. With `reader: ray` it runs in Ray tasks, on any node with free CPUs;
with `reader: local` in a thread of the process that trains, without Ray. Both give the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.data import order, shards
from pipeline.data.transforms import classify
from pipeline.errors import DataError, ImageError, VentralError
from pipeline.types import Frame, InputSpec, Int64Array, Split

Columns = dict[str, Any]
"""The columns of one batch: image uint8 [B, C, H, W], label int64 [B], frame float64 [B, 6], id text [B]."""


class Config(Strict):
    """How batches are read.

    Attributes:
        batch_size: images per step and worker.
        reader: `ray` decodes in Ray tasks on any node; `local` in the training process.
        num_tasks: Ray tasks that decode at once for one worker.
        batches_per_task: batches that one task makes.
    """

    batch_size: int = Field(default=64, ge=1)
    reader: Literal["ray", "local"] = "ray"
    num_tasks: int = Field(default=1, ge=1)
    batches_per_task: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class _Recipe:
    """All that `read_batches` needs beside the rows; travels to the Ray tasks."""

    source: shards.Shards
    split: Split
    spec: InputSpec
    batch_size: int
    augment: classify.Augment | None = None
    seed: int = 0
    epoch: int = 0


class Loader:
    """What one rank reads of a dataset.

    Args:
        source: the dataset on disk.
        spec: what the model expects of an image.
        config: batch size and reader.
        augment: how training images are varied.
        seed: of the run; the order and the variation of the images follow from it and the epoch.
        rank: this worker's number, and `world_size` how many workers there are.
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
    ) -> None:
        self.source = source
        self.spec = spec
        self.config = config
        self.augment = augment or classify.Augment()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in one epoch, the same on every rank.

        Raises:
            DataError: the split does not fill one batch on every rank.
        """
        global_batch = self.config.batch_size * self.world_size
        num_rows = self.source.manifest.num_rows("train")
        if num_rows < global_batch:
            raise DataError(
                f"{self.source.path}: {num_rows} training images do not fill one batch of {self.config.batch_size} on "
                f"each of {self.world_size} workers; take a smaller loading.batch_size"
            )
        return num_rows // global_batch

    def train(self, epoch: int) -> Iterator[Batch]:
        """The training batches of one epoch, varied by `augment`."""
        groups = [rows for shard in self.source.manifest.of("train") for rows in shard.row_groups]
        rows = order.training_order(groups, self.seed, epoch)
        share = order.training_share(rows, self.config.batch_size, self.rank, self.world_size)
        return self._batches(self._recipe("train", self.augment, epoch), share)

    def evaluate(self, split: Split) -> Iterator[Batch]:
        """The part of a split that belongs to this rank, each image once, as the predictor would see it."""
        share = order.evaluation_share(self.source.manifest.num_rows(split), self.rank, self.world_size)
        return self._batches(self._recipe(split), share)

    def _recipe(self, split: Split, augment: classify.Augment | None = None, epoch: int = 0) -> _Recipe:
        return _Recipe(self.source, split, self.spec, self.config.batch_size, augment, self.seed, epoch)

    def _batches(self, recipe: _Recipe, rows: Int64Array) -> Iterator[Batch]:
        per_task = self.config.batch_size * self.config.batches_per_task
        chunks = [rows[at : at + per_task] for at in range(0, len(rows), per_task)]
        read = self._read_ray if self.config.reader == "ray" else self._read_local
        return (_to_batch(columns) for columns in read(recipe, chunks))

    @staticmethod
    def _read_local(recipe: _Recipe, chunks: list[Int64Array]) -> Iterator[Columns]:
        """Decode the next batch in a thread while the last one is used."""
        source = (columns for chunk in chunks for columns in read_batches(recipe, chunk))
        with ThreadPoolExecutor(1, thread_name_prefix="loading") as pool:
            pending = pool.submit(next, source, None)
            while (columns := pending.result()) is not None:
                pending = pool.submit(next, source, None)
                yield columns

    def _read_ray(self, recipe: _Recipe, chunks: list[Int64Array]) -> Iterator[Columns]:
        """Decode in Ray tasks; blocks hold one batch each and come in order."""
        import ray  # noqa: PLC0415  (so that the local reader needs no Ray)
        import ray.data  # noqa: PLC0415

        if not chunks:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        image_bytes = recipe.spec.num_channels * recipe.spec.size_hw[0] * recipe.spec.size_hw[1]
        context.target_max_block_size = max(recipe.batch_size * image_bytes, 1)  # else small batches are merged
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=self.config.num_tasks)
        recipe_ref = ray.put(recipe)

        def decode(task: dict[str, Any]) -> Iterator[Columns]:
            for rows in task["rows"]:
                yield from read_batches(ray.get(recipe_ref), np.frombuffer(rows, np.int64))

        tasks = ray.data.from_items([{"rows": chunk.tobytes()} for chunk in chunks], override_num_blocks=len(chunks))
        batches = tasks.map_batches(decode, batch_size=1)
        try:
            yield from batches.iter_batches(batch_size=recipe.batch_size, batch_format="numpy", prefetch_batches=2)
        except ray.exceptions.RayError as error:
            raise _own_cause(error) from None


def read_batches(recipe: _Recipe, rows: Int64Array) -> Iterator[Columns]:
    """Read, decode and transform rows, in their order, as the columns of batches.

    Raises:
        DataError: a shard cannot be read, or holds an image that does not decode.
    """
    files = recipe.source.manifest.of(recipe.split)
    file_starts = np.cumsum([0, *(shard.num_rows for shard in files)])
    group_starts = [np.cumsum([0, *shard.row_groups]) for shard in files]
    encoded: dict[int, tuple[str, bytes, int]] = {}
    for number, (start, stop) in enumerate(pairwise(file_starts)):
        inside = np.sort(rows[(rows >= start) & (rows < stop)]) - start
        if len(inside):
            groups = np.unique(np.searchsorted(group_starts[number], inside, side="right") - 1)
            table = shards.read(
                recipe.source.path / files[number].name, groups.tolist(), ["image_id", "image", "label"]
            )
            held = np.concatenate([np.arange(*group_starts[number][group : group + 2]) for group in groups])
            chosen = table.take(np.searchsorted(held, inside))
            values = (chosen.column(name) for name in ("image_id", "image", "label"))
            for row, image_id, image, label in zip(inside + start, *values, strict=True):
                encoded[int(row)] = (image_id.as_py(), image.as_py(), label.as_py())
    for at in range(0, len(rows), recipe.batch_size):
        part = [int(row) for row in rows[at : at + recipe.batch_size]]
        yield _columns(recipe, part, [encoded[row] for row in part])


def _columns(recipe: _Recipe, rows: list[int], encoded: list[tuple[str, bytes, int]]) -> Columns:
    views = [_view(recipe, row, image_id, data) for row, (image_id, data, _) in zip(rows, encoded, strict=True)]
    return {
        "image": np.stack([pixels for pixels, _ in views]),
        "label": np.array([label for _, _, label in encoded], np.int64),
        "frame": np.array([(*frame.original_hw, *frame.scale_xy, *frame.offset_xy) for _, frame in views], np.float64),
        "id": np.array([image_id for image_id, _, _ in encoded]),
    }


def _view(recipe: _Recipe, row: int, image_id: str, data: bytes) -> tuple[Any, Frame]:
    try:
        if recipe.augment is None:
            return classify.evaluation(data, recipe.spec, recipe.source.manifest.decoding)
        rng = np.random.default_rng([recipe.seed, recipe.epoch, row])
        pixels = classify.training(data, recipe.spec, recipe.augment, rng, recipe.source.manifest.decoding)
        return pixels, Frame(recipe.spec.size_hw, recipe.spec.size_hw)
    except ImageError as error:
        raise DataError(
            f"{recipe.source.path}: image '{image_id}' does not decode: {error}; verify the shards"
        ) from None


def _to_batch(columns: Columns) -> Batch:
    size_hw = (columns["image"].shape[2], columns["image"].shape[3])
    frames = (
        Frame((int(h), int(w)), size_hw, (float(sx), float(sy)), (float(ox), float(oy)))
        for h, w, sx, sy, ox, oy in columns["frame"]
    )
    return Batch(
        images=torch.from_numpy(_writable(columns["image"])),
        targets=torch.from_numpy(_writable(columns["label"])),
        frames=tuple(frames),
        ids=tuple(str(image_id) for image_id in columns["id"]),
    )


def _writable(array: Any) -> Any:
    """Ray's batches are read-only views of shared memory, which torch must not write to."""
    return array if array.flags.writeable else array.copy()


def _own_cause(error: BaseException) -> BaseException:
    """The error that our code raised in a Ray task, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, VentralError):
            return DataError(str(cause))
        cause = cause.__cause__ or getattr(cause, "cause", None)
    return error
