"""What every door shares: argv to a checked configuration, Ray, MLflow's address, exit codes.

A job runs the same way on a laptop (`python -m jobs.X config.yaml`) and inside `ray job submit`: where RAY_ADDRESS
names a cluster it is used, else a local one is started for the job and stopped with it; so for MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jobs import _stack
from jobs._process import Service
from jobs._stack import Stack
from pipeline import config
from pipeline.config import Strict
from pipeline.data.datasets import DATA_ROOT
from pipeline.errors import ClusterError, VentralError
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle

STORAGE = "VENTRAL_STORAGE"


class Job(Strict):
    """Keys that every job has.

    Attributes:
        data_root: folder that relative dataset folders lie in; default: the environment variable VENTRAL_DATA, then the
            working directory.
        storage: folder for everything that is written; default: the environment variable VENTRAL_STORAGE, then
            `storage` in the working directory. On a cluster it must be reachable from every node.
    """

    data_root: Path | None = None
    storage: Path | None = None

    @property
    def data_folder(self) -> Path:
        """The absolute folder that relative input paths lie in."""
        return (self.data_root or Path(os.environ.get(DATA_ROOT, "."))).expanduser().absolute()

    @property
    def store(self) -> Path:
        """The absolute storage folder."""
        return (self.storage or Path(os.environ.get(STORAGE, "storage"))).expanduser().absolute()

    def remarks(self) -> Iterable[str]:
        """What a dry run adds to the configuration: what follows from it."""
        return ()


JobT = TypeVar("JobT", bound=Job)


class Reporter(Protocol):
    """Told how far the work is: how much is done, of how much, and what else there is to say."""

    def __call__(self, done: int, total: int, more: str = "") -> None: ...


def run(schema: type[JobT], work: Callable[[JobT], object], argv: Sequence[str] | None = None) -> int:
    """Parse argv, do the work, and return the exit code; errors raised on purpose end as one clear message."""
    module = sys.modules[work.__module__]
    parser = argparse.ArgumentParser(
        prog=f"python -m {(module.__spec__ and module.__spec__.name) or work.__module__}", description=module.__doc__
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the file, for trying things")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    args = parser.parse_intermixed_args(argv)
    if args.config and "=" in args.config:  # only overrides were given
        args.config, args.overrides = None, [args.config, *args.overrides]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    for number in (signal.SIGTERM, signal.SIGHUP):  # `ray job stop`, a lost terminal: clean up as on Ctrl-C
        signal.signal(number, _interrupt)
    try:
        job = config.load(schema, args.config, args.overrides)
        if args.dry_run:
            print(config.dump(job), *(f"# {line}\n" for line in job.remarks()), sep="", end="")
        else:
            work(job)
    except VentralError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


@contextmanager
def ray_session(storage: Path, num_cpus: int) -> Iterator[str]:
    """Connect to the cluster that RAY_ADDRESS names, or start a local head of `num_cpus` and stop it afterwards.

    Yields:
        The head's address, for processes of its own.
    """
    if "RAY_ADDRESS" in os.environ:
        with _connected():
            yield _head_address()
        return
    with Stack(storage) as stack, connected_to(stack.ray(num_cpus=num_cpus)):
        yield _head_address()


@contextmanager
def connected_to(head: Service) -> Iterator[None]:
    """Use a local head for a while; what workers log is shown here."""
    import ray  # noqa: PLC0415  (as in _connected)

    _quieten_ray_data()
    try:
        with _own_sigterm():
            _stack.attach(head, log_to_driver=True, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()


def bundle_of(reference: str, uri: str, storage: Path) -> Bundle:
    """The bundle in a folder, or that of `name@alias` or `name/3` in the registry, kept in `storage` for next time."""
    if (Path(reference) / bundle.CARD).exists():
        return bundle.load(Path(reference))
    from pipeline.tracking import registry  # noqa: PLC0415  (brings MLflow)

    return registry.fetch(uri, registry.resolve(uri, reference), storage / "bundles")


@contextmanager
def tracking_uri(storage: Path) -> Iterator[str]:
    """The server that MLFLOW_TRACKING_URI names or that `make up` left running, else a local one for this job."""
    kept = [service.address for service in Stack.kept(storage) if service.name == "MLflow"]
    known = os.environ.get("MLFLOW_TRACKING_URI") or next(iter(kept), None)
    if known is not None:
        yield known
        return
    with Stack(storage) as stack:
        yield stack.mlflow().address


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage of a longer job, and note in `seconds` how long it took."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def progress(noun: str) -> Reporter:
    """A reporter for library calls that count their work: a line of progress at most once a second, and at the end.

    What was done before the first call (by an earlier run) does not count for the rate.
    """
    started = last = time.monotonic()
    first: int | None = None

    def report(done: int, total: int, more: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None:
            first = done
        if now - last >= 1 or done == total:
            rate = (done - first) / max(now - started, 1e-9)
            left = f"about {(total - done) / rate:.0f} s left" if rate else "just begun"
            print("  ".join(filter(None, (f"{noun} {done}/{total}", f"{rate:.0f}/s", more, left))), flush=True)
            last = now

    return report


@contextmanager
def _connected() -> Iterator[None]:
    import ray  # noqa: PLC0415  (where a session is opened, so that a job without one runs without Ray)

    _quieten_ray_data()
    try:
        with _own_sigterm():
            ray.init(logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({reason})"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _head_address() -> str:
    import ray  # noqa: PLC0415  (as in _connected)

    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our handler of SIGTERM, which `ray.init` replaces by one that exits without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def _quieten_ray_data() -> None:
    """Our own lines tell the progress."""
    import ray.data  # noqa: PLC0415  (as in _connected)

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
