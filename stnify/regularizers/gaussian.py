"""Gaussian noise with a tunable standard deviation."""

from typing import final

import torch
from torch import Tensor

from stnify.regularizers.base import TensorNoise


@final
class TunedGaussianNoise(TensorNoise):
    """Adds ``s z`` with ``z`` standard normal for every element; ``s`` is a hyperparameter."""

    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Move every element of ``inputs``."""
        return inputs + strength.to(inputs.dtype) * _normal(inputs)


@final
class TunedScalingNoise(TensorNoise):
    """Multiplies by ``1 + s z`` with ``z`` standard normal for every element.

    Source: Gaussian dropout of Srivastava et al. 2014, section 10, with ``s`` instead of
        ``sqrt(rate / (1 - rate))``.
    """

    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Scale every element of ``inputs``."""
        return inputs * (1 + strength.to(inputs.dtype) * _normal(inputs))


def _normal(inputs: Tensor) -> Tensor:
    """Draw for every element of ``inputs``, with no tangent."""
    return torch.randn(inputs.shape, dtype=inputs.dtype, device=inputs.device)
