"""Augmentation of whole batches: mixup, cutmix, AlexNet's colour noise. Runs on the device, between batch and forward.

Per-picture augmentation is `transforms.classify`'s, on the CPU; label smoothing is the training loop's, for targets of
either kind. Everything drawn here follows from one generator, whatever the device.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.errors import ConfigError


class Mixing(Strict):
    """How the pictures of a batch are mixed; all off by default.

    Attributes:
        mixup: alpha of the Beta distribution of the share that the first picture keeps (Zhang et al. 2018, "mixup",
            section 2; 0.2 for ImageNet); 0 turns it off.
        cutmix: likewise for the area that it keeps (Yun et al. 2019, "CutMix", section 3.1; 1 for ImageNet).
        switch_prob: where both are on, the share of batches that get cutmix.
        colour_noise: sigma of the noise along the principal components of the training set's colours (Krizhevsky et al.
            2012, section 4.1; 0.1 there); 0 turns it off.
    """

    mixup: float = Field(default=0.0, ge=0, lt=math.inf)
    cutmix: float = Field(default=0.0, ge=0, lt=math.inf)
    switch_prob: float = Field(default=0.5, ge=0, le=1)
    colour_noise: float = Field(default=0.0, ge=0, le=1)

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with each other, which makes targets soft."""
        return self.mixup > 0 or self.cutmix > 0


Covariance = tuple[tuple[float, ...], ...]
"""Of the channels over all pixels of the training set, [C][C], on the scale 0..1."""


def check(mixing: Mixing, num_channels: int, covariance: Covariance | None) -> None:
    """Refuse colour noise where nobody knows the colours; best called before anything starts.

    Raises:
        ConfigError: no covariance, or one of another number of channels.
    """
    if mixing.colour_noise == 0:
        return
    if covariance is None:
        raise ConfigError(
            "mixing.colour_noise: expected the colour covariance of the training set, but it is not known; "
            "compute the shards' statistics, or set colour_noise to 0"
        )
    if [len(row) for row in covariance] != [num_channels] * num_channels:
        raise ConfigError(
            f"mixing.colour_noise: expected a covariance of {num_channels} x {num_channels} channels, got "
            f"{len(covariance)} x {len(covariance[0]) if covariance else 0}; set colour_noise to 0"
        )


def mix(
    batch: Batch,
    mixing: Mixing,
    num_classes: int,
    generator: torch.Generator,
    covariance: Covariance | None = None,
) -> Batch:
    """Vary a training batch; frames and ids stay those of the pictures that were first.

    Type and shape of the result depend on the configuration, never on what is drawn: images stay uint8 where values
    are only moved (cutmix) and become float32 where new ones arise (mixup, colour noise), always in 0..255; targets
    become float32 [B, num_classes] where pictures are mixed and stay as they are otherwise.

    Args:
        batch: on any device, with targets if pictures are mixed, int64 [B] or soft.
        mixing: what to do; the batch itself comes back if that is nothing.
        num_classes: width of soft targets.
        generator: gives one number per batch, from which everything else is drawn; best kept on the CPU.
        covariance: of the training set's colours, for colour noise.

    Raises:
        ConfigError: colour noise without a covariance of the batch's channels.
    """
    if not mixing.mixes and mixing.colour_noise == 0:
        return batch
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    rng = np.random.default_rng(int(seed))
    check(mixing, batch.images.shape[1], covariance)
    if mixing.colour_noise > 0 and covariance is not None:
        batch = replace(batch, images=_add_noise(batch.images, mixing.colour_noise, covariance, rng))
    return _mix_pictures(batch, mixing, num_classes, rng) if mixing.mixes else batch


def _mix_pictures(batch: Batch, mixing: Mixing, num_classes: int, rng: np.random.Generator) -> Batch:
    """Mixup or cutmix with the pictures of the same batch in another order."""
    partners = torch.from_numpy(rng.permutation(len(batch))).to(batch.images.device)
    images = batch.images.float() if mixing.mixup > 0 else batch.images
    if mixing.mixup == 0 or (mixing.cutmix > 0 and rng.random() < mixing.switch_prob):
        images, kept = _cutmix(images, partners, rng.beta(mixing.cutmix, mixing.cutmix), rng)
    else:
        kept = rng.beta(mixing.mixup, mixing.mixup)
        images = torch.lerp(images[partners], images, kept)
    targets = _soft(batch.labels, num_classes)
    return replace(batch, images=images, targets=torch.lerp(targets[partners], targets, kept))


def _cutmix(images: Tensor, partners: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste one window of the partners, and the share of the area that was really kept (Yun et al. 2019, eq. 2).

    The window has the picture's aspect and its centre anywhere; what reaches beyond the picture is cut off, so that
    less than `1 - share` of the area may be pasted.
    """
    height, width = images.shape[2:]
    half_h, half_w = height * math.sqrt(1 - share) / 2, width * math.sqrt(1 - share) / 2
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    top, bottom = max(round(y - half_h), 0), min(round(y + half_h), height)
    left, right = max(round(x - half_w), 0), min(round(x + half_w), width)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def _add_noise(images: Tensor, sigma: float, covariance: Covariance, rng: np.random.Generator) -> Tensor:
    """Add `[p1 p2 p3] [alpha_i * sqrt(lambda_i)]` to every pixel, one draw of alpha ~ N(0, sigma) per picture.

    Krizhevsky et al. 2012, section 4.1, write the eigenvalue lambda_i itself. Their program scales by the standard
    deviation, and so does this: only then does the noise not depend on the unit of the pixels. Its covariance is
    sigma^2 times that of the colours.
    """
    variances, components = np.linalg.eigh(np.asarray(covariance, np.float64))
    alphas = rng.normal(0, sigma, (len(images), len(variances)))
    shifts = 255 * (alphas * np.sqrt(variances.clip(0))) @ components.T  # rounding may leave a variance below 0
    noise = torch.from_numpy(shifts.astype(np.float32)).to(images.device)
    return (images.float() + noise[:, :, None, None]).clamp_(0, 255)


def _soft(targets: Tensor, num_classes: int) -> Tensor:
    """Hard targets [B] as float32 [B, num_classes]; soft ones as they are."""
    return F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets.float()
