"""Dropout with a tunable rate."""

from typing import Literal, final

import torch
from torch import Tensor, nn

from stnify.errors import ShapeError
from stnify.rows import RowLayout, expand_rows, placed

Granularity = Literal["element", "channel"]


@final
class TunedDropout(nn.Module):
    """Zeroes elements or whole channels with a probability that is a hyperparameter.

    Off in eval mode. In a linearised pass primal and tangent share the mask, because both are
    multiplied by it in one operation.

    Args:
        column: Which hyperparameter is the rate.
        granularity: ``"element"``, or ``"channel"`` for one draw for each channel.
        channel_dims: Trailing dimensions a channel spans, if the granularity is ``"channel"``.
        place: What it replaces or follows, for errors.

    Attributes:
        layout: Which rows of the input belong to which example.
    """

    def __init__(
        self, column: int, granularity: Granularity, channel_dims: int = 0, place: str = ""
    ) -> None:
        super().__init__()
        self.column = column
        self.granularity = granularity
        self.channel_dims = channel_dims
        self.place = place
        self.layout = RowLayout.BATCH

    def extra_repr(self) -> str:
        """Name the column and granularity."""
        return f"column={self.column}, granularity={self.granularity!r}"

    def forward(self, inputs: Tensor, constrained: Tensor | None) -> Tensor:
        """Drop entries of ``inputs`` and scale the rest by ``1 / (1 - rate)``.

        Args:
            inputs: ``(rows, ...)``.
            constrained: ``(h,)`` for one rate, ``(batch, h)`` for one for each example, constrained
                units; None leaves the inputs alone.

        Raises:
            ShapeError: The inputs are not one tensor of real numbers.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ShapeError(
                f"dropout must act on one tensor of real numbers, but at {self.place!r} there is "
                f"{found}. Choose another place by `at`, `after` or `exclude`."
            )
        if not self.training or constrained is None:
            return inputs
        rate = constrained[..., self.column]
        if rate.ndim:
            row = min(self.layout.dim, inputs.ndim - 1)
            rate = expand_rows(rate[:, None], inputs.shape[row], self.layout)
            rate = placed(rate, inputs.ndim, row, row - 1) if inputs.ndim > 1 else rate[:, 0]
        keep = (1 - rate).to(inputs.dtype)
        mask = torch.rand(self._mask_shape(inputs), device=inputs.device) < keep
        return inputs * (mask / keep)

    def _mask_shape(self, inputs: Tensor) -> tuple[int, ...]:
        if self.granularity == "element":
            return tuple(inputs.shape)
        channels = inputs.ndim - self.channel_dims
        return (*inputs.shape[:channels], *([1] * self.channel_dims))
