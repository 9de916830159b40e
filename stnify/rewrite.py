"""3. Carry a plan out: the graph with hyper layers and noise sites, sharing the user's parameters.

The graph takes three more inputs: ``response_input`` (``(batch, h)`` or None), ``constrained``
(``(h,)``, ``(batch, h)`` or None) and ``linearized``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from stnify.layers import (
    HYPER_FUNCTIONS,
    HYPER_MODULES,
    BiasResponse,
    HyperLayer,
    LayerKind,
    WeightResponse,
    fan_in_bound,
)
from stnify.plan import NoiseSite, Plan, WeightSite
from stnify.regularizers import FixedDropout, FixedScaledDotProductAttention, TunedDropout
from stnify.space import HyperparameterSpace
from stnify.streams import RandomStream
from stnify.swap import SwappedModule
from stnify.tunable import PREFIX, TunableModule, Tunables, Use, WholeFunction, insert

NOISES: dict[str, Callable[[int, NoiseSite], nn.Module]] = {
    "Dropout": lambda column, site: TunedDropout(column, *site.granularity),
}
"""Kind of site to the module that acts there."""

_DROPOUT_ARGUMENTS = ("input", "p", "training", "inplace")
FIXED_FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.dropout: _DROPOUT_ARGUMENTS,
    F.dropout1d: _DROPOUT_ARGUMENTS,
    F.dropout2d: _DROPOUT_ARGUMENTS,
    F.dropout3d: _DROPOUT_ARGUMENTS,
    F.alpha_dropout: ("input", "p", "training", "inplace"),
    F.feature_alpha_dropout: ("input", "p", "training", "inplace"),
}
"""Functions that depend on the mode, with the names of their arguments."""


def rewrite(
    model: nn.Module, plan: Plan, space: HyperparameterSpace, stream: RandomStream
) -> TunableModule:
    """Build the tunable model that ``plan`` describes; ``model`` itself stays as it is.

    Args:
        model: The model the plan was made for. Its parameters are shared.
        plan: What to do.
        space: The hyperparameters, in the plan's columns.
        stream: Where fresh response weights, and later all noise, are drawn from.
    """
    tunables = Tunables(space)
    for name, tensor in plan.traced.constants.items():
        tunables.constants.register_buffer(name, tensor.detach(), persistent=False)
    copy, nodes = _copied(plan)
    with stream.active():
        layers = _hyper_layers(model, plan)
    inputs = _add_inputs(copy)
    swaps = _Swaps(model)
    for site in plan.noises:
        module = NOISES[site.kind](space.index(site.column), site)
        key = insert(tunables.noises, site.name, module)
        if site.inside is None:
            _place_noise(copy, nodes, site, f"{PREFIX}.noises.{key}", inputs["constrained"])
        else:
            swaps.noises.setdefault(site.inside, {})[site.name] = module
    _keep_modes(copy, tunables)
    _keep_whole(copy, plan, tunables)
    uses: dict[str, list[Use]] = {}
    for call in plan.weights:
        key = _key(tunables, call, layers[call.node])
        if call.inside is None:
            _call_layer(copy, nodes[call.node], call, f"{PREFIX}.layers.{key}", inputs)
        else:
            swaps.layers.setdefault(call.inside, {})[call.name] = layers[call.node]
        computed = call.computed is not None
        uses.setdefault(call.weight, []).append(Use(call.node, key, call.bias, computed))
    swaps.place(copy, tunables, inputs)
    shell = TunableModule(model, tunables, stream, uses, plan.traced.fixed)
    copy.lint()
    shell.attach(fx.GraphModule(shell, copy, class_name=type(model).__name__))
    return shell


# Layers -------------------------------------------------------------------------------------------


def _hyper_layers(model: nn.Module, plan: Plan) -> dict[str, HyperLayer]:
    """Build the hyper layer of each call, by node; uses of one weight share its response."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    h = len(plan.columns)
    weights: dict[str, WeightResponse] = {}
    biases: dict[str, BiasResponse] = {}
    layers: dict[str, HyperLayer] = {}
    of_module: dict[tuple[str, str, str], HyperLayer] = {}
    for site in plan.weights:
        call = (site.name, site.way, site.node if site.way == "function" else repr(site.arguments))
        if call in of_module:
            layers[site.node] = of_module[call]
            continue
        original, kind = _original(model, plan, site)
        weight = parameters[site.weight].detach()
        if site.computed is not None:
            weight = weight.new_empty(site.computed)
        if site.weight_responds and site.key not in weights:
            groups = getattr(original, "groups", site.arguments.get("groups", 1))
            units = kind.units(weight, groups)
            weights[site.key] = WeightResponse(weight, h, kind.axis, plan.response, units)
        if site.bias_responds and site.bias is not None and site.bias not in biases:
            bias, bound = parameters[site.bias], fan_in_bound(weight)
            biases[site.bias] = BiasResponse(bias, h, bound, plan.response)
        responses = weights.get(site.key), biases.get(site.bias or "")
        layers[site.node] = of_module[call] = kind.build(original, responses, site.arguments)
    return layers


def _original(model: nn.Module, plan: Plan, site: WeightSite) -> tuple[Any, LayerKind]:
    if site.way != "function":
        module = model.get_submodule(site.name)
        return module, HYPER_MODULES[type(module)]
    function = next(node for node in plan.traced.graph.nodes if node.name == site.node).target
    return function, HYPER_FUNCTIONS[function]


def _key(tunables: Tunables, site: WeightSite, layer: HyperLayer) -> str:
    known = next((key for key, other in tunables.layers.items() if other is layer), None)
    return insert(tunables.layers, site.name, layer) if known is None else known


# Graph --------------------------------------------------------------------------------------------


def _copied(plan: Plan) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Copy the traced graph; return it and its nodes by their names in the plan."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(plan.traced.graph, copies))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in plan.traced.constants:
            node.target = f"{PREFIX}.constants.{node.target}"
    return graph, {old.name: new for old, new in copies.items()}


def _add_inputs(graph: fx.Graph) -> dict[str, fx.Node]:
    """Add the three inputs behind the model's own, before a ``**kwargs``."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    ordinary = [node for node in placeholders if not str(node.target).startswith("**")]
    inputs: dict[str, fx.Node] = {}
    defaults = {"response_input": None, "constrained": None, "linearized": False}
    anchor = ordinary[-1] if ordinary else next(iter(graph.nodes)).prev
    for name, default in defaults.items():
        with graph.inserting_after(anchor):
            anchor = inputs[name] = graph.placeholder(name, default_value=default)
    return inputs


def _place_noise(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    site: NoiseSite,
    target: str,
    constrained: fx.Node,
) -> None:
    if site.place == "replace":
        node = nodes[site.node]
        inputs = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_before(node):
            noisy = graph.call_module(target, (inputs, constrained))
        node.replace_all_uses_with(noisy)
        graph.erase_node(node)
        nodes[site.node] = noisy
        return
    value, last = nodes[site.node], nodes[site.last]
    if last.op == "placeholder":
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    later = _after(graph, last)
    with graph.inserting_after(last):
        noisy = graph.call_module(target, (value, constrained))
    value.replace_all_uses_with(noisy, delete_user_cb=lambda user: user in later)


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    order = list(graph.nodes)
    return set(order[order.index(node) + 1 :])


def _keep_modes(graph: fx.Graph, tunables: Tunables) -> None:
    """Replace functions traced with a training flag by modules that look at their own."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in FIXED_FUNCTIONS:
            names = FIXED_FUNCTIONS[node.target]
            arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            inputs = arguments.pop("input")
            if not arguments.pop("training", node.target is not F.alpha_dropout):
                continue
            module: nn.Module = FixedDropout(node.target, arguments)
            call: tuple[tuple[Any, ...], dict[str, Any]] = ((inputs,), {})
        elif node.target is F.scaled_dot_product_attention:
            dropout_p, call = _without_dropout(node)
            if not dropout_p:
                continue
            module = FixedScaledDotProductAttention(dropout_p)
        else:
            continue
        target = f"{PREFIX}.fixed.{insert(tunables.fixed, node.name, module)}"
        with graph.inserting_before(node):
            fixed = graph.call_module(target, *call)
        node.replace_all_uses_with(fixed)
        graph.erase_node(node)


def _keep_whole(graph: fx.Graph, plan: Plan, tunables: Tunables) -> None:
    """Call functions that cannot be traced through as modules, which no tracer enters."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in plan.traced.whole:
            key = insert(tunables.functions, node.name, WholeFunction(node.target))
            node.op, node.target = "call_module", f"{PREFIX}.functions.{key}"


def _without_dropout(node: fx.Node) -> tuple[float, tuple[tuple[Any, ...], dict[str, Any]]]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    dropout_p = arguments.pop("dropout_p", 0.0)
    query, key, value = (arguments.pop(name) for name in names[:3])
    return dropout_p, ((query, key, value), arguments)


def _call_layer(
    graph: fx.Graph, node: fx.Node, site: WeightSite, target: str, inputs: dict[str, fx.Node]
) -> None:
    with graph.inserting_before(node):
        if site.way == "module":
            weight: Any = graph.get_attr(f"{site.name}.weight")
            bias: Any = graph.get_attr(f"{site.name}.bias") if site.bias else None
            activations = node.args[0] if node.args else node.kwargs["input"]
        else:
            names = ("input", "weight", "bias")
            arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            activations, weight, bias = (arguments.get(name) for name in names)
        call = graph.call_module(
            target, (activations, weight, bias, inputs["response_input"], inputs["linearized"])
        )
    node.replace_all_uses_with(call)
    graph.erase_node(node)


# Modules that could not be traced through ---------------------------------------------------------


@dataclass
class _Swaps:
    """What is swapped inside which module, by qualified names."""

    model: nn.Module
    layers: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    noises: dict[str, dict[str, nn.Module]] = field(default_factory=dict)

    def place(self, graph: fx.Graph, tunables: Tunables, inputs: dict[str, fx.Node]) -> None:
        """Call swapped modules in the place of their originals."""
        for node in list(graph.nodes):
            owner = str(node.target)
            if node.op != "call_module" or owner.startswith(f"{PREFIX}."):
                continue
            if owner and owner not in self.layers.keys() | self.noises.keys():
                continue
            key = owner.replace(".", "/") or "root"
            if key not in tunables.swapped:
                insert(tunables.swapped, owner, self._swapped(owner))
            call = node.args if not owner else (tuple(node.args), dict(node.kwargs))
            with graph.inserting_before(node):
                target = f"{PREFIX}.swapped.{key}"
                swapped = graph.call_module(target, (*call, *inputs.values()))
            node.replace_all_uses_with(swapped)
            graph.erase_node(node)

    def _swapped(self, owner: str) -> SwappedModule:
        layers, noises = (
            {name.removeprefix(f"{owner}.") if owner else name: m for name, m in of.items()}
            for of in (self.layers.get(owner, {}), self.noises.get(owner, {}))
        )
        return SwappedModule(self.model.get_submodule(owner), layers, noises)
