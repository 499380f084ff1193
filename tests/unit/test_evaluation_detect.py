"""Average precision: by hand, against COCO's tool and a plain reading of VOC's kit, on any number of parts."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from pipeline.data.datasets import voc
from pipeline.errors import DataError
from pipeline.evaluation import detect
from pipeline.evaluation.detect import Judged, judge, merge
from pipeline.types import Detections, Objects

NUM_CLASSES = 3
VOC_ORIGIN = np.array([1, 1, 0, 0])  # its pixels are counted from 1, the last one is inside
Scene = tuple[Detections, Objects, str]


def objects(
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int] | None = None,
    difficult: Sequence[bool] | None = None,
    crowd: Sequence[bool] | None = None,
) -> Objects:
    num = len(boxes)
    names = np.array([0] * num if labels is None else labels, np.int64)
    hard, no, group = (np.array([False] * num if flag is None else flag, bool) for flag in (difficult, None, crowd))
    return Objects(np.array(boxes, np.float32).reshape(num, 4), names, hard, no, group)


def found(boxes: Sequence[Sequence[float]], scores: Sequence[float], labels: Sequence[int] | None = None) -> Detections:
    num = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(num, 4),
        np.array(labels if labels is not None else [0] * num, np.int64),
        np.array(scores, np.float32),
    )


def scenes(seed: int, count: int = 40) -> list[Scene]:
    """Images with objects of every size and detections near and far of them; all scores differ."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        num = int(rng.integers(0, 9))
        at, side = rng.uniform(0, 400, (num, 2)), rng.uniform(4, 160, (num, 2))
        boxes = np.concatenate([at, at + side], axis=1).astype(np.float32)
        labels = rng.integers(0, NUM_CLASSES, num)
        crowd = rng.random(num) < 0.15
        difficult = np.zeros(num, bool)
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 6, (3 * num, 4))
        far = np.sort(rng.uniform(0, 400, (5, 2, 2)), axis=1).reshape(5, 4)
        guesses = np.concatenate([near, far])
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        names = np.concatenate([np.repeat(labels, 3), rng.integers(0, NUM_CLASSES, 5)])
        names = np.where(rng.random(len(names)) < 0.1, (names + 1) % NUM_CLASSES, names)
        scores = rng.permutation(len(names)) * count + number + 1
        truth = Objects(boxes, labels, difficult, np.zeros(num, bool), crowd)
        made.append((found(guesses.tolist(), (scores / 20_000).tolist(), names.tolist()), truth, f"{number:03d}"))
    return made


def grid_scenes(seed: int, count: int = 40) -> list[Scene]:
    """The same on a coarse grid: equal overlaps, IoUs at the thresholds, areas at the bounds; no two scores alike."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        boxes = [
            np.concatenate([at, at + side])
            for at, side in zip(
                rng.integers(0, 5, (14, 2)) * 16.0, rng.choice([8.0, 16.0, 32.0, 96.0], (14, 2)), strict=True
            )
        ]
        labels, crowd = rng.integers(0, NUM_CLASSES, 14), rng.random(6) < 0.2
        scores = ((rng.permutation(8) * count + number + 1) / 1000).tolist()
        guesses = found([box.tolist() for box in boxes[6:]], scores, labels[6:].tolist())
        truth = objects([box.tolist() for box in boxes[:6]], labels[:6].tolist(), crowd=crowd.tolist())
        made.append((guesses, truth, f"{number:03d}"))
    return made


def judged(many: Sequence[Scene]) -> Judged:
    return merge([judge(one, truth, image_id, NUM_CLASSES) for one, truth, image_id in many])


def by_coco(many: Sequence[Scene]) -> dict[str, float]:
    """What COCO's evaluation says (faster-coco-eval)."""

    def xywh(box: npt.NDArray[np.float32]) -> list[float]:
        x, y, right, bottom = box.astype(np.float64).tolist()
        return [x, y, right - x, bottom - y]

    truth = [
        {"image_id": number, "category_id": int(label) + 1, "bbox": xywh(box), "iscrowd": int(crowd)}
        for number, (_, marked, _) in enumerate(many)
        for box, label, crowd in zip(marked.boxes_xyxy, marked.labels, marked.crowd, strict=True)
    ]
    for number, one in enumerate(truth):
        one |= {"id": number + 1, "area": one["bbox"][2] * one["bbox"][3]}  # type: ignore[index]
    results = [
        {"image_id": number, "category_id": int(label) + 1, "bbox": xywh(box), "score": float(score)}
        for number, (guess, _, _) in enumerate(many)
        for box, label, score in zip(guess.boxes_xyxy, guess.labels, guess.scores, strict=True)
    ]
    images = [{"id": number, "width": 1000, "height": 1000} for number in range(len(many))]
    classes = [{"id": label + 1, "name": str(label)} for label in range(NUM_CLASSES)]
    of = COCO({"images": images, "annotations": truth, "categories": classes})
    tool = COCOeval_faster(of, of.loadRes(results), "bbox")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    names = ("map", "map50", "map75", "map_small", "map_medium", "map_large", "mar1", "mar10", "mar100", "mar100_small",
             "mar100_medium", "mar100_large")  # fmt: skip
    return {f"coco_{name}": float(value) for name, value in zip(names, tool.stats, strict=False) if value != -1}


def by_voc_kit(many: Sequence[Scene], label: int) -> tuple[list[float], list[float]]:
    """Precision and recall by the rule of the development kit, in its own inclusive pixels; IoU must exceed 0.5."""
    truth = {
        name: [
            (box + VOC_ORIGIN, hard)
            for box, kind, hard in zip(marked.boxes_xyxy.astype(float), marked.labels, marked.difficult, strict=True)
            if kind == label
        ]
        for _, marked, name in many
    }
    guesses = [
        (float(score), name, box.astype(float) + VOC_ORIGIN)
        for guess, _, name in many
        for box, kind, score in zip(guess.boxes_xyxy, guess.labels, guess.scores, strict=True)
        if kind == label
    ]
    taken: set[tuple[str, int]] = set()
    hits, misses, precision, recall = 0, 0, [], []
    num = sum(not hard for marked in truth.values() for _, hard in marked)
    for _, name, box in sorted(guesses, key=lambda guess: -guess[0]):
        best, at = -np.inf, -1
        for number, (other, _) in enumerate(truth[name]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (box, other)]
                overlap = width * height / (sum(areas) - width * height)
                if overlap > best:
                    best, at = overlap, number
        if best > 0.5 and truth[name][at][1]:
            continue
        if best > 0.5 and (name, at) not in taken:
            taken.add((name, at))
            hits += 1
        else:
            misses += 1
        precision.append(hits / (hits + misses))
        recall.append(hits / num)
    return precision, recall


def test_average_precision_of_a_curve_drawn_by_hand() -> None:
    # Three objects; right, wrong, right, wrong: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3.
    truth = objects([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    guesses = found([[0, 0, 10, 10], [70, 0, 80, 10], [20, 0, 30, 10], [90, 0, 99, 9]], [0.9, 0.8, 0.7, 0.6])
    metrics = judge(guesses, truth, "a", 1).metrics()
    assert metrics["voc_map50"] == pytest.approx((1 + 2 / 3) / 3)
    assert metrics["voc07_map50"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # recalls 0 to 0.3, 0.4 to 0.6, none
    assert metrics["coco_map50"] == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)  # 0 to 0.33, 0.34 to 0.66
    assert metrics["coco_mar1"] == pytest.approx(1 / 3)
    assert metrics["coco_mar100"] == pytest.approx(2 / 3)


def test_recall_that_is_just_reached_counts_among_the_eleven() -> None:
    boxes = [[20 * at, 0, 20 * at + 10, 10] for at in range(5)]
    metrics = judge(found(boxes[:3], [0.9, 0.8, 0.7]), objects(boxes), "a", 1).metrics()
    assert metrics["voc07_map50"] == pytest.approx(7 / 11)  # 0 to 0.6


def test_overlap_of_exactly_a_half_is_enough_for_coco_alone() -> None:
    result = judge(found([[0, 0, 10, 10]], [0.9]), objects([[0, 0, 10, 20]]), "a", 1)
    assert (result.voc.tolist(), result.coco[0, 0].tolist()) == ([detect.WRONG], [detect.RIGHT] + [detect.WRONG] * 9)


@pytest.mark.parametrize(
    ("box", "score", "label", "message"),
    [
        ([0, 0, np.nan, 10], 0.5, 0, "'a': a detection's box or score is no number"),
        ([0, 0, 10, 10], np.nan, 0, "'a': a detection's box or score is no number"),
        ([0, 0, 10, 10], 0.5, 3, "'a': expected labels 0 to 2, got a detection of 3"),
        ([0, 0, 10, 10], 0.5, -1, "'a': expected labels 0 to 2, got a detection of -1"),
    ],
)
def test_what_cannot_be_judged_is_refused(box: list[float], score: float, label: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judge(found([box], [score], [label]), objects([[0, 0, 10, 10]]), "a", NUM_CLASSES)


def test_no_image_adds_nothing() -> None:
    part = judge(found([[0, 0, 10, 10]], [0.5]), objects([[0, 0, 10, 10]]), "a", 1)
    whole = merge([Judged.empty(1), part, Judged.empty(1)])
    assert whole.metrics() == part.metrics()
    assert whole.ids.tolist() == ["a"]
    with pytest.raises(DataError, match="one number of classes"):
        merge([Judged.empty(2), part])


def test_difficult_object_is_neither_to_be_found_nor_wrong_to_be_found() -> None:
    truth = objects([[0, 0, 10, 10], [20, 0, 30, 10]], difficult=[False, True])
    guesses = found([[20, 0, 30, 10], [20, 0, 30, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.7])
    result = judge(guesses, truth, "a", 1)
    assert result.num_voc.tolist() == [1]
    assert result.voc.tolist() == [detect.IGNORED, detect.IGNORED, detect.RIGHT]
    assert result.metrics()["voc_map50"] == 1
    assert result.metrics()["coco_map"] == pytest.approx(0.5)  # in COCO's rule a second one on it is wrong


def test_second_detection_of_an_object_is_wrong_also_where_another_object_is_near() -> None:
    truth = objects([[0, 0, 10, 10], [2, 0, 12, 10]])
    guesses = found([[0, 0, 10, 10], [0.5, 0, 10.5, 10]], [0.9, 0.8])
    result = judge(guesses, truth, "a", 1)
    assert result.voc.tolist() == [detect.RIGHT, detect.WRONG]  # VOC: it belongs to the first, which is taken
    assert result.coco[:, 0, 0].tolist() == [detect.RIGHT, detect.RIGHT]  # COCO: to the one that is free


@pytest.mark.parametrize("draw", [scenes, grid_scenes])
@pytest.mark.parametrize("seed", range(6))
def test_coco_metrics_are_those_of_its_own_tool(draw: Callable[[int], list[Scene]], seed: int) -> None:
    many = draw(seed)
    mine, theirs = judged(many).metrics(), by_coco(many)
    assert {name for name in mine if name.startswith("coco")} == set(theirs)
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, abs=1e-6), name


def test_coco_metrics_of_more_than_a_hundred_detections_are_those_of_its_own_tool() -> None:
    rng = np.random.default_rng(3)
    at = rng.uniform(0, 300, (2000, 2))
    guesses = found(np.concatenate([at, at + 60], axis=1).tolist(), (rng.permutation(2000) / 2000).tolist())
    truth = objects((np.concatenate([at, at + 60], axis=1)[::20] + rng.normal(0, 3, (100, 4))).tolist())
    many = [(guesses, truth, "a")]
    mine = judged(many).metrics()
    for name, value in by_coco(many).items():
        assert mine[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("draw", [scenes, grid_scenes])
@pytest.mark.parametrize("seed", range(4))
def test_voc_curves_are_those_of_the_development_kit(draw: Callable[[int], list[Scene]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    many = []
    for guess, truth, name in draw(seed + 100):
        hard, no = rng.random(len(truth)) < 0.2, np.zeros(len(truth), bool)
        many.append((guess, Objects(truth.boxes_xyxy, truth.labels, hard, no, no), name))
    curves = judged(many).voc_curves()
    assert sorted(curves) == [0, 1, 2]
    for label, curve in curves.items():
        precision, recall = by_voc_kit(many, label)
        np.testing.assert_allclose(curve.precision, precision, atol=1e-12)
        np.testing.assert_allclose(curve.recall, recall, atol=1e-12)


def test_parts_merge_in_any_order_to_the_same_record() -> None:
    many = scenes(11)
    parts = [judge(one, truth, image_id, NUM_CLASSES) for one, truth, image_id in many]
    whole = merge(parts)
    shuffled = [parts[at] for at in np.random.default_rng(0).permutation(len(parts))]
    again = merge([pickle.loads(pickle.dumps(merge(shuffled[start::4]))) for start in range(4)])
    for name in ("ids", "of_image", "labels", "scores", "voc", "coco", "num_voc", "num_coco", "own_iou"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))
    assert whole.metrics() == again.metrics()
    assert whole.errors() == again.errors()


def test_equal_scores_rank_by_image_whatever_the_parts() -> None:
    box, away = [[0, 0, 10, 10]], [[50, 50, 60, 60]]
    right = judge(found(box, [0.5]), objects(box), "b", 1)
    wrong = judge(found(away, [0.5]), objects(box), "a", 1)
    assert merge([right, wrong]).voc_average_precision() == merge([wrong, right]).voc_average_precision()


def test_an_image_that_is_judged_twice_is_refused() -> None:
    part = judge(found([], []), objects([]), "a", 1)
    with pytest.raises(DataError, match="'a' was judged twice"):
        merge([part, part])
    with pytest.raises(DataError, match="at least one image"):
        merge([])


def test_images_without_objects_count_their_false_alarms() -> None:
    box = [[0, 0, 10, 10]]
    hit, empty = judge(found(box, [0.5]), objects(box), "a", 1), judge(found(box, [0.9]), objects([]), "b", 1)
    assert merge([hit]).metrics()["voc_map50"] == 1
    assert merge([hit, empty]).metrics()["voc_map50"] == 0.5
    with pytest.raises(DataError, match="at least one object"):
        empty.metrics()


def test_no_detection_at_all_gives_zeros() -> None:
    metrics = judge(found([], []), objects([[0, 0, 10, 10]], [2]), "a", NUM_CLASSES).metrics()
    assert metrics["voc_map50"] == metrics["voc07_map50"] == metrics["coco_map"] == metrics["coco_mar100"] == 0


def test_errors_are_told_apart_as_hoiem_does() -> None:
    truth = objects(
        [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10]], [0, 0, 0, 1, 2]
    )
    guesses = found(
        [[0, 0, 10, 10], [24, 0, 34, 10], [60, 0, 70, 10], [80, 0, 90, 10], [0, 50, 10, 60]],
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [0, 0, 0, 1, 2],
    )
    expected = {"correct": 0.2, "localisation": 0.2, "similar": 0.2, "other": 0.2, "background": 0.2}
    assert judge(guesses, truth, "a", 3).errors([frozenset({0, 1})]) == pytest.approx(expected)
    assert judge(guesses, truth, "a", 3).errors()["other"] == pytest.approx(0.4)  # nothing is alike


def test_only_as_many_detections_of_a_class_are_told_apart_as_it_has_objects() -> None:
    guesses = found([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.8])
    assert judge(guesses, objects([[0, 0, 10, 10]]), "a", 1).errors()["correct"] == 1


def test_annotations_of_real_photos_found_exactly_score_one(real_data: Path) -> None:
    many = []
    for record in voc.records(voc.Config(root=real_data / "bccd_voc"), "test"):
        assert record.objects is not None
        boxes = record.objects.boxes_xyxy.tolist()
        scores = np.linspace(0.9, 0.1, len(boxes)).tolist() if boxes else []
        many.append((found(boxes, scores, record.objects.labels.tolist()), record.objects, record.image_id))
    result = judged(many)
    assert len(result.ids) == 72
    assert result.metrics()["voc_map50"] == result.metrics()["coco_map"] == 1
