"""Bytes in, answers out: a bad image fails alone, and company changes no answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import imaging, models
from pipeline.config import parse
from pipeline.data import shards
from pipeline.data.loading import Config, Loader
from pipeline.errors import ImageError
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Answer, Classification, Detections


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    torch.manual_seed(0)
    config = models.config_of("lenet5")(name="lenet5", num_classes=4)
    path = tmp_path_factory.mktemp("bundles") / "lenet"
    decoding = imaging.Decoding(formats=("PNG",), max_pixels=5000)
    return Predictor(bundle.save(path, models.build(config), config, classes=tuple("abcd"), decoding=decoding))


def picture(seed: int, height: int = 30, width: int = 40) -> bytes:
    return imaging.encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def answered(answers: Sequence[Answer | ImageError]) -> list[Classification]:
    assert all(isinstance(answer, Classification) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Classification)]


def test_answers_rank_all_classes_best_first(predictor: Predictor) -> None:
    for answer in answered(predictor.predict([picture(seed) for seed in range(3)])):
        assert sorted(answer.labels.tolist()) == [0, 1, 2, 3]
        assert (np.diff(answer.scores) <= 0).all()
        assert float(answer.scores.sum()) == pytest.approx(1, abs=1e-5)


def test_a_batch_gives_the_answers_of_single_images(predictor: Predictor) -> None:
    images = [picture(seed, height=20 + seed) for seed in range(5)]
    for one, image in zip(answered(predictor.predict(images)), images, strict=True):
        (alone,) = answered(predictor.predict([image]))
        np.testing.assert_array_equal(one.labels, alone.labels)
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-6)


def test_a_bad_image_gets_its_error_and_its_neighbours_their_answers(predictor: Predictor) -> None:
    good = [picture(1), picture(2)]
    jpeg = imaging.encode_jpeg(np.zeros((8, 8, 3), np.uint8))  # the bundle takes PNG only
    answers = predictor.predict(
        [b"text", good[0], good[0][:100], jpeg, picture(3, 80, 80), good[1], picture(4, 1, 4000)]
    )
    reasons = [answer.reason if isinstance(answer, ImageError) else "" for answer in answers]
    assert reasons == ["format", "", "truncated", "format", "pixels", "", "aspect"]
    expected = answered(predictor.predict(good))
    for at, answer in zip((1, 5), expected, strict=True):
        np.testing.assert_allclose(answered([answers[at]])[0].scores, answer.scores, atol=1e-6)


def test_nothing_asked_is_nothing_answered(predictor: Predictor) -> None:
    assert predictor.predict([]) == []
    assert isinstance(predictor.predict([b""])[0], ImageError)


def test_the_predictor_answers_as_offline_evaluation_does(
    stripes: shards.Shards, stripes_folder: Path, tmp_path: Path
) -> None:
    config = models.config_of("lenet5")(name="lenet5", num_classes=2)
    made = bundle.save(tmp_path / "lenet", models.build(config), config, classes=stripes.manifest.classes)
    predictor = Predictor(made)
    loader = Loader(stripes, predictor.model.spec, Config(batch_size=5, reader="local"))
    for batch in loader.evaluate("val"):
        answers = answered(predictor.predict([(stripes_folder / name).read_bytes() for name in batch.ids]))
        for offline, answer in zip(predictor.predict_batch(batch), answers, strict=True):
            np.testing.assert_array_equal(offline.labels, answer.labels)
            np.testing.assert_allclose(offline.scores, answer.scores, atol=1e-6)


def test_a_detectors_answer_about_a_picture_does_not_depend_on_what_it_is_asked_beside_it(tmp_path: Path) -> None:
    """Pictures that keep their aspect are padded to one size in a batch, which a network would see."""
    torch.manual_seed(0)
    fit = {"way": "resize", "short_side": 64, "long_side": 96}
    keys = {"backbone": "plain", "channels": 16, "num_classes": 3, "input": {"fit": fit}}
    config = parse(models.config_of("yolo_multiscale"), keys, "here")
    made = models.build(config)
    for name, value in made.named_parameters():
        if "classes" in name and name.endswith("weight"):
            torch.nn.init.normal_(value, std=0.5)
    asked = Predictor(bundle.save(tmp_path / "b", made, config, classes=tuple("abc")))
    pictures = [picture(1, 60, 90), picture(2, 90, 60), picture(3, 60, 90), picture(4, 70, 70)]
    together = asked.predict(pictures)
    for one, data in zip(together, pictures, strict=True):
        (alone,) = asked.predict([data])
        assert isinstance(one, Detections)
        assert isinstance(alone, Detections)
        assert len(one) == len(alone) > 0
        np.testing.assert_allclose(one.boxes_xyxy, alone.boxes_xyxy, atol=1e-2)
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)
