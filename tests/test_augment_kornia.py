"""Augmentations against kornia, which takes one number for each image too."""

import math

import kornia
import pytest
import torch
from torch import Tensor

from stnify.augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    affine,
    inverse_matrices,
)

COLORS = {
    "brightness": (adjust_brightness, kornia.enhance.adjust_brightness_accumulative),
    "contrast": (adjust_contrast, kornia.enhance.adjust_contrast_with_mean_subtraction),
    "saturation": (adjust_saturation, kornia.enhance.adjust_saturation_with_gray_subtraction),
    "hue": (
        lambda images, factor: adjust_hue(images, factor - 1),
        lambda images, factor: kornia.enhance.adjust_hue(images, (factor - 1) * 2 * math.pi),
    ),
}


@pytest.fixture(name="images")
def _images() -> Tensor:
    return torch.rand(4, 3, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COLORS)
def test_colour(name, images):
    ours, theirs = COLORS[name]
    factor = torch.tensor([0.6, 0.9, 1.2, 1.4], dtype=torch.float64)
    # Their weight of red in gray is 0.299, torchvision's 0.2989; their hue divides by 1e-8 more.
    close = {"rtol": 0, "atol": 2e-4}
    torch.testing.assert_close(ours(images, factor), theirs(images, factor), **close)
    assert not torch.allclose(ours(images, factor.flip(0)), theirs(images, factor), **close)


def test_warp(images):
    height, width = images.shape[-2:]
    draws = torch.tensor(
        [[10.0, 1, 0, 1.2, 5], [-40, 0, 2, 0.8, 0], [0, -3, 1, 1, -20], [170, 1, 1, 1.5, 30]]
    ).double()
    inverse = inverse_matrices(*draws.T)
    centre = torch.eye(3).double()
    centre[:2, 2] = torch.tensor([width - 1, height - 1]) / 2
    last = torch.tensor([[[0.0, 0, 1]]]).double().expand(4, 1, 3)
    # From pixels of the input to those of the output, counted from the upper left one.
    forward = centre @ torch.cat([inverse, last], 1).inverse() @ centre.inverse()
    expected = kornia.geometry.warp_affine(
        images, forward[:, :2], (height, width), align_corners=True
    )
    close = {"rtol": 0, "atol": 1e-6}  # float64, through three inverses with an epsilon of theirs
    # align_corners changes where zeros begin: half a pixel outside, so only the inside is the same.
    inside = affine(torch.ones_like(images), inverse) > 1 - 1e-9
    assert inside.double().mean() > 0.4
    found = affine(images, inverse)
    torch.testing.assert_close(found[inside], expected[inside], **close)
    assert not torch.allclose(found[inside], images[inside], atol=1e-2)
