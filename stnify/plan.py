"""2. Understand before doing: every site that will change, and every refusal with its reason.

A ``Plan`` is made from a traced graph and the declarations; it changes nothing and can be printed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, fx, nn

from stnify.declare import (
    Column,
    Decay,
    Declaration,
    Dropout,
    LossTerm,
    Pattern,
    Site,
    refuse_duplicates,
)
from stnify.errors import DeclarationError, UnsupportedModuleError
from stnify.patterns import choose, matches, require
from stnify.trace import Traced

ResponseKind = Literal["full", "gate"]

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

Granularity = tuple[Literal["element", "channel"], int]
ELEMENTS: Granularity = ("element", 0)
EXISTING_MODULES: dict[type[Site], dict[type[nn.Module], Granularity]] = {
    Dropout: {
        nn.Dropout: ELEMENTS,
        nn.Dropout1d: ("channel", 1),
        nn.Dropout2d: ("channel", 2),
        nn.Dropout3d: ("channel", 3),
    },
}
"""Modules a kind of site takes over, by exact type."""

EXISTING_FUNCTIONS: dict[type[Site], dict[Callable[..., Any], Granularity]] = {
    Dropout: {
        F.dropout: ELEMENTS,
        F.dropout1d: ("channel", 1),
        F.dropout2d: ("channel", 2),
        F.dropout3d: ("channel", 3),
    },
}
"""Functions a kind of site takes over."""

GATED_AXIS = {"Embedding": 1, "ConvTranspose1d": 1, "ConvTranspose2d": 1, "ConvTranspose3d": 1}
"""Weight dimension of the gated units, where it is not the first."""


@dataclass(frozen=True)
class WeightSite:
    """One call in which a weight meets activations.

    Attributes:
        name: Qualified name of the module that owns the weight.
        kind: Row of the layer table.
        way: Whether a module or a function is called.
        node: Name of the call in the graph.
        weight: Qualified name of the weight.
        bias: Qualified name of the bias, if it is a parameter.
        weight_responds: False if the weight is frozen.
        bias_responds: False if there is no bias, or it is frozen or computed.
        arguments: Fixed arguments of the call beside input, weight and bias.
        layout: Which rows belong to which example, once it has been measured.
        response_parameters: Parameters this site adds; a weight used twice counts once.
    """

    name: str
    kind: str
    way: Literal["module", "function"]
    node: str
    weight: str
    bias: str | None
    weight_responds: bool
    bias_responds: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "batch (assumed)"
    response_parameters: int = 0


@dataclass(frozen=True)
class NoiseSite:
    """One place where noise of a tunable rate acts.

    Attributes:
        name: Qualified name of the module it replaces or follows, or ``"input"``.
        kind: Class name of the declaration.
        place: Whether it replaces the node or is put after it.
        node: Name of that node in the graph.
        last: Name of the last node that must keep the untouched value, for ``"after"``.
        column: Name of the hyperparameter.
        granularity: Element- or channel-wise, and how many trailing dimensions a channel spans.
    """

    name: str
    kind: str
    place: Literal["replace", "after"]
    node: str
    last: str
    column: str
    granularity: Granularity


@dataclass(frozen=True)
class DecaySite:
    """Weights that one decay hyperparameter penalises, by qualified name."""

    column: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class LossSite:
    """A hyperparameter that acts in the loss, with its penalty if it was declared with one."""

    column: str
    penalty: Callable[[nn.Module, Any, Tensor], Tensor] | None


@dataclass(frozen=True)
class Refusal:
    """Something that stays an ordinary general parameter or module, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do; ``str(plan)`` is a table.

    Attributes:
        columns: The hyperparameters, resolved.
        weights, noises, decays, losses: What changes.
        refusals: What does not, and why.
        response: Full response parameters, or gates of the general weights.
        parameters: Size of the model before.
        traced: The graph the names of nodes refer to.
    """

    columns: tuple[Column, ...]
    weights: tuple[WeightSite, ...]
    noises: tuple[NoiseSite, ...]
    decays: tuple[DecaySite, ...]
    losses: tuple[LossSite, ...]
    refusals: tuple[Refusal, ...]
    response: ResponseKind
    parameters: int
    traced: Traced = field(repr=False, compare=False)

    @property
    def response_parameters(self) -> int:
        """Response parameters the conversion adds."""
        return sum(site.response_parameters for site in self.weights)

    def __str__(self) -> str:
        rows = [("layer", "kind", "way", "rows", "adds")]
        rows += [
            (s.name or "(root)", s.kind, s.way, s.layout, f"{s.response_parameters:,}")
            for s in self.weights
        ]
        lines = [*_table(rows), ""]
        for column in self.columns:
            where = [
                f"{site.place} {site.name}" for site in self.noises if site.column == column.name
            ]
            where += [
                f"{len(site.parameters)} weights"
                for site in self.decays
                if site.column == column.name
            ]
            where += ["the loss" for site in self.losses if site.column == column.name]
            lines.append(f"{column.name} = {column.init:g} in {column.range}: {', '.join(where)}")
        lines += ["", *(f"unchanged: {r.name}: {r.reason}" for r in self.refusals)]
        lines.append(
            f"{len(self.weights)} sites with a {self.response} response add "
            f"{self.response_parameters:,} parameters to {self.parameters:,}"
        )
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    traced: Traced,
    declared: Sequence[Declaration],
    *,
    response: ResponseKind = "full",
    exclude: Pattern = (),
    scale: float = 1.0,
    responds: bool = True,
) -> Plan:
    """Find every site of ``declared`` in ``traced`` and every weight that can respond.

    Args:
        model: The model that was traced.
        traced: Its graph.
        declared: Hyperparameters.
        response: ``"full"`` or ``"gate"``.
        exclude: Layers that get no response, by pattern or type.
        scale: Default perturbation scale, unconstrained units.
        responds: False for ``method="fixed"``, where no weight needs a response.

    Raises:
        DeclarationError: A pattern matches nothing, or two declarations claim one place.
        UnsupportedModuleError: No layer can respond.
    """
    weights, refusals = _weight_sites(model, traced, exclude) if responds else ([], [])
    if responds and not any(site.weight_responds or site.bias_responds for site in weights):
        kinds = sorted({*WEIGHT_MODULES.values()})
        refused = "; ".join(f"{r.name}: {r.reason}" for r in refusals) or "it has no such layer"
        raise UnsupportedModuleError(
            f"{type(model).__name__} must hold at least one trainable layer that can respond "
            f"({', '.join(kinds)}), but there is none to rewrite: {refused}."
        )
    columns: list[Column] = []
    noises: list[NoiseSite] = []
    decays: list[DecaySite] = []
    losses: list[LossSite] = []
    for declaration in declared:
        match declaration:
            case Site():
                noises += _noise_sites(model, traced, declaration, columns, scale)
            case Decay():
                decays += _decay_sites(model, declaration, columns, scale)
            case LossTerm():
                columns.append(Column.of(declaration, declaration.name, 0.0, scale))
                losses.append(LossSite(declaration.name, declaration.penalty))
            case _:
                raise DeclarationError(
                    f"{declaration!r} must be a Site, a Decay or a LossTerm to have a place."
                )
    refuse_duplicates(column.name for column in columns)
    _refuse_shared_places(noises, decays)
    return Plan(
        columns=tuple(columns),
        weights=tuple(_counted(model, weights, len(columns), response)),
        noises=tuple(noises),
        decays=tuple(decays),
        losses=tuple(losses),
        refusals=tuple(refusals),
        response=response,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        traced=traced,
    )


# Weights ------------------------------------------------------------------------------------------


def _weight_sites(
    model: nn.Module, traced: Traced, exclude: Pattern
) -> tuple[list[WeightSite], list[Refusal]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    excluded = set(choose(exclude, dict(model.named_modules(remove_duplicate=False))))
    sites: list[WeightSite] = []
    refusals = {name: Refusal(name, reason) for name, reason in traced.opaque.items()}
    for node in traced.graph.nodes:
        found = _weight_site(model, node, names)
        if isinstance(found, WeightSite) and found.name in excluded:
            found = Refusal(found.name, "excluded by `exclude=`")
        if isinstance(found, WeightSite):
            sites.append(found)
        elif found is not None:
            refusals[found.name] = found
    sites = _agreeing(sites, refusals)
    _refuse_unused_weights(model, sites, refusals)
    return sites, list(refusals.values())


def _weight_site(
    model: nn.Module, node: fx.Node, names: Mapping[int, str]
) -> WeightSite | Refusal | None:
    if node.op == "call_module":
        return _module_site(model.get_submodule(str(node.target)), node, names)
    if node.op == "call_function" and node.target in WEIGHT_FUNCTIONS:
        return _function_site(model, node, names)
    return None


def _module_site(
    module: nn.Module, node: fx.Node, names: Mapping[int, str]
) -> WeightSite | Refusal | None:
    name = str(node.target)
    if type(module) not in WEIGHT_MODULES:
        return None
    reason = _module_reason(module)
    if reason:
        return Refusal(name, reason)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)
    site = WeightSite(
        name=name,
        kind=WEIGHT_MODULES[type(module)],
        way="module",
        node=node.name,
        weight=names[id(weight)],
        bias=None if bias is None else names[id(bias)],
        weight_responds=weight.requires_grad,
        bias_responds=isinstance(bias, nn.Parameter) and bias.requires_grad,
        arguments=_call_arguments(node, ("input", "output_size")),
    )
    if any(isinstance(argument, fx.Node) for argument in site.arguments.values()):
        return Refusal(name, "is called with an output size known only while running")
    if not (site.weight_responds or site.bias_responds):
        return Refusal(name, "frozen (requires_grad=False)")
    return site


def _module_reason(module: nn.Module) -> str:
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed (weight norm, spectral norm, ...), not a parameter"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a hyper layer would bypass"
    if module.weight.is_complex():
        return "has complex weights"
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
        return "is an embedding with sparse gradients or max_norm"
    return ""


def _function_site(
    model: nn.Module, node: fx.Node, names: Mapping[int, str]
) -> WeightSite | Refusal | None:
    assert callable(node.target)
    kind, signature = WEIGHT_FUNCTIONS[node.target]
    arguments = _call_arguments(node, signature)
    weight, bias = arguments.pop("weight", None), arguments.pop("bias", None)
    caller = _caller(node)
    parameter = _parameter(model, weight)
    if parameter is None:
        return Refusal(caller, f"calls F.{node.target.__name__} with a computed weight")
    if any(isinstance(argument, fx.Node) for argument in arguments.values()):
        return Refusal(caller, "calls a convolution whose geometry is known only while running")
    bias_parameter = _parameter(model, bias)
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


def _caller(node: fx.Node) -> str:
    """Qualified name of the module whose forward made ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((name for name, _ in reversed(list(stack.values()))), "") or node.name


def _agreeing(sites: list[WeightSite], refusals: dict[str, Refusal]) -> list[WeightSite]:
    """Refuse weights that are used in ways one gate cannot serve."""
    kinds: dict[str, set[str]] = {}
    for site in sites:
        kinds.setdefault(site.weight, set()).add(site.kind)
    kept = []
    for site in sites:
        if len(kinds[site.weight]) > 1 and not kinds[site.weight] <= {"Linear", "Embedding"}:
            used = " and ".join(sorted(kinds[site.weight]))
            refusals[site.name] = Refusal(site.name, f"its weight serves {used} at once")
        else:
            kept.append(site)
    return kept


def _refuse_unused_weights(
    model: nn.Module, sites: Sequence[WeightSite], refusals: dict[str, Refusal]
) -> None:
    covered = {site.weight for site in sites}
    for name, parameter in model.named_parameters():
        owners = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
        refused = any(owner in refusals for owner in owners)
        if parameter.ndim >= 2 and name not in covered and not refused:
            frozen = "" if parameter.requires_grad else ", and is frozen"
            refusals[name] = Refusal(name, f"is not the weight of a known layer{frozen}")


def _counted(
    model: nn.Module, sites: Sequence[WeightSite], h: int, response: ResponseKind
) -> list[WeightSite]:
    """Fill in how many parameters each site adds ([DeltaSTN] 3.4 and E, less the general ones)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: Counter[str] = Counter()
    counted = []
    for site in sites:
        added = 0
        if site.weight_responds and not seen[site.weight]:
            weight = parameters[site.weight]
            units = weight.shape[GATED_AXIS.get(site.kind, 0)]
            units *= _groups(model, site) if site.kind.startswith("ConvTranspose") else 1
            added += units * h + (weight.numel() if response == "full" else 0)
        if site.bias_responds and site.bias is not None and not seen[site.bias]:
            size = parameters[site.bias].numel()
            added += size * h + (size if response == "full" else 0)
        seen.update(name for name in (site.weight, site.bias) if name)
        counted.append(replace(site, response_parameters=added))
    return counted


def _groups(model: nn.Module, site: WeightSite) -> int:
    if site.way == "function":
        return int(site.arguments.get("groups", 1))
    groups = model.get_submodule(site.name).groups
    assert isinstance(groups, int)
    return groups


# Noise --------------------------------------------------------------------------------------------


def _noise_sites(
    model: nn.Module,
    traced: Traced,
    declaration: Site,
    columns: list[Column],
    scale: float,
) -> list[NoiseSite]:
    if declaration.at == "input":
        places = [_input_place(traced)]
    elif declaration.after is not None:
        places = _places_after(model, traced, declaration)
    else:
        places = _existing_places(model, traced, declaration)
    rates = {name: rate for name, _, _, _, _, rate in places if rate is not None}
    names = list(dict.fromkeys(name for name, *_ in places))
    column_of = {
        name: f"{declaration.name}.{name}" if declaration.per_layer else declaration.name
        for name in names
    }
    for column in dict.fromkeys(column_of.values()):
        own = [rates[name] for name in names if column_of[name] == column and name in rates]
        start = sum(own) / len(own) if own else declaration.default_init
        low, high = declaration.range
        start = start if low < start < high else declaration.default_init
        columns.append(Column.of(declaration, column, start, scale))
    return [
        NoiseSite(
            name=name,
            kind=type(declaration).__name__,
            place=place,
            node=node,
            last=last,
            column=column_of[name],
            granularity=granularity,
        )
        for name, place, node, last, granularity, _ in places
    ]


Place = tuple[str, Literal["replace", "after"], str, str, Granularity, float | None]


def _input_place(traced: Traced) -> Place:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if not inputs:
        raise DeclarationError('`at="input"` needs a model whose forward takes an input.')
    return ("input", "after", inputs[0].name, inputs[-1].name, ELEMENTS, None)


def _places_after(model: nn.Module, traced: Traced, declaration: Site) -> list[Place]:
    assert declaration.after is not None
    candidates = {name: model.get_submodule(name) for name in traced.outputs if name}
    purpose = f"`after` of {declaration.name!r}"
    chosen = require(choose(declaration.after, candidates), declaration.after, candidates, purpose)
    chosen = _without(chosen, declaration, candidates)
    places: list[Place] = []
    for name in chosen:
        for output in traced.outputs[name]:
            if not isinstance(output.value, fx.Node):
                raise DeclarationError(
                    f"{purpose} must match modules that return one tensor, but {name!r} returns "
                    f"{type(output.value).__name__}. Choose a module inside it."
                )
            places.append((name, "after", output.value.name, output.last.name, ELEMENTS, None))
    return places


def _existing_places(model: nn.Module, traced: Traced, declaration: Site) -> list[Place]:
    places: list[Place] = []
    candidates: dict[str, nn.Module | None] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            granularity = EXISTING_MODULES[type(declaration)].get(type(module))
            name, rate = str(node.target), getattr(module, "p", None)
        elif node.op == "call_function":
            granularity = EXISTING_FUNCTIONS[type(declaration)].get(node.target)
            module, name = None, f"{_caller(node)}.{getattr(node.target, '__name__', '')}"
            rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p")
        else:
            continue
        if granularity is not None:
            known = float(rate) if isinstance(rate, int | float) else None
            places.append((name, "replace", node.name, node.name, granularity, known))
            candidates[name] = module
    patterns: Pattern = "**" if declaration.at is None else declaration.at
    if declaration.at is None and not candidates:
        kinds = ", ".join(kind.__name__ for kind in EXISTING_MODULES[type(declaration)])
        raise DeclarationError(
            f"{declaration.name!r} takes over existing modules ({kinds}), but "
            f'{type(model).__name__} calls none. Insert some with `after=PATTERN` or `at="input"`.'
        )
    chosen = require(
        choose(patterns, candidates), patterns, candidates, f"`at` of {declaration.name!r}"
    )
    chosen = _without(chosen, declaration, candidates)
    return [place for place in places if place[0] in chosen]


def _without(
    chosen: list[str], declaration: Site, candidates: Mapping[str, nn.Module | None]
) -> list[str]:
    excluded = set(choose(declaration.exclude, candidates))
    kept = [name for name in chosen if name not in excluded]
    purpose = f"{declaration.name!r} less its `exclude`"
    return require(kept, declaration.exclude, candidates, purpose)


# Decay --------------------------------------------------------------------------------------------


def _decay_sites(
    model: nn.Module, declaration: Decay, columns: list[Column], scale: float
) -> list[DecaySite]:
    weights = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad and name not in _no_decay(model)
    }
    chosen = _decayed(declaration.at, weights)
    purpose = f"`at` of {declaration.name!r}"
    chosen = require(chosen, declaration.at, weights, purpose)
    excluded = _decayed(declaration.exclude, weights)
    kept = [name for name in chosen if name not in excluded]
    require(kept, declaration.exclude, weights, f"{declaration.name!r} less its `exclude`")
    groups: dict[str, list[str]] = {}
    for name in kept:
        module = name.rpartition(".")[0]
        column = f"{declaration.name}.{module}" if declaration.per_layer else declaration.name
        groups.setdefault(column, []).append(name)
    columns += [
        Column.of(declaration, column, declaration.default_init, scale) for column in groups
    ]
    return [DecaySite(column, tuple(names)) for column, names in groups.items()]


def _decayed(patterns: Pattern, weights: Mapping[str, nn.Module]) -> list[str]:
    """Choose weights by their own name, their module's name or its type."""
    by_weight = set(choose(patterns, weights))
    globs = [patterns] if isinstance(patterns, str | type) else list(patterns)
    return [
        name
        for name in weights
        if name in by_weight
        or any(isinstance(g, str) and matches(g, name.rpartition(".")[0]) for g in globs)
    ]


def _no_decay(model: nn.Module) -> set[str]:
    names = getattr(model, "no_weight_decay", None)
    return set(names()) if callable(names) else set()


def _refuse_shared_places(noises: Sequence[NoiseSite], decays: Sequence[DecaySite]) -> None:
    claims = [(site.place, site.node, site.kind, site.name) for site in noises]
    twice = [claim for claim, count in Counter(claims).items() if count > 1]
    if twice:
        raise DeclarationError(
            f"a place can have one hyperparameter of a kind, but {twice[0][3]!r} is claimed by "
            f"{[site.column for site in noises if site.name == twice[0][3]]}. Narrow `at`, "
            f"`after` or `exclude`."
        )
    decayed = Counter(name for site in decays for name in site.parameters)
    shared = [name for name, count in decayed.items() if count > 1]
    if shared:
        raise DeclarationError(
            f"a weight can have one tuned decay, but {shared[0]!r} is claimed by "
            f"{[site.column for site in decays if shared[0] in site.parameters]}. Narrow `at` or "
            f"`exclude`."
        )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
