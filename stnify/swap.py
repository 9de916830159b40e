"""Rewrite a module from the inside, where its forward cannot be traced.

The module's own code runs. Its weights are recognised in the calls that use them, see ``calls``.
Noise is swapped in by a copy of the module objects, see ``shadow``.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stnify.calls import Drop, KnownWeight, WeightCalls
from stnify.checkpoints import plain_checkpoints
from stnify.layers import HyperLayer
from stnify.shadow import Ambient, NoiseStandIn, copy_attributes, shadow_of
from stnify.untouched import attributes_restored

OUTPUT = "out_proj.weight"
"""The weight that tells an attention from others."""


class WeightUse(NamedTuple):
    """A weight that responds inside a module, by names relative to it.

    Attributes:
        weight: Name of the parameter, or of the attribute that is computed in its place.
        bias: Name of the bias that responds with it, if there is one.
        layer: What calls on it go to.
    """

    weight: str
    bias: str | None
    layer: HyperLayer


@dataclass(frozen=True)
class _Run:
    """What a swapped module calls, and the originals its parts are kept equal to."""

    ambient: Ambient
    original: nn.Module
    shadow: nn.Module
    pairs: list[tuple[nn.Module, nn.Module]]
    uses: tuple[WeightUse, ...]
    attentions: tuple[tuple[nn.MultiheadAttention, nn.Module], ...]


class SwappedModule(nn.Module):
    """Runs a module's own forward; calls on its weights respond, and noise is swapped in.

    Args:
        original: The user's module, which stays as it is.
        uses: Weights that respond.
        noises: Noise sites by the name inside ``original`` of what they replace.
    """

    def __init__(
        self, original: nn.Module, uses: Sequence[WeightUse], noises: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        ambient = Ambient()
        stand_ins: dict[nn.Module, nn.Module] = {}
        attentions: list[tuple[nn.MultiheadAttention, nn.Module]] = []
        for name, module in noises.items():
            replaced = original.get_submodule(name)
            if isinstance(replaced, nn.MultiheadAttention):
                attentions.append((replaced, module))
            else:
                stand_ins[replaced] = NoiseStandIn(replaced, module, ambient)
        pairs: list[tuple[nn.Module, nn.Module]] = []
        shadow = shadow_of(original, stand_ins, pairs)
        # Kept out of the registries: the user's own tree holds the parameters already.
        self.__dict__["_run"] = _Run(
            ambient, original, shadow, pairs, tuple(uses), tuple(attentions)
        )

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        response_input: Tensor | None,
        constrained: Tensor | None,
        linearized: bool,
    ) -> Any:
        """Call the module with ``args`` and ``kwargs`` under this perturbation."""
        run: _Run = self.__dict__["_run"]
        eager = torch.compiler.is_compiling() and _computes_weights(run)
        call = _eagerly if eager else _called
        return call(run, args, kwargs, response_input, constrained, linearized)


class SwappedFunction(nn.Module):
    """Calls a function; calls in it on weights respond.

    Args:
        function: Importable, so that it can be pickled.
        layers: What calls on each of the weights go to, and whether that weight is a transpose.
    """

    def __init__(
        self, function: Callable[..., Any], layers: Sequence[tuple[HyperLayer, bool]]
    ) -> None:
        super().__init__()
        self.function = function
        # Kept out of the registries: they are registered under names of their own.
        self.__dict__["_layers"] = tuple(layers)

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        response_input: Tensor | None,
        linearized: bool,
    ) -> Any:
        """Call the function, which receives ``weights`` and ``biases`` among its arguments."""
        if response_input is None:
            return self.function(*args, **kwargs)
        known = [
            KnownWeight(weight, bias, layer, transposed)
            for weight, bias, (layer, transposed) in zip(
                weights, biases, self.__dict__["_layers"], strict=True
            )
        ]
        with WeightCalls(known, response_input, linearized):
            return self.function(*args, **kwargs)


def _called(
    run: _Run,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    response_input: Tensor | None,
    constrained: Tensor | None,
    linearized: bool,
) -> Any:
    noisy = bool(run.pairs or run.attentions) and not torch.compiler.is_compiling()
    before, run.ambient.constrained = run.ambient.constrained, constrained
    for shadow, original in run.pairs:
        copy_attributes(original, shadow)
    try:
        if response_input is not None:
            return _perturbed(run, args, kwargs, response_input, linearized)
        with _attending(run), plain_checkpoints() if noisy else nullcontext():
            output = run.shadow(*args, **kwargs)
        for shadow, original in run.pairs:
            copy_attributes(shadow, original)
        return output
    finally:
        run.ambient.constrained = before
        for shadow, original in run.pairs:  # a perturbed pass leaves nothing behind
            copy_attributes(original, shadow)


# Compilers do not run the hooks that tell of computed weights.
_eagerly = torch.compiler.disable(_called)


def _known(run: _Run) -> list[KnownWeight]:
    """Return the parameters that respond, as they are at the moment: perturbed passes replace them.

    Weights that are computed in the place of parameters are not among them.
    """
    weights = [(use, _parameter(run.original, use.weight)) for use in run.uses]
    return [_use(run, use, weight) for use, weight in weights if weight is not None]


def _use(run: _Run, use: WeightUse, weight: Tensor) -> KnownWeight:
    bias = None if use.bias is None else _parameter(run.original, use.bias)
    return KnownWeight(weight, bias, use.layer, name=use.weight)


def _drops(run: _Run) -> list[tuple[Tensor, Drop]]:
    """Return what drops attention weights, at the hyperparameters of the pass, if it does."""
    constrained = run.ambient.constrained
    if constrained is None:
        return []
    return [
        (weight, partial(noise, constrained=constrained))
        for attention, noise in run.attentions
        if (weight := _parameter(attention, OUTPUT)) is not None
    ]


def _attending(run: _Run) -> AbstractContextManager[Any]:
    """Return a context in which tuned noise acts on attention weights, if there is any."""
    if not run.attentions or run.ambient.constrained is None:
        return nullcontext()
    calls = WeightCalls([], None, False, _drops(run))
    return calls if torch.compiler.is_compiling() else _watching(run, (), calls)


@contextmanager
def _watching(run: _Run, uses: Sequence[WeightUse], calls: WeightCalls) -> Iterator[None]:
    """Watch the calls of the body; tell of each weight of ``uses`` that is computed in it."""

    def respond(use: WeightUse, weight: Tensor) -> None:
        calls.known.append(_use(run, use, weight))

    def drop(noise: nn.Module, weight: Tensor) -> None:
        calls.drops.append((weight, partial(noise, constrained=run.ambient.constrained)))

    when = partial(_when_computed, run)
    with ExitStack() as stack:
        for use in uses:
            stack.callback(when(run.original, use.weight, calls, partial(respond, use)))
        for attention, noise in run.attentions if run.ambient.constrained is not None else ():
            stack.callback(when(attention, OUTPUT, calls, partial(drop, noise)))
        stack.enter_context(calls)
        yield


def _when_computed(
    run: _Run, module: nn.Module, name: str, calls: WeightCalls, tell: Callable[[Tensor], None]
) -> Callable[[], None]:
    """Tell of a weight each time it is computed; not of a parameter. Return what ends that."""
    owner, attribute = _owner(module, name)
    if attribute in owner._parameters:
        return _nothing
    if parametrize.is_parametrized(owner, attribute):
        cached = vars(parametrize)["_cache"].get((id(owner), attribute))
        if cached is not None:
            tell(cached)
        lists = cast(nn.ModuleDict, owner.parametrizations)
        return lists[attribute].register_forward_hook(lambda _, inputs, weight: tell(weight)).remove
    shadows = {id(original): shadow for shadow, original in run.pairs}
    attributes = vars(shadows.get(id(owner), owner))
    latest: list[Tensor] = []

    def look() -> None:
        """Whichever hook it is that sets the weight, it has by the time of a call on it."""
        if not latest or attributes[attribute] is not latest[0]:
            latest[:] = [attributes[attribute]]
            tell(latest[0])

    calls.before_each.append(look)
    return _nothing


def _nothing() -> None:
    pass


def _computes_weights(run: _Run) -> bool:
    """Whether a weight that is watched for is no parameter."""
    places = [(run.original, use.weight) for use in run.uses]
    places += [(attention, OUTPUT) for attention, _ in run.attentions]
    return any(_parameter(module, name) is None for module, name in places)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter of this name as it is at the moment, if it is one."""
    owner, attribute = _owner(module, name)
    return owner._parameters.get(attribute)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _perturbed(
    run: _Run,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    response_input: Tensor,
    linearized: bool,
) -> Any:
    """Run the module's code in a perturbed pass, which leaves no trace in its attributes."""
    calls = WeightCalls(_known(run), response_input, linearized, _drops(run))
    if torch.compiler.is_compiling():
        with calls:
            return run.shadow(*args, **kwargs)
    with attributes_restored(run.original), ExitStack() as stack:
        for module in (*run.original.modules(), *(shadow for shadow, _ in run.pairs)):
            module.__dict__["_backward_hooks"] = OrderedDict()  # they belong to the user's pass
            module.__dict__["_backward_pre_hooks"] = OrderedDict()
            if isinstance(module, nn.RNNBase):
                _prepare_recurrent(module, calls, stack)
        stack.enter_context(plain_checkpoints())
        stack.enter_context(_nothing_cached())
        stack.enter_context(_watching(run, run.uses, calls))
        return run.shadow(*args, **kwargs)


@contextmanager
def _nothing_cached() -> Iterator[None]:
    """Let weights be computed anew: what ``parametrize.cached()`` holds is another pass's."""
    scope = vars(parametrize)
    before, scope["_cache"] = scope["_cache"], {}
    try:
        yield
    finally:
        scope["_cache"] = before


def _prepare_recurrent(network: nn.RNNBase, calls: WeightCalls, stack: ExitStack) -> None:
    """Let a recurrent module use the weights of the pass, and tell of packed batches.

    It keeps a list of its parameters beside the registry, which a perturbed pass replaces.
    """

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        packed = inputs and isinstance(inputs[0], PackedSequence)
        calls.order = inputs[0].sorted_indices if packed else None

    stack.callback(network.register_forward_pre_hook(remember).remove)
    named = zip(network._flat_weights_names, network._flat_weights, strict=True)
    present = [network._parameters.get(str(name), flat) for name, flat in named]
    network.__dict__["_flat_weights"] = present
    # Otherwise it would look for what has changed, and compute parametrized weights twice as often.
    references = [None if weight is None else weakref.ref(weight) for weight in present]
    network.__dict__["_flat_weight_refs"] = references
