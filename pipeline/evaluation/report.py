"""What an evaluation found, with where it came from: a JSON file, its figures, and the evidence image by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import ConfigDict, Field

from pipeline.config import Strict
from pipeline.evaluation import figures
from pipeline.evaluation.classify import Counts
from pipeline.evaluation.curves import all_precision_recall, mean_average_precision, reliability
from pipeline.tracking.predictions import Predictions, file_name, identity, model_tag, views_tag
from pipeline.types import Split

if TYPE_CHECKING:  # MLflow takes seconds to import, and counting needs none of it
    from pipeline.tracking.runs import Run

FIGURES = "figures"


class PerClass(Strict):
    """One class: images of it, share of them found (recall), share of its predictions that are right (precision).

    F1 is the harmonic mean of both.
    """

    class_name: str
    num_images: int
    recall: float
    precision: float
    f1: float


class Report(Strict):
    """Metrics of one model on one split, whatever its task.

    Attributes:
        metrics: figures by name.
        provenance: which weights, which data, which views of each image, which code.
    """

    split: Split
    num_images: int
    metrics: dict[str, float]
    classes: tuple[str, ...]
    provenance: dict[str, str]

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
            run.log_figure(f"{FIGURES}/{self.split}-{name}", figure)

    def figures(self) -> dict[str, Figure]:
        """What a person looks at, by file name."""
        return {}


class ClassificationReport(Report):
    """Metrics of one classifier on one split.

    Attributes:
        metrics: `top1`, `top5`, `mean_recall`, `macro_f1`, `loss`, `ece`, `mean_ap`.
        confusion: [C][C] images, true class by row, predicted class by column.
    """

    task: Literal["classification"] = "classification"
    confusion: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, counts: Counts, split: Split, classes: tuple[str, ...], provenance: dict[str, str]
    ) -> ClassificationReport:
        """Conclude from counts."""
        return ClassificationReport(
            split=split,
            num_images=counts.num_images,
            metrics=counts.metrics(),
            classes=classes,
            confusion=tuple(tuple(int(value) for value in row) for row in counts.confusion),
            provenance=provenance,
        )

    def per_class(self) -> list[PerClass]:
        """Recall, precision and F1 of every class; 0 where nothing was to be found or predicted."""
        confusion = np.array(self.confusion)
        right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        f1 = Counts(confusion).f1()
        return [
            PerClass(
                class_name=name,
                num_images=int(true[label]),
                recall=float(right[label] / max(true[label], 1)),
                precision=float(right[label] / max(predicted[label], 1)),
                f1=float(f1[label]),
            )
            for label, name in enumerate(self.classes)
        ]

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix, and recall and F1 per class, by file name."""
        title = f"{self.split}: top-1 {self.metrics['top1']:.4f}"
        seen = [entry for entry in self.per_class() if entry.num_images]
        recall = {entry.class_name: entry.recall for entry in seen}
        f1 = {entry.class_name: entry.f1 for entry in seen}
        return {
            "confusion.png": figures.confusion_matrix(np.array(self.confusion), self.classes, title),
            "recall.png": figures.weakest_classes(recall, "recall", f"{self.split}: weakest classes"),
            "f1.png": figures.weakest_classes(f1, "F1", f"{self.split}: macro-F1 {self.metrics['macro_f1']:.4f}"),
        }


class Evaluation(ClassificationReport):
    """A report with its evidence at hand: as JSON the same as without.

    Attributes:
        predictions: what was said of every image.
        filters: the figure of the model's first filters, where it has some.
        errors: PNG of the most confident errors, where there are any.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    predictions: Predictions = Field(exclude=True, repr=False)
    filters: Figure | None = Field(default=None, exclude=True, repr=False)
    errors: bytes | None = Field(default=None, exclude=True, repr=False)

    def record(self, run: Run, path: Path) -> None:
        """Also write `predictions-<split>.parquet` and `errors-<split>.png` beside the report, and log both.

        The run is tagged with the model that was evaluated, so that a comparison finds it by that, and with the views,
        so that it compares only what was measured alike.
        """
        super().record(run, path)
        table = path.with_name(file_name(self.split))
        self.predictions.write(table)
        run.log_file(table)
        if self.errors is not None:
            picture = path.with_name(f"errors-{self.split}.png")
            picture.write_bytes(self.errors)
            run.log_file(picture, FIGURES)
        origin = self.predictions.origin
        model = identity(origin.weights_sha256, origin.engine)
        run.set_tags({model_tag(self.split): model, views_tag(self.split): origin.views})

    def figures(self) -> dict[str, Figure]:
        """Also precision against recall, calibration, and the first filters."""
        found = super().figures()
        partly = "" if self.predictions.ranks_all else f", from the {self.predictions.ranked.shape[1]} best classes"
        curves = all_precision_recall(self.predictions)
        found["precision-recall.png"] = figures.precision_recall(curves, self.classes, self.split + partly)
        reliable = reliability(self.predictions.confidence, self.predictions.right())
        found["calibration.png"] = figures.calibration(reliable, self.split)
        return found if self.filters is None else found | {"filters.png": self.filters}


def evidence_metrics(predictions: Predictions) -> dict[str, float]:
    """Calibration error and, where every class has its score, the mean of average precision over classes."""
    found = {"ece": reliability(predictions.confidence, predictions.right()).ece}
    if predictions.ranks_all:
        found["mean_ap"] = mean_average_precision(all_precision_recall(predictions))
    return found
