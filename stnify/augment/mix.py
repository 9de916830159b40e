"""Mixup and CutMix: each image is mixed with that of another row, and so are the targets.

An example keeps the larger of a share from Beta(strength, strength) and its complement, so that
mixing fades out as the strength falls. For mixup that only decides which of two rows is called the
partner; for CutMix the small strengths of the paper would paste rectangles as large as the image.

Sizes below: ``n`` examples, images ``(n, c, h, w)``, strengths ``(n,)``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stnify.augment.examples import beside, check_images, of_examples, rectangles
from stnify.errors import ShapeError

SMALLEST_STRENGTH = 1e-30
"""What is divided by a strength stays in the range of float32."""


class Mixed(NamedTuple):
    """Images, and whose targets belong to them in which shares.

    Attributes:
        images: ``(n, c, h, w)``.
        partner: Row each example is mixed with, ``(n,)``; None if nothing is mixed.
        share: What an example keeps of itself, ``(n,)``; the partner has the rest. None if nothing
            is mixed.
    """

    images: Tensor
    partner: Tensor | None = None
    share: Tensor | None = None


def mixup(images: Tensor, strength: Tensor) -> Mixed:
    """Return ``share * image + (1 - share) * partner's image`` with a share for each example.

    At a strength of exactly 0 the images are as they were, to the last bit.

    Raises:
        ShapeError: The images are not four-dimensional, or there is no strength for each.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; one share for each
    example, where their code draws one for the batch.
    """
    check_images(images, "mixup")
    share = _shares(of_examples(strength, images, "mixup"))
    partner = torch.randperm(len(images), device=images.device)
    return Mixed(_linear(images, partner, share), partner, share)


def cutmix(images: Tensor, strength: Tensor) -> Mixed:
    """Paste a rectangle of the partner's image; the share is that of the pixels that stay.

    The rectangle has the image's proportions, an area of 1 - share of it as drawn, and a centre
    that is uniform over the pixels; what lies outside is cut off. At a strength of exactly 0 the
    images are as they were, to the last bit.

    Raises:
        ShapeError: The images are not four-dimensional, or there is no strength for each.

    Source: Yun et al., "CutMix", 2019, with the rectangle of ``torchvision.transforms.v2.CutMix``,
    but one for each example.
    """
    check_images(images, "cutmix")
    height, width = images.shape[-2:]
    drawn = _shares(of_examples(strength, images, "cutmix"))
    partner = torch.randperm(len(images), device=images.device)
    half = (1 - drawn).sqrt() / 2
    across = torch.randint(width, drawn.shape, device=images.device)
    down = torch.randint(height, drawn.shape, device=images.device)
    reach_across, reach_down = (half * width).floor(), (half * height).floor()
    box = rectangles(
        down - reach_down, down + reach_down, across - reach_across, across + reach_across, images
    )
    share = 1 - box.to(drawn.dtype).mean(dim=(-3, -2, -1))
    return Mixed(torch.where(box, images[partner], images), partner, share)


def mixed_targets(target: Tensor, partner: Tensor, share: Tensor, classes: int) -> Tensor:
    """Return each example's target mixed with its partner's, in their shares.

    Args:
        target: Class indices ``(n,)``, which become probabilities ``(n, classes)``, or
            probabilities and other real numbers ``(n, ...)``. An index outside the classes, as
            ``ignore_index`` is, has probability 0 everywhere.
        partner: Of a `Mixed`, ``(n,)``.
        share: Of a `Mixed`, ``(n,)``.
        classes: Used for class indices only.

    Raises:
        ShapeError: Class indices are not a vector.
    """
    if not target.is_floating_point():
        if target.ndim != 1:
            raise ShapeError(
                f"class indices must be a vector to be mixed, but their shape is "
                f"{tuple(target.shape)}. Pass probabilities: `target.float()`, if they are such."
            )
        every = torch.arange(classes, device=target.device)
        target = (target[:, None] == every).to(share.dtype)
    return _linear(target, partner, share)


def _linear(values: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    share = beside(share, values)
    own, other = share.to(values.dtype), (1 - share).to(values.dtype)
    return own * values + other * values[partner]


def _shares(strength: Tensor) -> Tensor:
    """Draw the larger of a share from Beta(strength, strength) and its complement; 1 at strength 0.

    Two uniform numbers make a draw, whatever the strength: a sampler that rejects would use up a
    number of them that depends on the strengths of the rows before.

    Source: Devroye, "Random Variate Generation in One Line of Code", 1996: the symmetric beta, by
    Bailey's polar method for Student's t with ``2 * strength`` degrees of freedom.
    """
    radius = -(-torch.rand_like(strength)).log1p() / strength.clamp(min=SMALLEST_STRENGTH)
    cosine = (2 * math.pi * torch.rand_like(strength)).cos()
    squared = radius.expm1() * cosine.square()  # Student's t, squared, by its degrees of freedom
    share = (1 + 1 / (1 + 1 / squared).sqrt()) / 2
    return torch.where(strength > 0, share, 1)
