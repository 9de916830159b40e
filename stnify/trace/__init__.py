"""2. Trace a model into a graph, without changing the model.

A module is a leaf of the graph if it comes from ``torch.nn``, is a normalisation or dropout, holds
no weight of two or more dimensions, or has backward hooks. All others, and layers with forward
hooks or parametrisations, are traced through, so that the layers inside them become visible. A
function that cannot be traced through is called as it is; a module that cannot becomes a leaf, with
the reason. So does a module that does more than compute: that keeps something from pass to pass,
draws numbers, asks in which context it runs, or fills tensors it makes.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from stnify.patterns import require_each
from stnify.trace.functions import TracedFunctions
from stnify.trace.snapshot import Snapshot
from stnify.trace.tracer import (
    EagerUse,
    ModuleOutput,
    SiteTracer,
    Traced,
    caller,
    hooked,
    random_states,
    refuse_draws,
    swappable,
)
from stnify.untouched import state_restored

__all__ = ["ModuleOutput", "Traced", "caller", "swappable", "trace"]


def trace(
    model: nn.Module,
    leaves: Sequence[str | type[nn.Module]] = (),
    given: Collection[str] = (),
) -> Traced:
    """Trace ``model`` as it trains, and leave it exactly as it was.

    Args:
        model: Any module.
        leaves: Patterns or types not to trace through.
        given: Optional arguments of its forward that every training pass will be given; all others
            keep their defaults.

    Returns:
        The graph; if ``model.forward`` itself cannot be traced, it is one call of the whole model.
    """
    names = require_each(leaves, dict(model.named_modules()), "`leaves`")
    differing: dict[str, str] = {}
    while True:
        held = [*names, *differing]
        tracer, graph, constants, whole = _trace_in_mode(model, held, given, training=True)
        held += tracer.opaque
        in_eval, other, _, _ = _trace_in_mode(model, held, given, training=False)
        found = (_differing(graph, other) | in_eval.opaque.keys()) - set(held)
        if not found:
            break
        if "" in found:
            graph, constants, differing = _one_leaf(tracer, OTHER_IN_EVAL), {}, {}
            break
        differing.update(dict.fromkeys(found, f"cannot be traced through ({OTHER_IN_EVAL})"))
    tracer.opaque = differing | tracer.opaque
    return Traced(
        graph,
        tracer.outputs,
        tracer.opaque,
        constants,
        tracer.fixed,
        whole,
        frozenset({""} | tracer.outputs.keys()) - {str(node.target) for node in graph.nodes},
    )


def _trace_in_mode(
    model: nn.Module, leaves: Sequence[str], given: Collection[str], *, training: bool
) -> tuple[SiteTracer, fx.Graph, dict[str, Tensor], frozenset[Callable[..., Any]]]:
    """Trace from the top, again for each function left whole; else call the model as one leaf."""
    with state_restored(model) as added, TracedFunctions(model) as functions:
        model.train(training)
        draws = random_states()
        while True:
            tracer = SiteTracer(leaves, functions, given, training=training)
            if hooked(model) or type(model).__call__ is not nn.Module.__call__:
                graph = _one_leaf(tracer, "calling it does more than its forward")
                break
            if "" in leaves:
                graph = _one_leaf(tracer, "named in `leaves`")
                break
            attributes = Snapshot(model, training=training)
            try:
                with EagerUse(model):
                    graph = tracer.trace(model)
                refuse_draws(draws)
                attributes.refuse_changes()
                tracer.refuse_assignments()
                if tracer.fixed and not any(node.op == "placeholder" for node in graph.nodes):
                    graph = _one_leaf(tracer, "every argument of its forward is optional")
                break
            except Exception as error:
                attributes.restore()
                if not functions.leave_whole(error):
                    graph = _one_leaf(tracer, f"{type(error).__name__}: {error}")
                    break
    constants = {name: value for name, value in added.items() if isinstance(value, Tensor)}
    return tracer, graph, constants, frozenset(functions.whole)


OFF_IN_EVAL: set[Callable[..., Any]] = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.scaled_dot_product_attention,
}
"""Functions whose constants say in which mode they draw noise; the rewriting gives them theirs."""

OTHER_IN_EVAL = "it computes something else in eval mode"


def _differing(one: fx.Graph, other: fx.Graph) -> set[str]:
    """Return the modules whose own code calls something else, in another order or otherwise."""
    first, second = _by_module(one), _by_module(other)
    found = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    returned = [repr(graph.output_node().args) for graph in (one, other)]
    return found or ({""} if returned[0] != returned[1] else set())


def _by_module(graph: fx.Graph) -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return what each module's code calls, and with which constants."""
    calls: dict[str, list[tuple[str, str, list[str]]]] = {}
    for node in graph.nodes:
        if node.op not in {"get_attr", "placeholder", "output"}:
            call = (node.op, str(node.target), _constants(node))
            calls.setdefault(_owner(node), []).append(call)
    return calls


def _owner(node: fx.Node) -> str:
    """Return the qualified name of the module whose code made a call; a leaf is not its own."""
    stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack.pop()
    return stack[-1] if stack else ""


def _constants(node: fx.Node) -> list[str]:
    """Return the numbers and words among the arguments of a call."""
    found: list[str] = []
    if node.target in OFF_IN_EVAL:
        return found

    def see(value: Any) -> Any:
        if isinstance(value, bool | int | float | complex | str | type(None)):
            found.append(repr(value))
        return value

    map_aggregate((node.args, node.kwargs), see)
    return found


def _one_leaf(tracer: SiteTracer, reason: str) -> fx.Graph:
    """Return a graph that only calls the whole model, whatever it is called with."""
    tracer.outputs, tracer.fixed = {}, {}
    tracer.opaque = {"": f"cannot be traced through ({reason})"}
    graph = fx.Graph()
    inputs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    graph.output(graph.call_module("", inputs))
    return graph
