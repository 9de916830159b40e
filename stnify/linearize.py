"""5. Predict through the best-response Jacobian: ``f(x, w0) + J_yw Theta epsilon``.

One forward pass carries every activation as a dual number. Each hyper layer adds its response to
the tangent, PyTorch's forward-mode differentiation carries it on, and the two parts are added at
the end, so they share every dropout mask. Source: [DeltaSTN] Eqs. 3.12, 3.13; same value as the
double backward of the official ``utils/linearize_utils.py``, which fails with BatchNorm.
"""

import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from stnify.errors import UnsupportedModuleError
from stnify.forward_mode import ForwardModeRules
from stnify.nested import map_tensors
from stnify.perturb import Perturbation
from stnify.regularizers import weight_factors
from stnify.tunable import PREFIX, Tunables, pass_inputs
from stnify.untouched import attributes_restored

Forward = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Perturbation], Any]
"""``(graph, args, kwargs, perturbation) -> prediction``."""


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

    Raises:
        UnsupportedModuleError: An operator has no forward-mode derivative.
    """
    with ForwardModeRules(), forward_ad.dual_level():
        try:
            outputs = _constant_call(graph, args, kwargs, perturbation, linearized=True)
        except NotImplementedError as error:
            _refuse_operator(graph, error)
            raise
        for recorder in _tunables(graph).recorders:
            recorder.records = [_primal_plus_tangent(record) for record in recorder.records]
        return map_tensors(_primal_plus_tangent, outputs)


def _refuse_operator(graph: nn.Module, error: NotImplementedError) -> None:
    """Raise UnsupportedModuleError if ``error`` says that forward mode lacks an operator."""
    found = re.search(r"forward AD with (\S+) that does not support", str(error))
    if found is None:
        return
    names = {module: name for name, module in graph.named_modules() if name}
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [names[c] for c in callers if isinstance(c, nn.Module) and c in names]
    raise UnsupportedModuleError(
        f"every operator must have a forward-mode derivative, but {found[1]!r} has none. It is "
        f"called in {inside[-1] if inside else 'the forward of the model'!r}. Write it in other "
        f'operators, or use method="centered", which needs no derivative of this kind.'
    ) from error


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
    constants = _constants(graph)
    noises = _tunables(graph).weight_noises
    factors = weight_factors(noises, graph.get_parameter, perturbation.constrained)
    for name, factor in factors.items():
        weight = constants[name] if name in constants else graph.get_parameter(name)
        constants[name] = weight * factor
    own = pass_inputs(perturbation.response_input, perturbation.constrained, linearized)
    inputs = {**kwargs, **own}
    with _attributes_kept(graph):
        return functional_call(graph, constants, args, inputs, tie_weights=False)


def _attributes_kept(graph: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which code that is not traced changes the model's attributes in vain."""
    if not _tunables(graph).untraced or torch.compiler.is_compiling():
        return nullcontext()
    return attributes_restored(graph)


def _tunables(graph: nn.Module) -> Tunables:
    return cast(Tunables, graph.get_submodule(PREFIX))


def _constants(graph: nn.Module) -> dict[str, Tensor]:
    """Return a constant in the place of each general parameter and buffer, tied ones the same one.

    A module that is registered twice has one name here: ``functional_call`` would otherwise put
    the constant back where the parameter was.
    """
    made: dict[int, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for path, module in graph.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own if not path.startswith(PREFIX) else module._buffers.items():
            if tensor is not None:
                if id(tensor) not in made:
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = tensor.detach() if parameter else tensor.clone()
                constants[f"{path}.{name}" if path else name] = made[id(tensor)]
    return constants


def _primal_plus_tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else primal + tangent
