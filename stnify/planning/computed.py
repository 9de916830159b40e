"""Weights that a model computes from its parameters, such as a standardised kernel."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg


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
