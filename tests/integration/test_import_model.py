"""Weights from elsewhere as a registered version, with golden images that its copy in the registry is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jobs import import_model
from jobs._process import Service
from pipeline import models
from pipeline.errors import ImageError, ModelError
from pipeline.inference import golden
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.tracking import registry
from tests.small_detection import photo

LENET = json.dumps({"name": "lenet5", "num_classes": 3})


@dataclass
class Done:
    """What the door printed, and the bundle that the registry holds then, if it ended well."""

    code: int
    out: str
    err: str
    fetched: Bundle | None


@pytest.fixture
def imported(
    mlflow_server: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Run the door with a configuration's keys; data and storage lie in the test's folder."""
    uri = mlflow_server.address
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def run(name: str, *words: str) -> Done:
        folders = [f"data_root={tmp_path}", f"storage={tmp_path / 'storage'}"]
        code = import_model.main([*words, f"register_as.model={name}", *folders])
        told = capfd.readouterr()
        fetched = None if code else registry.fetch(uri, registry.resolve(uri, f"{name}@champion"), tmp_path / "cache")
        return Done(code, told.out, told.err, fetched)

    return run


@pytest.fixture
def lenet(tmp_path: Path) -> list[str]:
    """Words that name a LeNet-5 in a file, one of whose classes it is sure of."""
    torch.manual_seed(5)
    state = models.build(models.config_of("lenet5")(name="lenet5", num_classes=3)).state_dict()
    *_, last = state
    state[last][1] += 2
    torch.save(state, tmp_path / "lenet.pt")
    return [f"source.model={LENET}", "source.weights=lenet.pt", 'source.classes=["a", "b", "c"]']


def replay(kept: Bundle, shift: float = 0.0) -> None:
    """Let a bundle answer its golden images, with its last layer shifted."""
    predictor = Predictor(kept)
    with torch.no_grad():
        list(predictor.model.parameters())[-1][0] += shift
    for image, expected in golden.load(kept.path):
        [answer] = predictor.predict([image], golden.SELECTED)
        assert not isinstance(answer, ImageError)
        golden.check(expected, answer)


def test_golden_images_of_an_import_are_in_the_registered_version_which_must_answer_them_alike(
    imported: Callable[..., Done], lenet: list[str], tmp_path: Path
) -> None:
    images = [photo(seed, 40, 36) for seed in range(3)]
    for at, image in enumerate(images):
        (tmp_path / f"chosen/{at}").mkdir(parents=True)
        (tmp_path / f"chosen/{at}/photo.png").write_bytes(image)
    done = imported("imported", *lenet, "golden=chosen")
    assert done.code == 0, done.err
    assert "golden   3 images\n" in done.out
    assert done.fetched is not None
    assert [image for image, _ in golden.load(done.fetched.path)] == images
    replay(done.fetched)
    with pytest.raises(ModelError, match=r"golden image 0\.image: class"):
        replay(done.fetched, shift=5.0)


def test_an_import_without_golden_images_says_that_nothing_will_be_rehearsed(
    imported: Callable[..., Done], lenet: list[str]
) -> None:
    done = imported("unrehearsed", *lenet)
    assert done.code == 0, done.err
    assert "golden   none, so nothing is rehearsed before it is served; see `golden`\n" in done.out
    assert done.fetched is not None
    assert list(golden.load(done.fetched.path)) == []


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "chosen is not a folder; give one that holds a few images"),
        ({}, "chosen: expected 1 to 16 golden images, found 0 files"),
        ({f"{at}.png": photo(1, 40, 36) for at in range(17)}, "chosen: expected 1 to 16 golden images, found 17 files"),
        ({"a.png": photo(1, 40, 36), "notes.txt": b"of the photos"}, "chosen/notes.txt: "),
    ],
)
def test_golden_images_that_are_none_are_one_sentence_before_anything_is_made(
    imported: Callable[..., Done], lenet: list[str], tmp_path: Path, files: dict[str, bytes] | None, sentence: str
) -> None:
    if files is not None:
        (tmp_path / "chosen").mkdir()
        for name, data in files.items():
            (tmp_path / "chosen" / name).write_bytes(data)
    done = imported("refused", *lenet, "golden=chosen")
    assert done.code == 3
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "storage").exists()


def test_golden_images_of_real_weights_are_real_photos(
    imported: Callable[..., Done], real_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "chosen").mkdir()
    for name in ("10.jpg", "15.jpg"):
        shutil.copy(real_data / "snacks/voc/test" / name, tmp_path / "chosen")
    config = Path(__file__).parents[2] / "jobs/configs/import_model/squeezenet_imagenet.yaml"
    weights = real_data / "weights/squeezenet/squeezenet1_0_imagenet.pth"
    done = imported("squeezed", str(config), f"source.weights={weights}", "golden=chosen")
    assert done.code == 0, done.err
    assert done.fetched is not None
    assert len(list(golden.load(done.fetched.path))) == 2
    replay(done.fetched)
