"""Parts: noise whose strength is a tensor, one value for the batch or one for each example."""

from stnify.regularizers.alpha import TunedAlphaDropout
from stnify.regularizers.attention import TunedAttentionDropout
from stnify.regularizers.base import Noise
from stnify.regularizers.block import TunedDropBlock
from stnify.regularizers.connect import TunedDropConnect, weight_factors, weights_scaled
from stnify.regularizers.dropout import TunedDropout
from stnify.regularizers.embedding import TunedEmbeddingDropout
from stnify.regularizers.fixed import FixedDropout, FixedScaledDotProductAttention
from stnify.regularizers.gaussian import TunedGaussianNoise, TunedScalingNoise

__all__ = [
    "FixedDropout",
    "FixedScaledDotProductAttention",
    "Noise",
    "TunedAlphaDropout",
    "TunedAttentionDropout",
    "TunedDropBlock",
    "TunedDropConnect",
    "TunedDropout",
    "TunedEmbeddingDropout",
    "TunedGaussianNoise",
    "TunedScalingNoise",
    "weight_factors",
    "weights_scaled",
]
