"""Alpha dropout with a tunable rate."""

from typing import ClassVar, final

import torch
from torch import Tensor

from stnify.regularizers.base import TensorNoise, row_dimension
from stnify.regularizers.masks import Granularity, drawn, mask_shape, wide_type

SATURATION = 1.7580993408473766
"""Minus the limit of SELU at minus infinity: its scale times its alpha."""


@final
class TunedAlphaDropout(TensorNoise):
    r"""Sets elements or channels to SELU's lower limit, then restores mean zero and variance one.

    With :math:`\alpha'` that limit and :math:`q = 1 - p` the outcome is scaled by
    :math:`a = (q + \alpha'^2 q p)^{-1/2}` and shifted by :math:`-a p \alpha'`.

    Args:
        column: Which hyperparameter is the rate ``p``, less than one.
        granularity: ``"element"`` or ``"channel"``, as in ``TunedDropout``, whose other choices
            hold as well.
        channel_dims: As in ``TunedDropout``.
        place: What it replaces or follows, for errors.
        factor: The rate is this many times the hyperparameter.

    Source: Klambauer et al. 2017, section "New dropout technique"; same as ``F.alpha_dropout`` and
        ``F.feature_alpha_dropout``.
    """

    settings: ClassVar[tuple[str, ...]] = ("column", "granularity", "channel_dims", "factor")

    def __init__(
        self,
        column: int,
        granularity: Granularity,
        channel_dims: int = 0,
        place: str = "",
        factor: float = 1.0,
    ) -> None:
        super().__init__(column, place, factor)
        self.granularity = granularity
        self.channel_dims = channel_dims

    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Drop entries of ``inputs``."""
        row = row_dimension(inputs, self.layout)
        shape = mask_shape(inputs, self.granularity, self.channel_dims, row, self.place)
        rate = strength.to(wide_type(inputs))
        scale = torch.rsqrt((1 - rate) * (1 + SATURATION**2 * rate))
        shift = scale * rate * SATURATION
        left = torch.where(drawn(1 - rate, shape, inputs), inputs, -SATURATION)
        return left * scale.to(inputs.dtype) + shift.to(inputs.dtype)
