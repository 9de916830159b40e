"""Recognise the calls in which weights meet activations while code runs that cannot be traced.

Whatever the code looks like, a weight meets activations in one of a few operators. ``WeightCalls``
watches these; a call that receives a known weight, the very tensor, goes to its hyper layer.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from stnify.composites import (
    DESCRIPTIONS,
    MEETINGS,
    RECURRENT_CELLS,
    RECURRENT_NETWORKS,
    TENSOR_ATTRIBUTES,
    embedding_bag,
    multi_head_attention,
)
from stnify.errors import UnsupportedModuleError
from stnify.layers import (
    OPERATOR_ARGUMENTS,
    HyperConv,
    HyperEmbedding,
    HyperLayer,
    HyperLinear,
    HyperParameter,
    HyperProduct,
    Product,
)
from stnify.products import MULTIPLICATIONS, bilinear, multiplication, product

Drop = Callable[[Tensor], Tensor]

ATTENTION_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
"""Names of what PyTorch's attention receives, read here because compiled code cannot."""


class KnownWeight(NamedTuple):
    """A weight that responds.

    Attributes:
        weight: The tensor that calls receive.
        bias: The bias that responds with it, if the call receives that too.
        layer: What such a call goes to.
        transposed: Whether ``weight`` is the transpose of what the layer holds a response of.
        name: Of the weight in the module whose code is watched.
    """

    weight: Tensor
    bias: Tensor | None
    layer: HyperLayer
    transposed: bool = False
    name: str = ""


class WeightCalls(TorchFunctionMode):
    """Sends calls of the operators in ``WEIGHT_CALLS`` on known weights to hyper layers.

    Args:
        known: Weights that respond.
        response_input: ``(batch, h)`` unconstrained; None if none of them is to.
        linearized: Whether activations are dual numbers.
        drops: What drops attention weights, by the weight of the attention's output projection.

    Attributes:
        order: Which example comes where in the packed sequence at hand.
        before_each: What tells, before each call of an operator with a rule, of weights that code
            has computed since the last one.
    """

    def __init__(
        self,
        known: Sequence[KnownWeight],
        response_input: Tensor | None,
        linearized: bool,
        drops: Sequence[tuple[Tensor, Drop]] = (),
    ) -> None:
        super().__init__()
        self.drops = list(drops)
        self.known = list(known)
        self.parameters = [k.weight for k in known if isinstance(k.layer, HyperParameter)]
        self.response_input = response_input
        self.linearized = linearized
        self.order: Tensor | None = None
        self.before_each: list[Callable[[], None]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the rule of ``func`` if there is one and it receives a known weight."""
        kwargs = kwargs or {}
        rule = WEIGHT_CALLS.get(func)
        if rule is None and not self.parameters:
            return func(*args, **kwargs)
        alone = any(self.responds_alone(value) for value in _flat((args, kwargs)))
        if alone and not _describes(func):
            if func in MEETINGS:
                return MEETINGS[func](self, func, args, kwargs)
            args, kwargs = tree_map_only(Tensor, self.mean, (args, kwargs))
        if rule is not None:
            for look in self.before_each:
                look()
        if rule is None or not any(self.knows(value) for value in _flat((args, kwargs))):
            return func(*args, **kwargs)
        if self.response_input is not None and _hidden(args):
            self.refuse_hidden(args)
        return rule(self, func, args, kwargs)

    def refuse_hidden(self, args: tuple[Any, ...]) -> None:
        """Raise UnsupportedModuleError for a call in which examples cannot be told apart."""
        names = [k.name for k in self.known if any(v is k.weight for v in _flat(args))]
        raise UnsupportedModuleError(
            f"a weight that responds must meet all examples at once, but torch.vmap hides "
            f"dimensions of what {(names or ['it'])[0]!r} meets. Call the layer without "
            f"torch.vmap, or name it in `exclude=`."
        )

    def knows(self, value: object) -> bool:
        """Whether a value is one of the weights."""
        return any(known.weight is value for known in self.known) or self.drop(value) is not None

    def drop(self, weight: object) -> Drop | None:
        """Return what drops the weights of the attention that projects its output by ``weight``."""
        return next((drop for known, drop in self.drops if known is weight), None)

    def responds_alone(self, value: object) -> bool:
        """Whether a value is a parameter that responds wherever it is used."""
        return any(parameter is value for parameter in self.parameters)

    def find(
        self, weight: object, kind: type[HyperLayer], bias: Tensor | None = None
    ) -> KnownWeight | None:
        """Return what is known of a weight in calls that such a layer serves, with this bias."""
        known = [k for k in self.known if k.weight is weight and isinstance(k.layer, kind)]
        together = [k for k in known if k.bias is bias]
        return next(iter(together or known), None)

    def apply(
        self,
        kind: type[HyperLayer],
        function: Callable[..., Tensor],
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Call ``function`` on a weight, or its hyper layer if the weight is known."""
        known = self.find(weight, kind, bias)
        own = bias if known is not None and bias is known.bias else None
        if known is None or (own is None and known.layer.weight_response is None):
            return function(inputs, weight, bias, **arguments)
        outputs: Tensor = known.layer(
            inputs, weight, own, self.response_input, self.linearized, **arguments
        )
        if bias is None or own is not None:
            return outputs
        per_channel = (-1, *([1] * (weight.ndim - 2)))
        return outputs + bias.view(per_channel)

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply ``F.linear`` or its hyper layer."""
        return self.apply(HyperLinear, F.linear, inputs, weight, bias)

    def embed(self, indices: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Apply ``F.embedding`` or its hyper layer."""
        return self.apply(HyperEmbedding, _embed, indices, weight, None, **options)

    def meet(self, parameter: Tensor, activations: Tensor, first: int) -> Tensor:
        """Shape a parameter to meet activations; a known one has a value for each row."""
        after = activations.ndim - first - parameter.ndim
        shape = [*[1] * first, *parameter.shape, *[1] * after]
        known = self.find(parameter, HyperParameter)
        if known is None:
            return parameter if list(parameter.shape) == shape else parameter.reshape(shape)
        values = known.layer(
            activations, parameter, None, self.response_input, self.linearized, first=first
        )
        if len(values) == 1:
            return values[0].reshape(shape)
        row = known.layer.layout.dim
        shape[row] = len(values)
        return values.movedim(0, max(row - first, 0)).reshape(shape)

    def mean(self, value: Tensor) -> Tensor:
        """Return a tensor, or a known parameter as its mean over the batch."""
        return self.meet(value, value[None], 1)[0] if self.responds_alone(value) else value

    def multiply(
        self, product: Product, operands: Sequence[Tensor], weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Apply a product of ``operands`` with a known weight, the first one with the batch."""
        known = self.find(weight, HyperProduct, bias)
        assert known is not None, "the rule has found it"
        product = product.transposed() if known.transposed else product
        own = bias if bias is known.bias else None
        outputs: Tensor = known.layer(
            operands[0],
            weight.mT if known.transposed else weight,
            own,
            self.response_input,
            self.linearized,
            product=product,
            others=tuple(operands[1:]),
        )
        return outputs if bias is None or own is not None else outputs + bias


Rule = Callable[[WeightCalls, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _direct(kind: type[HyperLayer], names: Sequence[str]) -> Rule:
    """Return the rule of an operator that takes these arguments: input, weight, bias, geometry."""

    def rule(
        calls: WeightCalls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        first = (arguments.pop("input"), arguments.pop("weight"), arguments.pop("bias", None))
        return calls.apply(kind, function, *first, **arguments)

    return rule


def _embedding(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    names = ("input", "weight", "padding_idx")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    options = {
        name: arguments[name] for name in ("padding_idx", "scale_grad_by_freq") if name in arguments
    }
    return calls.embed(arguments["input"], arguments["weight"], **options)


def _embedding_bag(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return embedding_bag(calls.embed, *args, **kwargs)


def _attention(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    arguments = {**dict(zip(ATTENTION_ARGUMENTS, args, strict=False)), **kwargs}
    drop = calls.drop(arguments["out_proj_weight"])
    return multi_head_attention(calls.linear, **arguments, drop=drop)


def _network(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return RECURRENT_NETWORKS[function](calls.linear, *args, order=calls.order, **kwargs)


def _cell(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return RECURRENT_CELLS[function](calls.linear, *args, **kwargs)


def _bilinear(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    names = ("input1", "input2", "weight", "bias")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    left, right, weight = (arguments[name] for name in names[:3])
    if calls.find(weight, HyperProduct) is None:
        return function(*args, **kwargs)
    return calls.multiply(bilinear(left.ndim), (left, right), weight, arguments.get("bias"))


def _multiplication(
    calls: WeightCalls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    found = multiplication(function, args, kwargs)
    operands = found.operands if found else ()
    places = [i for i, o in enumerate(operands) if calls.find(o, HyperProduct)]
    if found is None or len(places) != 1 or len(operands) < 2:
        return function(*args, **kwargs)
    weight = operands[places[0]]
    others = [operand for operand in operands if operand is not weight]
    named = product(found, [operand.ndim for operand in operands], places[0])
    outputs = calls.multiply(named, others, weight, None)
    if found.added is None:
        return outputs
    beta, alpha = found.factors
    return beta * found.added + alpha * outputs


WEIGHT_CALLS: dict[Callable[..., Any], Rule] = {
    **{
        function: _direct(HyperLinear if function is F.linear else HyperConv, names)
        for function, names in OPERATOR_ARGUMENTS.items()
    },
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.bilinear: _bilinear,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys(RECURRENT_NETWORKS, _network),
    **dict.fromkeys(RECURRENT_CELLS, _cell),
    **dict.fromkeys(MULTIPLICATIONS, _multiplication),
}
"""Operator to what is done when one of its arguments is a weight that responds."""


def _hidden(args: tuple[Any, ...]) -> bool:
    """Whether ``torch.vmap`` hides a dimension of an argument."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(value, Tensor) and is_batchedtensor(value) for value in _flat(args))


def _describes(function: Callable[..., Any]) -> bool:
    """Whether a function reads what a tensor is like, and computes nothing from it."""
    name = getattr(function, "__name__", "")
    if name != "__get__":
        return name in DESCRIPTIONS
    attribute = getattr(function, "__self__", None)
    return getattr(attribute, "__name__", "") not in TENSOR_ATTRIBUTES


def _embed(indices: Tensor, weight: Tensor, bias: None, **options: Any) -> Tensor:
    return F.embedding(indices, weight, **options)


def _flat(value: Any) -> Sequence[Any]:
    match value:
        case list() | tuple():
            return [entry for child in value for entry in _flat(child)]
        case dict():
            return _flat(list(value.values()))
    return [value]
