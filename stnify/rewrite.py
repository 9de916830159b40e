"""3. Carry a plan out: the graph with hyper layers and noise sites, sharing the user's parameters.

The graph takes three more inputs, see ``tunable.pass_inputs``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from stnify.augment import Augment, Stats
from stnify.errors import UnsupportedModuleError
from stnify.layers import (
    HYPER_MODULES,
    HYPER_OPERATORS,
    OPERATOR_ARGUMENTS,
    BiasResponse,
    HyperLayer,
    WeightResponse,
    fan_in_bound,
)
from stnify.penalties import Recorder
from stnify.plan import NoiseSite, Plan, WeightNoiseSite, WeightSite
from stnify.regularizers import (
    FixedDropout,
    FixedScaledDotProductAttention,
    TunedAlphaDropout,
    TunedAttentionDropout,
    TunedDropBlock,
    TunedDropConnect,
    TunedDropout,
    TunedEmbeddingDropout,
    TunedGaussianNoise,
    TunedScalingNoise,
)
from stnify.space import HyperparameterSpace
from stnify.streams import RandomStream
from stnify.swap import SwappedFunction, SwappedModule, WeightUse
from stnify.trace import caller
from stnify.tunable import (
    PASS_INPUTS,
    PREFIX,
    TunableModule,
    Tunables,
    Use,
    WholeFunction,
    insert,
    share_tree,
)

RESPONSE_INPUT, CONSTRAINED, LINEARIZED = PASS_INPUTS


def _dropout(column: int, site: NoiseSite) -> nn.Module:
    return TunedDropout(column, *site.granularity, place=site.name, factor=site.factor)


def _alpha_dropout(column: int, site: NoiseSite) -> nn.Module:
    return TunedAlphaDropout(column, *site.granularity, place=site.name, factor=site.factor)


def _drop_block(column: int, site: NoiseSite) -> nn.Module:
    return TunedDropBlock(column, site.settings["block_size"], site.name, site.factor)


def _embedding_dropout(column: int, site: NoiseSite) -> nn.Module:
    return TunedEmbeddingDropout(column, site.settings["words"], site.name, site.factor)


def _attention_dropout(column: int, site: NoiseSite) -> nn.Module:
    if site.inside is not None:  # acts on the weights of an nn.MultiheadAttention
        return TunedDropout(column, *site.granularity, place=site.name, factor=site.factor)
    return TunedAttentionDropout(column, site.name, site.factor)


def _plain(kind: Callable[..., nn.Module]) -> Callable[[int, NoiseSite], nn.Module]:
    return lambda column, site: kind(column, place=site.name, factor=site.factor)


def _recorder(column: int, site: NoiseSite) -> nn.Module:
    return Recorder(site.column)


NOISES: dict[str, Callable[[int, NoiseSite], nn.Module]] = {
    "Dropout": _dropout,
    "AlphaDropout": _alpha_dropout,
    "AttentionDropout": _attention_dropout,
    "EmbeddingDropout": _embedding_dropout,
    "LockedDropout": _dropout,
    "DropPath": _dropout,
    "DropBlock": _drop_block,
    "GaussianNoise": _plain(TunedGaussianNoise),
    "ScalingNoise": _plain(TunedScalingNoise),
    "ActivationPenalty": _recorder,
    "TemporalActivationPenalty": _recorder,
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
    model: nn.Module,
    plan: Plan,
    space: HyperparameterSpace,
    stream: RandomStream,
    input_stats: Stats | None = None,
) -> TunableModule:
    """Build the tunable model that ``plan`` describes; ``model`` itself stays as it is.

    Args:
        model: The model the plan was made for. Its parameters are shared.
        plan: What to do.
        space: The hyperparameters, in the plan's columns.
        stream: Where fresh response weights, and later all noise, are drawn from.
        input_stats: Mean and standard deviation that images were normalised with, if any.

    Raises:
        UnsupportedModuleError: The model has a part of a name that is stnify's own.
    """
    _refuse_own_names(model)
    tunables = Tunables(space, model, stream)
    tunables.augment = _augment(plan, space, input_stats)
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
        inserted = site.place in {"after", "operand"}
        owner = site.name.rpartition(".")[0] if inserted else site.name
        tunables.follow(module, _nearest(model, owner))
        if site.inside is None:
            _place_noise(copy, nodes, site, f"{PREFIX}.noises.{key}", inputs[CONSTRAINED])
        else:
            swaps.noises.setdefault(site.inside, {})[site.name] = module
    _keep_modes(copy, model, tunables)
    uses: dict[str, list[Use]] = {}
    watched: dict[str, list[WeightSite]] = {}
    for call in plan.weights:
        key = _key(tunables, call, layers[call.node])
        if call.inside is not None:
            use = WeightUse(_place(call), call.bias, layers[call.node])
            swaps.uses.setdefault(call.inside, {})[_use(call)] = use
        elif call.value is not None:
            watched.setdefault(call.node.partition(":")[0], []).append(call)
        else:
            _call_layer(copy, nodes[call.node], call, f"{PREFIX}.layers.{key}", inputs)
        computed = call.computed is not None
        uses.setdefault(call.weight, []).append(Use(call.node, key, call.bias, computed))
    for name, calls in watched.items():
        _watch(copy, nodes, name, [(call, layers[call.node]) for call in calls], tunables, inputs)
    for noise in plan.weight_noises:
        sharing = _sharing(model, tunables, noise, uses)
        for weight, names in sharing.items():  # each follows the mode of its own module
            module = TunedDropConnect(space.index(noise.column), {weight: names})
            tunables.weight_noises.append(module)
            tunables.follow(module, _nearest(model, weight))
    _keep_whole(copy, plan, tunables)
    swaps.place(copy, tunables, inputs)
    copy.lint()
    tunables.own_code = [""] if plan.traced.opaque else _own_code(model, copy)
    graph = PassGraph(copy)
    read = plan.traced.through | _never_called(model, plan)
    tunables.serve(graph, uses, plan.traced.fixed, read)
    tunable = TunableModule(tunables)
    share_tree(tunable, graph)
    return tunable


def _refuse_own_names(model: nn.Module) -> None:
    """Raise UnsupportedModuleError if a part of the model is called as what is added to it."""
    names = [*vars(model), *model._modules, *model._parameters, *model._buffers]
    taken = [name for name in names if name.startswith(PREFIX)]
    if taken:
        raise UnsupportedModuleError(
            f"a model must leave names that begin with {PREFIX!r} to stnify, but "
            f"{type(model).__name__} has {taken[0]!r}. Rename it."
        )


def _never_called(model: nn.Module, plan: Plan) -> set[str]:
    """Return the modules that the traced graph does not call, but may have read numbers of."""
    calls = {str(node.target) for node in plan.traced.graph.nodes if node.op == "call_module"}

    def inside_call(name: str) -> bool:
        parts = name.split(".") if name else []
        return any(".".join(parts[:end]) in calls for end in range(len(parts) + 1))

    return {name for name, _ in model.named_modules() if not inside_call(name)}


def _own_code(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Return the modules that the graph calls and that run code which is not PyTorch's."""
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    names = {name for name in calls if not name.startswith(f"{PREFIX}.")}
    kinds = {name: {type(m) for m in model.get_submodule(name).modules()} for name in names}
    foreign = [n for n in names if any(k.__module__.split(".")[0] != "torch" for k in kinds[n])]
    return sorted(foreign)


def _nearest(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, or the innermost one that the name lies in."""
    modules = dict(model.named_modules(remove_duplicate=False))
    while name not in modules:
        name = name.rpartition(".")[0]
    return modules[name]


def _augment(plan: Plan, space: HyperparameterSpace, stats: Stats | None) -> Augment | None:
    """Build one module for all augmentations; what is tuned is not fixed."""
    columns = {site.kind: space.index(site.column) for site in plan.augmentations}
    settings = {
        name: value
        for site in plan.augmentations
        for name, value in site.settings.items()
        if name not in columns
    }
    return Augment(columns, settings, stats).to(space.unconstrained.device) if columns else None


# Layers -------------------------------------------------------------------------------------------


def _hyper_layers(model: nn.Module, plan: Plan) -> dict[str, HyperLayer]:
    """Build the hyper layer of each call, by node; uses of one weight share its response."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    h = len(plan.columns)
    weights: dict[str, WeightResponse] = {}
    biases: dict[str, BiasResponse] = {}
    layers: dict[str, HyperLayer] = {}
    shared: dict[tuple[str, ...], HyperLayer] = {}
    for site in plan.weights:
        weight = parameters[site.weight].detach()
        if site.computed is not None:
            weight = weight.new_empty(site.computed)
        if site.weight_responds and site.key not in weights:
            response = WeightResponse(weight, h, site.axis, plan.response, site.units)
            weights[site.key] = response
        if site.bias_responds and site.bias is not None and site.bias not in biases:
            bias, bound = parameters[site.bias], fan_in_bound(weight)
            biases[site.bias] = BiasResponse(bias, h, bound, plan.response)
        use = _use(site)
        if use not in shared:
            responses = weights.get(site.key), biases.get(site.bias or "")
            shared[use] = _hyper_layer(model, site, responses)
        layers[site.node] = shared[use]
    return layers


def _use(site: WeightSite) -> tuple[str, ...]:
    """Return what calls served by one layer have in common.

    A module called twice is one layer; code that is watched shows which weight it applies, not for
    which module.
    """
    match site.way:
        case "function":
            return (site.way, site.node)
        case "module":
            return (site.way, site.name)
        case "swap":
            return (site.way, _place(site), str(site.bias), site.kind, str(site.inside))


def _place(site: WeightSite) -> str:
    """Return where code that is watched finds the weight."""
    return site.computed_by if site.way == "swap" and site.computed_by else site.weight


def _hyper_layer(
    model: nn.Module,
    site: WeightSite,
    responses: tuple[WeightResponse | None, BiasResponse | None],
) -> HyperLayer:
    if site.way == "function":
        return HYPER_OPERATORS[site.kind](*responses)
    module = model.get_submodule(site.name)
    if site.way == "module":
        return HYPER_MODULES[type(module)](module, responses)
    padding = getattr(module, "padding_idx", None)
    if responses[0] is not None and isinstance(padding, int):
        responses[0].silence(padding)
    return HYPER_OPERATORS[site.kind](*responses)


def _key(tunables: Tunables, site: WeightSite, layer: HyperLayer) -> str:
    known = next((key for key, other in tunables.layers.items() if other is layer), None)
    return insert(tunables.layers, site.name, layer) if known is None else known


def _slots(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every place a parameter is registered at; a module under two names has one."""
    for path, module in root.named_modules(prefix=prefix):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def _sharing(
    model: nn.Module, tunables: Tunables, noise: WeightNoiseSite, uses: Mapping[str, Sequence[Use]]
) -> dict[str, tuple[str, ...]]:
    """Return each weight with the names of all tensors that are masked as it is.

    They are the names it has in the model, and those of what is added to it in response.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    registered = [*_slots(model, ""), *_slots(tunables, PREFIX)]
    sharing: dict[str, tuple[str, ...]] = {}
    for weight in noise.parameters:
        shared = {id(parameters[weight])}
        for use in uses.get(weight, ()):
            response = cast(HyperLayer, tunables.layers[use.layer]).weight_response
            if response is not None and response.response is not None and not use.computed:
                shared.add(id(response.response))
        sharing[weight] = tuple(name for name, tensor in registered if id(tensor) in shared)
    return sharing


# Graph --------------------------------------------------------------------------------------------


class PassGraph(nn.Module):
    """Runs a graph on the modules, parameters and buffers of a tunable model, by the user's names.

    It has no name of its own that the user's model may have. What is none of these, such as a plain
    tensor, is read from the user's model in each pass, as its own code does.

    Args:
        graph: Its targets are names in the tunable model's tree.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.__dict__.update(_stnify_graph=graph, _stnify_code=_compiled(graph))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tunables = self.__dict__.get("_modules", {}).get(PREFIX)
            if tunables is None:
                raise
            return getattr(tunables.original, name)

    def __getstate__(self) -> dict[str, Any]:
        own = nn.Module().__dict__  # the tree is shared again by whom it belongs to
        return {**own, "_stnify_graph": _Written.of(self.__dict__["_stnify_graph"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state["_stnify_graph"].graph()
        super().__setstate__({**state, "_stnify_graph": graph, "_stnify_code": _compiled(graph)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on its own inputs and those of ``tunable.pass_inputs``."""
        return self._stnify_code(self, *args, **kwargs)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function of the module it reads from and its inputs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<graph of stnify>", "exec"), scope)
    return cast(Callable[..., Any], scope["forward"])


@dataclass(frozen=True)
class _Reference:
    """A node among the arguments of another one.

    Attributes:
        name: Of the node.
    """

    name: str


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested arguments with ``function`` applied to every leaf."""
    return map_aggregate(value, function)


@dataclass(frozen=True)
class _Written:
    """A graph as a list of nodes, which can be pickled whatever its length.

    Attributes:
        nodes: Operation, target, arguments, keyword arguments and name of each, in order.
    """

    nodes: tuple[tuple[str, Any, Any, Any, str], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> "_Written":
        """Write a graph down."""

        def refer(value: Any) -> Any:
            return _mapped(
                value, lambda leaf: _Reference(leaf.name) if isinstance(leaf, fx.Node) else leaf
            )

        return cls(
            tuple((n.op, n.target, refer(n.args), refer(n.kwargs), n.name) for n in graph.nodes)
        )

    def graph(self) -> fx.Graph:
        """Make the graph again."""
        graph, made = fx.Graph(), dict[str, fx.Node]()

        def resolve(value: Any) -> Any:
            return _mapped(
                value, lambda leaf: made[leaf.name] if isinstance(leaf, _Reference) else leaf
            )

        for op, target, args, kwargs, name in self.nodes:
            made[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        return graph


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
    anchor = ordinary[-1] if ordinary else next(iter(graph.nodes)).prev
    for name, default in PASS_INPUTS.items():
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
    node, last = nodes[site.node], nodes[site.last]
    match site.place:
        case "replace":
            with graph.inserting_before(node):
                noisy = graph.call_module(target, *_noise_call(node, site.kind, constrained))
            node.replace_all_uses_with(noisy)
            graph.erase_node(node)
            nodes[site.node] = noisy
        case "operand":
            with graph.inserting_before(last):
                noisy = graph.call_module(target, (node, constrained))
            last.replace_input_with(node, noisy)
        case "after":
            behind = f"behind {site.node}"  # what noise declared before has made of the node
            value, last = (nodes[behind],) * 2 if behind in nodes else (node, last)
            if last.op == "placeholder":
                last = [other for other in graph.nodes if other.op == "placeholder"][-1]
            later = _after(graph, last)
            others = (node.args[0],) if site.kind == "EmbeddingDropout" else ()
            with graph.inserting_after(last):
                noisy = graph.call_module(target, (value, constrained, *others))
            value.replace_all_uses_with(noisy, delete_user_cb=lambda user: user in later)
            nodes[behind] = noisy


def _noise_call(
    node: fx.Node, kind: str, constrained: fx.Node
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which noise takes the place of a node."""
    if kind == "AttentionDropout":
        _, (args, kwargs) = _without_dropout(node)
        return args, {**kwargs, "constrained": constrained}
    return (node.args[0] if node.args else node.kwargs["input"], constrained), {}


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    order = list(graph.nodes)
    return set(order[order.index(node) + 1 :])


def _keep_modes(graph: fx.Graph, model: nn.Module, tunables: Tunables) -> None:
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
        tunables.follow(module, _nearest(model, caller(node)))
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
    function: Any = node.target
    names = ("input", "output_size") if site.way == "module" else OPERATOR_ARGUMENTS[function]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    with graph.inserting_before(node):
        weight, bias = arguments.pop("weight", None), arguments.pop("bias", None)
        if site.way == "module":
            weight = graph.get_attr(f"{site.name}.weight".lstrip("."))
            bias = graph.get_attr(f"{site.name}.bias".lstrip(".")) if site.bias else None
        activations = arguments.pop("input")
        call = graph.call_module(
            target,
            (activations, weight, bias, inputs[RESPONSE_INPUT], inputs[LINEARIZED]),
            arguments,
        )
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _watch(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    name: str,
    calls: list[tuple[WeightSite, HyperLayer]],
    tunables: Tunables,
    inputs: dict[str, fx.Node],
) -> None:
    """Call a function as it is, watched for calls on the weights it receives."""
    node = nodes[name]
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(Tensor, str(node.target))
    module = SwappedFunction(function, [(layer, site.transposed) for site, layer in calls])
    target = f"{PREFIX}.functions.{insert(tunables.functions, name, module)}"
    weights = tuple(nodes[site.value] for site, _ in calls if site.value is not None)
    biases = tuple(nodes[site.value_bias] if site.value_bias else None for site, _ in calls)
    with graph.inserting_before(node):
        watched = graph.call_module(
            target,
            (
                tuple(node.args),
                dict(node.kwargs),
                weights,
                biases,
                inputs[RESPONSE_INPUT],
                inputs[LINEARIZED],
            ),
        )
    node.replace_all_uses_with(watched)
    graph.erase_node(node)


# Modules that could not be traced through ---------------------------------------------------------


@dataclass
class _Swaps:
    """What is swapped inside which module, by qualified names."""

    model: nn.Module
    uses: dict[str, dict[tuple[str, ...], WeightUse]] = field(default_factory=dict)
    noises: dict[str, dict[str, nn.Module]] = field(default_factory=dict)

    def place(self, graph: fx.Graph, tunables: Tunables, inputs: dict[str, fx.Node]) -> None:
        """Call swapped modules in the place of their originals."""
        for node in list(graph.nodes):
            owner = str(node.target)
            if node.op != "call_module" or owner.startswith(f"{PREFIX}."):
                continue
            if owner and owner not in self.uses.keys() | self.noises.keys():
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
        """Swap what is inside a module, by names relative to it."""
        module = self.model.get_submodule(owner)
        names = {id(p): name for name, p in module.named_parameters()}
        owners = {id(inner): name for name, inner in module.named_modules()}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))

        def inside(name: str) -> str:
            if name in parameters:
                return names[id(parameters[name])]
            path, _, attribute = name.rpartition(".")
            return f"{owners[id(self.model.get_submodule(path))]}.{attribute}".lstrip(".")

        uses = [
            WeightUse(inside(weight), None if bias is None else inside(bias), layer)
            for weight, bias, layer in self.uses.get(owner, {}).values()
        ]
        prefix = f"{owner}." if owner else ""
        noises = {
            "" if name == owner else name.removeprefix(prefix): noise
            for name, noise in self.noises.get(owner, {}).items()
        }
        return SwappedModule(module, uses, noises)
