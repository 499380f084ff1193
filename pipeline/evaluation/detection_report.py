"""What the evaluation of a detector found: average precision by every rule, its errors by kind, and the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure
from pydantic import ConfigDict, Field

from pipeline.config import Strict
from pipeline.evaluation import figures, sightings
from pipeline.evaluation.detect import Judged
from pipeline.evaluation.live import Found
from pipeline.evaluation.report import FIGURES, Report
from pipeline.evaluation.sightings import Sighting
from pipeline.tracking.predictions import identity, model_tag
from pipeline.types import Split

if TYPE_CHECKING:  # MLflow takes seconds to import, and counting needs none of it
    from pipeline.tracking.runs import Run


class ClassPrecision(Strict):
    """One class: objects to be found, and average precision at IoU 0.5 by VOC's two rules; None without objects."""

    class_name: str
    num_objects: int
    voc_ap50: float | None
    voc07_ap50: float | None


class DetectionReport(Report):
    """Metrics of one detector on one split.

    Attributes:
        metrics: by the names of their rules: `coco_map`, `coco_map50`, `voc_map50`, `voc07_map50`, ... (see
            `evaluation.detect`), `loss`; and `voc_f1` with the `voc_f1_score` from which on detections count for it.
        per_class: average precision of every class.
        errors: shares of the best detections (`Judged.errors`).
    """

    task: Literal["detection"] = "detection"
    per_class: tuple[ClassPrecision, ...]
    errors: dict[str, float]

    @classmethod
    def of_found(
        cls, found: Found, split: Split, classes: tuple[str, ...], provenance: dict[str, str]
    ) -> DetectionReport:
        """Conclude from what was judged.

        Raises:
            DataError: there is no object to be found.
        """
        judged = found.judged
        area, eleven = judged.voc_average_precision("voc"), judged.voc_average_precision("voc07")
        f1, score = judged.best_f1()
        return cls(
            split=split,
            num_images=len(judged.ids),
            metrics=found.metrics() | {"voc_f1": f1, "voc_f1_score": score},
            classes=classes,
            provenance=provenance,
            per_class=tuple(
                ClassPrecision(
                    class_name=name,
                    num_objects=int(judged.num_voc[label]),
                    voc_ap50=area.get(label),
                    voc07_ap50=eleven.get(label),
                )
                for label, name in enumerate(classes)
            ),
            errors=judged.errors(),
        )

    def figures(self) -> dict[str, Figure]:
        """Average precision per class and what the errors are, by file name."""
        precision = {one.class_name: one.voc_ap50 for one in self.per_class if one.voc_ap50 is not None}
        title = f"{self.split}: voc_map50 {self.metrics['voc_map50']:.4f}"
        return {
            "average-precision.png": figures.weakest_classes(precision, "average precision (voc, IoU 0.5)", title),
            "errors.png": figures.shares(self.errors, f"{self.split}: the best detections, as many as objects"),
        }


class DetectionEvaluation(DetectionReport):
    """A report with its evidence at hand: as JSON the same as without.

    Attributes:
        judged: every detection.
        seen: what was found in every image.
        sheets: PNGs of the best and the worst images, by name.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    judged: Judged = Field(exclude=True, repr=False)
    seen: tuple[Sighting, ...] = Field(exclude=True, repr=False)
    sheets: dict[str, bytes] = Field(default={}, exclude=True, repr=False)

    def record(self, run: Run, path: Path) -> None:
        """Also write `detections-<split>.parquet` and the sheets beside the report, and log them."""
        super().record(run, path)
        table = path.with_name(f"detections-{self.split}.parquet")
        sightings.write(self.seen, table)
        run.log_file(table)
        for name, picture in self.sheets.items():
            file = path.with_name(f"{name}-{self.split}.png")
            file.write_bytes(picture)
            run.log_file(file, FIGURES)
        model = identity(self.provenance["weights_sha256"], self.provenance["engine"])
        run.set_tags({model_tag(self.split): model})

    def figures(self) -> dict[str, Figure]:
        """Also precision against recall."""
        curves, precision = self.judged.voc_curves(), self.judged.voc_average_precision("voc")
        drawn = figures.precision_recall(curves, self.classes, f"{self.split}, voc at IoU 0.5", precision)
        return super().figures() | {"precision-recall.png": drawn}
