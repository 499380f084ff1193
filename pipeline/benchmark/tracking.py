"""What tracking costs a training: the time of its steps with a server that does not answer, to that without tracking.

The loop is plain torch on one CPU thread, every step of it is tracked, and the ways take turns in short blocks; only
blocks of one round are divided by each other. `driver` is what a training does: the loop's process appends to the
journal, another ships it. `thread` ships from the loop's own process, which then also has to import MLflow.
Run as `python -m pipeline.benchmark.tracking [rounds] [steps]`.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.benchmark.report import Spread, spread
from pipeline.config import Strict
from pipeline.tracking import journal

if TYPE_CHECKING:
    from pipeline.tracking.shipping import Shipper

LIMIT = 1.02
NUM_METRICS = 10
NO_RUN = "0" * 32
Track = Callable[[int], None]
Way = Callable[[int], AbstractContextManager[Track]]
"""Tracking as it is on during the block of one round: it gives what to call after each step."""


class Figures(Strict):
    """What was found.

    Attributes:
        append_us: microseconds that one entry of ten metrics takes, median.
        step_ms: of the loop without tracking, median over blocks.
        ratios: (median, least, most) of block times to those without tracking, by way.
        import_s: that MLflow takes to be imported in a thread beside the loop.
        import_ratio: how much longer a step takes meanwhile, on average.
        longest_step_ms: of those.
        load: average over one minute, before and after.
    """

    append_us: float
    step_ms: float
    ratios: dict[str, Spread]
    import_s: float
    import_ratio: float
    longest_step_ms: float
    load: tuple[float, float]


def measure(rounds: int = 9, steps: int = 150) -> Figures:
    """Time `rounds` x `steps` steps of every way."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            step = _loop()
            imported = _import_beside(step)  # first: afterwards it is loaded
            seconds = _take_turns(_ways(Path(scratch), stack), step, rounds, steps)
            append_us = _append_us(Path(scratch) / "append")
    finally:
        torch.set_num_threads(threads)
    without = seconds.pop("none")
    step_s = median(without) / steps
    return Figures(
        append_us=append_us,
        step_ms=step_s * 1e3,
        ratios={
            name: spread([mine / bare for mine, bare in zip(found, without, strict=True)])
            for name, found in seconds.items()
        },
        import_s=sum(imported),
        import_ratio=sum(imported) / len(imported) / step_s,
        longest_step_ms=max(imported) * 1e3,
        load=(load, os.getloadavg()[0]),
    )


def table(figures: Figures) -> str:
    """What a person reads."""
    lines = [
        f"an entry of {NUM_METRICS} metrics takes {figures.append_us:.1f} us, a step {figures.step_ms:.2f} ms; "
        f"the ratio of step times may be {LIMIT}",
        *(
            f"{name:16} {found.median:.3f} ({found.least:.3f}..{found.most:.3f})"
            for name, found in figures.ratios.items()
        ),
        f"importing MLflow in a thread: {figures.import_s:.1f} s, steps {figures.import_ratio:.1f} times as long, "
        f"the longest {figures.longest_step_ms:.0f} ms",
        f"load average {figures.load[0]:.2f} before, {figures.load[1]:.2f} after",
    ]
    return "\n".join(lines) + "\n"


def _ways(scratch: Path, stack: ExitStack) -> dict[str, Way]:
    dead, hanging = stack.enter_context(_servers())
    writer = journal.Writer(scratch / "alone" / journal.FOLDER, "rank0")
    return {
        "none": lambda _: nullcontext(lambda step: None),
        "journal": lambda _: nullcontext(_tracker(writer)),
        "driver, dead": _driver(scratch / "dead", dead, stack),
        "driver, hanging": _driver(scratch / "hanging", hanging, stack),
        "thread, dead": _thread(scratch / "thread", dead),
    }


def _take_turns(ways: dict[str, Way], step: Callable[[], None], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every block, by way; each round begins with another one."""
    names, seconds = list(ways), {name: list[float]() for name in ways}
    _block(step, lambda _: None, 0, steps)  # to warm up
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            with ways[name](index) as track:
                seconds[name].append(_block(step, track, index * steps, steps))
    return seconds


def _block(step: Callable[[], None], track: Track, first: int, steps: int) -> float:
    began = time.perf_counter()
    for number in range(first, first + steps):
        step()
        track(number)
    return time.perf_counter() - began


def _loop() -> Callable[[], None]:
    """A step of training a small net on 32 pictures of 32 x 32 pixels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _tracker(writer: journal.Writer) -> Track:
    values = {f"train/metric{number}": number / 7 for number in range(NUM_METRICS)}
    return lambda step: writer.metrics(values, step)


def _driver(folder: Path, uri: str, stack: ExitStack) -> Way:
    """Another process ships; it is stopped (SIGSTOP) while other ways have their turn."""
    writer = journal.Writer(folder / journal.FOLDER, "rank0")
    command = [sys.executable, "-m", "pipeline.benchmark.tracking", "ship", str(folder), uri]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    stack.callback(process.kill)
    assert process.stdout
    process.stdout.readline()  # it has imported MLflow and begun
    process.send_signal(signal.SIGSTOP)

    @contextmanager
    def on(_: int) -> Iterator[Track]:
        process.send_signal(signal.SIGCONT)
        yield _tracker(writer)
        process.send_signal(signal.SIGSTOP)

    return on


def _thread(folder: Path, uri: str) -> Way:
    @contextmanager
    def on(index: int) -> Iterator[Track]:
        writer = journal.Writer(folder / str(index) / journal.FOLDER, "rank0")
        shipper = _shipper(folder / str(index), uri)
        yield _tracker(writer)
        shipper.close(timeout_s=0)

    return on


def _shipper(folder: Path, uri: str) -> Shipper:
    from pipeline.tracking.delivery import Destination  # noqa: PLC0415  (MLflow: its import is one of the figures)
    from pipeline.tracking.shipping import Shipper  # noqa: PLC0415

    return Shipper(Destination(uri, NO_RUN, "0", folder))


def _import_beside(step: Callable[[], None]) -> list[float]:
    """Seconds of the steps during which a thread imports what ships journals."""
    thread = threading.Thread(target=importlib.import_module, args=("pipeline.tracking.shipping",))
    step()
    thread.start()
    seconds = list[float]()
    while thread.is_alive():
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def _append_us(folder: Path, count: int = 2000) -> float:
    track, seconds = _tracker(journal.Writer(folder, "rank0")), list[float]()
    for step in range(count):
        began = time.perf_counter()
        track(step)
        seconds.append(time.perf_counter() - began)
    return median(seconds) * 1e6


@contextmanager
def _servers() -> Iterator[tuple[str, str]]:
    """Addresses at which nobody listens, and at which somebody does and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else takes it, but not listening
        yield f"http://127.0.0.1:{closed.getsockname()[1]}", f"http://127.0.0.1:{silent.getsockname()[1]}"


def _ship(folder: Path, uri: str) -> None:
    """Ship until this process is ended."""
    _shipper(folder, uri)
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["ship"]:
        _ship(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.stdout.write(table(measure(*map(int, sys.argv[1:3]))))
