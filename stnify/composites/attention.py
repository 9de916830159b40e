"""Multi-head attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Drop = Callable[[Tensor], Tensor]


def multi_head_attention(
    linear: Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what ``F.multi_head_attention_forward`` returns for the same arguments.

    ``drop``, if it is given, takes the place of the dropout of attention weights, which it receives
    as ``(batch, heads, length, keys)``.

    Shapes: query ``(length, batch, width)`` or ``(length, width)``; key and value likewise.
    """
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = separate if use_separate_proj_weight else (in_proj_weight,)
    projected = _projected(linear, (query, key, value), weights, in_proj_bias)
    single = query.ndim == 2
    if single:
        projected = [side.unsqueeze(1) for side in projected]
    mask = _mask(attn_mask, key_padding_mask, num_heads, projected[0].dtype)
    if bias_k is not None and bias_v is not None:
        projected[1:] = [_appended(projected[1], bias_k), _appended(projected[2], bias_v)]
    length, batch, width = projected[0].shape
    heads = [side.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for side in projected]
    for i, static in ((1, static_k), (2, static_v)):
        heads[i] = heads[i] if static is None else static.unflatten(0, (batch, num_heads))
    if add_zero_attn:
        heads[1:] = [F.pad(side, (0, 0, 0, 1)) for side in heads[1:]]
    if mask is not None:
        mask = F.pad(mask, (0, heads[1].shape[2] - mask.shape[-1]))
    dropout = dropout_p if training else 0.0
    attention = None
    if drop is None and not need_weights:
        query, key, value = heads
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    else:
        ordinary = partial(F.dropout, p=dropout, training=dropout > 0)
        attended, attention = _attend(heads, mask, drop or ordinary)
    outputs = attended.permute(2, 0, 1, 3).reshape(length, batch, width)
    outputs = linear(outputs.squeeze(1) if single else outputs, out_proj_weight, out_proj_bias)
    if attention is not None and need_weights:
        attention = attention.mean(1) if average_attn_weights else attention
        attention = attention.squeeze(0) if single else attention
    return outputs, attention if need_weights else None


def _projected(
    linear: Linear,
    sides: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> list[Tensor]:
    """Return query, key and value, projected by one packed weight or by three."""
    if len(weights) == 3:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [linear(s, _given(w), b) for s, w, b in zip(sides, weights, biases, strict=True)]
    # One call for each distinct input: a slice of a weight would be another weight.
    done: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    projected = []
    for i, side in enumerate(sides):
        known = next((parts for other, parts in done if other is side), None)
        if known is None:
            known = linear(side, _given(weights[0]), bias).chunk(3, -1)
            done.append((side, known))
        projected.append(known[i])
    return projected


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None, "attention has a packed projection or three separate ones"
    return weight


def _appended(side: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([side, bias.expand(1, side.shape[1], -1)])


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Return what is added to the scores, ``(batch or 1, heads or 1, length or 1, keys)``."""
    found = None
    if attn_mask is not None:
        found = _additive(attn_mask, dtype)
        found = found[None, None] if found.ndim == 2 else found.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype)
        padding = (padding if padding.ndim == 2 else padding[None])[:, None, None]
        found = padding if found is None else found + padding
    return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attend(heads: list[Tensor], mask: Tensor | None, drop: Drop) -> tuple[Tensor, Tensor]:
    query, key, value = heads
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    attention = drop((scores if mask is None else scores + mask).softmax(-1))
    return attention @ value, attention
