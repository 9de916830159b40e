"""Brightness, contrast, saturation and hue, as torchvision's ``ColorJitter`` means them.

Sizes below: ``n`` images of ``c`` channels, in [0, 1]; strengths and factors ``(n,)``. A strength
``s`` draws a factor from ``[max(0, 1 - s), 1 + s]`` for each image, for hue a shift from
``[-s, s]``, where 1 is the whole circle. A strength of 0 leaves images in [0, 1] as they are, to
the last bit.
"""

import torch
from torch import Tensor

from stnify.augment.examples import beside, check_images, of_examples, uniform
from stnify.errors import ShapeError

GRAY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a pixel's gray value (ITU-R 601-2, torchvision's digits)."""


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Multiply each image by a factor of its own."""
    return adjust_brightness(images, _factor(images, strength, "brightness"))


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Move each image away from its mean gray, or towards it, by a factor of its own.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    return adjust_contrast(images, _factor(images, strength, "contrast"))


def saturation(images: Tensor, strength: Tensor) -> Tensor:
    """Move each image away from its gray version, or towards it; gray images stay.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    return adjust_saturation(images, _factor(images, strength, "saturation"))


def hue(images: Tensor, strength: Tensor) -> Tensor:
    """Turn each image's colours around the circle of hues; gray images stay.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    check_images(images, "hue")
    largest = of_examples(strength, images, "hue")
    return adjust_hue(images, uniform(-largest, largest))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return ``images * factor``, clamped to [0, 1]."""
    return (images * beside(factor, images).to(images.dtype)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return ``images * factor + mean * (1 - factor)``, clamped; ``mean`` of all gray values.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    _check_channels(images, "contrast")
    return _blend(images, _gray(images).mean(dim=(-3, -2, -1), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return ``images * factor + gray * (1 - factor)``, clamped; gray images as they are.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    _check_channels(images, "saturation")
    return images if images.shape[1] == 1 else _blend(images, _gray(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Add ``shift`` to the hue, a shift of 1 being the whole circle; gray images as they are.

    Raises:
        ShapeError: The images have neither 1 nor 3 channels.
    """
    _check_channels(images, "hue")
    if images.shape[1] == 1:
        return images
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    highest, lowest = precise.amax(1, keepdim=True), precise.amin(1, keepdim=True)
    chroma = highest - lowest
    angle = _sixths(precise, highest, chroma) + 6 * beside(shift, images).to(precise.dtype)
    # Each channel is the highest value less a trapezoid, as high as the chroma, around the hue
    # opposite to it: in sixths of the circle 3 is opposite to red, 5 to green, 7 to blue.
    distance = angle - torch.arange(3, 8, 2, device=images.device)[:, None, None]
    distance = distance - (distance / 6).round_().mul_(6)
    fall = distance.abs_().neg_().add_(2).clamp_(0, 1)
    turned = (highest - chroma * fall).clamp_(0, 1).to(images.dtype)
    return torch.where(beside(shift, images) == 0, images, turned)


def _sixths(images: Tensor, highest: Tensor, chroma: Tensor) -> Tensor:
    """Return the hue in sixths of the circle, ``(n, 1, h, w)``; 0 where there is no colour."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    divisor = torch.where(chroma == 0, 1, chroma)
    by_red = (green - blue) / divisor
    by_green = 2 + (blue - red) / divisor
    by_blue = 4 + (red - green) / divisor
    return torch.where(highest == red, by_red, torch.where(highest == green, by_green, by_blue))


def _factor(images: Tensor, strength: Tensor, operation: str) -> Tensor:
    check_images(images, operation)
    strength = of_examples(strength, images, operation)
    return uniform((1 - strength).clamp(min=0), 1 + strength)


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = (weight * images[:, i : i + 1] for i, weight in enumerate(GRAY))
    return red + green + blue


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(others, images, beside(factor, images).to(images.dtype)).clamp_(0, 1)


def _check_channels(images: Tensor, operation: str) -> None:
    check_images(images, operation)
    if images.shape[1] not in (1, 3):
        raise ShapeError(
            f"{operation} must get images of 1 or 3 channels, but got {images.shape[1]}. Leave "
            "it out for these images."
        )
