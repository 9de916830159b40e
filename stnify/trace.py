"""2. Trace a model into a graph, without changing the model.

A module is a leaf of the graph if it comes from ``torch.nn``, is a normalisation or dropout, or
holds no weight of two or more dimensions; all others are traced through, so that the layers inside
them become visible. A module that cannot be traced through becomes a leaf as well, with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from stnify.errors import TraceError
from stnify.patterns import choose

NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
DROPOUTS: tuple[type[nn.Module], ...] = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class ModuleOutput:
    """What one call of a module returned while tracing.

    Attributes:
        value: A node, or a nested structure of nodes.
        last: The last node the graph held when the module returned.
    """

    value: Any
    last: fx.Node


@dataclass(frozen=True)
class Traced:
    """A model's graph and what tracing learned.

    Attributes:
        graph: Nodes refer to the model's own modules and parameters by qualified name.
        outputs: Qualified module name to one entry for each of its calls.
        opaque: Modules that could not be traced through, with the reason.
        constants: Tensors made while tracing, by the name the graph uses.
        fixed: Optional arguments of the model's forward, traced at these defaults.
    """

    graph: fx.Graph
    outputs: dict[str, list[ModuleOutput]] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


def trace(model: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> Traced:
    """Trace ``model`` as it trains, and leave it exactly as it was.

    Args:
        model: Any module.
        leaves: Patterns or types not to trace through.

    Raises:
        TraceError: ``model.forward`` itself cannot be traced.
    """
    tracer = SiteTracer(choose(leaves, dict(model.named_modules())))
    with _state_restored(model) as added:
        model.train()
        try:
            with _len_of_proxies(model):
                graph = tracer.trace(model)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__}.forward must be traceable by torch.fx, but it is not: "
                f"{error} Move the data-dependent part into a submodule and name it in `leaves=`."
            ) from error
    constants = {name: value for name, value in added.items() if isinstance(value, Tensor)}
    return Traced(graph, tracer.outputs, tracer.opaque, constants, tracer.fixed)


class SiteTracer(fx.Tracer):
    """Traces down to leaves and remembers what each module returned.

    Args:
        leaves: Qualified names not to trace through.
    """

    def __init__(self, leaves: Sequence[str] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = set(leaves)
        self.outputs: dict[str, list[ModuleOutput]] = {}
        self.opaque: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Fix optional arguments at their defaults: a traced None would not be None."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in enumerate(arguments):
            if isinstance(argument, fx.Proxy) and argument.node.args:
                self.fixed[str(argument.node.target)] = argument.node.args[0]
                arguments[i] = argument.node.args[0]
        return function, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is called as it is: see the module docstring for the rule."""
        if module_qualified_name in self.leaves | self.opaque.keys():
            return True
        if isinstance(m, (*NORMALIZATIONS, *DROPOUTS)):
            return True
        if type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential):
            return True
        holds_weights = any(parameter.ndim >= 2 for parameter in m.parameters())
        holds_dropout = any(isinstance(child, DROPOUTS) for child in m.modules())
        return not (holds_weights or holds_dropout or isinstance(m, nn.Sequential))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a call of ``m``; if that fails, take its nodes back and call it as a leaf."""
        name = self.path_of_module(m)
        before = set(self.graph.nodes)
        try:
            output = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if name in self.opaque:
                raise
            self.opaque[name] = f"cannot be traced through ({type(error).__name__}: {error})"
            self._roll_back(before, name)
            output = super().call_module(m, forward, args, kwargs)
        value = map_aggregate(output, lambda v: v.node if isinstance(v, fx.Proxy) else v)
        last = next(iter(reversed(self.graph.nodes)))
        self.outputs.setdefault(name, []).append(ModuleOutput(value, last))
        return output

    def _roll_back(self, before: set[fx.Node], name: str) -> None:
        """Erase nodes made since ``before``; parameters stay, because their proxies are cached."""
        for node in reversed(self.graph.nodes):
            if node not in before and node.op != "get_attr":
                self.graph.erase_node(node)
        inside = [other for other in self.outputs if other.startswith(f"{name}.")]
        for other in inside:
            kept = [output for output in self.outputs[other] if output.last in before]
            self.outputs[other] = kept
            if not kept:
                del self.outputs[other]


def caller(node: fx.Node) -> str:
    """Return the qualified name of the module whose forward made ``node``; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((name for name, _ in reversed(list(stack.values()))), "")


@contextmanager
def _len_of_proxies(model: nn.Module) -> Iterator[None]:
    """Let ``len(tensor)`` in the code of the model's modules be traced."""

    def traced_len(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", len, (value,), {})
        return len(value)

    forwards = [getattr(type(module).forward, "__globals__", {}) for module in model.modules()]
    scopes = [scope for scope in {id(s): s for s in forwards}.values() if "len" not in scope]
    for scope in scopes:
        scope["len"] = traced_len
    try:
        yield
    finally:
        for scope in scopes:
            del scope["len"]


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Put every module's attributes back; yield what tracing added to the root."""
    registries = ("_parameters", "_buffers", "_modules")
    before = [
        (module, dict(module.__dict__), {name: dict(module.__dict__[name]) for name in registries})
        for module in model.modules()
    ]
    added: dict[str, Any] = {}
    known = set(model.__dict__) | set(model._buffers)
    try:
        yield added
    finally:
        now = {**model.__dict__, **model._buffers}
        added.update({name: value for name, value in now.items() if name not in known})
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name in registries:
                module.__dict__[name].clear()
                module.__dict__[name].update(contents[name])
