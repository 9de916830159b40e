"""2. Trace a model into a graph, without changing the model.

A module is a leaf of the graph if it comes from ``torch.nn``, is a normalisation or dropout, or
holds no weight of two or more dimensions; all others are traced through, so that the layers inside
them become visible. A function that cannot be traced through is called as it is; a module that
cannot becomes a leaf, with the reason.
"""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from stnify.patterns import choose
from stnify.trace.functions import TracedFunctions
from stnify.trace.tracer import ModuleOutput, SiteTracer, Traced, caller, swappable
from stnify.trace.untouched import state_restored

__all__ = ["ModuleOutput", "Traced", "caller", "swappable", "trace"]


def trace(model: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> Traced:
    """Trace ``model`` as it trains, and leave it exactly as it was.

    Args:
        model: Any module.
        leaves: Patterns or types not to trace through.

    Returns:
        The graph; if ``model.forward`` itself cannot be traced, it is one call of the whole model.
    """
    names = choose(leaves, dict(model.named_modules()))
    with state_restored(model) as added, TracedFunctions(model) as functions:
        model.train()
        tracer, graph = _trace_root(model, names, functions)
    constants = {name: value for name, value in added.items() if isinstance(value, Tensor)}
    whole = frozenset(functions.whole)
    return Traced(graph, tracer.outputs, tracer.opaque, constants, tracer.fixed, whole)


def _trace_root(
    model: nn.Module, leaves: Sequence[str], functions: TracedFunctions
) -> tuple[SiteTracer, fx.Graph]:
    """Trace from the top, again for each function left whole; else call the model as one leaf."""
    while True:
        tracer = SiteTracer(leaves, functions)
        try:
            return tracer, tracer.trace(model)
        except Exception as error:
            if not functions.leave_whole(error):
                return tracer, _one_leaf(tracer, f"{type(error).__name__}: {error}")


def _one_leaf(tracer: SiteTracer, reason: str) -> fx.Graph:
    """Return a graph that only calls the whole model, whatever it is called with."""
    tracer.outputs, tracer.fixed = {}, {}
    tracer.opaque = {"": f"cannot be traced through ({reason})"}
    graph = fx.Graph()
    inputs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    graph.output(graph.call_module("", inputs))
    return graph
