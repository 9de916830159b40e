"""DropBlock with a tunable rate."""

from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from stnify.errors import ShapeError
from stnify.regularizers.base import TensorNoise
from stnify.regularizers.masks import drawn, rescaled, wide_type


@final
class TunedDropBlock(TensorNoise):
    """Zeroes square blocks of feature maps, each map its own, and scales what is left.

    About ``rate`` of an image is dropped, less where blocks overlap. The rest of a row is scaled by
    the share of that row that was kept, so that rows stay independent; torchvision and timm take
    the share of the batch.

    Args:
        column: Which hyperparameter is the rate.
        block_size: Side of a block in pixels, at most the image's own height and width.
        place: What it replaces or follows, for errors.
        factor: The rate is this many times the hyperparameter.

    Source: Ghiasi et al. 2018, Algorithm 1, a mask for each channel; as
        ``torchvision.ops.drop_block2d``. Blocks of even size lie within the image as well.
    """

    settings: ClassVar[tuple[str, ...]] = ("column", "block_size", "factor")

    def __init__(self, column: int, block_size: int, place: str = "", factor: float = 1.0) -> None:
        super().__init__(column, place, factor)
        self.block_size = block_size

    def act(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Drop blocks of ``(rows, channels, height, width)``; ShapeError for other dimensions."""
        if inputs.ndim != 4:
            raise ShapeError(
                f"DropBlock must act on images (n, c, height, width), but at {self.place!r} the "
                f"shape is {tuple(inputs.shape)}. Choose another place by `at`, `after` or "
                "`exclude`."
            )
        kept = self._kept(inputs, strength)
        count = kept.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        return rescaled(inputs, kept, count.to(wide_type(inputs)) / kept[0].numel())

    def _kept(self, inputs: Tensor, rate: Tensor) -> Tensor:
        """Draw the corners of blocks wherever a block fits; return what no block covers."""
        rows, channels, height, width = inputs.shape
        tall, wide = min(self.block_size, height), min(self.block_size, width)
        places = (height - tall + 1, width - wide + 1)
        seed_rate = rate * (height * width / (tall * wide * places[0] * places[1]))
        corners = drawn(seed_rate, (rows, channels, *places), inputs).to(inputs.dtype)
        around = F.pad(corners, (wide - 1, wide - 1, tall - 1, tall - 1))
        return F.max_pool2d(around, (tall, wide), stride=1) == 0
