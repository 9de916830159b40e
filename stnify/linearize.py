"""5. Predict through the best-response Jacobian: ``f(x, w0) + J_yw Theta epsilon``.

One forward pass carries every activation as a dual number. Each hyper layer adds its response to
the tangent, PyTorch's forward-mode differentiation carries it on, and the two parts are added at
the end, so they share every dropout mask. Source: [DeltaSTN] Eqs. 3.12, 3.13; same value as the
double backward of the official ``utils/linearize_utils.py``, which fails with BatchNorm.
"""

import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from stnify.errors import UnsupportedModuleError
from stnify.forward_mode import DIFFERENTIATES, ForwardModeRules
from stnify.nested import leaves, map_tensors
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
        UnsupportedModuleError: An operator has no forward-mode derivative, or no layer can respond
            in the way it is called.
    """
    with ForwardModeRules(), forward_ad.dual_level():
        try:
            outputs = _constant_call(graph, args, kwargs, perturbation, linearized=True)
        except RuntimeError as error:
            _refuse_limits(graph, error)
            raise
        for recorder in _tunables(graph).recorders:
            recorder.records = [_primal_plus_tangent(record) for record in recorder.records]
        outputs = map_tensors(_primal_plus_tangent, outputs)
    _refuse_unmet(graph, args, kwargs, perturbation, outputs)
    return outputs


INSTEAD = 'or use method="centered", which needs no derivative of this kind.'
LIMITS = {
    r"forward AD with (\S+) that does not support": (
        "every operator must have a forward-mode derivative, but {0!r} has none. It is called in "
        f"{{place}}. Write it in other operators, {INSTEAD}"
    ),
    r"implement the jvp function for custom autograd": (
        "every autograd.Function must have a forward-mode derivative, but {function!r} has none. "
        f"It is called in {{place}}. Give it a static method `jvp`, {INSTEAD}"
    ),
    DIFFERENTIATES: (
        "a forward must not differentiate what responds, because forward mode would lose the "
        f"response in it, but {{place}} calls torch.autograd.grad. Write the derivative out, "
        f"{INSTEAD}"
    ),
    r"(?i)batching rule not implemented for aten::_\w+_dual": (
        "code that forward mode goes through must not be under torch.vmap, but is in {place}. "
        f"Write it without, {INSTEAD}"
    ),
}
"""What an error of a perturbed pass says, to the refusal it is turned into."""


def _refuse_limits(graph: nn.Module, error: Exception) -> None:
    """Raise UnsupportedModuleError if ``error`` says what perturbed passes cannot take."""
    for pattern, refusal in LIMITS.items():
        found = re.search(pattern, str(error))
        if found is not None:
            place, function = _place(graph, error), _function(error)
            message = refusal.format(*found.groups(), place=place, function=function)
            raise UnsupportedModuleError(message) from error


def _place(graph: nn.Module, error: Exception) -> str:
    """Return the innermost of the user's modules in which an error arose, in words."""
    names = {module: _users_name(name) for name, module in graph.named_modules()}
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [names[c] for c in callers if isinstance(c, nn.Module) and names.get(c)]
    return repr(inside[-1]) if inside else "the forward of the model"


def _users_name(name: str) -> str:
    """Return the name of the user's module that a module of a graph stands for; empty for none."""
    if not name.startswith(f"{PREFIX}."):
        return name
    _, kind, key = (*name.split(".", 2), "")[:3]
    if kind not in {"layers", "swapped"}:
        return ""
    stem = key.partition(".")[0].partition(":")[0]
    return "" if stem == "root" else stem.replace("/", ".")


def _function(error: Exception) -> str:
    """Return the name of the ``autograd.Function`` whose derivative was asked for."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked = [frame.f_locals["self"] for frame in frames if frame.f_code.co_name == "apply_jvp"]
    kinds = [getattr(one, "_forward_cls", type(one)) for one in asked]
    return kinds[-1].__name__ if kinds else "autograd.Function"


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
    try:
        outputs = _constant_call(graph, args, kwargs, perturbation, linearized=False)
    except RuntimeError as error:
        _refuse_limits(graph, error)
        raise
    _refuse_unmet(graph, args, kwargs, perturbation, outputs)
    return outputs


def _refuse_unmet(
    graph: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    perturbation: Perturbation,
    outputs: Any,
) -> None:
    """Raise UnsupportedModuleError if ``outputs`` have no response because no layer is called."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    tensors = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)]
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not numbers or any(tensor.requires_grad for tensor in numbers):
        return
    layers = _tunables(graph).hyper_layers
    if not any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
        return
    met: list[nn.Module] = []
    with torch.no_grad(), _noticed(layers.values(), met):
        _constant_call(graph, args, kwargs, perturbation, linearized=False)
    if not met:
        names = ", ".join(sorted({repr(name.partition(":")[0]) for name in layers}))
        raise UnsupportedModuleError(
            f"a layer that responds must meet activations with its own weight, but none of {names} "
            f"does: where code that cannot be traced replaces a weight, or computes another one "
            f"from it, there is no response. Write that code so that it can be traced, or exclude "
            f"the layer."
        )


@contextmanager
def _noticed(layers: Iterable[nn.Module], met: list[nn.Module]) -> Iterator[None]:
    """Add to ``met`` every layer that is called in the body."""
    handles = [layer.register_forward_pre_hook(lambda one, _: met.append(one)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    if torch.compiler.is_compiling():
        return nullcontext()
    kept = ExitStack()
    for name in _tunables(graph).own_code:
        kept.enter_context(attributes_restored(graph.get_submodule(name)))
    return kept


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
                    made[id(tensor)] = _constant(tensor)
                constants[f"{path}.{name}" if path else name] = made[id(tensor)]
    return constants


def _constant(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.clone()
    if torch.compiler.is_compiling():
        return tensor.detach()
    return nn.Parameter(tensor.detach(), requires_grad=False)  # what `get_parameter` looks for


def _primal_plus_tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else primal + tangent
