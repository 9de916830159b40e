"""5. Predict through the best-response Jacobian: ``f(x, w0) + J_yw Theta epsilon``.

One forward pass carries every activation as a dual number. Each hyper layer adds its response to
the tangent, PyTorch's forward-mode differentiation carries it on, and the two parts are added at
the end, so they share every dropout mask. Source: [DeltaSTN] Eqs. 3.12, 3.13; same value as the
double backward of the official ``utils/linearize_utils.py``, which fails with BatchNorm.
"""

from collections.abc import Mapping
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from stnify.forward_mode import ForwardModeRules
from stnify.perturb import Perturbation
from stnify.tunable import PREFIX


def linearized_forward(
    graph: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    perturbation: Perturbation,
) -> Any:
    """Predict to first order in the response, differentiably in the response parameters only.

    General parameters are constants, buffers are not updated, and BatchNorm in train mode
    normalises with the statistics of the batch at hand.

    Args:
        graph: Graph of a tunable model.
        args: Positional inputs of the model.
        kwargs: Keyword inputs of the model.
        perturbation: Response input and constrained hyperparameters, one row for each example.

    Returns:
        What the model returns, every tensor replaced by primal plus tangent.
    """
    with ForwardModeRules(), forward_ad.dual_level():
        outputs = _constant_call(graph, args, kwargs, perturbation, linearized=True)
        return tree_map_only(Tensor, _primal_plus_tangent, outputs)


def perturbed_forward(
    graph: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    perturbation: Perturbation,
) -> Any:
    """Predict with the perturbed weights themselves, ``f(x, w0 + Theta delta)``.

    Differentiable in the response parameters and the response input; general parameters are
    constants and buffers are not updated.
    """
    return _constant_call(graph, args, kwargs, perturbation, linearized=False)


def _constant_call(
    graph: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    perturbation: Perturbation,
    *,
    linearized: bool,
) -> Any:
    """Call the graph with general parameters detached and a private copy of every buffer."""
    constants = {
        name: parameter.detach()
        for name, parameter in graph.named_parameters()
        if not name.startswith(f"{PREFIX}.")
    }
    constants.update({name: buffer.clone() for name, buffer in graph.named_buffers()})
    inputs = {
        **kwargs,
        "response_input": perturbation.response_input,
        "constrained": perturbation.constrained,
        "linearized": linearized,
    }
    return functional_call(graph, constants, args, inputs)


def _primal_plus_tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else primal + tangent
