"""Find the first operation of a pass that differs: what every node and module returned, compared.

A graph is run node by node. Inside a node that calls a module, also one that was rewritten from the
inside, every module call is kept as well.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, resolve_name

from stnify.testing.subject import Subject, tensors
from stnify.tunable import PREFIX


@dataclass(frozen=True)
class Step:
    """What one operation returned.

    Attributes:
        label: The operation in words.
        key: Name of the function, or of the module in the user's model.
        values: The tensors it returned.
        tangents: Their tangents, in a linearised pass; None where there is none.
    """

    label: str
    key: str
    values: list[Tensor]
    tangents: list[Tensor | None]

    @property
    def is_module(self) -> bool:
        """Whether a module was called, not a function or a node."""
        return self.label.startswith("module ")

    def all(self) -> list[Tensor]:
        """Return values and tangents."""
        return self.values + [tangent for tangent in self.tangents if tangent is not None]


Trail = list[Step]

Judge = Callable[[Sequence[Step]], float]
"""How much the same step of several passes differs; zero if it is as it should be."""


def record(subject: Subject, run: Callable[[], Any], *, attached: bool = False) -> Trail:
    """Run a pass of the graph and return what every node and module returned, as they finish.

    Args:
        subject: What runs.
        run: One of its passes.
        attached: Keep tensors that can be differentiated.
    """
    keeper = _Keeper([subject.model._stnify.original, subject.model], attached)
    with keeper.watching_modules(), keeper.node_by_node(subject.model._stnify.graph):
        run()
    return keeper.trail


def record_functions(model: nn.Module, run: Callable[[], Any]) -> Trail:
    """Run anything and return what every PyTorch function and module returned, as they finish.

    Args:
        model: Knows the names of the modules that run.
        run: What to run.
    """
    keeper = _Keeper([model], attached=False)
    with keeper.watching_modules(), _Functions(keeper):
        run()
    return keeper.trail


def first_difference(trails: Sequence[Trail], judge: Judge) -> str:
    """Return, in words, the first step that differs over passes that do the same, and how much."""
    sequences = [_by_occurrence(trail) for trail in trails]
    for key in sequences[0]:
        steps = [sequence[key] for sequence in sequences if key in sequence]
        size = judge(steps) if len(steps) == len(trails) else 0.0
        if size:
            return f"The first to differ is {steps[0].label}, by {size:.3g}."
    return "No single operation differs; only the prediction as a whole does."


def first_missing(expected: Trail, found: Trail) -> str:
    """Return, in words, the first step of one pass that another one does not take, and how far off.

    A module must return what the module of its name returns; the value of a function must be there.
    """
    known: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for step in found:
        for value in step.values:
            known[_form(value)].append(value)
    others = _by_occurrence(found, lambda step: step.key)
    for key, step in _by_occurrence(expected, lambda step: step.key).items():
        other = others.get(key)
        if step.is_module and other is not None:
            missing = not all(map(identical, step.values, other.values))
        else:
            missing = not all(
                any(identical(value, one) for one in known[_form(value)]) for value in step.values
            )
        if missing:
            size = torch.inf if other is None else max(map(distance, step.values, other.values))
            return f"The first to differ is {step.label}, by {size:.3g}."
    return "No single operation differs; only the prediction as a whole does."


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, and NaN in the same places."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference; infinite between different shapes."""
    if one.shape != other.shape:
        return torch.inf
    if not one.numel():
        return 0.0
    wide = torch.complex128 if one.is_complex() else torch.float64
    change = one.detach().to(wide) - other.detach().to(wide)
    return float(change.abs().nan_to_num(torch.inf).max())


# Recording ----------------------------------------------------------------------------------------


class _Keeper:
    """Keeps what operations return, under names the user knows."""

    def __init__(self, models: Sequence[nn.Module], attached: bool) -> None:
        self.attached = attached
        self.trail: Trail = []
        self.running: list[str] = []
        # A module that was rewritten from the inside shares this registry with the original.
        self.names = {
            id(module._parameters): name
            for model in reversed(models)
            for name, module in model.named_modules()
        }

    def keep(self, label: str, key: str, value: Any) -> None:
        """Append a step, unless it returned no real numbers."""
        values = [tensor for tensor in tensors(value) if tensor.is_floating_point()]
        if values:
            duals = [forward_ad.unpack_dual(tensor) for tensor in values]
            primals = [self.copied(dual.primal) for dual in duals]
            tangents = [None if d.tangent is None else self.copied(d.tangent) for d in duals]
            self.trail.append(Step(label, key, primals, tangents))

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy that later operations in place do not reach."""
        return tensor.clone() if self.attached else tensor.detach().clone()

    def name(self, module: nn.Module) -> str | None:
        """Return the qualified name of a module, or of the one it stands for; None if unknown."""
        module = module.__dict__.get("_original", module)
        name = self.names.get(id(module._parameters))
        if name is None or not name.startswith(f"{PREFIX}."):
            return name
        room, _, key = name.removeprefix(f"{PREFIX}.").partition(".")
        inside_layer = room == "layers" and "." in key
        return None if inside_layer else key.replace("/", ".")

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Keep what every module returns that has a name."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(self.name(module) or "")

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            name = self.name(module)
            if name:
                kind = type(module.__dict__.get("_original", module)).__name__
                self.keep(f"module {name!r} ({kind})", name, output)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def node_by_node(self, graph: Any) -> Iterator[None]:
        """Let an interpreter run the graph for the time of the body."""
        graph.__dict__["forward"] = _NodeByNode(graph, self).run_with
        try:
            yield
        finally:
            del graph.__dict__["forward"]


class _NodeByNode(fx.Interpreter):
    """Runs a graph as its generated code does, and hands every node's value to a keeper."""

    def __init__(self, graph: Any, keeper: _Keeper) -> None:
        super().__init__(graph, graph=graph._stnify_graph)
        self.keeper = keeper
        self.given: Mapping[str, Any] = {}

    def run_with(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the arguments of the graph's ``forward``."""
        self.given = _bound(self.module, args, kwargs)
        return self.run()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Look an input up by its name."""
        return self.given[str(target)]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value."""
        value = super().run_node(n)
        if n.op not in {"placeholder", "get_attr", "output"}:
            target = getattr(n.target, "__name__", str(n.target)).removeprefix(f"{PREFIX}.")
            self.keeper.keep(f"node {n.name!r} ({target})", n.name, value)
        return value


def _bound(graph: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give each placeholder of a graph, by its target, the value that a call would give it."""
    rest, named = list(args), dict(kwargs)
    values: dict[str, Any] = {}
    for node in (node for node in graph._stnify_graph.nodes if node.op == "placeholder"):
        target = str(node.target)
        if target.startswith("**"):
            values[target] = named
        elif target.startswith("*"):
            values[target], rest = tuple(rest), []
        elif rest:
            values[target] = rest.pop(0)
        elif target in named:
            values[target] = named.pop(target)
        else:
            values[target] = node.args[0]
    return values


class _Functions(TorchFunctionMode):
    """Keeps what every PyTorch function returns, labelled with the module that calls it."""

    def __init__(self, keeper: _Keeper) -> None:
        super().__init__()
        self.keeper = keeper

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` and keep what it returns."""
        value = func(*args, **(kwargs or {}))
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        if not name.endswith(("__get__", "__set__")):
            where = next((name for name in reversed(self.keeper.running) if name), "")
            inside = f"module {where!r}" if where else "the model's own forward"
            self.keeper.keep(f"{name} in {inside}", name, value)
        return value


def _form(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype


def _by_occurrence(
    trail: Trail, name: Callable[[Step], str] = lambda step: step.label
) -> dict[tuple[str, int], Step]:
    """Number the steps of one name, so that passes can be compared step by step."""
    counts: dict[str, int] = defaultdict(int)
    numbered = {}
    for step in trail:
        numbered[name(step), counts[name(step)]] = step
        counts[name(step)] += 1
    return numbered
