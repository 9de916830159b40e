"""Penalties on weights."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from stnify.declare.base import Decay


@final
@dataclass(frozen=True)
class WeightDecay(Decay):
    """Tune the coefficient of half the squared norm of the weights (L2 penalty).

    It covers trainable weights of two or more dimensions, except those the model, or a module
    inside it, lists in ``no_weight_decay()``. It is the gradient of the penalty that enters the
    optimizer, as in ``torch.optim.SGD``; the optimizer steps these weights without its own
    ``weight_decay``, also after a schedule or a loaded state has set one, and all others with it.
    With ``AdamW`` tuned decay is not decoupled: it goes through Adam's scaling, as in
    ``Adam(weight_decay=...)``, so that a coefficient taken from ``AdamW`` means something else.
    Source: [DeltaSTN] Eqs. G.1, H.1.
    """

    name: str = "weight_decay"
    range: tuple[float, float] = (0.0, math.inf)
    default_init: ClassVar[float] = 5e-4


@final
@dataclass(frozen=True)
class L1Penalty(Decay):
    """Tune the coefficient of the sum of the weights' absolute values.

    It covers what ``WeightDecay`` covers and leaves the optimizer's own decay alone. In the
    response step it is taken to first order in the response, like the predictions; ``method="stn"``
    does not have it.
    """

    name: str = "l1_penalty"
    range: tuple[float, float] = (0.0, math.inf)
    default_init: ClassVar[float] = 1e-5
