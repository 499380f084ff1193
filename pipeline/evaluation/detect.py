"""Detection metrics as mergeable records: each image is judged by itself, curves are drawn when all of them are there.

Two rules of matching, side by side, both on boxes in original pixels:

- Pascal VOC (Everingham et al., IJCV 2010, section 4.2): a detection belongs to the object of its class that it
  overlaps most; it is right if their IoU exceeds 0.5 and none of a higher score has taken that object.
- COCO (its `COCOeval`): a detection takes the free object that it overlaps most, at each of ten IoUs from 0.5 to 0.95;
  the hundred best detections of a class in an image count, and objects may be counted by their size.

Objects marked difficult, or crowd, are neither to be found nor wrong to be found. In COCO's rule one detection of a
difficult object is forgiven, and any number of a crowd's, of which counts what share of the detection it covers. Sizes
are those of boxes; COCO's own figures for small, medium and large objects take the areas of outlines, which shards do
not keep.

Records merge in any order to the same record, so figures are the same on any number of workers. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline import boxes
from pipeline.errors import DataError
from pipeline.evaluation.curves import PrecisionRecall
from pipeline.types import BoolArray, Detections, Float32Array, Int64Array, Objects, UInt8Array, no_objects

VOC_IOU = 0.5
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas in square pixels, both ends included."""
COCO_LIMITS = (1, 10, 100)
"""So many detections of an image and class count, for average recall; for average precision the last."""

WRONG, RIGHT, IGNORED = 0, 1, 2
CORRECT, LOCALISATION, SIMILAR, OTHER, BACKGROUND = KINDS = (
    "correct",
    "localisation",
    "similar",
    "other",
    "background",
)
_NEAR_IOU = 0.1
_RECALLS = {"voc07": np.arange(11) / 10, "coco": np.linspace(0, 1, 101)}  # the latter as COCO's tool rounds them

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """I images with N detections, each judged against the objects of its own image; C classes.

    Attributes:
        ids: text [I], sorted.
        of_image: int64 [N], the image of each detection, an index into `ids`; sorted, the best of an image first.
        labels: int64 [N].
        scores: float32 [N].
        ranks: int64 [N], place among the detections of that class in that image, from 0.
        voc: uint8 [N], `WRONG`, `RIGHT` or `IGNORED` by VOC's rule.
        coco: uint8 [N, sizes, IoUs], the same by COCO's.
        own_iou: float32 [N], the largest IoU with an object of its class.
        other_iou: float32 [N], that with an object of another class.
        other_labels: int64 [N], the class of that object, where `other_iou` is not 0.
        num_voc: int64 [C], objects to be found by VOC's rule.
        num_coco: int64 [C, sizes], the same by COCO's.
    """

    ids: npt.NDArray[np.object_]
    of_image: Int64Array
    labels: Int64Array
    scores: Float32Array
    ranks: Int64Array
    voc: UInt8Array
    coco: UInt8Array
    own_iou: Float32Array
    other_iou: Float32Array
    other_labels: Int64Array
    num_voc: Int64Array
    num_coco: Int64Array

    @classmethod
    def empty(cls, num_classes: int) -> Judged:
        """No image yet."""
        one = judge(_nothing_found(), no_objects(), "", num_classes)
        return replace(one, ids=one.ids[:0])

    @property
    def num_classes(self) -> int:
        """Classes, whether they occur or not."""
        return len(self.num_voc)

    def metrics(self) -> dict[str, float]:
        """Mean average precision and recall by the names of their rules; means are over classes that have objects.

        `voc_map50` is the area under the curve (VOC from 2010 on), `voc07_map50` the mean of eleven points, `coco_map`
        the mean over ten IoUs, `coco_map50` and `coco_map75` at one. `coco_map_small` and its like are left out where
        there is no object of such a size.

        Raises:
            DataError: there is no object to be found.
        """
        if not self.num_coco[:, 0].any():
            raise DataError("expected at least one object to be found, got none; check the split's annotations")
        found = {f"{rule}_map50": _mean(self.voc_average_precision(rule).values()) for rule in ("voc", "voc07")}
        everything, *sizes = ((size, list(self._coco_curves(size, COCO_LIMITS[-1]))) for size in COCO_SIZES)
        precision = _coco_precision(everything[1])
        found["coco_map"] = float(precision.mean())
        found["coco_map50"], found["coco_map75"] = (float(precision[:, at].mean()) for at in (0, 5))
        for size, curves in sizes:
            if curves:
                found[f"coco_map_{size}"] = float(_coco_precision(curves).mean())
                found[f"coco_mar100_{size}"] = _coco_recall(curves)
        found["coco_mar100"] = _coco_recall(everything[1])
        return found | {
            f"coco_mar{limit}": _coco_recall([*self._coco_curves("all", limit)]) for limit in COCO_LIMITS[:-1]
        }

    def voc_curves(self) -> dict[int, PrecisionRecall]:
        """Precision against recall at IoU 0.5 by VOC's rule, for each class with objects, one point a detection."""
        curves = {}
        for label in np.flatnonzero(self.num_voc).tolist():
            codes = self.voc[self._ranked(self.labels == label)]
            hits = np.cumsum(codes == RIGHT)[codes != IGNORED]
            curves[label] = PrecisionRecall(hits / np.arange(1, len(hits) + 1), hits / self.num_voc[label])
        return curves

    def voc_average_precision(self, rule: str = "voc") -> dict[int, float]:
        """Average precision of each class with objects, by `voc` (area) or `voc07` (eleven points)."""
        of = average_precision if rule == "voc" else _at_recalls(_RECALLS["voc07"])
        return {label: of(curve) for label, curve in self.voc_curves().items()}

    def best_f1(self) -> tuple[float, float]:
        """The highest F1 over all classes by VOC's rule, and the score from which on detections count for it.

        For people who must choose a threshold; without any right detection, 0 and a score of 1.
        """
        rows = self._ranked(self.voc != IGNORED)
        hits, drawn = np.cumsum(self.voc[rows] == RIGHT), np.arange(1, len(rows) + 1)
        f1 = 2 * hits / np.maximum(drawn + int(self.num_voc.sum()), 1)
        last_of_score = np.append(np.diff(self.scores[rows]) != 0, True)[: len(rows)]
        f1 = np.where(last_of_score, f1, 0.0)
        if not f1.any():
            return 0.0, 1.0
        best = int(f1.argmax())
        return float(f1[best]), float(self.scores[rows][best])

    def errors(self, groups: Sequence[frozenset[int]] = ()) -> dict[str, float]:
        """What the best detections are, as shares: of each class as many as it has objects.

        Hoiem, Chodpathumwan, Dai, "Diagnosing Error in Object Detectors", ECCV 2012, by the bounds of Redmon et al.
        2016, "You Only Look Once", section 4.2: `correct`, right class and IoU above 0.5; `localisation`, right class
        and IoU above 0.1, or an object that was found already; `similar`, an object of a class of the same group, and
        `other`, one of another class, each with IoU above 0.1; else `background`. Here the object of another class
        that is overlapped most decides between the two, where they let any similar one.

        Args:
            groups: classes that are alike, such as the animals.
        """
        group_of = {label: number for number, group in enumerate(groups) for label in group}
        best = [
            row
            for label, count in enumerate(self.num_voc.tolist())
            for row in self._ranked((self.labels == label) & (self.voc != IGNORED))[:count].tolist()
        ]
        kinds = [self._kind(row, group_of) for row in best]
        return {kind: kinds.count(kind) / max(len(kinds), 1) for kind in KINDS}

    def _kind(self, row: int, group_of: dict[int, int]) -> str:
        if self.voc[row] == RIGHT:
            return CORRECT
        if self.own_iou[row] > _NEAR_IOU:
            return LOCALISATION
        if self.other_iou[row] <= _NEAR_IOU:
            return BACKGROUND
        mine, others = (group_of.get(int(labels[row])) for labels in (self.labels, self.other_labels))
        return SIMILAR if mine is not None and mine == others else OTHER

    def _coco_curves(self, size: str, limit: int) -> Iterator[list[PrecisionRecall]]:
        """For each class with objects of that size, one curve for each IoU."""
        at = list(COCO_SIZES).index(size)
        for label in np.flatnonzero(self.num_coco[:, at]).tolist():
            codes = self.coco[self._ranked((self.labels == label) & (self.ranks < limit)), at]
            right, wrong = (np.cumsum(codes == code, axis=0, dtype=np.float64) for code in (RIGHT, WRONG))
            precision = right / (right + wrong + np.spacing(1))
            yield [
                PrecisionRecall(precision[:, iou], right[:, iou] / self.num_coco[label, at])
                for iou in range(len(COCO_IOUS))
            ]

    def _ranked(self, chosen: BoolArray) -> Int64Array:
        """The rows of some detections, the highest scores first; of equal ones, by image."""
        rows = np.flatnonzero(chosen)
        return rows[np.argsort(-self.scores[rows], kind="stable")]


def judge(found: Detections, objects: Objects, image_id: str, num_classes: int) -> Judged:
    """Judge the detections of one image; their boxes and those of the objects are in the same pixels.

    Raises:
        DataError: a box or a score is no number, or a label is none of the classes.
    """
    _check(found, objects, image_id, num_classes)
    order = np.argsort(-found.scores, kind="stable")
    mine, labels, scores = found.boxes_xyxy[order], found.labels[order], found.scores[order]
    near = boxes.iou(mine, objects.boxes_xyxy)
    covered = boxes.iou(mine, objects.boxes_xyxy, objects.crowd) if objects.crowd.any() else near
    same = labels[:, None] == objects.labels[None, :]
    other = np.where(same, 0, near)
    judged = Judged(
        ids=np.array([image_id], object),
        of_image=np.zeros(len(order), np.int64),
        labels=labels,
        scores=scores,
        ranks=np.zeros(len(order), np.int64),
        voc=np.full(len(order), WRONG, np.uint8),
        coco=np.full((len(order), len(COCO_SIZES), len(COCO_IOUS)), WRONG, np.uint8),
        own_iou=np.where(same, near, 0).max(axis=1, initial=0).astype(np.float32),
        other_iou=other.max(axis=1, initial=0).astype(np.float32),
        other_labels=objects.labels[other.argmax(axis=1)] if len(objects) else np.full(len(order), -1),
        num_voc=np.bincount(objects.labels[~(objects.difficult | objects.crowd)], minlength=num_classes),
        num_coco=np.zeros((num_classes, len(COCO_SIZES)), np.int64),
    )
    for label in np.union1d(labels, objects.labels).tolist():
        rows, truth = np.flatnonzero(labels == label), np.flatnonzero(objects.labels == label)
        ignored = (objects.difficult | objects.crowd)[truth]
        crowd, areas = objects.crowd[truth], boxes.area(objects.boxes_xyxy[truth])
        judged.ranks[rows] = np.arange(len(rows))
        judged.voc[rows] = _by_voc(near[np.ix_(rows, truth)], ignored)
        skipped = ignored[None, :] | ~_has_size(areas)  # [sizes, G]
        judged.num_coco[label] = (~skipped).sum(axis=1)
        has_size = _has_size(boxes.area(mine[rows]))
        judged.coco[rows] = _by_coco(covered[np.ix_(rows, truth)], skipped, crowd, has_size)
    return judged


def merge(parts: Sequence[Judged]) -> Judged:
    """Put the records of different images together, in any order.

    Raises:
        DataError: there is no part, two speak of one image, or of other numbers of classes.
    """
    if not parts:
        raise DataError("expected at least one image that was judged, got none; check the split's shards")
    if len({part.num_classes for part in parts}) > 1:
        raise DataError(f"expected one number of classes, got {sorted({part.num_classes for part in parts})}")
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids, kind="stable")
    twice = ids[order][1:][ids[order][1:] == ids[order][:-1]]
    if len(twice):
        raise DataError(f"image '{twice[0]}' was judged twice; image ids must be unique within a split")
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    places = np.argsort(order)  # where each image comes to lie
    of_image = np.concatenate([places[part.of_image + start] for part, start in zip(parts, starts, strict=False)])
    rows = np.argsort(of_image, kind="stable")
    names = ("labels", "scores", "ranks", "voc", "coco", "own_iou", "other_iou", "other_labels")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts])[rows] for name in names}
    counts = {name: sum(getattr(part, name) for part in parts) for name in ("num_voc", "num_coco")}
    return replace(parts[0], ids=ids[order], of_image=of_image[rows], **arrays, **counts)


def average_precision(curve: PrecisionRecall) -> float:
    """The area under the curve, precision made falling first (VOC from 2010 on; its development kit's `VOCap`)."""
    recall = np.concatenate([[0.0], curve.recall, [1.0]])
    return float((np.diff(recall) * _falling(np.concatenate([curve.precision, [0.0]]))).sum())


def _at_recalls(recalls: Float64Array) -> Callable[[PrecisionRecall], float]:
    """The mean of the best precision at these recalls or higher ones; 0 at those that are not reached."""

    def average(curve: PrecisionRecall) -> float:
        at = np.searchsorted(curve.recall, recalls, side="left")
        return float(np.append(_falling(curve.precision), 0.0)[at].mean())

    return average


def _coco_precision(curves: Sequence[Sequence[PrecisionRecall]]) -> Float64Array:
    """Average precision [classes, IoUs] of so many curves."""
    of = _at_recalls(_RECALLS["coco"])
    return np.array([[of(curve) for curve in row] for row in curves], np.float64)


def _coco_recall(curves: Sequence[Sequence[PrecisionRecall]]) -> float:
    """The recall that is reached, mean over classes and IoUs."""
    return float(np.mean([[curve.recall[-1] if len(curve.recall) else 0.0 for curve in row] for row in curves]))


def _falling(precision: Float64Array) -> Float64Array:
    """The best precision at each recall or a higher one."""
    envelope: Float64Array = np.maximum.accumulate(precision[::-1])[::-1]
    return envelope


def _check(found: Detections, objects: Objects, image_id: str, num_classes: int) -> None:
    if not (np.isfinite(found.boxes_xyxy).all() and np.isfinite(found.scores).all()):
        raise DataError(f"image '{image_id}': a detection's box or score is no number; the model's weights may be none")
    for labels, whose in ((found.labels, "detection"), (objects.labels, "object")):
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise DataError(
                f"image '{image_id}': expected labels 0 to {num_classes - 1}, got a {whose} of {labels.min()} to "
                f"{labels.max()}; the classes of model and data differ"
            )


def _nothing_found() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def _by_voc(near: Float64Array, ignored: BoolArray) -> UInt8Array:
    """Codes [D] of the detections of one class in one image, best first, from their IoUs [D, G]."""
    codes, taken = np.full(len(near), WRONG, np.uint8), np.zeros(len(ignored), bool)
    for row in np.flatnonzero((near > VOC_IOU).any(axis=1)).tolist():
        one = int(near[row].argmax())
        if ignored[one]:
            codes[row] = IGNORED
        elif not taken[one]:
            codes[row], taken[one] = RIGHT, True
    return codes


def _by_coco(near: Float64Array, skipped: BoolArray, crowd: BoolArray, has_size: BoolArray) -> UInt8Array:
    """The same by COCO's rule, [D, sizes, IoUs].

    Args:
        near: [D, G], best detection first.
        skipped: bool [sizes, G], objects that need not be found.
        crowd: bool [G].
        has_size: bool [sizes, D], detections of that size.
    """
    codes = np.full((len(near), len(COCO_SIZES), len(COCO_IOUS)), WRONG, np.uint8)
    taken = np.zeros((*codes.shape[1:], near.shape[1]), bool)
    sizes, ious = np.ogrid[: codes.shape[1], : codes.shape[2]]
    for row in np.flatnonzero((near >= COCO_IOUS[0]).any(axis=1)).tolist():
        if row >= COCO_LIMITS[-1]:
            break
        may = (near[row] >= COCO_IOUS[:, None]) & (~taken | crowd)  # [sizes, IoUs, G]
        wanted = may & ~skipped[:, None, :]
        pick_from = np.where(wanted.any(axis=2, keepdims=True), wanted, may)
        # Of equal overlaps the last one, as COCOeval.
        best = near.shape[1] - 1 - np.where(pick_from, near[row], -1.0)[..., ::-1].argmax(axis=2)
        matched = pick_from.any(axis=2)
        taken[sizes, ious, best] |= matched
        codes[row] = np.where(matched, np.where(skipped[sizes, best], IGNORED, RIGHT), WRONG)
    unmatched = codes == WRONG
    codes[unmatched & ~has_size.T[:, :, None]] = IGNORED
    codes[COCO_LIMITS[-1] :] = IGNORED
    return codes


def _has_size(areas: Float32Array) -> BoolArray:
    """Whether areas [N] are of each size: bool [sizes, N]."""
    bounds = np.array([*COCO_SIZES.values()])
    found: BoolArray = (areas >= bounds[:, :1]) & (areas <= bounds[:, 1:])
    return found


def _mean(values: object) -> float:
    return float(np.mean([*values]))  # type: ignore[misc]
