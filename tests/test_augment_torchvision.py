"""Augmentations against torchvision, image by image, at the same factors."""

import math
from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment

from stnify.augment import (
    OPERATIONS,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    affine,
    horizontal_flip,
    inverse_matrices,
    rand_augment,
)

ROUNDING = {"rtol": 0, "atol": 1e-12}
"""Float64, values up to 1; torchvision multiplies and adds in another order."""

SINGLE = {"rtol": 0, "atol": 2e-6}
"""Float32, values up to 1; the hue's six sectors multiply the rounding."""

BILINEAR = InterpolationMode.BILINEAR

ADJUSTMENTS: dict[str, tuple[Callable, Callable, tuple[float, float]]] = {
    "brightness": (adjust_brightness, F.adjust_brightness, (0, 3)),
    "contrast": (adjust_contrast, F.adjust_contrast, (0, 3)),
    "saturation": (adjust_saturation, F.adjust_saturation, (0, 3)),
    "hue": (adjust_hue, F.adjust_hue, (-0.5, 0.5)),
}

shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**20)


def one_by_one(function: Callable[..., Tensor], images: Tensor, *values: Tensor) -> Tensor:
    """The slow way: each image with its own numbers."""
    rows = zip(images, *(value.tolist() for value in values), strict=True)
    return torch.stack([function(image, *row) for image, *row in rows])


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images on few levels, so that channels are often equal, as in real ones."""
    torch.manual_seed(seed)
    levels = torch.randint(0, 6, shape) / 5
    return torch.where(torch.rand(shape) < 0.5, levels, torch.rand(shape)).to(dtype)


# Colour -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADJUSTMENTS)
@given(shape=shapes, seed=seeds)
def test_adjustments_are_torchvisions(name, shape, seed):
    ours, theirs, (low, high) = ADJUSTMENTS[name]
    images = draw(shape, seed)
    factor = low + (high - low) * torch.rand(shape[0], dtype=torch.float64)
    expected = one_by_one(theirs, images, factor)
    precise = SINGLE if name == "hue" else ROUNDING  # torchvision turns hues in float32
    torch.testing.assert_close(ours(images, factor), expected, **precise)
    single = ours(images.float(), factor.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, **SINGLE)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_another_factor_is_another_image(name):
    ours, theirs, _ = ADJUSTMENTS[name]
    images, factor = draw((2, 3, 8, 8), 0), torch.tensor([0.3, 0.4], dtype=torch.float64)
    others = one_by_one(theirs, images, factor.flip(0))
    for found, other in zip(ours(images, factor), others, strict=True):
        assert not torch.allclose(found, other, **ROUNDING)


# Geometry -----------------------------------------------------------------------------------------


def their_affine(
    image: Tensor, angle: float, across: float, down: float, factor: float, shear: float
) -> Tensor:
    translate = [round(across), round(down)]
    return F.affine(image, angle, translate, factor, [shear, 0.0], interpolation=BILINEAR)


def placements(count: int) -> tuple[Tensor, ...]:
    """Angle, shifts in pixels, factor and shear of each image."""
    scales = torch.tensor([[180.0], [4.0], [3.0], [0.6], [40.0]])
    draws = scales * (2 * torch.rand(5, count) - 1)
    draws[1:3].round_()
    draws[3] += 1
    return tuple(draws.double())


@given(shape=shapes, seed=seeds)
def test_affine_is_torchvisions(shape, seed):
    images = draw(shape, seed)
    placed = placements(shape[0])
    expected = one_by_one(their_affine, images, *placed)
    # Their coordinates come from a float32 linspace, exact for small images; the rest is float64.
    found = affine(images, inverse_matrices(*placed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    single = affine(images.float(), inverse_matrices(*(value.float() for value in placed)))
    # Coordinates up to 30 pixels off, in float32, times slopes of 1 for each pixel.
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=5e-5)


def test_affine_of_a_large_image():
    images = draw((3, 3, 190, 224), 0, torch.float32)
    placed = placements(3)
    expected = one_by_one(their_affine, images, *placed)
    found = affine(images, inverse_matrices(*(value.float() for value in placed)))
    # Coordinates of hundreds of pixels, in float32: 1e-4 of a pixel, times slopes up to 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("moved", range(5))
def test_every_part_of_an_affine_map_counts(moved):
    images = draw((1, 3, 9, 9), 0)
    placed = [torch.tensor([value]).double() for value in (20.0, 1.0, 2.0, 1.3, 15.0)]
    expected = one_by_one(their_affine, images, *placed)
    torch.testing.assert_close(affine(images, inverse_matrices(*placed)), expected, **ROUNDING)
    placed[moved] += 0.5
    assert not torch.allclose(affine(images, inverse_matrices(*placed)), expected, atol=1e-3)


def test_the_flip_is_torchvisions():
    images = draw((4, 3, 5, 8), 0)
    assert torch.equal(horizontal_flip(images, torch.ones(4)), F.horizontal_flip(images))


# RandAugment --------------------------------------------------------------------------------------


def shear(image: Tensor, across: float, down: float) -> Tensor:
    angles = [math.degrees(math.atan(across)), math.degrees(math.atan(down))]
    return F.affine(image, 0.0, [0, 0], 1.0, angles, interpolation=BILINEAR, center=[0, 0])


def translate(image: Tensor, across: float, down: float) -> Tensor:
    shift = [int(across), int(down)]
    return F.affine(image, 0.0, shift, 1.0, [0.0, 0.0], interpolation=BILINEAR)


THEIRS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda image, value: shear(image, value, 0),
    "ShearY": lambda image, value: shear(image, 0, value),
    "TranslateX": lambda image, value: translate(image, value, 0),
    "TranslateY": lambda image, value: translate(image, 0, value),
    "Rotate": lambda image, value: F.rotate(image, value, interpolation=BILINEAR),
    "Identity": lambda image, value: image,
    "Brightness": lambda image, value: F.adjust_brightness(image, 1 + value),
    "Color": lambda image, value: F.adjust_saturation(image, 1 + value),
    "Contrast": lambda image, value: F.adjust_contrast(image, 1 + value),
    "Sharpness": lambda image, value: F.adjust_sharpness(image, 1 + value),
    "Posterize": lambda image, value: F.posterize(image, int(value)),
    "Solarize": F.solarize,
    "AutoContrast": lambda image, value: F.autocontrast(image),
}
SPACE = RandAugment._AUGMENTATION_SPACE
"""Name to torchvision's values at 31 magnitudes, and whether their sign is drawn."""


def test_all_operations_but_one_are_there():
    assert set(OPERATIONS) == set(THEIRS) == set(SPACE) - {"Equalize"}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("magnitude", [4, 9, 17, 30])  # below 4, posterize has all 8 bits
def test_operations_and_ranges_are_torchvisions(name, magnitude):
    images = draw((8, 3, 6, 13), magnitude)
    values, signed = SPACE[name]
    values = values(31, 6, 13)
    value = 0.0 if values is None else float(values[magnitude])
    magnitudes = torch.full((8,), float(magnitude), dtype=torch.float64)
    torch.manual_seed(0)
    found = rand_augment(images, magnitudes, [name], count=1)
    # Their table of values is float32.
    close = {"rtol": 0, "atol": 1e-5}
    signs = set()
    for image, result in zip(images, found, strict=True):
        agreeing = [
            sign
            for sign in ((1, -1) if signed else (1,))
            if torch.allclose(result, THEIRS[name](image, sign * value), **close)
        ]
        assert agreeing
        signs.update(agreeing)
    assert signs == ({1, -1} if signed else {1})


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "Identity"])
def test_another_magnitude_is_another_image(name):
    images = draw((1, 3, 9, 13), 0) * 0.8
    magnitudes = torch.full((1,), 30.0, dtype=torch.float64)
    values, _ = SPACE[name]
    values = values(31, 9, 13)
    torch.manual_seed(0)
    found = rand_augment(images, magnitudes, [name], count=1)[0]
    assert not torch.allclose(found, images[0], atol=1e-3)
    if values is not None:
        weaker = [
            THEIRS[name](images[0], sign * float(values[15]))
            for sign in (1, -1)[: 1 + SPACE[name][1]]
        ]
        assert not any(torch.allclose(found, image, atol=1e-3) for image in weaker)


@pytest.mark.parametrize("shape", [(2, 1, 6, 7), (2, 3, 2, 9), (2, 3, 1, 1)])
@pytest.mark.parametrize("name", THEIRS)
def test_operations_on_gray_and_narrow_images(name, shape):
    images = draw(shape, 0)
    values, _ = SPACE[name]
    values = values(31, *shape[2:])
    value = 0.0 if values is None else float(values[30])
    torch.manual_seed(0)
    found = rand_augment(images, torch.full((2,), 30.0).double(), [name], count=1)
    for image, result in zip(images, found, strict=True):
        either = [THEIRS[name](image, sign * value) for sign in (1, -1)[: 1 + SPACE[name][1]]]
        assert any(torch.allclose(result, expected, rtol=0, atol=1e-5) for expected in either)
