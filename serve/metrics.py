"""What is counted of the endpoint, for Prometheus, and who keeps the counts.

Whoever knows something notes it with a `Meter`: `serve.watching` in the ingress, `Load` in a replica. `RayMeter` hands
everything to Ray, whose agent on each node exports it for all its processes as `ray_<name>`; `serve.scrape` reads the
agents. `SILENT` stands in where there is no Ray. Labels are the server's own words: nothing a client writes gets here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from serve.schemas import Served

NOBODY = "-"
"""The model, version or route of a request that reached none; no model can have this name."""
HAND_OVER_S = 1.0  # Ray's agent forgets a gauge two report intervals after it was set; an interval is a second at least
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_MODEL = ("model", "version")
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        labels: names of its labels.
        buckets: upper bounds, of a histogram. Other bounds need another name: an agent that knows the old ones drops
            what comes with new ones.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = _MODEL
    buckets: tuple[float, ...] = ()


REQUESTS = Metric(
    "counter",
    "ventral_requests_total",
    "Requests by path template, outcome (2xx, 4xx, 5xx) and problem code (ok where there is none).",
    ("route", *_MODEL, "status", "code"),
)
IMAGES = Metric("counter", "ventral_images_total", "Images that a model answered about.")
REJECTS = Metric(
    "counter",
    "ventral_rejected_images_total",
    "Bytes that a replica did not accept as an image, by reason.",
    (*_MODEL, "reason"),
)
STAGE = Metric(
    "histogram",
    "ventral_stage_seconds",
    "Time of each image in decode, queue and infer, and of each answered request in total.",
    (*_MODEL, "stage"),
    _SECONDS,
)
SPENT = Metric(
    "counter",
    "ventral_spent_seconds_total",
    "The sum of what ventral_stage_seconds counts; Ray's agent only estimates a histogram's sum.",
    (*_MODEL, "stage"),
)
IN_HAND = Metric("gauge", "ventral_images_in_hand", "Images in hand at one ingress process, of all models.", ())
WAITING = Metric("gauge", "ventral_images_waiting", "Images that wait in one replica, for a decoder or for a batch.")
BATCH = Metric("histogram", "ventral_batch_images", "Images per forward pass.", _MODEL, _IMAGES)
SERVED = Metric("gauge", "ventral_model_info", "1 for every version that is served.", (*_MODEL, "alias"))
TROUBLE = Metric(
    "gauge",
    "ventral_alias_trouble",
    "1 for every alias that is not followed, GET /models says why; served.json: what is served is not written down.",
    ("model", "alias"),
)
STARTED = Metric("gauge", "ventral_start_time_seconds", "When the process began, in seconds since 1970.", ("role",))
METRICS = (REQUESTS, IMAGES, REJECTS, STAGE, SPENT, IN_HAND, WAITING, BATCH, SERVED, TROUBLE, STARTED)

Reading = tuple[Metric, float, tuple[str, ...]]
"""A gauge, its value, its labels' values."""


class Meter(Protocol):
    """Who keeps the counts of one process."""

    def note(self, metric: Metric, value: float, *labels: str) -> None:
        """Add to a counter, or to a histogram's observations; one value for each of the metric's labels."""

    def watch(self, source: Callable[[], Iterable[Reading]]) -> None:
        """Read gauges from `source`, again and again, in any thread, for as long as the process lives."""


class Silent:
    """Keeps nothing."""

    def note(self, metric: Metric, value: float, *labels: str) -> None:
        """Forget it."""

    def watch(self, source: Callable[[], Iterable[Reading]]) -> None:
        """Never ask."""


SILENT = Silent()


class RayMeter:
    """Hands everything to Ray; to be made in one of its processes.

    Ray takes 3 us for each value, so counters are added up here and handed over every second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers = {metric.name: _writer(metric) for metric in METRICS}
        self._sums: dict[tuple[str, tuple[str, ...]], float] = {}
        self._sources: list[Callable[[], Iterable[Reading]]] = []
        threading.Thread(target=self._keep_handing_over, name="metrics", daemon=True).start()

    def note(self, metric: Metric, value: float, *labels: str) -> None:
        """As in `Meter`."""
        if metric.kind != "counter":
            self._writers[metric.name](value, labels)
            return
        key = metric.name, labels
        with self._lock:
            self._sums[key] = self._sums.get(key, 0.0) + value

    def watch(self, source: Callable[[], Iterable[Reading]]) -> None:
        """As in `Meter`."""
        self._sources.append(source)

    def hand_over(self) -> None:
        """Give Ray what has been added up, and what the gauges say now."""
        with self._lock:
            sums, self._sums = self._sums, {}
        for (name, labels), value in sums.items():
            if value > 0:  # Ray's counters do not take zero
                self._writers[name](value, labels)
        for source in self._sources:
            for metric, value, labels in source():
                self.note(metric, value, *labels)

    def _keep_handing_over(self) -> None:
        while True:
            time.sleep(HAND_OVER_S)
            try:
                self.hand_over()
            except Exception:  # the counts of one second, rather than of all that follow
                _log.exception("metrics were not handed over")


def _writer(metric: Metric) -> Callable[[float, tuple[str, ...]], None]:
    from ray.util import metrics  # noqa: PLC0415  (the definitions above are read where there is no Ray)

    if metric.kind == "counter":
        write = metrics.Counter(metric.name, metric.help, metric.labels).inc
    elif metric.kind == "gauge":
        write = metrics.Gauge(metric.name, metric.help, metric.labels).set
    else:
        write = metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels).observe
    return lambda value, labels: write(value, dict(zip(metric.labels, labels, strict=True)))


class Load:
    """What one replica has in hand; not thread-safe, but for reading."""

    def __init__(self, meter: Meter, model: Served) -> None:
        self._meter = meter
        self._model = (model.name, model.version)
        self._began_s = time.time()
        self._joined = 0
        self._computed = 0
        meter.watch(self.readings)

    def readings(self) -> list[Reading]:
        """The gauges of a replica."""
        waiting = max(0, self._joined - self._computed)
        return [(WAITING, waiting, self._model), (STARTED, self._began_s, ("replica",))]

    @contextmanager
    def image(self) -> Iterator[None]:
        """Count an image in, that waits, is decoded or computed, and out."""
        self._joined += 1
        try:
            yield
        finally:
            self._joined -= 1

    @contextmanager
    def batch(self, count: int) -> Iterator[None]:
        """Note a batch, whose images do not wait any more."""
        self._meter.note(BATCH, count, *self._model)
        self._computed += count
        try:
            yield
        finally:
            self._computed -= count
