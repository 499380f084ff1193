"""What tracking costs a training: the time of its steps with a server that does not answer, to that without tracking.

The loop is plain torch on one CPU thread, every step of it is tracked, and the ways take turns in short blocks; only
blocks of one round are divided by each other. `driver` is what a training does: the loop's process appends to the
journal, another ships it. `nothing` tracks nothing either: its ratio says what the machine's noise is. That the loop's
process could ship by itself is not measured, only its first step: what it costs to import MLflow beside the loop.
Run as `python -m pipeline.benchmark.tracking [rounds steps]`.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import nn

from pipeline.benchmark.rounds import Spread, rotated, spread
from pipeline.config import Strict
from pipeline.tracking import journal

LIMIT = 1.02
NOTHING, ALONE, DEAD, HANGING = ALL = ("nothing", "journal", "driver, dead", "driver, hanging")
ROUNDS, STEPS = 80, 20
NUM_METRICS = 10
NO_RUN = "0" * 32
Track = Callable[[int], None]
Way = Callable[[int], AbstractContextManager[Track]]
"""Tracking as it is on during the block of one round: it gives what to call after each step."""


class Import(Strict):
    """What it costs a loop that a thread beside it imports MLflow: how long, and how much longer its steps take."""

    seconds: float
    ratio: float
    longest_step_ms: float


class Figures(Strict):
    """What was found.

    Attributes:
        append_us: microseconds that one entry of ten metrics takes, median.
        step_ms: of the loop without tracking, median over blocks.
        ratios: (median, least, most) of block times to those without tracking, by way.
        load: average over one minute, before and after.
    """

    append_us: float
    step_ms: float
    ratios: dict[str, Spread]
    imported: Import | None
    load: tuple[float, float]


def measure(rounds: int = ROUNDS, steps: int = STEPS, ways: Sequence[str] = ALL) -> Figures:
    """Time `rounds` x `steps` steps without tracking and in each of some ways, on one thread of torch."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            opened = {"none": _nothing} | {name: _way(name, Path(scratch) / name, stack) for name in ways}
            seconds = _take_turns(opened, _loop(), rounds, steps)
            append_us = _append_us(Path(scratch) / "append")
    finally:
        torch.set_num_threads(threads)
    without = seconds.pop("none")
    return Figures(
        append_us=append_us,
        step_ms=median(without) / steps * 1e3,
        ratios={
            name: spread([mine / bare for mine, bare in zip(found, without, strict=True)])
            for name, found in seconds.items()
        },
        imported=_import_in_a_process() if ways == ALL else None,
        load=(load, os.getloadavg()[0]),
    )


def table(figures: Figures) -> str:
    """What a person reads."""
    lines = [
        f"an entry of {NUM_METRICS} metrics takes {figures.append_us:.1f} us, a step {figures.step_ms:.2f} ms; "
        f"the ratio of step times may be {LIMIT}"
    ]
    lines += [f"{name:16} {found.shown(3)}" for name, found in figures.ratios.items()]
    if (imported := figures.imported) is not None:
        lines.append(
            f"importing MLflow in a thread: {imported.seconds:.1f} s, steps {imported.ratio:.1f} times as long, "
            f"the longest {imported.longest_step_ms:.0f} ms"
        )
    lines.append(f"load average {figures.load[0]:.2f} before, {figures.load[1]:.2f} after")
    return "\n".join(lines) + "\n"


def _nothing(_: int) -> AbstractContextManager[Track]:
    return nullcontext(lambda step: None)


def _way(name: str, folder: Path, stack: ExitStack) -> Way:
    """Make one of `ALL` ready; it lives as long as the stack."""
    if name == NOTHING:
        return _nothing
    if name == ALONE:
        track = _tracker(journal.Writer(folder / journal.FOLDER, "rank0"))
        return lambda _: nullcontext(track)
    return _driver(folder, stack.enter_context(_server(listens=name == HANGING)), stack)


def _take_turns(ways: dict[str, Way], step: Callable[[], None], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every block, by way; each round begins with another one."""
    names, seconds = list(ways), {name: list[float]() for name in ways}
    _block(step, _ignore, 0, steps)  # to warm up
    for index in range(rounds):
        for name in rotated(names, index):
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
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
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


def _import_in_a_process() -> Import:
    """In one that has not imported it."""
    command = [sys.executable, "-m", "pipeline.benchmark.tracking", "import"]
    return Import.model_validate_json(subprocess.run(command, capture_output=True, check=True).stdout)


def _import_beside(step: Callable[[], None]) -> Import:
    """Time steps before and while a thread imports what ships journals."""
    thread = threading.Thread(target=importlib.import_module, args=("pipeline.tracking.shipping",))
    before = [_block(step, _ignore, 0, 1) for _ in range(50)]
    thread.start()
    beside = list[float]()
    while thread.is_alive():
        beside.append(_block(step, _ignore, 0, 1))
    ratio = sum(beside) / len(beside) / median(before)
    return Import(seconds=sum(beside), ratio=ratio, longest_step_ms=max(beside) * 1e3)


def _ignore(_: int) -> None: ...


def _append_us(folder: Path, count: int = 2000) -> float:
    track, seconds = _tracker(journal.Writer(folder, "rank0")), list[float]()
    for step in range(count):
        began = time.perf_counter()
        track(step)
        seconds.append(time.perf_counter() - began)
    return median(seconds) * 1e6


@contextmanager
def _server(*, listens: bool) -> Iterator[str]:
    """An address at which nobody listens, or somebody does and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # also where it does not listen, so that nobody else takes it
        if listens:
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _ship(folder: Path, uri: str) -> None:
    """Ship until this process is ended."""
    from pipeline.tracking.delivery import Destination  # noqa: PLC0415  (MLflow: its import is one of the figures)
    from pipeline.tracking.shipping import Shipper  # noqa: PLC0415

    Shipper(Destination(uri, NO_RUN, "0", folder))
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    threading.Event().wait()


def main(words: Sequence[str]) -> None:
    """Measure and print; or do one part of it, in a process of its own."""
    torch.set_num_threads(1)
    if words[:1] == ["ship"]:
        _ship(Path(words[1]), words[2])
    elif words[:1] == ["import"]:
        sys.stdout.write(_import_beside(_loop()).model_dump_json())
    else:
        rounds, steps = [int(word) for word in words] or (ROUNDS, STEPS)
        sys.stdout.write(table(measure(rounds, steps)))


if __name__ == "__main__":
    main(sys.argv[1:])
