"""The tracer: which modules are leaves, what each call returned, what could not be traced."""

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, fx, is_autocast_enabled, is_grad_enabled, nn
from torch.fx.node import map_aggregate
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from stnify.kept import kept_tensors, kept_values
from stnify.trace.functions import TracedFunctions
from stnify.trace.snapshot import ChangedAttributeError, Snapshot

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
        whole: Functions that are called as they are, because they cannot be traced through.
        through: Modules whose code the graph replaces.
    """

    graph: fx.Graph
    outputs: dict[str, list[ModuleOutput]] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    whole: frozenset[Callable[..., Any]] = frozenset()
    through: frozenset[str] = frozenset()


def random_states() -> tuple[Any, ...]:
    """Return the states of the generators a forward may draw from while it is traced."""
    states = torch.get_rng_state(), random.getstate()
    if "numpy" not in sys.modules:
        return states
    return *states, sys.modules["numpy"].random.get_state()[1].tobytes()


def refuse_draws(before: tuple[Any, ...]) -> None:
    """Raise if a generator has moved: a number drawn while tracing would stay the same for ever."""
    now = random_states()
    if not torch.equal(now[0], before[0]) or now[1:] != before[1:]:
        raise RuntimeError("it draws random numbers that do not depend on its inputs")


class EagerUse(TorchFunctionMode):
    """Raises if code computes with what the model keeps while it is traced, past the tracer.

    It does so if it gets parameters from ``self.parameters()``, say, or computes with a tensor that
    is no buffer: the result would be a constant.

    Args:
        model: Its parameters, buffers and other tensors are meant.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        values = [value for module in model.modules() for value in kept_values(module).values()]
        kept = [*kept_tensors(values), *model.buffers()]
        self._kept = {id(tensor) for tensor in kept}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` and look at what it got and what it returned; before, if it may write."""
        kwargs = kwargs or {}
        if _writes(func):
            self._refuse_kept(args, kwargs)
        result = func(*args, **kwargs)
        if func in READS or any(isinstance(value, Tensor) for value in tree_leaves(result)):
            self._refuse_kept(args, kwargs)
        return result

    def _refuse_kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = tree_leaves((args, kwargs))
        if any(isinstance(value, nn.Parameter) for value in given):
            raise RuntimeError("it computes with parameters that it does not name as attributes")
        if any(id(value) in self._kept for value in given):
            raise RuntimeError("it computes with a tensor it keeps, apart from its inputs")


def _writes(function: Callable[..., Any]) -> bool:
    """Whether a function is called as those are that change a tensor in place."""
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE


IN_PLACE = {"__setitem__", "__set__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
"""Operators that change a tensor in place; names of functions that do end in one underscore."""


READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__contains__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__complex__, Tensor.__index__),
    *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero),
}
"""Functions that give a tensor's numbers to Python."""


class SiteTracer(fx.Tracer):
    """Traces down to leaves and remembers what each module returned.

    What code does to buffers in place is traced; a module that does more than compute with its
    inputs, parameters and buffers, for example counts its calls in an attribute, becomes a leaf.

    Args:
        leaves: Qualified names not to trace through.
        functions: Functions that are left whole.
        given: Optional arguments of the model's forward that are inputs nevertheless.
        training: Whether the model is traced as it trains; parts may stay in eval mode.
    """

    def __init__(
        self,
        leaves: Sequence[str],
        functions: TracedFunctions,
        given: Collection[str] = (),
        *,
        training: bool = True,
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = set(leaves)
        self.given = set(given)
        self.functions = functions
        self.training = training
        self.outputs: dict[str, list[ModuleOutput]] = {}
        self.opaque: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}
        self.proxies: list[fx.Proxy] = []
        self.proxy_buffer_attributes = True
        self._contexts = _contexts()

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record an operation, unless a graph would do something else when it is run again."""
        if kind.startswith("call_") and _contexts() != self._contexts:
            raise RuntimeError(
                "it computes under no_grad, autocast or checkpoint, which a graph cannot hold"
            )
        if _writes_to_constant(kind, target, *args[:1]):
            raise RuntimeError("it writes to a tensor it makes, which a graph would make once")
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.proxies.append(proxy)
        return proxy

    def assigned(self) -> list[tuple[fx.Proxy, str]]:
        """Return the tensors on which code has set an attribute, such as ``weight.data``."""
        more = [proxy for proxy in self.proxies if len(vars(proxy)) > len(_PLAIN)]
        return [(proxy, name) for proxy in more for name in vars(proxy).keys() - _PROXY]

    def refuse_assignments(self, before: int = 0) -> None:
        """Raise if code has set attributes of more tensors than ``before``."""
        assigned = self.assigned()
        if len(assigned) > before:
            name = assigned[-1][1]
            raise RuntimeError(f"it sets {name!r} of a tensor, which a graph would not do again")

    def create_arg(self, a: Any) -> Any:
        """Keep dictionaries of other types what they are; a graph would return plain ones."""
        if isinstance(a, dict) and is_dataclass(a):
            fields = {str(key): self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        if type(a) is OrderedDict:
            pairs = tuple((key, self.create_arg(value)) for key, value in a.items())
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        return super().create_arg(a)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Fix optional arguments at their defaults: a traced None would not be None."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in enumerate(arguments):
            optional = isinstance(argument, fx.Proxy) and argument.node.args
            if optional and str(argument.node.target) not in self.given:
                self.fixed[str(argument.node.target)] = argument.node.args[0]
                arguments[i] = argument.node.args[0]
        return function, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is called as it is: see the module docstring for the rule."""
        if module_qualified_name in self.leaves | self.opaque.keys():
            return True
        if isinstance(m, (*NORMALIZATIONS, *DROPOUTS)):
            return True
        if m._backward_hooks or m._backward_pre_hooks:
            return True  # a graph would lose them
        if parametrize.is_parametrized(m) or (hooked(m) and own_weight(m)):
            return False
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
        """Trace a call of ``m``; if that fails, leave a function whole, or ``m`` itself."""
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return self._remember(name, super().call_module(m, forward, args, kwargs))
        if any(isinstance(hook, SpectralNorm) for hook in m._forward_pre_hooks.values()):
            self.opaque.setdefault(name, OLD_SPECTRAL_NORM)
        before = set(self.graph.nodes)
        draws = random_states()
        stack, calls, scope = self.module_stack.copy(), self.num_calls.copy(), copy(self.scope)
        attributes = Snapshot(m, training=self.training)
        assigned = self.assigned()
        while True:
            try:
                output = super().call_module(m, forward, args, kwargs)
                refuse_draws(draws)
                attributes.refuse_changes()
                self.refuse_assignments(len(assigned))
                break
            except Exception as error:
                if name in self.opaque:
                    raise
                self._roll_back(before, name)
                self._forget_assignments(assigned)
                attributes.restore()
                if isinstance(error, ChangedAttributeError):
                    error.forget_values()
                self.module_stack, self.num_calls, self.scope = stack.copy(), calls.copy(), scope
                if not self.functions.leave_whole(error):
                    reason = f"{type(error).__name__}: {error}"
                    self.opaque[name] = f"cannot be traced through ({reason})"
        return self._remember(name, output)

    def _remember(self, name: str, output: Any) -> Any:
        value = map_aggregate(output, lambda v: v.node if isinstance(v, fx.Proxy) else v)
        last = next(iter(reversed(self.graph.nodes)))
        self.outputs.setdefault(name, []).append(ModuleOutput(value, last))
        return output

    def _forget_assignments(self, kept: list[tuple[fx.Proxy, str]]) -> None:
        for proxy, name in self.assigned():
            if not any(proxy is other and name == known for other, known in kept):
                delattr(proxy, name)

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


OLD_SPECTRAL_NORM = (
    "cannot be traced through (torch.nn.utils.spectral_norm changes its vectors under no_grad; "
    "use torch.nn.utils.parametrizations.spectral_norm)"
)

_PLAIN = {"node", "tracer"}
"""Attributes of every proxy."""

_PROXY = _PLAIN | {"param", "name"}
"""Attributes of a proxy that are fx's own."""


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def own_weight(module: nn.Module) -> bool:
    """Whether a module itself, not a child, owns a weight of two or more dimensions."""
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _contexts() -> tuple[Any, ...]:
    """Return what a graph cannot hold: whether gradients and autocast are on, and checkpoints."""
    autocast = is_autocast_enabled("cpu"), is_autocast_enabled("cuda")
    saved: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (is_grad_enabled(), *autocast, saved)


def _writes_to_constant(kind: str, target: Any, args: tuple[Any, ...] = ()) -> bool:
    """Whether an operation changes its first argument, a tensor that does not come from inputs."""
    if not kind.startswith("call_") or not args or type(args[0]) is not Tensor:
        return False
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


IN_PLACE = {
    *("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "__iadd__", "__isub__"),
    *("__imul__", "__itruediv__", "__ipow__", "__ifloordiv__", "__imod__"),
}
"""Operators that change their first argument; names of functions that do end with _."""


def swappable(model: nn.Module, node: fx.Node) -> dict[str, nn.Module]:
    """Return the modules inside a leaf of the graph, by qualified names."""
    if node.op != "call_module":
        return {}
    owner, name = model.get_submodule(str(node.target)), str(node.target)
    prefix = f"{name}." if name else ""
    return {f"{prefix}{key}": module for key, module in owner.named_modules() if key}


def caller(node: fx.Node) -> str:
    """Return the qualified name of the module whose forward made ``node``; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((name for name, _ in reversed(list(stack.values()))), "")
