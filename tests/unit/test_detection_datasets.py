"""Pascal VOC, COCO and YOLO: hand-made trees with what real files do, damaged ones, and real data."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import boxes, masks
from pipeline.data import datasets, plan
from pipeline.data.datasets import _json, coco, voc, yolo
from pipeline.errors import ConfigError, DataError
from pipeline.types import Objects, Record, RunLengths


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def seen(record: Record) -> Objects:
    assert record.objects is not None
    assert record.label is None
    return record.objects


# Pascal VOC


def voc_object(name: str, box: tuple[str, str, str, str], extra: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    return f"<object><name>{name}</name>{extra}<bndbox>{''.join(f'<{t}>{v}</{t}>' for t, v in tags)}</bndbox></object>"


def voc_xml(*objects: str, filename: str = "1.jpg", size: str = "<width>20</width><height>10</height>") -> str:
    return f"<annotation><filename>{filename}</filename><size>{size}</size>{''.join(objects)}</annotation>"


DOG = voc_object("dog", ("1", "2", "20", "10"), "<difficult>1</difficult><truncated>0</truncated>")
PART = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
CAT = voc_object("cat", ("3.5", "4", " 7.25", "4"), f"<truncated>1</truncated><pose>Unspecified</pose>{PART}")


def voc_tree(root: Path, **files: Any) -> voc.Config:
    write(
        root,
        {
            "ImageSets/Main/train.txt": "b\na\n\n",
            "ImageSets/Main/val.txt": "c",
            "Annotations/a.xml": voc_xml(DOG, CAT),
            "Annotations/b.xml": voc_xml(),
            "Annotations/c.xml": voc_xml(voc_object("cow", ("1", "1", "1", "1"))),
            **{f"JPEGImages/{name}": "pixels are not looked at" for name in ("a.jpg", "b.JPEG", "c.png")},
            **files,
        },
    )
    return voc.Config(root=root)


def test_voc_boxes_move_to_the_house_form_and_keep_their_flags(tmp_path: Path) -> None:
    config = voc_tree(tmp_path)
    assert voc.class_names(config) == ("cat", "cow", "dog")
    empty, full = voc.records(config, "train")
    assert (empty.image_id, full.image_id) == ("train/b", "train/a")  # in the order of the list
    assert len(seen(empty)) == 0
    found = seen(full)
    assert found.boxes_xyxy.tolist() == [[0, 1, 20, 10], [2.5, 3, 7.25, 4]]
    assert found.labels.tolist() == [2, 0]
    assert found.difficult.tolist() == [True, False]
    assert found.truncated.tolist() == [False, True]
    assert not found.crowd.any()
    assert found.frame_hw == (10, 20)
    assert (Path(full.uri), full.size_bytes) == (tmp_path / "JPEGImages/a.jpg", 24)


def test_voc_images_are_found_by_their_name_with_any_suffix_or_by_the_tag(tmp_path: Path) -> None:
    config = voc_tree(tmp_path, **{"Annotations/b.xml": voc_xml(filename="other.gif"), "JPEGImages/other.gif": b"x"})
    assert [Path(record.uri).name for record in voc.records(config, "train")] == ["b.JPEG", "a.jpg"]
    (tmp_path / "JPEGImages/b.JPEG").unlink()
    assert [Path(record.uri).name for record in voc.records(config, "train")] == ["other.gif", "a.jpg"]
    (tmp_path / "JPEGImages/other.gif").unlink()
    assert [record.size_bytes for record in voc.records(config, "train")] == [0, 24]
    (tmp_path / "JPEGImages/a.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages: expected images such as b.jpg, got none"):
        list(voc.records(config, "train"))


def test_voc_split_names_and_classes_come_from_the_configuration(tmp_path: Path) -> None:
    config = voc_tree(tmp_path).model_copy(
        update={"image_set": {"train": "val"}, "classes": ("cow", "pig"), "splits": ("train",)}
    )
    assert voc.class_names(config) == ("cow", "pig")
    (record,) = voc.records(config, "train")
    assert (record.image_id, seen(record).labels.tolist()) == ("train/c", [0])
    with pytest.raises(ConfigError, match=r"dataset.image_set: .* got none for 'val'"):
        list(voc.records(config, "val"))
    with pytest.raises(DataError, match=r"a.xml: expected classes among cow, pig, got 'dog'"):
        list(voc.records(config.model_copy(update={"image_set": "{split}"}), "train"))


def test_voc_without_lists_takes_every_annotation(tmp_path: Path) -> None:
    write(
        tmp_path, {"train/2.xml": voc_xml(DOG), "train/2.jpg": b"x", "train/1.xml": voc_xml(CAT), "train/1.jpg": b"x"}
    )
    config = voc.Config(root=tmp_path, splits=("train",), listed=False, images="{split}", annotations="{split}")
    assert [record.image_id for record in voc.records(config, "train")] == ["train/1", "train/2"]


def test_voc_masks_need_classes_and_their_own_list(tmp_path: Path) -> None:
    config = voc_tree(tmp_path, **{"ImageSets/Segmentation/train.txt": "a", "SegmentationClass/a.png": b"x"})
    config = config.model_copy(update={"masks": True})
    with pytest.raises(ConfigError, match=r"dataset.classes: expected all class names"):
        voc.class_names(config)
    config = config.model_copy(update={"classes": ("cat", "cow", "dog")})
    (record,) = voc.records(config, "train")
    assert (record.mask_uri, record.mask_bytes) == (str(tmp_path / "SegmentationClass/a.png"), 1)
    assert all(record.mask_uri is None for record in voc.records(voc.Config(root=tmp_path), "train"))
    (tmp_path / "SegmentationClass/a.png").unlink()
    with pytest.raises(DataError, match="expected a mask for each image of the list, got none for 'a'"):
        list(voc.records(config, "train"))


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
)
FILE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>'


@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        (voc_xml(voc_object("dog", ("1", "many", "3", "4"))), "a number of pixels in 'ymin', got 'many'"),
        (voc_xml(voc_object("dog", ("1", "nan", "3", "4"))), "a number of pixels in 'ymin', got 'nan'"),
        (voc_xml(voc_object("dog", ("1", "2", "1e999", "4"))), "a number of pixels in 'xmax', got '1e999'"),
        (voc_xml(voc_object("dog", ("1", "2", "3", ""))), "expected a 'ymax' in every bndbox, got none"),
        (voc_xml("<object><name>dog</name></object>"), "expected a 'bndbox' in every object, got none"),
        (voc_xml(voc_object("", ("1", "2", "3", "4"))), "expected a 'name' in every object, got none"),
        (voc_xml(voc_object("dog", ("1",) * 4, "<difficult>maybe</difficult>")), "0 or 1 in 'difficult', got 'maybe'"),
        (voc_xml(DOG)[:-20], "expected a whole XML file, got one that is damaged"),
        ("", "expected a whole XML file"),
        (b"\xff\xfe\x00", "expected a whole XML file"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "expected a whole XML file"),
        (BOMB, "expected an XML without entities of its own, got EntitiesForbidden"),
        (FILE, "expected an XML without entities of its own, got EntitiesForbidden"),
    ],
)
def test_voc_annotation_that_is_damaged_names_file_and_tag(tmp_path: Path, xml: str | bytes, sentence: str) -> None:
    config = voc_tree(tmp_path, **{"Annotations/a.xml": xml})
    with pytest.raises(DataError, match=rf"Annotations/a\.xml: .*{sentence}"):
        voc.class_names(config)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("a\na", r"each once, got 'a' again"),
        ("", r"one name of an image per line, got none"),
        ("../../etc/x", r"got '../../etc/x'"),
        ("s3://there/x", r"got 's3://there/x'"),
        ("a\nz", r"z\.xml: cannot be read: No such file"),
    ],
)
def test_voc_list_that_is_damaged_is_named(tmp_path: Path, names: str, sentence: str) -> None:
    config = voc_tree(tmp_path, **{"ImageSets/Main/train.txt": names})
    with pytest.raises(DataError, match=sentence):
        list(voc.records(config, "train"))


def test_voc_size_that_a_tool_left_at_zero_is_unknown(tmp_path: Path) -> None:
    zero = voc_xml(DOG, size="<width>0</width><height>0</height>")
    config = voc_tree(tmp_path, **{"Annotations/a.xml": zero, "Annotations/b.xml": "<annotation/>"})
    assert [seen(record).frame_hw for record in voc.records(config, "train")] == [None, None]


def test_voc_classes_that_are_not_sorted_are_refused() -> None:
    with pytest.raises(ValueError, match="each class once, sorted"):
        voc.Config(classes=("dog", "cat"))


# COCO


PACKED: dict[str, Any] = coco_mask.encode(np.asfortranarray(np.eye(4, 6, dtype=np.uint8)))
CONTENT: dict[str, Any] = {
    "info": {"a [bracket": '"quoted" \\ [[['},
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 4, "width": 6},
        {"id": "7", "file_name": "sub\\a.jpg", "height": 4, "width": 6},
        {"id": 1, "file_name": "c.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": "7", "category_id": 90, "bbox": [0, 0, 6, 4], "iscrowd": 1,
         "segmentation": {"size": [4, 6], "counts": [0, 24]}},
        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [1, 1, 2.5, 2], "segmentation": [[1, 1, 3, 1, 3, 3]]},
        {"id": 3, "image_id": "7", "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": 0,
         "segmentation": {"size": [4, 6], "counts": PACKED["counts"].decode()}},
        {"id": 4, "image_id": "7", "category_id": 50, "bbox": [5, 3, 0, 0], "segmentation": []},
    ],
    "categories": [{"id": 3, "name": "zebra"}, {"id": 50, "name": "apple"}, {"id": 90, "name": "bear"}],
}  # fmt: skip


def coco_tree(root: Path, content: Any = CONTENT, **keys: Any) -> coco.Config:
    write(root, {f"train2017/{name}": b"x" for name in ("b.jpg", "sub/a.jpg", "c.jpg")})
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    write(root, {"annotations/instances_train2017.json": text})
    return coco.Config(root=root, splits=("train",), **keys)


def changed(key: str, index: int, **values: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(CONTENT))
    copy[key][index].update(values)
    return copy


def test_coco_ids_with_gaps_become_labels_and_every_image_a_record(tmp_path: Path) -> None:
    config = coco_tree(tmp_path)
    assert coco.class_names(config) == ("apple", "bear", "zebra")
    first, second, third = coco.records(config, "train")
    assert [record.image_id for record in (first, second, third)] == ["train/b.jpg", "train/sub/a.jpg", "train/c.jpg"]
    assert seen(first).boxes_xyxy.tolist() == [[1, 1, 3.5, 3]]
    assert seen(second).boxes_xyxy.tolist() == [[0, 0, 6, 4], [0, 0, 4, 4], [5, 3, 5, 3]]
    assert seen(second).labels.tolist() == [1, 2, 0]
    assert seen(second).crowd.tolist() == [True, False, False]
    assert seen(second).regions == ()
    assert [seen(record).frame_hw for record in (first, third)] == [(4, 6), None]
    assert len(seen(third)) == 0
    assert Path(second.uri) == tmp_path / "train2017/sub/a.jpg"


def test_coco_outlines_of_every_kind_are_kept_where_wanted(tmp_path: Path) -> None:
    first, second, third = coco.records(coco_tree(tmp_path, masks=True), "train")
    assert seen(first).regions == ((((1, 1, 3, 1, 3, 3)),),)
    crowd, packed, none = seen(second).regions
    assert crowd == RunLengths((4, 6), (0, 24))
    assert np.array_equal(masks.mask(packed, (4, 6)), np.eye(4, 6))
    assert none == ()
    assert seen(third).regions == ()
    painted = masks.semantic(seen(second), (4, 6))
    assert Counter(painted.ravel().tolist()) == {255: 20, 3: 4}


def test_coco_image_without_a_file_is_rejected_later_or_skipped(tmp_path: Path) -> None:
    config = coco_tree(tmp_path)
    (tmp_path / "train2017/b.jpg").unlink()
    missing, *others = coco.records(config, "train")
    assert (Path(missing.uri), missing.size_bytes, len(others)) == (tmp_path / "train2017/b.jpg", 0, 2)
    kept = list(coco.records(config.model_copy(update={"missing_images": "skip"}), "train"))
    assert kept == others
    with pytest.raises(DataError, match=r"expected the images that .* names, for example b.jpg, got none"):
        list(coco.records(config.model_copy(update={"images": "annotations"}), "train"))


def test_coco_file_name_that_is_no_text_is_escaped_like_that_of_a_file(tmp_path: Path) -> None:
    odd, *others = coco.records(coco_tree(tmp_path, changed("images", 0, file_name="\ud800.jpg")), "train")
    assert (odd.image_id, Path(odd.uri).name, odd.size_bytes) == ("train/%ED%A0%80.jpg", "%ED%A0%80.jpg", 0)
    assert len(others) == 2
    assert len(plan.write_listing(tmp_path / "listing", [odd, *others])) == 3


def test_class_names_that_are_no_text_are_one_error_at_listing(tmp_path: Path) -> None:
    write(tmp_path / "yolo", {"names.txt": "gar\xe7on\nfille\n".encode("latin-1")})
    with pytest.raises(DataError, match=r"yolo: expected class names in UTF-8, got 'gar\\udce7on'; write the file"):
        datasets.class_names(yolo.Config(root=tmp_path / "yolo", description="names.txt"))
    with pytest.raises(DataError, match=r"coco: expected class names in UTF-8, got '\\ud800'"):
        datasets.class_names(coco_tree(tmp_path / "coco", changed("categories", 0, name="\ud800")))


def test_coco_splits_with_other_categories_are_refused(tmp_path: Path) -> None:
    config = coco_tree(tmp_path).model_copy(update={"splits": ("train", "val")})
    odd = json.dumps(changed("categories", 1, name="pear"))
    write(tmp_path, {"annotations/instances_val2017.json": odd})
    with pytest.raises(DataError, match=r"val2017.json: expected the same categories .* \['apple', 'pear'\]"):
        coco.class_names(config)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (changed("images", 2, id=9), "image 9: expected every id and file_name once"),
        (changed("images", 2, file_name="b.jpg"), "image 1: expected every id and file_name once"),
        (changed("images", 2, file_name="../x.jpg"), "image 1: expected a file_name below the folder"),
        (changed("images", 2, file_name="/x.jpg"), "image 1: expected a file_name below the folder"),
        (changed("images", 2, file_name="s3://x/y.jpg"), "image 1: expected a file_name below the folder"),
        (changed("images", 2, file_name=None), "image 1: expected a file_name, got None"),
        (changed("images", 2, id=[1]), r"image \[1\]: expected an entry with 'id', a number or a text"),
        (changed("annotations", 1, image_id=10**30), "only known image ids in the annotations, got 10000"),
        (changed("annotations", 1, category_id=4), "only known category ids in the annotations, got 4"),
        (changed("annotations", 1, bbox=[1, 2, 3]), r"annotation 2: expected a bbox of 4 numbers, got \[1, 2, 3\]"),
        (changed("annotations", 1, bbox=[1, 2, 3, 1e300]), "annotation 2: expected a bbox of 4 numbers"),
        (changed("annotations", 1, bbox=[1, 2, 3, float("nan")]), "annotation 2: expected a bbox of 4 numbers"),
        (changed("annotations", 1, segmentation=[["x"]]), "annotation 2: segmentation:"),
        (changed("annotations", 1, segmentation=[7]), "annotation 2: segmentation:"),
        (changed("annotations", 1, segmentation={"size": [4, 6], "counts": "1"}), "annotation 2: .* add up"),
        (changed("annotations", 1, segmentation={"size": [4], "counts": "1"}), r"annotation 2: .* got \[4\]"),
        (changed("annotations", 1, segmentation={"size": [4, 6], "counts": [0.5]}), r"annotation 2: .* got \[0.5\]"),
        (changed("categories", 1, id=3), "category 3: expected an id and a name of its own, got 'apple'"),
        (changed("categories", 1, name="zebra"), "category 50: expected an id and a name of its own"),
        (CONTENT | {"images": []}, "expected a COCO file of images, .* got no images"),
        (CONTENT | {"images": [3]}, "image 3: expected an entry with 'id'"),
        ({}, "expected a COCO file of images, .* got no images"),
        ([], "does not begin with '{'"),
        ("", "ends too early"),
        (b"\x00\x01\x02", "does not begin with '{'"),
        (json.dumps(CONTENT)[:-300], "cut off or damaged"),
        (json.dumps(CONTENT).replace('"bbox":', '"bbox"'), "cut off or damaged"),
        (json.dumps(CONTENT).replace("zebra", "\\ud800\\x").encode(), "cut off or damaged"),
        (b'{"images":' + b"[" * 2_000_000, "nest deeper than 64"),
    ],
)
def test_coco_file_that_is_damaged_or_contradicts_itself_names_what(
    tmp_path: Path, content: Any, sentence: str
) -> None:
    with pytest.raises(DataError, match=rf"instances_train2017\.json: .*{sentence}|{sentence}"):
        list(coco.records(coco_tree(tmp_path, content, masks=True), "train"))


def test_coco_file_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at most 100 bytes, got \d+; split it, or raise dataset.max_json_bytes"):
        coco.class_names(coco_tree(tmp_path, max_json_bytes=100))
    with pytest.raises(DataError, match=r"none.json: cannot be read: No such file"):
        coco.class_names(coco_tree(tmp_path, annotations="none.json"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\[]{},: é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\[', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.dictionaries(st.sampled_from(["a", "b", 'a"', "\\a", "c"]), VALUES | st.lists(VALUES, max_size=6)),
    chunk_bytes=st.integers(1, 30),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_elements_of_any_json_are_those_that_json_reads(
    tmp_path: Path, content: dict[str, Any], chunk_bytes: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only))
    expected = [
        (key, each) for key in content if key in "ab" and isinstance(content[key], list) for each in content[key]
    ]
    assert list(_json.elements(str(path), ("a", "b"), 10**6, chunk_bytes)) == expected


@pytest.mark.parametrize(
    "text", ['{"a": [1,, 2]}', '{"a": [1, 2,]}', '{"a": [,1]}', '{"a": [1 2]}', '{"a": [1]', '{"a": [1]}}']
)
def test_json_that_is_none_is_refused_for_any_chunk(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    for chunk_bytes in range(1, 20):
        with pytest.raises(DataError, match="cut off or damaged"):
            list(_json.elements(str(path), ("a", "b"), 100, chunk_bytes))


# YOLO


LETTERS = "abcdefghij"
BOMB = (
    f"names: [x, y]\na: &a [{'ha, ' * 9}ha]\n"
    + "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise(LETTERS))
    + "train: *j\n"
)  # 10 billion words


def yolo_tree(root: Path, description: str = "names: [zebra, apple]\n", **files: Any) -> yolo.Config:
    write(
        root,
        {
            "data.yaml": description,
            **{f"images/{name}": b"x" for name in ("train/2.jpg", "train/1.png", "train/3.jpg", "val/1.jpg")},
            "labels/train/1.txt": "1 0.5 0.5 1 0.5\n\n0 .25 .25 .5 .5 \r\n",
            "labels/train/3.txt": "",
            "labels/val/1.txt": "0 0.1 0.2 0.5 0.2 0.5 0.6\n",
            **files,
        },
    )
    return yolo.Config(root=root)


def test_yolo_lines_become_boxes_in_shares_with_labels_by_sorted_name(tmp_path: Path) -> None:
    config = yolo_tree(tmp_path)
    assert yolo.class_names(config) == ("apple", "zebra")
    first, second, third = yolo.records(config, "train")
    assert [record.image_id for record in (first, second)] == ["train/images/train/1.png", "train/images/train/2.jpg"]
    assert seen(first).boxes_xyxy.tolist() == [[0, 0.25, 1, 0.75], [0, 0, 0.5, 0.5]]
    assert seen(first).labels.tolist() == [0, 1]
    assert {seen(record).frame_hw for record in (first, second, third)} == {(1, 1)}
    assert [len(seen(record)) for record in (second, third)] == [0, 0]


def test_yolo_polygon_gives_the_box_around_it(tmp_path: Path) -> None:
    (record,) = yolo.records(yolo_tree(tmp_path), "val")
    np.testing.assert_allclose(seen(record).boxes_xyxy, [[0.1, 0.2, 0.5, 0.6]], rtol=1e-6)


@pytest.mark.parametrize(
    "description",
    [
        "names: {0: zebra, 1: apple}\ntrain: images/train\n",
        "names: [zebra, apple]\npath: images\ntrain: train\n",
        "names: [zebra, apple]\npath: /elsewhere/on/another/machine\ntrain: ../images/train/\n",  # as Roboflow exports
        "names: [zebra, apple]\ntrain: [./images/train]\nval:\n",
        "names: [zebra, apple]\ntrain: lists/train.txt\n",
    ],
)
def test_yolo_description_says_where_the_images_are(tmp_path: Path, description: str) -> None:
    listed = "./images/train/1.png\nimages/train/2.jpg\nimages/train/3.jpg\n"
    config = yolo_tree(tmp_path, description, **{"lists/train.txt": listed})
    assert [Path(record.uri).name for record in yolo.records(config, "train")] == ["1.png", "2.jpg", "3.jpg"]


def test_yolo_list_of_absolute_paths_names_images_below_the_root_only(tmp_path: Path) -> None:
    inside = f"{tmp_path}/images/train/1.png\n"
    beside = {"lists/images/train/1.png": b"another"}
    config = yolo_tree(tmp_path, "names: [a, b]\ntrain: lists/l.txt", **{"lists/l.txt": inside}, **beside)
    (record,) = yolo.records(config, "train")
    assert record.uri == inside.strip()
    for description in (
        f"names: [a, b]\ntrain: {tmp_path}/images/train",
        f"names: [a, b]\npath: {tmp_path}/images\ntrain: train",
    ):
        (tmp_path / "data.yaml").write_text(description)
        assert len(list(yolo.records(config, "train"))) == 3
    (tmp_path / "lists/l.txt").write_text("/images/train/1.png")
    sentence = r"'lists/l.txt' lists '/images/train/1.png', which does not lie below this folder; set dataset.root"
    with pytest.raises(DataError, match=sentence):
        list(yolo.records(config.model_copy(update={"images": "lists/l.txt"}), "train"))


def test_yolo_labels_lie_beside_images_where_no_folder_is_called_images(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"obj.names": "zebra\napple\n", "obj/1.jpg": b"x", "obj/1.txt": "1 .5 .5 1 1", "train.txt": "obj/1.jpg"},
    )
    config = yolo.Config(root=tmp_path, description="obj.names", images="{split}.txt")
    (record,) = yolo.records(config, "train")
    assert (record.image_id, seen(record).labels.tolist()) == ("train/obj/1.jpg", [0])
    assert len(list(yolo.records(config.model_copy(update={"images": "obj"}), "train"))) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 .5 .5 1", "expected a class and 4 numbers, or at least 3 points, got 3 after the class"),
        ("0 .5 .5 1 1 .9", "got 5 after the class"),
        ("0 .5 .5 1 1 .9 .9 .1 .1 .2 .2 .3 .4 .4", "got 13 after the class"),
        ("cat .5 .5 1 1", "expected numbers 'class x_center y_center width height', got 'cat .5 .5 1 1'"),
        ("2 .5 .5 1 1", "expected a class index of 0 to 1, got 2"),
        ("-1 .5 .5 1 1", "expected a class index of 0 to 1, got -1"),
        ("nan .5 .5 1 1", "expected a class index of 0 to 1, got nan"),
        ("0 250 .5 1 1", "expected shares of the image's size, 0 to 1, got '0 250 .5 1 1'"),
        ("0 .5 .5 -.2 1", "expected shares of the image's size"),
        ("0 .5 nan 1 1", "expected shares of the image's size"),
    ],
)
def test_yolo_line_that_is_damaged_names_file_and_line(tmp_path: Path, line: str, sentence: str) -> None:
    config = yolo_tree(tmp_path, **{"labels/train/1.txt": f"0 .5 .5 1 1\n\n{line}\n"})
    with pytest.raises(DataError, match=rf"labels/train/1\.txt:3: .*{sentence}"):
        list(yolo.records(config, "train"))


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ("names: [a, a]", "class names, each once, got 2, 1 of them different"),
        ("names: 3", "class names, each once, got 0"),
        ("names: [yes, no]", "class names as text by index, got a bool; put it in quotes"),
        ("- a", "a YAML with a key 'names', got a list"),
        ("names: [", "not YAML that can be read: while parsing"),
        ("a: &a [ha, ha]\nnames: [x, y]\npath: *a", r"an alias \(\*name\) is not followed; write out what it"),
        (BOMB, "an alias .* is not followed"),
        ("names: [a, b]\ntrain: none", "expected images in 'none', got nothing there; set dataset.images"),
        ("names: [a, b]\ntrain: l.txt", "expected the image 'images/train/9.jpg' that 'l.txt' lists"),
        ("names: [a, b]\ntrain: [images/train, images/train]", "each once, got 6 of which 3 differ"),
        ("names: [a, b]\ntrain: images/unlabelled", "expected labels such as labels/unlabelled/1.txt, got none"),
        ("names: [a, b]\ntrain: 3", "expected folders of images in 'train', got 3"),
    ],
)
def test_yolo_description_that_is_damaged_says_what_was_expected(
    tmp_path: Path, description: str, sentence: str
) -> None:
    config = yolo_tree(tmp_path, description, **{"l.txt": "images/train/9.jpg", "images/unlabelled/1.jpg": b"x"})
    with pytest.raises(DataError, match=sentence):
        list(yolo.records(config, "train"))


# Real data


def test_voc_of_real_blood_cells_has_its_published_counts(real_data: Path) -> None:
    config = voc.Config(root=real_data / "bccd_voc", splits=("train", "val", "test"))
    assert voc.class_names(config) == ("Platelets", "RBC", "WBC")
    found = {split: list(voc.records(config, split)) for split in config.splits}
    assert [len(records) for records in found.values()] == [205, 87, 72]
    every = [seen(record) for records in found.values() for record in records]
    assert sum(map(len, every)) == 4888
    assert {each.frame_hw for each in every} == {(480, 640)}
    sides = np.concatenate([each.boxes_xyxy[:, 2:] - each.boxes_xyxy[:, :2] for each in every])
    assert np.count_nonzero((sides == 1).all(axis=1)) == 2  # corners in one pixel: of no size by the files' own account


def test_voc_and_coco_of_real_snacks_show_the_same_objects(real_data: Path) -> None:
    """They were drawn twice, by hand, up to 12 pixels apart, one object in one of them only."""
    root, places = real_data / "snacks", {"splits": ("train", "test"), "images": "voc/{split}"}
    first = voc.Config(root=root, listed=False, annotations="voc/{split}", **places)
    second = coco.Config(root=root, annotations="coco_instances.json", missing_images="skip", masks=True, **places)
    assert voc.class_names(first) == coco.class_names(second) == ("date", "fig", "hazelnut")
    numbers = Counter[str]()
    for split in first.splits:
        others = {Path(record.uri): seen(record) for record in coco.records(second, split)}
        for record in voc.records(first, split):
            mine, other = seen(record), others.pop(Path(record.uri))
            overlap = boxes.iou(mine.boxes_xyxy, other.boxes_xyxy)
            best = overlap.argmax(axis=1)
            assert len(set(best)) == len(mine)
            assert overlap.max(axis=1).min() > 0.75
            assert np.array_equal(mine.labels, other.labels[best])
            numbers += Counter(voc=len(mine), coco=len(other), images=1)
        assert not others
    assert numbers == {"images": 18, "voc": 164, "coco": 165}


def open_coco(real_data: Path) -> coco.Config:
    return coco.Config(
        root=real_data / "coco_open", splits=("train",), annotations="instances.json", images="images", masks=True
    )


def test_yolo_of_real_coco_images_equals_their_coco_boxes(real_data: Path) -> None:
    config = yolo.Config(root=real_data / "coco_open", splits=("train",), description="names.txt", images="images")
    assert yolo.class_names(config) == coco.class_names(open_coco(real_data))
    found = {Path(record.uri).name: seen(record) for record in yolo.records(config, "train")}
    assert len(found) == 33
    for record in coco.records(open_coco(real_data), "train"):
        mine, other = seen(record), found[Path(record.uri).name]
        assert mine.frame_hw is not None
        single = ~mine.crowd  # the YOLO files leave crowds out
        assert np.array_equal(mine.labels[single], other.labels)
        scaled = boxes.scale(other.boxes_xyxy, (1, 1), mine.frame_hw)
        np.testing.assert_allclose(scaled, mine.boxes_xyxy[single], atol=1e-3)


def test_outlines_of_real_coco_images_fill_their_boxes(real_data: Path) -> None:
    crowds = 0
    for record in coco.records(open_coco(real_data), "train"):
        found = seen(record)
        assert found.frame_hw is not None
        for region, box, crowd in zip(found.regions, found.boxes_xyxy, found.crowd, strict=True):
            rows, columns = np.nonzero(masks.mask(region, found.frame_hw))
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(around, box, atol=5)  # tips thinner than a pixel are not filled
            crowds += int(crowd)
        assert (255 in masks.semantic(found, found.frame_hw)) <= bool(found.crowd.any())
    assert crowds == 3
