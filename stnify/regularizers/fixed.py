"""Noise the model had and nobody tunes, as modules that follow ``train()`` and ``eval()``.

A traced graph keeps the ``training`` flag it was traced with; a module looks at its own.
"""

from collections.abc import Callable
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class FixedDropout(nn.Module):
    """Calls a dropout function of ``torch.nn.functional`` with this module's training flag.

    Args:
        function: ``F.dropout`` or a relative.
        arguments: Its keyword arguments other than ``input`` and ``training``.
    """

    def __init__(self, function: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.arguments = arguments

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop entries in training, do nothing in eval mode."""
        return self.function(inputs, training=self.training, **self.arguments)


@final
class FixedScaledDotProductAttention(nn.Module):
    """Scaled dot-product attention whose dropout is off in eval mode.

    Args:
        dropout_p: Rate while training.
    """

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """Attend; other arguments are those of the function, less ``dropout_p``."""
        arguments["dropout_p"] = self.dropout_p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, **arguments)
