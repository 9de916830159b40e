"""2. Trace a model into a graph, without changing the model.

A module is a leaf of the graph if it comes from ``torch.nn``, is a normalisation or dropout, or
holds no weight of two or more dimensions; all others are traced through, so that the layers inside
them become visible. A function that cannot be traced through is called as it is; a module that
cannot becomes a leaf, with the reason.
"""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from stnify.errors import TraceError
from stnify.patterns import choose
from stnify.trace.functions import TracedFunctions
from stnify.trace.tracer import ModuleOutput, SiteTracer, Traced, caller
from stnify.trace.untouched import state_restored

__all__ = ["ModuleOutput", "Traced", "caller", "trace"]


def trace(model: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> Traced:
    """Trace ``model`` as it trains, and leave it exactly as it was.

    Args:
        model: Any module.
        leaves: Patterns or types not to trace through.

    Raises:
        TraceError: ``model.forward`` itself cannot be traced.
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
    """Trace from the top, again for each function that has to be left whole."""
    while True:
        tracer = SiteTracer(leaves, functions)
        try:
            return tracer, tracer.trace(model)
        except Exception as error:
            if functions.leave_whole(error):
                continue
            raise TraceError(
                f"{type(model).__name__}.forward must be traceable by torch.fx, but it is not: "
                f"{error} Move the data-dependent part into a submodule and name it in `leaves=`."
            ) from error
