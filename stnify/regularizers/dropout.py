"""Dropout with a tunable rate."""

from typing import ClassVar, final

from torch import Tensor

from stnify.regularizers.base import TensorNoise, row_dimension
from stnify.regularizers.masks import Granularity, dropped, mask_shape


@final
class TunedDropout(TensorNoise):
    """Zeroes elements, channels or rows with a probability that is a hyperparameter.

    The others are scaled by ``1 / (1 - rate)``.

    Args:
        column: Which hyperparameter is the rate.
        granularity: ``"element"``; ``"channel"`` for one draw for each channel; ``"row"`` for one
            draw for each row (drop path, stochastic depth); ``"time"`` for draws shared by all
            time steps (locked dropout); ``"batch"`` for one draw for all, at the mean rate.
        channel_dims: Trailing dimensions a channel spans, if the granularity is ``"channel"``; 0
            for all after the second, as PyTorch's feature dropout has it. The index of the time
            dimension, if the granularity is ``"time"``. None is 1 for time and 0 for channels.
        place: What it replaces or follows, for errors.
        factor: The rate is this many times the hyperparameter.

    Source: the masks are those of ``F.dropout`` and its relatives, ``timm.layers.DropPath``,
        ``torchvision.ops.stochastic_depth`` and Gal & Ghahramani 2016 (time).
    """

    settings: ClassVar[tuple[str, ...]] = ("column", "granularity", "channel_dims", "factor")

    def __init__(
        self,
        column: int,
        granularity: Granularity,
        channel_dims: int | None = None,
        place: str = "",
        factor: float = 1.0,
    ) -> None:
        super().__init__(column, place, factor)
        self.granularity = granularity
        unsaid = int(granularity == "time")
        self.channel_dims = unsaid if channel_dims is None else channel_dims

    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Drop entries of ``inputs``."""
        row = row_dimension(inputs, self.layout)
        shape = mask_shape(inputs, self.granularity, self.channel_dims, row, self.place)
        rate = strength.mean() if self.granularity == "batch" else strength
        return dropped(inputs, rate, shape)
