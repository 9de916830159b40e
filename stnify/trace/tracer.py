"""The tracer: which modules are leaves, what each call returned, what could not be traced."""

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from stnify.trace.functions import TracedFunctions

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


CONSTANT = "_tensor_constant"
"""How fx names the tensors made while tracing, which it keeps on the root."""


class ChangedAttributeError(RuntimeError):
    """A module changes attributes of its own, which a graph would not do again.

    Args:
        names: The attributes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"it changes its attribute {names[0]!r}")
        self.names = names


class UnknownWhileTracing:
    """Stands for an attribute that only a real pass sets, so that code that reads it fails."""


class Snapshot:
    """What a module's attributes are now, and what lists, dictionaries and sets among them hold.

    What they hold counts in train mode only: in eval mode the model's own code runs, and caches.

    Args:
        module: Its registries of parameters, buffers, modules and hooks are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = dict(module.__dict__)
        own = self._values.keys() - _REGISTRIES if module.training else set[str]()
        containers = (n for n in own if isinstance(self._values[n], _CONTAINERS))
        self._contents = {name: _held(self._values[name]) for name in containers}

    def refuse_changes(self) -> None:
        """Raise ChangedAttributeError if any is another, or holds something else."""
        now = {n: v for n, v in self._module.__dict__.items() if not n.startswith(CONSTANT)}
        before = self._values
        changed = [n for n, value in now.items() if n not in before or before[n] is not value]
        changed += [n for n, held in self._contents.items() if _held(before[n]) != held]
        if changed:
            raise ChangedAttributeError(changed)

    def restore(self) -> None:
        """Put the attributes back, not what they hold."""
        self._module.__dict__.clear()
        self._module.__dict__.update(self._values)


_REGISTRIES = set(nn.Module().__dict__)
_CONTAINERS = (list, dict, set)


def _held(value: Any) -> list[int]:
    """Return the identities of what a container holds, in its order."""
    held = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    return [id(entry) for entry in held]


class EagerUse(TorchFunctionMode):
    """Raises if code computes with parameters while it is traced, past the tracer.

    It does so if it gets them from ``self.parameters()``, say: the result would be a constant.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` and look at what it got and what it returned."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and any(isinstance(a, nn.Parameter) for a in args):
            raise RuntimeError("it computes with parameters that it does not name as attributes")
        return result


class SiteTracer(fx.Tracer):
    """Traces down to leaves and remembers what each module returned.

    What code does to buffers is traced; a module that does more than compute with its inputs,
    parameters and buffers, for example counts its calls in an attribute, becomes a leaf.

    Args:
        leaves: Qualified names not to trace through.
        functions: Functions that are left whole.
        given: Optional arguments of the model's forward that are inputs nevertheless.
    """

    def __init__(
        self, leaves: Sequence[str], functions: TracedFunctions, given: Collection[str] = ()
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = set(leaves)
        self.given = set(given)
        self.functions = functions
        self.outputs: dict[str, list[ModuleOutput]] = {}
        self.opaque: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}
        self.proxies: list[fx.Proxy] = []
        self.proxy_buffer_attributes = True
        self._contexts = _contexts()

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record an operation; not under ``no_grad`` or ``autocast``, which would be lost."""
        if kind.startswith("call_") and _contexts() != self._contexts:
            raise RuntimeError("it computes under no_grad or autocast, which a graph cannot hold")
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        self.proxies.append(proxy)
        return proxy

    def assigned(self) -> list[tuple[fx.Proxy, str]]:
        """Return the tensors on which code has set an attribute, such as ``weight.data``."""
        return [(p, name) for p in self.proxies for name in vars(p).keys() - _PROXY]

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
        before = set(self.graph.nodes)
        draws = random_states()
        stack, calls, scope = self.module_stack.copy(), self.num_calls.copy(), copy(self.scope)
        attributes, assigned = Snapshot(m), self.assigned()
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
                    m.__dict__.update(dict.fromkeys(error.names, UnknownWhileTracing()))
                self.module_stack, self.num_calls, self.scope = stack.copy(), calls.copy(), scope
                if not self.functions.leave_whole(error):
                    reason = f"{type(error).__name__}: {error}"
                    self.opaque[name] = f"cannot be traced through ({reason})"
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


_PROXY = {"node", "tracer", "param", "name"}
"""Attributes of a proxy that are fx's own."""


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def own_weight(module: nn.Module) -> bool:
    """Whether a module itself, not a child, owns a weight of two or more dimensions."""
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _contexts() -> tuple[bool, bool, bool]:
    """Return what a graph cannot hold: whether gradients and autocast are on."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (torch.is_grad_enabled(), *autocast)


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
