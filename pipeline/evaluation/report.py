"""What an evaluation found, with where it came from: a JSON file and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.figure
import numpy as np

from pipeline.config import Strict
from pipeline.evaluation.classify import Counts
from pipeline.types import Split

if TYPE_CHECKING:  # MLflow takes seconds to import, and counting needs none of it
    from pipeline.tracking.runs import Run


class PerClass(Strict):
    """One class: images of it, share of them found (recall), share of its predictions that are right (precision)."""

    class_name: str
    num_images: int
    recall: float
    precision: float


class Report(Strict):
    """Metrics of one model on one split.

    Attributes:
        metrics: figures by name (`top1`, `top5`, `mean_recall`, `loss`).
        confusion: [C][C] images, true class by row, predicted class by column.
        provenance: which weights, which data, which code.
    """

    split: Split
    num_images: int
    metrics: dict[str, float]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    provenance: dict[str, str]

    @classmethod
    def of(cls, counts: Counts, split: Split, classes: tuple[str, ...], provenance: dict[str, str]) -> Report:
        """Conclude from counts."""
        return cls(
            split=split,
            num_images=counts.num_images,
            metrics=counts.metrics(),
            classes=classes,
            confusion=tuple(tuple(int(value) for value in row) for row in counts.confusion),
            provenance=provenance,
        )

    def per_class(self) -> list[PerClass]:
        """Recall and precision of every class; 0 where nothing was to be found or predicted."""
        confusion = np.array(self.confusion)
        right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        return [
            PerClass(
                class_name=name,
                num_images=int(true[label]),
                recall=float(right[label] / max(true[label], 1)),
                precision=float(right[label] / max(predicted[label], 1)),
            )
            for label, name in enumerate(self.classes)
        ]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n")

    def record(self, run: Run, path: Path) -> None:
        """Write as JSON to `path`, and log that, the metrics and the figures to a run."""
        self.write(path)
        run.log_file(path)
        run.log_metrics({f"final/{self.split}/{name}": value for name, value in self.metrics.items()}, step=0)
        for name, figure in self.figures().items():
            run.log_figure(f"figures/{self.split}-{name}", figure)

    def figures(self) -> dict[str, matplotlib.figure.Figure]:
        """The confusion matrix and the recall per class, by file name."""
        return {"confusion.png": self._draw_confusion(), "recall.png": self._draw_recall()}

    def _draw_confusion(self) -> matplotlib.figure.Figure:
        confusion = np.array(self.confusion)
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        figure = matplotlib.figure.Figure(figsize=(7, 6), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the true class")
        axes.set(xlabel="predicted", ylabel="true", title=f"{self.split}: top-1 {self.metrics['top1']:.4f}")
        if len(self.classes) <= 30:
            axes.set_xticks(range(len(self.classes)), self.classes, rotation=90)
            axes.set_yticks(range(len(self.classes)), self.classes)
        if len(self.classes) <= 12:
            for (row, column), count in np.ndenumerate(confusion):
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=shade)
        return figure

    def _draw_recall(self) -> matplotlib.figure.Figure:
        ranked = sorted(self.per_class(), key=lambda entry: entry.recall)[:40]
        figure = matplotlib.figure.Figure(figsize=(7, 1 + 0.25 * len(ranked)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(ranked)), [entry.recall for entry in ranked])
        axes.set_yticks(range(len(ranked)), [entry.class_name for entry in ranked])
        axes.set(xlabel="recall", xlim=(0, 1), title=f"{self.split}: weakest classes")
        return figure
