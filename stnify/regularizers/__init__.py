"""Parts: noise whose rate is a tensor, one value for the batch or one for each example."""

from stnify.regularizers.dropout import TunedDropout
from stnify.regularizers.fixed import FixedDropout, FixedScaledDotProductAttention

__all__ = ["FixedDropout", "FixedScaledDotProductAttention", "TunedDropout"]
