"""Parts: noise whose strength is a tensor, one value for the batch or one for each example."""

from stnify.regularizers.base import Noise
from stnify.regularizers.dropout import TunedDropout
from stnify.regularizers.fixed import FixedDropout, FixedScaledDotProductAttention
from stnify.regularizers.masks import Granularity

__all__ = [
    "FixedDropout",
    "FixedScaledDotProductAttention",
    "Granularity",
    "Noise",
    "TunedDropout",
]
