"""Cutout and random erasing: rectangles of each image are overwritten.

Sizes below: ``n`` images ``(n, c, h, w)``; strengths ``(n,)``.
"""

import math

import torch
from torch import Tensor

from stnify.augment.examples import beside, check_images, of_examples, rectangles

Fill = float | Tensor
"""One value, or one for each channel."""


def cutout(images: Tensor, holes: Tensor, length: Tensor, most: int, fill: Fill = 0.0) -> Tensor:
    """Overwrite squares in each image, centred uniformly and cut off at the border.

    Args:
        images: ``(n, c, h, w)``, floating.
        holes: How many squares, rounded in use, ``(n,)``.
        length: Their side in pixels, rounded in use, ``(n,)``.
        most: No image gets more holes; so many are always drawn, whatever ``holes`` is.
        fill: What is written.

    Raises:
        ShapeError: The images are not four-dimensional, or a strength has no value for each.

    Source: DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017. Their code makes an odd side one pixel shorter; here it is what was asked for.
    """
    check_images(images, "cutout")
    height, width = images.shape[-2:]
    count = of_examples(holes, images, "cutout").round()
    side = of_examples(length, images, "cutout").round()
    mask = torch.zeros((len(images), 1, height, width), dtype=torch.bool, device=images.device)
    for hole in range(most):
        top = _integers(height, images) - (side / 2).floor()
        left = _integers(width, images) - (side / 2).floor()
        square = rectangles(top, top + side, left, left + side, images)
        mask = mask | (square & beside(hole < count, images))
    return _overwritten(images, mask, fill)


def random_erasing(
    images: Tensor,
    probability: Tensor,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 3.3),
    fill: Fill = 0.0,
) -> Tensor:
    """Overwrite one rectangle of each image with its probability.

    The rectangle's share of the image is uniform in ``area``, its height by its width is
    log-uniform in ``aspect``, and it lies uniformly inside the image. Where torchvision and timm
    draw again because a side is as long as the image's, that side is cut to one pixel less here,
    which makes the share smaller.

    Args:
        images: ``(n, c, h, w)``, floating.
        probability: ``(n,)``.
        area: Smallest and largest share of the image.
        aspect: Smallest and largest height by width.
        fill: What is written.

    Raises:
        ShapeError: The images are not four-dimensional, or there is no probability for each.

    Source: Zhong et al., "Random Erasing Data Augmentation", 2017.
    """
    check_images(images, "random erasing")
    height, width = images.shape[-2:]
    probability = of_examples(probability, images, "random erasing")
    pixels = height * width * _between(*area, probability)
    ratio = _between(math.log(aspect[0]), math.log(aspect[1]), probability).exp()
    tall = (pixels * ratio).sqrt().round().clamp(max=max(height - 1, 1))
    wide = (pixels / ratio).sqrt().round().clamp(max=max(width - 1, 1))
    top = (torch.rand_like(tall) * (height - tall + 1)).floor()
    left = (torch.rand_like(wide) * (width - wide + 1)).floor()
    erased = torch.rand_like(probability) < probability
    mask = rectangles(top, top + tall, left, left + wide, images)
    return _overwritten(images, mask & beside(erased, images), fill)


def _integers(count: int, images: Tensor) -> Tensor:
    return torch.randint(count, (len(images),), device=images.device)


def _between(low: float, high: float, like: Tensor) -> Tensor:
    return low + (high - low) * torch.rand_like(like)


def _overwritten(images: Tensor, mask: Tensor, fill: Fill) -> Tensor:
    if isinstance(fill, Tensor):
        fill = fill.to(images).reshape(-1, 1, 1)
    return torch.where(mask, fill, images)
