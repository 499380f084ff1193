"""The lecture's table of detectors: accuracy and speed side by side, ours and the papers'; text, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from pipeline.benchmark.detectors import Speed
from pipeline.benchmark.rounds import aligned
from pipeline.config import Strict

METRICS = ("coco_map50", "coco_map", "voc07_map50")
PARTS = ("decoding_ms", "proposals_ms", "network_ms", "post_ms")


class Row(Strict):
    """One detector: its accuracy by the names of the rules, its speed, and the seconds of its training if known."""

    name: str
    model: str
    metrics: dict[str, float]
    speed: Speed
    train_s: float | None = None


class Published(NamedTuple):
    """What a paper reports of Pascal VOC 2007's test set: mAP by VOC07's rule, and images a second where it says."""

    system: str
    map50: float
    images_per_s: float | None
    source: str


PUBLISHED = (
    Published("R-CNN, AlexNet, box regression", 58.5, 1 / 13, "Girshick et al. 2014; 13 s on a GPU, from its code"),
    Published("Fast R-CNN, VGG-16", 66.9, None, "Girshick 2015, Table 1; 0.32 s an image without proposals"),
    Published("Faster R-CNN, VGG-16 (07+12)", 73.2, 5.0, "Ren et al. 2015, Table 5; K40"),
    Published("YOLO (07+12)", 63.4, 45.0, "Redmon et al. 2016, Table 1; Titan X"),
    Published("Fast YOLO (07+12)", 52.7, 155.0, "Redmon et al. 2016, Table 1; Titan X"),
)
"""The papers' figures, on their hosts; ours are on other data and another machine."""


def table(rows: Sequence[Row]) -> str:
    """What a person reads: ours, then the papers'."""
    head = (
        *("detector", "coco_map50", "coco_map", "voc07_map50", "images/s at 1", "images/s at best"),
        *("decoding ms", "proposals ms", "network ms", "post ms", "/ network"),
        *("found", "parameters", "memory MiB", "trained s"),
    )
    theirs = ("as published (VOC 2007 test)", "voc07_map50", "images/s", "source")
    return "\n".join(
        [
            *aligned([head, *(_cells(row) for row in rows)]),
            "",
            *aligned([theirs[:3], *((one.system, f"{one.map50:.1f} %", _rate(one)) for one in PUBLISHED)]),
            *(f"  {one.system}: {one.source}" for one in PUBLISHED),
        ]
    )


def as_csv(rows: Sequence[Row]) -> str:
    """The same for programs; only what was measured here."""
    text = io.StringIO()
    out = csv.writer(text)
    sizes = sorted({size for row in rows for size in row.speed.images_per_s})
    out.writerow(
        [
            *("detector", "model", *METRICS, *(f"images_per_s_{size}" for size in sizes)),
            *(*PARTS, "parameters", "peak_bytes", "train_s"),
        ]
    )
    for row in rows:
        speed = row.speed
        measured = (*_parts(speed), speed.parameters, speed.peak_bytes)
        rates = [speed.images_per_s.get(size, "") for size in sizes]
        accuracy = [row.metrics.get(name, "") for name in METRICS]
        out.writerow([row.name, row.model, *accuracy, *rates, *measured, "" if row.train_s is None else row.train_s])
    return text.getvalue()


def plot(rows: Sequence[Row], title: str) -> Figure:
    """Accuracy over speed, each detector at its best batch, proposals included."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        speed = row.speed
        at = speed.images_per_s[speed.best_batch], row.metrics["coco_map50"]
        axes.plot(*at, "o", markersize=9)
        axes.annotate(f"{row.name}, batch {speed.best_batch}", at, textcoords="offset points", xytext=(8, 6))
    axes.set(xscale="log", xlabel="images a second", ylabel="coco_map50", title=title)
    axes.margins(x=0.3, y=0.2)
    axes.grid(alpha=0.25, which="both")
    return figure


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """What the parent run is told of each detector."""
    told: dict[str, float] = {}
    for row in rows:
        speed = row.speed
        told |= {f"{row.name}/{name}": row.metrics[name] for name in METRICS if name in row.metrics}
        told[f"{row.name}/images_per_s"] = speed.images_per_s[speed.best_batch]
        told[f"{row.name}/images_per_s_batch1"] = speed.images_per_s[min(speed.images_per_s)]
        told |= {f"{row.name}/{part}": ms for part, ms in zip(PARTS, _parts(speed), strict=True)}
    return told


def _cells(row: Row) -> tuple[str, ...]:
    speed = row.speed
    rates = speed.images_per_s
    return (
        row.name,
        *(f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in METRICS),
        f"{rates[min(rates)]:.2f}",
        f"{rates[speed.best_batch]:.2f} ({speed.best_batch})",
        *(f"{ms:.1f}" for ms in _parts(speed)),
        f"{speed.bare_ratio:.3f}",
        f"{speed.num_detections:.0f}",
        f"{speed.parameters:,}",
        f"{speed.peak_bytes / 2**20:.0f}",
        "" if row.train_s is None else f"{row.train_s:.0f}",
    )


def _parts(speed: Speed) -> tuple[float, ...]:
    return tuple(getattr(speed, part) for part in PARTS)


def _rate(one: Published) -> str:
    return "" if one.images_per_s is None else f"{one.images_per_s:.3g}"
