"""Gaussian noise on the inputs, added or multiplied, for inputs ``(n, ...)`` of any shape."""

import torch
from torch import Tensor

from stnify.augment.examples import beside, of_examples


def gaussian_noise(inputs: Tensor, scale: Tensor) -> Tensor:
    """Return ``inputs + scale * z`` with ``z`` standard normal for each element.

    Args:
        inputs: ``(n, ...)``, floating.
        scale: Standard deviation in the inputs' units, ``(n,)``.

    Raises:
        ShapeError: There is not one scale for each example.
    """
    scale = of_examples(scale, inputs, "Gaussian noise").to(inputs.dtype)
    return inputs + beside(scale, inputs) * torch.randn_like(inputs)


def scaling_noise(inputs: Tensor, scale: Tensor) -> Tensor:
    """Return ``inputs * (1 + scale * z)`` with ``z`` standard normal for each element.

    Args:
        inputs: ``(n, ...)``, floating.
        scale: Standard deviation of the factors, ``(n,)``.

    Raises:
        ShapeError: There is not one scale for each example.
    """
    scale = of_examples(scale, inputs, "scaling noise").to(inputs.dtype)
    return inputs * (1 + beside(scale, inputs) * torch.randn_like(inputs))
