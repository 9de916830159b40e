"""DropConnect: single weights set to zero, the same ones for a whole batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor, nn


@final
class TunedDropConnect(nn.Module):
    """Draws which entries of weights a pass does without; off in eval mode.

    A weight and its response share the mask, so that the perturbed weight as a whole is masked.

    Args:
        column: Which hyperparameter is the rate.
        sharing: Name of each weight to the names of all tensors that share its mask.

    Source: Wan et al., ICML 2013; [STN] D.
    """

    def __init__(self, column: int, sharing: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.column = column
        self.sharing = dict(sharing)

    def extra_repr(self) -> str:
        """Name the column and the weights."""
        return f"column={self.column}, weights={list(self.sharing)}"

    def factors(
        self, parameter: Callable[[str], Tensor], constrained: Tensor | None
    ) -> dict[str, Tensor]:
        """Return by name what tensors are multiplied by in one pass: 0 or ``1 / (1 - rate)``.

        Args:
            parameter: Name to parameter.
            constrained: ``(h,)`` or ``(batch, h)``, constrained units, of which the batch takes the
                mean; None draws nothing.
        """
        if not self.training or constrained is None:
            return {}
        keep = 1 - constrained[..., self.column].mean()
        found: dict[str, Tensor] = {}
        for name, sharing in self.sharing.items():
            weight = parameter(name)
            scale = keep.reciprocal().to(weight.dtype)
            kept = torch.rand(weight.shape, device=weight.device) < keep
            found.update(dict.fromkeys(sharing, torch.where(kept, scale, 0)))
        return found


def weight_factors(
    noises: Iterable[nn.Module], parameter: Callable[[str], Tensor], constrained: Tensor | None
) -> dict[str, Tensor]:
    """Return what all of ``noises`` multiply tensors by in one pass; see their ``factors``."""
    found: dict[str, Tensor] = {}
    for noise in noises:
        found.update(cast(TunedDropConnect, noise).factors(parameter, constrained))
    return found


@contextmanager
def weights_scaled(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply parameters by ``factors`` inside the body, differentiably; then put them back."""
    before = {name: model.get_parameter(name) for name in factors}
    _set_all(model, {name: before[name] * factor for name, factor in factors.items()})
    try:
        yield
    finally:
        _set_all(model, before)


def _set_all(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors where parameters are registered, and in the lists of recurrent modules."""
    owners: dict[nn.Module, None] = {}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        owners[owner] = None
        cast(dict[str, Tensor | None], owner._parameters)[attribute] = tensor
    for owner in owners:
        if isinstance(owner, nn.RNNBase):
            names: list[str] = owner._flat_weights_names
            owner.__dict__["_flat_weights"] = [getattr(owner, name) for name in names]
