"""6b. Try the pass of the response step, and count the floating-point operations of one example.

PyTorch counts them while the passes run; there is no formula of our own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stnify.errors import UnsupportedModuleError
from stnify.layers import HyperLayer
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.nested import map_tensors
from stnify.perturb import Perturbation
from stnify.rows import batch_size
from stnify.step import first_rows
from stnify.streams import RandomStream
from stnify.tunable import PREFIX, TunableModule, evaluating
from stnify.untouched import state_restored

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

WHOLE = ""
"""Stands for the whole model among the names of hyper layers."""


@torch.no_grad()
def prove_response_pass(
    model: TunableModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    linearized: bool = True,
) -> Inputs:
    """Run the pass of the response step once, in eval mode; return copies of what it ran on.

    That is two examples, because some models fail on one, or all where inputs cannot be cut, as
    those that index into others. Buffers and random state stay as they are.

    Args:
        model: Converted.
        args: Positional inputs, as for the model.
        kwargs: Keyword inputs.
        linearized: Run a linearised pass, else one with perturbed weights.

    Raises:
        UnsupportedModuleError: An operator of the model has no derivative of the kind it needs.
    """
    inputs: Inputs = map_tensors(_copy, (args, dict(kwargs)))
    try:
        few: Inputs = map_tensors(_copy, first_rows((args, dict(kwargs)), 2))
        _run(model, few, linearized)
        return few
    except UnsupportedModuleError:
        raise
    except Exception:
        _run(model, inputs, linearized)
        return inputs


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@torch.no_grad()
def count_flops(
    model: TunableModule, inputs: Inputs, *, linearized: bool = True
) -> dict[str, tuple[int, int]]:
    """Return what one example costs before and after, by hyper layer and, under ``""``, in all.

    Before is every layer's plain operator, after the pass of the response step. A layer called
    several times counts all its calls. Operators PyTorch has no formula for, which are those that
    do little arithmetic, count nothing; where a forward differentiates, PyTorch's counter fails,
    and nothing is returned. Runs in eval mode; buffers and random state stay as they are.

    Args:
        model: Converted.
        inputs: What ``prove_response_pass`` returned.
        linearized: Count a linearised pass, else one with perturbed weights.
    """
    graph, examples = model._stnify.graph, max(1, batch_size(inputs))
    try:
        with _plain_operators(model._stnify.hyper_layers.values()):
            before = _counted(graph, lambda: _run(model, inputs, linearized=False))
        after = _counted(graph, lambda: _run(model, inputs, linearized))
    except Exception as error:
        if COUNTER_LIMIT in str(error):
            return {}
        raise
    layers = {
        f"{type(graph).__name__}.{PREFIX}.layers.{name}": name
        for name in model._stnify.hyper_layers
    }
    layers["Global"] = WHOLE
    return {
        name: (before.get(key, 0) // examples, after.get(key, 0) // examples)
        for key, name in layers.items()
    }


COUNTER_LIMIT = "_will_engine_execute_node"
"""What PyTorch's counter complains of where a forward differentiates."""


def _run(model: TunableModule, inputs: Inputs, linearized: bool) -> None:
    """Run a perturbed pass, perturbed by nought; it leaves nothing behind."""
    space, graph = model._stnify.space, model._stnify.graph
    zeros = space.unconstrained.new_zeros(max(1, batch_size(inputs)), len(space.columns))
    forward = linearized_forward if linearized else perturbed_forward
    private = RandomStream(0, space.unconstrained.device)
    untouched = state_restored(model._stnify.original)
    with evaluating(model), model._stnify.buffers_restored(), untouched, private.active():
        forward(graph, *inputs, Perturbation(zeros, None))


@contextmanager
def _plain_operators(layers: Iterable[HyperLayer]) -> Iterator[None]:
    """Make hyper layers leave their response out; a pass without any would not call them all."""

    def plain(layer: HyperLayer) -> Callable[..., Tensor]:
        def forward(
            inputs: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            response_input: Tensor,
            linearized: bool,
            **arguments: Any,
        ) -> Tensor:
            return layer.operate(inputs, weight, bias, **arguments)

        return forward

    changed = list(layers)
    for layer in changed:
        layer.__dict__["forward"] = plain(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _counted(graph: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return the operations of ``run`` by module, as PyTorch names it."""
    with _ZerosInMemory(), FlopCounterMode(display=False) as counter:
        run()
    return {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}


class _ZerosInMemory(TorchDispatchMode):
    """Gives memory to the zeros that stand for the tangents of constants.

    PyTorch keeps none for them; beneath a counter, operators that scale such a tangent, like
    ``torch.add`` with ``alpha`` or ``torch.addmm`` with ``beta``, would read it all the same.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or make zeros in its place."""
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))
