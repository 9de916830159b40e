"""Bags of embeddings."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def embedding_bag(
    embed: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return what ``F.embedding_bag`` returns, by looking up ``(bags, longest)`` indices.

    Args:
        embed: ``(indices, weight) -> vectors``, in place of ``F.embedding``.
        input: ``(bags, length)``, or ``(indices,)`` cut at ``offsets``.
        weight: The table.
        offsets: Where each bag starts.
        max_norm: Must be None.
        norm_type: Unused without ``max_norm``.
        scale_grad_by_freq: As in ``F.embedding``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        sparse: Unused: gradients are dense.
        per_sample_weights: Factors of the vectors, shaped as the input.
        include_last_offset: Whether the last offset is the end of the last bag.
        padding_idx: Index that is left out.
    """
    indices, used, factors = input, torch.ones_like(input, dtype=torch.bool), per_sample_weights
    if offsets is not None:
        indices, used, factors = _padded(input, offsets, factors, include_last_offset)
    if padding_idx is not None:
        used = used & (indices != padding_idx % weight.shape[0])
    options: dict[str, Any] = {"scale_grad_by_freq": scale_grad_by_freq}
    vectors = embed(indices, weight, **options)
    count = used.sum(1, keepdim=True)
    if mode == "max":
        highest = vectors.masked_fill(~used[..., None], float("-inf")).amax(1)
        return torch.where(count > 0, highest, 0)
    weights = used.to(vectors.dtype) if factors is None else factors * used
    total = (vectors * weights[..., None]).sum(1)
    return total if mode == "sum" else total / count.clamp_min(1)


def _padded(
    indices: Tensor, offsets: Tensor, factors: Tensor | None, include_last: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return indices as ``(bags, longest)``, which of them are used, and the factors."""
    ends = offsets if include_last else torch.cat([offsets, offsets.new_tensor([len(indices)])])
    lengths = ends.diff()
    places = torch.arange(int(lengths.max()) if len(lengths) else 0, device=indices.device)
    used = places < lengths[:, None]
    chosen = (ends[:-1, None] + places).clamp_max(max(len(indices) - 1, 0))
    if not len(indices):
        return indices.new_zeros(used.shape), used, None
    return indices[chosen], used, None if factors is None else factors[chosen]
