"""Parts: PyTorch's composite operators, written out in terms of a linear map.

A function on weights takes ``linear(inputs, weight, bias)`` first, in place of ``F.linear``, and
computes otherwise what the operator of its name does. So they can be given responding weights, and
a forward-mode derivative, neither of which the fused kernels have.
"""

from stnify.composites.attention import multi_head_attention
from stnify.composites.bag import embedding_bag
from stnify.composites.meeting import DESCRIPTIONS, MEETINGS, TENSOR_ATTRIBUTES
from stnify.composites.packing import pack, pad
from stnify.composites.recurrent import RECURRENT_CELLS, RECURRENT_NETWORKS

__all__ = [
    "DESCRIPTIONS",
    "MEETINGS",
    "RECURRENT_CELLS",
    "RECURRENT_NETWORKS",
    "TENSOR_ATTRIBUTES",
    "embedding_bag",
    "multi_head_attention",
    "pack",
    "pad",
]
