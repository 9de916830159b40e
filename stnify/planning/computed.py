"""Weights that a model computes from its parameters, such as a standardised kernel."""

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from stnify.composites import DESCRIPTIONS, TENSOR_ATTRIBUTES
from stnify.products import multiplication

SUFFIXES = ("orig", "g", "v", "raw")
"""Behind the name of a weight that hooks set: the names of the parameters they compute it from."""


def parameters_behind(model: nn.Module, value: object) -> dict[str, nn.Parameter] | None:
    """Return the parameters ``value`` is computed from, by name; None if an input is among them."""
    found: dict[str, nn.Parameter] = {}
    pending, seen = [value], set[fx.Node]()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return None
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            found.update(module.named_parameters(prefix=str(node.target)))
        if node.op == "get_attr":
            attribute = _attribute(model, str(node.target))
            if isinstance(attribute, nn.Parameter):
                found[str(node.target)] = attribute
        pending.extend(node.all_input_nodes)
    return found


def parameters_of(model: nn.Module, graph: fx.Graph, value: str) -> dict[str, nn.Parameter]:
    """Return the parameters a computed weight is made of, by name.

    Args:
        model: The traced model.
        graph: Its graph.
        value: The node that computes the weight, or where a module that is not traced keeps it.
    """
    for node in graph.nodes:
        if node.name == value:
            return parameters_behind(model, node) or {}
    owner, _, attribute = value.rpartition(".")
    made_of = {id(p) for p in computing(model.get_submodule(owner), attribute)}
    return {name: p for name, p in model.named_parameters() if id(p) in made_of}


def computing(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    """Return the parameters that a module computes an attribute from, at each call.

    It is parametrized, or a hook sets it, as those of pruning and older norms of weights do.
    """
    if parametrize.is_parametrized(module, attribute):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        return list(module.parametrizations[attribute].parameters())
    if not isinstance(vars(module).get(attribute), Tensor):
        return []
    kept = [module._parameters.get(f"{attribute}_{suffix}") for suffix in SUFFIXES]
    return [parameter for parameter in kept if parameter is not None]


def main_part(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """Return the parameter to name a computed weight after: the largest that trains, if any does.

    So a low-rank change of a frozen weight responds.
    """
    return max(parameters, key=lambda parameter: (parameter.requires_grad, parameter.numel()))


@torch.no_grad()
def computed_value(module: nn.Module, attribute: str) -> Tensor:
    """Return what a module computes in the place of a weight; its state stays as it is."""
    if not parametrize.is_parametrized(module, attribute):
        value: Tensor = vars(module)[attribute]
        return value
    assert isinstance(module.parametrizations, nn.ModuleDict)
    computed: Tensor = copy.deepcopy(module.parametrizations[attribute])()
    return computed


def meeting_tables(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Return the parameters with rows and columns that activations are multiplied with.

    They enter a product themselves, or in what is computed from them without any number of an
    input, whose size may be used; or a function that is called whole receives them together with
    activations. A table that is multiplied with constants only is not among them.
    """
    names = {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.numel() > max(parameter.shape, default=1)
    }
    # What is computed from which tables; from activations, None.
    origins: dict[fx.Node, frozenset[str] | None] = {}
    found: set[str] = set()
    for node in graph.nodes:
        found |= _met(node, origins)
        inputs = [] if _describes(node) else [origins[other] for other in node.all_input_nodes]
        known = [tables for tables in inputs if tables is not None]
        if node.op == "placeholder" or len(known) < len(inputs):
            origins[node] = None
        else:
            origins[node] = frozenset(_tables(model, node, names)).union(*known)
    return found


def _met(node: fx.Node, origins: dict[fx.Node, frozenset[str] | None]) -> set[str]:
    """Return the tables that meet activations in a node."""
    operands: list[fx.Node] = []
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(Tensor, str(node.target), None)
    product = multiplication(function, node.args, dict(node.kwargs))
    if product is not None:
        operands = [operand for operand in product.operands if isinstance(operand, fx.Node)]
    elif calls_whole(node):
        received = node.all_input_nodes
        operands = [n for n in received if n.op == "get_attr" or origins[n] is None]
    tables = [origins[operand] for operand in operands]
    if None not in tables:
        return set()
    return {name for names in tables if names is not None for name in names}


def _tables(model: nn.Module, node: fx.Node, names: dict[int, str]) -> Iterator[str]:
    """Yield those of ``names`` a node reads: itself, or inside the module it calls."""
    read: list[Any] = []
    if node.op == "get_attr":
        read = [_attribute(model, str(node.target))]
    elif node.op == "call_module":
        read = list(model.get_submodule(str(node.target)).parameters())
    yield from (names[id(value)] for value in read if id(value) in names)


def calls_whole(node: fx.Node) -> bool:
    """Whether a node calls a Python function, in which weights may meet activations."""
    return inspect.isfunction(node.target) and not node.target.__module__.startswith("torch.")


def _describes(node: fx.Node) -> bool:
    """Whether a node reads what a tensor is like, not its numbers."""
    if node.op == "call_method":
        return node.target in DESCRIPTIONS
    return node.target is getattr and node.args[1] not in TENSOR_ATTRIBUTES


@torch.no_grad()
def evaluate(model: nn.Module, value: fx.Node, constants: dict[str, Tensor]) -> Any:
    """Return what ``value`` is with the model's present parameters.

    Args:
        model: The traced model.
        value: A node that no input of the model reaches.
        constants: Tensors made while tracing.
    """
    known: dict[fx.Node, Any] = {}

    def run(node: fx.Node) -> Any:
        if node not in known:
            known[node] = _run(node)
        return known[node]

    def _run(node: fx.Node) -> Any:
        target = str(node.target)
        if node.op == "get_attr":
            return constants[target] if target in constants else _attribute(model, target)
        args, kwargs = map_arg(node.args, run), map_arg(node.kwargs, run)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        function: Any = node.target
        if node.op == "call_module":  # a copy, because a spectral norm updates its buffers
            function = copy.deepcopy(model.get_submodule(target))
        return function(*args, **kwargs)

    return run(value)


def _attribute(model: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name, None)
