"""Translation, scaling, rotation and shear in one warp, and the horizontal flip.

Sizes below: ``n`` images ``(n, c, h, w)``; strengths ``(n,)``. Draws mean what torchvision's
``RandomAffine`` means by them; pixels are interpolated bilinearly, and 0 outside the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stnify.augment.examples import beside, check_images, of_examples, uniform

SMALLEST_SCALE = 0.01
"""An image is never drawn smaller than this, whatever the strength."""


def warp(
    images: Tensor,
    translate: Tensor | None = None,
    scale: Tensor | None = None,
    rotate: Tensor | None = None,
    shear: Tensor | None = None,
) -> Tensor:
    """Move, scale, turn and shear each image by draws of its own, with one interpolation.

    A row whose draws change nothing is returned as it is, to the last bit.

    Args:
        images: ``(n, c, h, w)``, floating.
        translate: Largest shift as a fraction of width and of height, ``(n,)``. Shifts are whole
            pixels as in torchvision, so that a shift alone does not blur.
        scale: Factors come from ``[1 - scale, 1 + scale]``, ``(n,)``; none is below
            ``SMALLEST_SCALE``.
        rotate: Largest angle in degrees, ``(n,)``.
        shear: Largest angle in degrees along the width, ``(n,)``.

    Raises:
        ShapeError: The images are not four-dimensional, or a strength has no value for each.
    """
    check_images(images, "warp")
    height, width = images.shape[-2:]
    rows = {"translate": translate, "scale": scale, "rotate": rotate, "shear": shear}
    declared = {k: of_examples(v, images, k) for k, v in rows.items() if v is not None}
    if not declared:
        return images
    nothing = torch.zeros_like(next(iter(declared.values())))
    of_translate, of_scale, of_rotate, of_shear = (declared.get(name, nothing) for name in rows)
    across = uniform(-of_translate * width, of_translate * width).round()
    down = uniform(-of_translate * height, of_translate * height).round()
    factor = uniform((1 - of_scale).clamp(min=SMALLEST_SCALE), 1 + of_scale)
    angle, slant = uniform(-of_rotate, of_rotate), uniform(-of_shear, of_shear)
    return affine(images, inverse_matrices(angle, across, down, factor, slant))


def horizontal_flip(images: Tensor, probability: Tensor) -> Tensor:
    """Mirror each image left to right with its probability, ``(n,)``."""
    check_images(images, "horizontal flip")
    probability = of_examples(probability, images, "horizontal flip")
    flipped = torch.rand_like(probability) < probability
    return torch.where(beside(flipped, images), images.flip(-1), images)


def inverse_matrices(
    angle: Tensor, across: Tensor, down: Tensor, factor: Tensor, shear: Tensor
) -> Tensor:
    """Return the maps from an output's coordinates to the input's, ``(n, 2, 3)``.

    Coordinates are in pixels from the image's centre. The image is sheared, turned and scaled
    about its centre and then shifted, as by ``torchvision.transforms.functional.affine``.

    Args:
        angle: Clockwise, degrees, ``(n,)``.
        across: Shift to the right, pixels, ``(n,)``.
        down: Shift to the bottom, pixels, ``(n,)``.
        factor: Above 1 enlarges, ``(n,)``.
        shear: Along the width, degrees, ``(n,)``.
    """
    turn, tangent = angle.deg2rad(), shear.deg2rad().tan()
    cosine, sine = turn.cos(), turn.sin()
    # The inverse of the rotation times the shear [[1, -tangent], [0, 1]], both of determinant 1.
    across_x, across_y = cosine - sine * tangent, sine + cosine * tangent
    down_x, down_y = -sine, cosine
    entries = (
        across_x / factor,
        across_y / factor,
        -(across_x * across + across_y * down) / factor,
        down_x / factor,
        down_y / factor,
        -(down_x * across + down_y * down) / factor,
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (2, 3))


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample each image where its matrix points to, bilinearly, with 0 outside.

    A row whose matrix is exactly the identity is returned as it is, to the last bit.

    Args:
        images: ``(n, c, h, w)``, floating.
        matrices: As of `inverse_matrices`, ``(n, 2, 3)``.
    """
    height, width = images.shape[-2:]
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    # F.affine_grid's coordinates run from -1 to 1 along both sides.
    sides = matrices.new_tensor([width, height, 2])
    grid = F.affine_grid(
        (matrices * sides / sides[:2, None]).to(precise.dtype),
        list(images.shape),
        align_corners=False,
    )
    sampled = F.grid_sample(precise, grid, mode="bilinear", align_corners=False)
    same = (matrices == torch.eye(2, 3, device=matrices.device)).all(-1).all(-1)
    return torch.where(beside(same, images), images, sampled.to(images.dtype))
