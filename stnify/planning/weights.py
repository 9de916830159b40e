"""Find every call in which a weight meets activations, and say why any other weight is left."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from stnify.declare import Pattern
from stnify.patterns import require_each
from stnify.plan import Refusal, ResponseKind, WeightSite
from stnify.planning.computed import evaluate, parameters_behind
from stnify.trace import Traced, caller, swappable

WEIGHT_MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.Conv1d: "Conv1d",
    nn.Conv2d: "Conv2d",
    nn.Conv3d: "Conv3d",
    nn.ConvTranspose1d: "ConvTranspose1d",
    nn.ConvTranspose2d: "ConvTranspose2d",
    nn.ConvTranspose3d: "ConvTranspose3d",
    nn.Embedding: "Embedding",
}
"""Exact types of modules whose weights get a response."""

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = (*_CONV[:5], "output_padding", "groups", "dilation")
WEIGHT_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.linear: ("Linear", ("input", "weight", "bias")),
    F.conv1d: ("Conv1d", _CONV),
    F.conv2d: ("Conv2d", _CONV),
    F.conv3d: ("Conv3d", _CONV),
    F.conv_transpose1d: ("ConvTranspose1d", _CONV_TRANSPOSE),
    F.conv_transpose2d: ("ConvTranspose2d", _CONV_TRANSPOSE),
    F.conv_transpose3d: ("ConvTranspose3d", _CONV_TRANSPOSE),
}
"""Functions whose weight argument gets a response, with the names of their arguments in order."""

GATED_AXIS = {"Embedding": 1, "ConvTranspose1d": 1, "ConvTranspose2d": 1, "ConvTranspose3d": 1}
"""Weight dimension of the gated units, where it is not the first."""


def weight_sites(
    model: nn.Module, traced: Traced, exclude: Pattern
) -> tuple[list[WeightSite], list[Refusal]]:
    """Return every site whose weight can respond, and a refusal for every other weight."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = require_each(exclude, modules, "`exclude`")
    sites: list[WeightSite] = []
    refusals: dict[str, Refusal] = {}
    candidates = (c for node in traced.graph.nodes for c in _candidates(model, traced, node, names))
    for found in candidates:
        if isinstance(found, WeightSite) and any(_within(found.name, name) for name in excluded):
            found = Refusal(found.name, "excluded by `exclude=`")
        if isinstance(found, WeightSite):
            sites.append(found)
        else:
            refusals[found.name] = found
    sites = _agreeing(sites, refusals)
    for name, reason in traced.opaque.items():
        if not any(site.inside == name for site in sites):
            refusals[name] = Refusal(name, reason)
    _refuse_unused_weights(model, sites, refusals)
    return sites, list(refusals.values())


def _within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def _candidates(
    model: nn.Module, traced: Traced, node: fx.Node, names: Mapping[int, str]
) -> Iterator[WeightSite | Refusal]:
    """Yield what one node of the graph does with weights."""
    if node.op == "call_function" and node.target in WEIGHT_FUNCTIONS:
        yield _function_site(model, traced, node, names)
    elif node.op == "call_module":
        name = str(node.target)
        module = model.get_submodule(name)
        if type(module) in WEIGHT_MODULES:
            arguments = _call_arguments(node, ("input", "output_size"))
            yield _module_site(module, name, node.name, names, arguments)
        for inner, child in swappable(model, node).items():
            if type(child) in WEIGHT_MODULES:
                found = _module_site(child, inner, f"{node.name}:{inner}", names, {})
                if isinstance(found, WeightSite):
                    found = replace(found, way="swap", inside=name)
                yield found


def _module_site(
    module: nn.Module,
    name: str,
    node: str,
    names: Mapping[int, str],
    arguments: Mapping[str, Any],
) -> WeightSite | Refusal:
    reason = _module_reason(module)
    if reason:
        return Refusal(name, reason)
    if any(isinstance(argument, fx.Node) for argument in arguments.values()):
        return Refusal(name, "is called with an output size known only while running")
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None, "a computed weight has been refused"
    site = WeightSite(
        name=name,
        kind=WEIGHT_MODULES[type(module)],
        way="module",
        node=node,
        weight=names[id(weight)],
        bias=None if bias is None else names[id(bias)],
        weight_responds=weight.requires_grad,
        bias_responds=bias is not None and bias.requires_grad,
        arguments=arguments,
    )
    if not (site.weight_responds or site.bias_responds):
        return Refusal(name, "frozen (requires_grad=False)")
    return site


def _module_reason(module: nn.Module) -> str:
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed (weight norm, spectral norm, ...), not a parameter"
    bias = getattr(module, "bias", None)
    if bias is not None and "bias" not in module._parameters:
        return "its bias is computed, not a parameter"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a hyper layer would bypass"
    if module._parameters["weight"].dtype.is_complex:  # type: ignore[union-attr]
        return "has complex weights"
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
        return "is an embedding with sparse gradients or max_norm"
    return ""


def _function_site(
    model: nn.Module, traced: Traced, node: fx.Node, names: Mapping[int, str]
) -> WeightSite | Refusal:
    assert callable(node.target)
    kind, signature = WEIGHT_FUNCTIONS[node.target]
    arguments = _call_arguments(node, signature)
    weight, bias = arguments.pop("weight", None), arguments.pop("bias", None)
    user, function = caller(node) or "(root)", node.target.__name__
    if any(isinstance(argument, fx.Node) for argument in arguments.values()):
        return Refusal(user, f"calls F.{function} with a geometry known only while running")
    behind = parameters_behind(model, weight)
    if behind is None:
        return Refusal(user, f"calls F.{function} with a weight computed from its input")
    if not behind or not isinstance(weight, fx.Node):
        return Refusal(user, f"calls F.{function} with a weight that is no parameter")
    parameter = max(behind.values(), key=nn.Parameter.numel)
    bias_parameter = _parameter(model, bias)
    computed = None
    if _parameter(model, weight) is None:
        computed = tuple(evaluate(model, weight, traced.constants).shape)
    weight_name = names[id(parameter)]
    site = WeightSite(
        name=weight_name.rpartition(".")[0],
        kind=kind,
        way="function",
        node=node.name,
        weight=weight_name,
        bias=None if bias_parameter is None else names[id(bias_parameter)],
        weight_responds=parameter.requires_grad,
        bias_responds=bias_parameter is not None and bias_parameter.requires_grad,
        arguments=arguments,
        computed=computed,
    )
    if not (site.weight_responds or site.bias_responds):
        return Refusal(weight_name, "frozen (requires_grad=False)")
    return site


def _call_arguments(node: fx.Node, signature: tuple[str, ...]) -> dict[str, Any]:
    """Name the arguments of a call, without the first one, the input."""
    arguments = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
    arguments.pop("input", None)
    return arguments


def _parameter(model: nn.Module, value: object) -> nn.Parameter | None:
    """Return the parameter a node reads, if it does nothing else."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    path, _, attribute = str(value.target).rpartition(".")
    return model.get_submodule(path)._parameters.get(attribute)


def _agreeing(sites: list[WeightSite], refusals: dict[str, Refusal]) -> list[WeightSite]:
    """Refuse weights that are used in ways one gate cannot serve."""
    kinds: dict[str, set[str]] = {}
    for site in sites:
        kinds.setdefault(site.key, set()).add(site.kind)
    kept = []
    for site in sites:
        if len(kinds[site.key]) > 1 and not kinds[site.key] <= {"Linear", "Embedding"}:
            used = " and ".join(sorted(kinds[site.key]))
            refusals[site.name] = Refusal(site.name, f"its weight serves {used} at once")
        else:
            kept.append(site)
    return kept


def _refuse_unused_weights(
    model: nn.Module, sites: Sequence[WeightSite], refusals: dict[str, Refusal]
) -> None:
    covered = {site.weight for site in sites}
    for name, parameter in model.named_parameters():
        refused = any(_within(name, refusal) for refusal in list(refusals))
        if parameter.ndim >= 2 and name not in covered and not refused:
            frozen = "" if parameter.requires_grad else ", and is frozen"
            refusals[name] = Refusal(name, f"is not the weight of a known layer{frozen}")


def count_responses(
    model: nn.Module, sites: Sequence[WeightSite], h: int, response: ResponseKind
) -> list[WeightSite]:
    """Fill in how many parameters each site adds ([DeltaSTN] 3.4 and E, less the general ones)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: Counter[str] = Counter()
    counted = []
    for site in sites:
        added = 0
        if site.weight_responds and not seen[site.key]:
            shape = site.computed or parameters[site.weight].shape
            units = shape[GATED_AXIS.get(site.kind, 0)]
            units *= _groups(model, site) if site.kind.startswith("ConvTranspose") else 1
            added += units * h + (math.prod(shape) if response == "full" else 0)
        if site.bias_responds and site.bias is not None and not seen[site.bias]:
            size = parameters[site.bias].numel()
            added += size * h + (size if response == "full" else 0)
        seen.update(name for name in (site.key, site.bias) if name)
        counted.append(replace(site, response_parameters=added))
    return counted


def _groups(model: nn.Module, site: WeightSite) -> int:
    if site.way == "function":
        return int(site.arguments.get("groups", 1))
    groups = model.get_submodule(site.name).groups
    assert isinstance(groups, int)
    return groups
