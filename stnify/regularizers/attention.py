"""Dropout of attention weights with a tunable rate."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from stnify.regularizers.base import Noise
from stnify.regularizers.masks import dropped, wide_type


@final
class TunedAttentionDropout(Noise):
    """``F.scaled_dot_product_attention`` whose ``dropout_p`` is a hyperparameter.

    Off in eval mode, when it is that very function. Otherwise the weights are written out, because
    the fused kernels know one rate for all, and no forward-mode derivative; they take
    ``queries x keys`` numbers for each head.

    Source: [Vaswani et al. 2017] section 3.2.1; same values at rate zero, but for rounding.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        constrained: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend, dropping attention weights in training.

        Args:
            query: ``(rows, ..., queries, width)``.
            key: ``(rows, ..., keys, width)``.
            value: ``(rows, ..., keys, width of the result)``.
            constrained: ``(h,)`` for one rate, ``(batch, h)`` for one for each example,
                constrained units; None drops nothing.
            attn_mask: As the function takes it: true where a query may look, or what is added.
            is_causal: No query looks at later keys.
            scale: What scores are multiplied by; None for ``width ** -0.5``.
            enable_gqa: Several heads of queries share one head of keys.

        Raises:
            ShapeError: The query is not one tensor of real numbers.
        """
        self.require_real(query)
        if not self.training or constrained is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (side.repeat_interleave(repeats, dim=-3) for side in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        weights = _weights(scores, attn_mask, is_causal)
        rate = self.strength(weights, constrained)
        rate = rate if weights.ndim > 2 else rate.mean()  # a matrix has no dimension of examples
        return dropped(weights, rate, tuple(weights.shape)).to(value.dtype) @ value


def _weights(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return the softmax of masked scores in at least single precision, as the function does."""
    scores = scores.to(wide_type(scores))
    seen = None
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + mask
    elif mask is not None:
        seen = mask if seen is None else seen & mask
    if seen is not None:
        scores = torch.where(seen, scores, float("-inf"))
    return scores.softmax(-1) if mask is None else _safe_softmax(scores)


def _safe_softmax(scores: Tensor) -> Tensor:
    """Return the softmax, zero where a query may look nowhere."""
    nowhere = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(nowhere, 0).softmax(-1).masked_fill(nowhere, 0)
