"""[Ray Data] Three ways to have batches read while the last one is used; all give the same batches in the same order.

In a thread of this process, in processes of a torch DataLoader beside it, or in Ray tasks on any node with free CPUs.
Task t of n makes the batches t, t + n, t + 2n, ..., in one long run: short tasks leave a gap after each.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import pickle
import select
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.pages import Pages
from pipeline.data.reading import Columns, Reading, read_batches
from pipeline.errors import DataError, VentralError, own_cause
from pipeline.types import DetectorSpec, Int64Array, UInt8Array

HELLO_S, STARTS = 10.0, 3
_PREFETCH, _HELD = 2, 2  # batches of each process on their way, and in the hands of who asked for them

log = logging.getLogger("ventral.data")


def in_thread(reading: Reading, batches: list[Int64Array]) -> Iterator[Columns]:
    """Decode the next batch in a thread while the last one is used."""
    return _ahead(read_batches(reading, batches))


def _ahead(source: Iterator[Columns]) -> Iterator[Columns]:
    """Take the next batch in a thread while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="loading") as pool:
        pending = pool.submit(next, source, None)
        while (columns := pending.result()) is not None:
            pending = pool.submit(next, source, None)
            yield columns


class _Share(IterableDataset[Columns | VentralError]):
    """The batches of one process of a DataLoader, which asks its processes in turn and so keeps the order."""

    def __init__(self, reading: Reading, batches: list[Int64Array], pages: list[Pages]) -> None:
        self.reading, self.batches, self.pages = reading, batches, pages

    def __iter__(self) -> Iterator[Columns | VentralError]:
        """Read this process's batches; errors travel as values, because torch would bury their message."""
        info = get_worker_info()
        assert info is not None
        pages, taken = self.pages[info.id] if self.pages else None, list[int | None]()

        def empty(shape: tuple[int, ...]) -> UInt8Array:
            taken.append(page := None if pages is None else pages.take())
            return np.empty(shape, np.uint8) if pages is None or page is None else pages.page(page)[: shape[0]]

        try:
            for columns in read_batches(self.reading, self.batches[info.id :: info.num_workers], empty):
                page = taken.pop()
                yield columns | {"image": torch.from_numpy(columns["image"]) if page is None else (info.id, page)}
        except VentralError as error:
            yield error


class _Process(ForkProcess):
    """A process that is forked, and forked again where the child does not say that it runs.

    A training process has threads (gloo's, autograd's, Ray's), and CPython 3.11 was seen to hang in the child of such a
    fork, before any of its Python ran: the lock of the list of threads was taken at that moment.
    """

    _said: int

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802  (multiprocessing's name)
        assert isinstance(process_obj, _Process)
        for _ in range(STARTS):
            hello, process_obj._said = os.pipe()
            try:
                made = popen_fork.Popen(process_obj)
                if select.select([hello], [], [], HELLO_S)[0]:
                    return made
            finally:
                os.close(hello)
                os.close(process_obj._said)
            log.warning("a reading process did not begin within %g s of its fork; another one is started", HELLO_S)
            made.kill()
            made.wait()
            made.close()
        raise DataError(
            f"no process for reading images began within {HELLO_S:g} s, {STARTS} times; with loading.num_tasks=0 a "
            "thread reads them"
        )

    def _bootstrap(self, parent_sentinel: int | None = None) -> Any:
        """What runs first in the child."""
        os.write(self._said, b".")
        return super()._bootstrap(parent_sentinel)  # type: ignore[misc]  # typeshed leaves it out


class _Context(ForkContext):
    Process = _Process


def in_processes(reading: Reading, batches: list[Int64Array], num_tasks: int) -> Iterator[Columns]:
    """Decode in processes of a torch DataLoader; pixels come through shared memory."""
    if not batches:
        return
    num_tasks = min(num_tasks, len(batches))
    shape = reading.image_shape  # without one of its own, each batch needs memory of its own
    pages = [Pages(_PREFETCH + _HELD, (len(batches[0]), *shape)) for _ in range(num_tasks)] if shape else []
    share = _Share(reading, batches, pages)
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=num_tasks,
        prefetch_factor=_PREFETCH,
        collate_fn=cast(Any, _unchanged),  # torch would make tensors of small arrays, each a file of its own
        multiprocessing_context=_Context(),
    )
    for columns in loader:
        if isinstance(columns, VentralError):
            raise columns
        if isinstance(columns["image"], tuple):
            task, page = columns["image"]
            columns["image"] = pages[task].lend(page, len(columns["id"]))
        yield columns


def _unchanged(columns: Columns) -> Columns:
    return columns


def warm_up(num_tasks: int, decode_on: dict[str, str]) -> list[Any]:
    """Have Ray start the processes that are going to decode, in the background; what `ray.get` waits for."""
    import ray  # noqa: PLC0415  (as in on_ray)

    return [ray.remote(num_cpus=0)(_run_nothing).remote(num_tasks, decode_on)]


def _run_nothing(num_tasks: int, decode_on: dict[str, str]) -> None:
    """A pipeline like that of `on_ray`, which starts the same processes and Ray Data's own actors."""
    import ray.data  # noqa: PLC0415

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # of this process, which tells people nothing
    _set_context(num_tasks, decode_on, max_block_bytes=1)
    tasks = ray.data.from_items([{"first": number} for number in range(num_tasks)], override_num_blocks=num_tasks)
    tasks.map_batches(_unchanged, batch_size=1).materialize()


def _set_context(num_tasks: int, decode_on: dict[str, str], max_block_bytes: int) -> None:
    """Set how Ray Data runs the pipelines of this process that are made from now on."""
    import ray.data  # noqa: PLC0415

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = max_block_bytes
    context.execution_options.preserve_order = False  # tasks take turns
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=num_tasks)
    context.execution_options.label_selector = _selector(ray.nodes(), decode_on)


def on_ray(reading: Reading, batches: list[Int64Array], num_tasks: int, decode_on: dict[str, str]) -> Iterator[Columns]:
    """Decode in Ray tasks; a block holds one batch, and what comes early waits for its turn."""
    import ray  # noqa: PLC0415  (so that the local reader needs no Ray)
    import ray.data  # noqa: PLC0415

    if not batches:
        return
    whole = isinstance(reading.spec, DetectorSpec)  # a batch is one value: what is in its images has no fixed shape
    batch_bytes = 0 if whole else len(batches[0]) * math.prod(reading.image_shape or ())
    _set_context(num_tasks, decode_on, max(batch_bytes, 1))  # else blocks are merged
    num_tasks = min(num_tasks, len(batches))
    work = ray.put((reading, batches))

    def decode(task: dict[str, Any]) -> Iterator[Columns]:
        reading, batches = ray.get(work)
        for first in task["first"].tolist():
            numbers = range(first, len(batches), num_tasks)
            for number, columns in zip(numbers, read_batches(reading, batches[first::num_tasks]), strict=True):
                if whole:
                    yield {"batch": [pickle.dumps(columns, protocol=5)], "number": np.array([number])}
                else:
                    yield columns | {"number": np.full(len(columns["id"]), number)}

    tasks = ray.data.from_items([{"first": number} for number in range(num_tasks)], override_num_blocks=num_tasks)
    blocks = tasks.map_batches(decode, batch_size=1)
    try:
        # Ray would hold the first batch back until it has the ones to prefetch too: 0.2 s of an epoch's beginning
        found = blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
        for columns in _ahead(_in_order(found, len(batches))):
            yield pickle.loads(columns["batch"][0]) if whole else columns  # noqa: S301  (our own tasks')
    except ray.exceptions.RayError as error:
        raise own_cause(error) from None


def _in_order(blocks: Iterable[Columns], num_batches: int) -> Iterator[Columns]:
    """Hold back what came before its turn.

    Raises:
        DataError: a batch never came.
    """
    waiting: list[tuple[int, Columns]] = []
    turn = 0
    for columns in blocks:
        heapq.heappush(waiting, (int(columns["number"][0]), columns))
        while waiting and waiting[0][0] == turn:
            yield heapq.heappop(waiting)[1]
            turn += 1
    if turn != num_batches:
        raise DataError(
            f"expected {num_batches} batches from the tasks that read, but batch {turn} (counted from 0) never came "
            "though all have ended; run again (a training goes on with resume=true), or set loading.reader to local"
        )


def _selector(nodes: list[dict[str, Any]], wanted: dict[str, str]) -> dict[str, str] | None:
    """The labels to ask for, where a living node has them."""
    alive = (node["Labels"] for node in nodes if node["Alive"])
    return wanted if wanted and any(wanted.items() <= labels.items() for labels in alive) else None
