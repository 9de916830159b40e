"""Find every call in which a weight meets activations, and say why any other weight is left."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stnify.declare import Pattern
from stnify.patterns import require_each
from stnify.plan import Refusal, ResponseKind, WeightSite
from stnify.planning.computed import (
    computed_value,
    computing,
    main_part,
    meeting_tables,
    parameters_of,
)
from stnify.planning.functions import FunctionSites
from stnify.planning.modules import (
    GATED_AXIS,
    WEIGHT_MODULES,
    OwnWeight,
    computed_weights,
    own_weights,
    reason_against,
)
from stnify.planning.parameters import other_uses, parameter_sites
from stnify.trace import Traced, trace


def weight_sites(
    model: nn.Module, traced: Traced, exclude: Pattern, affine: bool = False
) -> tuple[list[WeightSite], list[Refusal]]:
    """Return every site whose weight can respond, and a refusal for every other weight.

    Args:
        model: The model that was traced.
        traced: Its graph.
        exclude: Layers that get no response.
        affine: Whether parameters that are no weight of a layer have sites as well. Without it,
            those that activations are multiplied with have them all the same.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = require_each(exclude, modules, "`exclude`")
    sites: list[WeightSite] = []
    refusals: dict[str, Refusal] = {}
    for found in _candidates(model, traced):
        if isinstance(found, WeightSite) and any(_within(found.name, name) for name in excluded):
            found = Refusal(found.name, "excluded by `exclude=`")
        if isinstance(found, WeightSite):
            sites.append(found)
        else:
            refusals[found.name] = found
    alone = list(parameter_sites(model, traced, sites))
    if not affine:
        meeting = meeting_tables(model, traced.graph)
        alone = [site for site in alone if site.weight in meeting]
    sites = _agreeing(sites, refusals)
    sites += [s for s in alone if not any(_within(s.name, name) for name in excluded)]
    for name, reason in traced.opaque.items():
        if not any(site.inside == name for site in sites):
            refusals[name] = Refusal(name, reason)
    _refuse_unused_weights(model, traced, sites, refusals)
    refusals |= {refusal.name: refusal for refusal in other_uses(model, traced, sites)}
    return sites, list(refusals.values())


def _within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}.")


def _candidates(model: nn.Module, traced: Traced) -> Iterator[WeightSite | Refusal]:
    """Yield what the nodes of the graph do with weights."""
    functions = FunctionSites(model, traced)
    firsts = {id(module): name for name, module in model.named_modules()}
    for node in traced.graph.nodes:
        if node.op != "call_module":
            yield from functions.find(node)
            continue
        owner = str(node.target)
        module = model.get_submodule(owner)
        hooked = module._backward_hooks or module._backward_pre_hooks  # the module itself must run
        if type(module) in WEIGHT_MODULES and not hooked and not computed_weights(module):
            for own in own_weights(module):
                yield _module_site(functions.names, module, owner, own, node.name)
            continue
        for name, child in module.named_modules(prefix=owner):
            for own in (*own_weights(child), *computed_weights(child)):
                key = f"{node.name}:{name}.{own.weight}"
                found = _module_site(functions.names, child, name, own, key, firsts[id(child)])
                if isinstance(found, WeightSite):
                    found = replace(found, way="swap", inside=owner)
                yield found
            for bare in _bare_weights(child):
                site = functions.renamed(bare, child)
                yield replace(site, way="swap", inside=owner, node=f"{node.name}:{site.weight}")


def _bare_weights(module: nn.Module) -> Iterator[WeightSite]:
    """Yield what a module of no known kind does with its own parameters, traced by itself."""
    known = {own.weight for own in own_weights(module)}
    own = {n for n, p in module.named_parameters(recurse=False) if p.ndim >= 2} - known
    if not own or type(module).__module__.startswith("torch.nn"):
        return
    traced = trace(module)
    functions = FunctionSites(module, traced)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            continue
        for found in functions.find(node):
            if not isinstance(found, WeightSite) or found.weight not in own:
                continue
            if found.computed is None and not found.transposed:
                yield found


def _module_site(
    names: dict[int, str],
    module: nn.Module,
    name: str,
    own: OwnWeight,
    node: str,
    first: str = "",
) -> WeightSite | Refusal:
    """Return what a call of a module does with one weight; ``first`` is the module's first name."""
    reason = reason_against(module)
    if reason:
        return Refusal(name, reason)
    behind = computing(module, own.weight)
    weight: Any = computed_value(module, own.weight) if behind else module._parameters[own.weight]
    parameter = main_part(behind) if behind else weight
    bias = None if own.bias is None else module._parameters[own.bias]
    axis = GATED_AXIS.get(own.kind, 0)
    groups = module.groups if own.kind.startswith("ConvTranspose") else 1
    assert isinstance(groups, int)
    site = WeightSite(
        name=name,
        kind=own.kind,
        way="module",
        node=node,
        weight=names[id(parameter)],
        bias=None if bias is None else names[id(bias)],
        weight_responds=parameter.requires_grad,
        bias_responds=bias is not None and bias.requires_grad,
        axis=axis,
        units=weight.shape[axis] * groups,
        computed=tuple(weight.shape) if behind else None,
        computed_by=f"{first}.{own.weight}".lstrip(".") if behind else None,
    )
    if not (site.weight_responds or site.bias_responds):
        return Refusal(name, "frozen (requires_grad=False)")
    return site


SHARING = {"Linear", "Embedding", "Product"}
"""Kinds of operator that can share one response, whichever dimension is gated."""


def _agreeing(sites: list[WeightSite], refusals: dict[str, Refusal]) -> list[WeightSite]:
    """Refuse weights that are used in ways one gate cannot serve."""
    kinds: dict[str, set[str]] = {}
    for site in sites:
        kinds.setdefault(site.key, set()).add(site.kind)
    kept = []
    for site in sites:
        if len(kinds[site.key]) > 1 and not kinds[site.key] <= SHARING:
            used = " and ".join(sorted(kinds[site.key]))
            refusals[site.name] = Refusal(site.name, f"its weight serves {used} at once")
        else:
            kept.append(site)
    return kept


def _refuse_unused_weights(
    model: nn.Module, traced: Traced, sites: Sequence[WeightSite], refusals: dict[str, Refusal]
) -> None:
    covered, parts = {site.weight for site in sites}, _parts(model, traced, sites)
    for name, parameter in model.named_parameters():
        refused = any(_within(name, refusal) for refusal in list(refusals))
        if parameter.ndim >= 2 and name not in covered and not refused:
            frozen = "" if parameter.requires_grad else ", and is frozen"
            reason = parts.get(name, "is not the weight of a known layer")
            refusals[name] = Refusal(name, f"{reason}{frozen}")


def _parts(model: nn.Module, traced: Traced, sites: Sequence[WeightSite]) -> dict[str, str]:
    """Return what to say of the parameters that weights which respond are computed from."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts: dict[str, str] = {}
    for site in sites:
        if site.computed_by is not None:
            reason = f"is part of the computed weight of {site.name or '(root)'}, which responds"
            for parameter in parameters_of(model, traced.graph, site.computed_by).values():
                parts.setdefault(names[id(parameter)], reason)
    return parts


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
            added += site.units * h + (math.prod(shape) if response == "full" else 0)
        if site.bias_responds and site.bias is not None and not seen[site.bias]:
            size = parameters[site.bias].numel()
            added += size * h + (size if response == "full" else 0)
        seen.update(name for name in (site.key, site.bias) if name)
        counted.append(replace(site, response_parameters=added))
    return counted
