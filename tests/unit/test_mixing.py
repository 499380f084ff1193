"""Mixed batches against hand-made ones, and the noise against the statistics it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import Batch
from pipeline.config import parse
from pipeline.data.transforms.mixing import Mixing, check, mix
from pipeline.errors import ConfigError
from pipeline.models import lenet5
from pipeline.models._contract import Classifier
from pipeline.types import Frame, InputSpec

COVARIANCE = ((0.08, 0.06, 0.05), (0.06, 0.07, 0.06), (0.05, 0.06, 0.09))
EVERYTHING = Mixing(mixup=0.4, cutmix=1.0, colour_noise=0.1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(size: int, height: int = 8, width: int = 12) -> Batch:
    """Pictures of one level each: 0, 10, 20, ...; the class is the picture's number."""
    images = (torch.arange(size, dtype=torch.uint8) * 10).view(-1, 1, 1, 1).expand(-1, 3, height, width).contiguous()
    frames = tuple(Frame((height, width), (height, width)) for _ in range(size))
    return Batch(images, torch.arange(size), frames, tuple(str(number) for number in range(size)))


def soft(batch: Batch) -> torch.Tensor:
    return batch.labels


def test_mixing_that_is_off_returns_the_batch_itself() -> None:
    batch, generator = levels(4), seeded()
    before = generator.get_state()
    assert mix(batch, Mixing(), 4, generator) is batch
    assert torch.equal(generator.get_state(), before)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_cutmix_targets_equal_the_pasted_area_exactly(size: int, height: int, width: int, seed: int) -> None:
    mixed = mix(levels(size, height, width), Mixing(cutmix=1.0), size, seeded(seed))
    assert mixed.images.dtype == torch.uint8
    for number, (image, target) in enumerate(zip(mixed.images, soft(mixed), strict=True)):
        shares = torch.bincount(image[0].flatten() // 10, minlength=size) / (height * width)
        torch.testing.assert_close(target, shares, atol=1e-6, rtol=0)
        rows, columns = torch.where(image[0] != number * 10)  # what was pasted is one whole rectangle
        if len(rows):
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_cutmix_keeps_half_the_area_on_average() -> None:
    """Beta(1, 1) is even over 0..1; cutting the window at the border can only keep more."""
    kept = [float(soft(mix(levels(2, 32, 32), Mixing(cutmix=1.0), 2, seeded(seed)))[0].max()) for seed in range(300)]
    assert 0.6 < np.mean(kept) < 0.95
    assert min(kept) < 0.6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_mixup_blends_pictures_as_it_blends_targets(size: int, seed: int) -> None:
    mixed = mix(levels(size), Mixing(mixup=0.4), size, seeded(seed))
    expected = soft(mixed) @ (torch.arange(size) * 10.0)
    torch.testing.assert_close(mixed.images, expected.view(-1, 1, 1, 1).expand(-1, 3, 8, 12), atol=1e-4, rtol=0)
    torch.testing.assert_close(soft(mixed).sum(dim=1), torch.ones(size))


def test_mixup_share_follows_its_beta_distribution() -> None:
    """Of Beta(a, a) the variance is 1 / (4 (2a + 1)): for 0.4, 0.139."""
    shares = []
    for seed in range(1500):
        first = soft(mix(levels(2, 1, 1), Mixing(mixup=0.4), 2, seeded(seed)))[0]
        if first[1] > 0:  # else the picture met itself
            shares.append(float(first[0]))
    assert len(shares) > 600
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * 1.8), abs=0.02)


@pytest.mark.parametrize(("switch_prob", "kinds"), [(0.0, {"mixup"}), (1.0, {"cutmix"}), (0.5, {"mixup", "cutmix"})])
def test_switch_chooses_between_mixup_and_cutmix(switch_prob: float, kinds: set[str]) -> None:
    config, seen = Mixing(mixup=1.0, cutmix=1.0, switch_prob=switch_prob), set()
    for seed in range(40):
        mixed = mix(levels(4, 16, 16), config, 4, seeded(seed))
        assert mixed.images.dtype == torch.float32  # also of cutmix: the type must not depend on the draw
        seen.add("mixup" if (mixed.images % 10 != 0).any() else "cutmix")
    assert kinds <= seen
    if "mixup" not in kinds:
        assert seen == {"cutmix"}


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0), Mixing(colour_noise=0.1), EVERYTHING])
def test_mix_of_one_picture_keeps_its_class(mixing: Mixing) -> None:
    mixed = mix(levels(1), mixing, 7, seeded(), COVARIANCE)
    assert mixed.images.shape == (1, 3, 8, 12)
    target = soft(mixed)
    assert target.tolist() == ([[1.0] + [0.0] * 6] if mixing.mixes else [0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_mix_is_a_function_of_the_generator(seed: int, size: int, already_soft: bool) -> None:
    batch = levels(size)
    if already_soft:
        batch = Batch(batch.images, torch.eye(size), batch.frames, batch.ids)
    torch.manual_seed(seed + 1)  # nothing may come from here
    first = mix(batch, EVERYTHING, size, seeded(seed), COVARIANCE)
    torch.manual_seed(seed + 2)
    second = mix(levels(size), EVERYTHING, size, seeded(seed), COVARIANCE)
    assert torch.equal(first.images, second.images)
    assert torch.equal(soft(first), soft(second))
    assert (first.frames, first.ids) == (batch.frames, batch.ids)
    assert float(first.images.min()) >= 0
    assert float(first.images.max()) <= 255
    torch.testing.assert_close(soft(first).sum(dim=1), torch.ones(size))


def test_mix_leaves_the_given_batch_alone_and_goes_on_with_the_generator() -> None:
    batch, generator = levels(5), seeded()
    first = mix(batch, EVERYTHING, 5, generator, COVARIANCE)
    second = mix(batch, EVERYTHING, 5, generator, COVARIANCE)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(batch.images, levels(5).images)


def test_colour_noise_has_the_covariance_of_the_colours() -> None:
    """Over many pictures: mean 0, covariance sigma^2 * C, the same shift for every pixel of a picture."""
    grey = Batch(torch.full((20_000, 3, 2, 2), 128, dtype=torch.uint8), torch.zeros(20_000, dtype=torch.int64))
    noisy = mix(grey, Mixing(colour_noise=0.1), 10, seeded(), COVARIANCE)
    shifts = ((noisy.images - 128) / 255).numpy()
    np.testing.assert_allclose(np.ptp(shifts, axis=(2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(shifts[:, :, 0, 0].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(shifts[:, :, 0, 0].T), 0.01 * np.array(COVARIANCE), atol=4e-5)
    assert soft(noisy).dtype == torch.int64  # nothing was mixed


def test_colour_noise_of_one_principal_component_moves_along_it() -> None:
    """The colours vary along (1, 2, 2) / 3 only, by 0.3: the shift of level 9 * 2.55 * alpha lies on that line."""
    covariance = tuple(tuple(0.09 * a * b / 9 for b in (1, 2, 2)) for a in (1, 2, 2))
    grey = Batch(torch.full((50, 3, 1, 1), 128, dtype=torch.uint8))
    shifts = mix(grey, Mixing(colour_noise=0.1), 2, seeded(), covariance).images[:, :, 0, 0] - 128
    torch.testing.assert_close(shifts[:, 1], 2 * shifts[:, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shifts[:, 2], 2 * shifts[:, 0], atol=1e-3, rtol=1e-3)
    assert float(shifts.norm(dim=1).std()) > 1


def test_colour_noise_is_clipped_to_the_range_of_pixels() -> None:
    edges = Batch(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(64, 3, 1, 2).contiguous())
    images = mix(edges, Mixing(colour_noise=1.0), 2, seeded(), COVARIANCE).images
    assert (float(images.min()), float(images.max())) == (0, 255)


@pytest.mark.parametrize("covariance", [None, ((0.1,),), ((0.1, 0, 0), (0, 0.1, 0), (0, 0))])
def test_colour_noise_without_a_fitting_covariance_is_a_config_error(covariance: Any) -> None:
    with pytest.raises(ConfigError, match="colour_noise"):
        mix(levels(2), Mixing(colour_noise=0.1), 2, seeded(), covariance)
    with pytest.raises(ConfigError, match="colour_noise"):
        check(Mixing(colour_noise=0.1), 3, covariance)
    check(Mixing(mixup=0.2), 3, covariance)


@pytest.mark.parametrize("keys", [{"mixup": -1}, {"cutmix": -0.1}, {"switch_prob": 2}, {"colour_noise": 2}])
def test_mixing_out_of_range_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        parse(Mixing, keys, "here")


def test_mixing_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="targets"):
        mix(Batch(levels(2).images), Mixing(mixup=0.2), 2, seeded())


def test_loss_of_classifiers_accepts_soft_targets_and_agrees_with_hard_ones() -> None:
    outputs = torch.randn(4, 10, generator=seeded())
    hard = torch.tensor([1, 2, 3, 4])
    nets = (
        Classifier(InputSpec((4, 4)), torch.nn.Identity()),
        lenet5.build(lenet5.Config(name="lenet5")),
    )
    for net in nets:
        scores = outputs if isinstance(net.network, torch.nn.Identity) else -outputs.abs()
        soft_loss = net.loss(scores, torch.nn.functional.one_hot(hard, 10).float())
        for name, value in net.loss(scores, hard).items():
            torch.testing.assert_close(soft_loss[name], value)
