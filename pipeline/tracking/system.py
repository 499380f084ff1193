"""What each node of a training does meanwhile: processor, memory, disk, network and GPUs, as metrics of its run.

One process on each node watches it (the worker of local rank 0) and appends to the run's journal, like everyone who
trains. The names are MLflow's own with the node between, so that its page of system metrics shows them.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.tracking import journal

log = logging.getLogger("ventral.tracking")

MIB = 2**20


@contextmanager
def watched(run_folder: Path, node: str, every_s: float = 10.0) -> Iterator[None]:
    """Write down what this node does, now and every `every_s`, while the block runs; nothing is raised for it.

    The step of a figure is the seconds since the run began, so that it goes on after a resumption.

    Args:
        run_folder: of a training that has a journal.
        node: a name of this machine that no other node has: letters, digits, `.`, `_`, `-`.
    """
    folder = run_folder / journal.FOLDER
    found = journal.origin(folder)
    began_ms = found.began_ms if found else time.time_ns() // 1_000_000
    writer, done, sample = journal.Writer(folder, f"system-{node}"), threading.Event(), sampler(run_folder)

    def watch() -> None:
        while True:
            try:
                figures = sample()
            except (OSError, psutil.Error) as error:
                log.warning("system metrics of %s end: %s", node, error)
                return
            step = (time.time_ns() // 1_000_000 - began_ms) // 1000
            writer.metrics({f"system/{node}/{name}": value for name, value in figures.items()}, step)
            if done.wait(every_s):
                return

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        writer.close()


def sampler(disk: Path) -> Callable[[], dict[str, float]]:
    """A function that measures this machine; rates are those since its last call, or since now.

    Args:
        disk: any path on the disk of interest.
    """
    psutil.cpu_percent()  # the first answer is always 0
    gpus = _gpus()
    last = _traffic(), time.monotonic()

    def sample() -> dict[str, float]:
        nonlocal last
        (received, sent), before = last
        last = _traffic(), time.monotonic()
        seconds = max(last[1] - before, 1e-3)
        memory, used = psutil.virtual_memory(), psutil.disk_usage(str(disk))
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MIB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": used.percent,
            "disk_available_megabytes": used.free / MIB,
            "network_receive_megabytes_per_s": (last[0][0] - received) / MIB / seconds,
            "network_transmit_megabytes_per_s": (last[0][1] - sent) / MIB / seconds,
            **gpus(),
        }

    return sample


def _traffic() -> tuple[int, int]:
    """Bytes received and sent by this machine, those to itself included."""
    found = psutil.net_io_counters()
    return (0, 0) if found is None else (found.bytes_recv, found.bytes_sent)


def _gpus() -> Callable[[], dict[str, float]]:
    """A function that measures the GPUs; without any, or without NVIDIA's library, it finds nothing."""
    try:
        pynvml = importlib.import_module("pynvml")  # nvidia-ml-py, which only machines with GPUs need
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # not installed, no driver, no GPU: the library has an error of its own for each
        return dict

    def measure() -> dict[str, float]:
        found: dict[str, float] = {}
        for index, handle in enumerate(handles):
            try:
                found |= _gpu(pynvml, index, handle)
            except pynvml.NVMLError:  # one figure that this card does not have
                continue
        return found

    return measure


def _gpu(pynvml: Any, index: int, handle: Any) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        f"gpu_{index}_utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        f"gpu_{index}_memory_usage_megabytes": memory.used / MIB,
        f"gpu_{index}_memory_usage_percentage": 100 * memory.used / memory.total,
        f"gpu_{index}_power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
