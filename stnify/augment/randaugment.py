"""RandAugment: one magnitude drives operations that each example draws for itself."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stnify.augment.color import adjust_brightness, adjust_contrast, adjust_saturation
from stnify.augment.examples import beside, check_images, of_examples
from stnify.augment.filters import adjust_sharpness, autocontrast, posterize, solarize
from stnify.augment.geometry import affine, inverse_matrices
from stnify.errors import DeclarationError, nearest

LARGEST_MAGNITUDE = 30.0
"""Where the ranges below end."""


class Warp(NamedTuple):
    """An operation that moves pixels; either direction is equally likely.

    Attributes:
        matrices: ``(value (n,), height, width)`` to maps as of `inverse_matrices`, ``(n, 2, 3)``.
        end: Value at the largest magnitude; 0 at magnitude 0.
    """

    matrices: Callable[[Tensor, int, int], Tensor]
    end: float


class Filter(NamedTuple):
    """An operation that changes values.

    Attributes:
        apply: ``(images, value (n,)) -> images``.
        start: Value at magnitude 0.
        end: Value at the largest magnitude.
        signed: Whether the value's sign is drawn.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    start: float
    end: float
    signed: bool


def _shear_x(value: Tensor, height: int, width: int) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    rows = (one, value, value * height / 2, zero, one, zero)  # about the upper left corner
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def _shear_y(value: Tensor, height: int, width: int) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    rows = (one, zero, zero, value, one, value * width / 2)  # about the upper left corner
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def _translate_x(value: Tensor, height: int, width: int) -> Tensor:
    zero = torch.zeros_like(value)
    return inverse_matrices(zero, (value * width).trunc(), zero, zero + 1, zero)


def _translate_y(value: Tensor, height: int, width: int) -> Tensor:
    zero = torch.zeros_like(value)
    return inverse_matrices(zero, zero, (value * height).trunc(), zero + 1, zero)


def _rotate(value: Tensor, height: int, width: int) -> Tensor:
    zero = torch.zeros_like(value)
    return inverse_matrices(-value, zero, zero, zero + 1, zero)


WARPS: dict[str, Warp] = {
    "ShearX": Warp(_shear_x, 0.3),
    "ShearY": Warp(_shear_y, 0.3),
    "TranslateX": Warp(_translate_x, 150 / 331),
    "TranslateY": Warp(_translate_y, 150 / 331),
    "Rotate": Warp(_rotate, 30.0),
}
"""Values are slopes, fractions of the side and degrees."""

FILTERS: dict[str, Filter] = {
    "Identity": Filter(lambda images, _: images, 0, 0, False),
    "Brightness": Filter(
        lambda images, change: adjust_brightness(images, 1 + change), 0, 0.9, True
    ),
    "Color": Filter(lambda images, change: adjust_saturation(images, 1 + change), 0, 0.9, True),
    "Contrast": Filter(lambda images, change: adjust_contrast(images, 1 + change), 0, 0.9, True),
    "Sharpness": Filter(lambda images, change: adjust_sharpness(images, 1 + change), 0, 0.9, True),
    "Posterize": Filter(lambda images, bits: posterize(images, bits.round()), 8, 4, False),
    "Solarize": Filter(solarize, 1, 0, False),
    "AutoContrast": Filter(lambda images, _: autocontrast(images), 0, 0, False),
}
"""Values are changes of a factor of 1, bits and thresholds."""

OPERATIONS = (*WARPS, *FILTERS)
"""All of torchvision's but Equalize, which needs 8-bit levels."""


def rand_augment(
    images: Tensor, magnitude: Tensor, operations: Sequence[str] = OPERATIONS, count: int = 2
) -> Tensor:
    """Apply to each image ``count`` operations that it draws for itself, one after the other.

    The ranges are torchvision's, with a continuous magnitude. Warps interpolate bilinearly, not by
    the nearest pixel. A magnitude of 0 leaves an image as it is, to the last bit, also if it draws
    an operation that has no strength.

    Args:
        images: ``(n, c, h, w)``, in [0, 1], of 1 or 3 channels.
        magnitude: From 0 to 30, ``(n,)``.
        operations: Names from ``OPERATIONS``, all equally likely.
        count: How many for each image.

    Raises:
        DeclarationError: An operation's name is unknown.
        ShapeError: The images are not four-dimensional, or there is no magnitude for each.

    Source: Cubuk et al., "RandAugment", 2020; ``torchvision.transforms.v2.RandAugment``.
    """
    check_images(images, "RandAugment")
    magnitude = of_examples(magnitude, images, "RandAugment")
    check_operations(operations)
    for _ in range(count):
        drawn = torch.randint(len(operations), magnitude.shape, device=images.device)
        sign = torch.where(torch.rand_like(magnitude) < 0.5, -1, 1)
        chosen = {name: (drawn == i) & (magnitude > 0) for i, name in enumerate(operations)}
        images = _warped(images, magnitude * sign, chosen)
        images = _filtered(images, magnitude, sign, chosen)
    return images


def check_operations(operations: Sequence[str]) -> None:
    """Refuse names that are not in ``OPERATIONS``.

    Raises:
        DeclarationError: An operation's name is unknown, or there is none.
    """
    if not operations:
        raise DeclarationError("RandAugment must have operations to draw from, but got none.")
    for name in operations:
        if name not in OPERATIONS:
            raise DeclarationError(
                f"RandAugment's operations must be among {', '.join(OPERATIONS)}, but got "
                f"{name!r}. Nearest: {nearest(name, OPERATIONS)}."
            )


def _warped(images: Tensor, magnitude: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """Move the pixels of the rows that chose a warp, all in one interpolation."""
    warps = [name for name in chosen if name in WARPS]
    if not warps:
        return images
    matrices = torch.eye(2, 3, dtype=magnitude.dtype, device=images.device)
    matrices = matrices.expand(len(images), 2, 3)
    for name in warps:
        value = magnitude * (WARPS[name].end / LARGEST_MAGNITUDE)
        own = WARPS[name].matrices(value, *images.shape[-2:])
        matrices = torch.where(beside(chosen[name], matrices), own, matrices)
    return affine(images, matrices)


def _filtered(images: Tensor, magnitude: Tensor, sign: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """Change the values of the rows that chose a filter; a row has chosen one at most."""
    for name in (name for name in chosen if name in FILTERS):
        apply, start, end, signed = FILTERS[name]
        value = start + magnitude * ((end - start) / LARGEST_MAGNITUDE)
        result = apply(images, value * sign if signed else value)
        images = torch.where(beside(chosen[name], images), result, images)
    return images
