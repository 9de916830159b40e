"""5a. Operators that forward mode cannot take as they are, and what is done in their place.

Add a rule: one row in ``FORWARD_MODE_RULES``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from stnify.composites import (
    RECURRENT_CELLS,
    RECURRENT_NETWORKS,
    multi_head_attention,
    pack,
    pad,
)
from stnify.constants import ADD, CONSTANT_RULES, MULTIPLY


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    values = input.to(_accumulation_dtype(input))
    if training or running_mean is None or running_var is None:
        _refuse_single_value(input)
        return _batch_standardise(values, weight, bias, eps).to(input.dtype)
    per_channel = (1, -1, *([1] * (input.ndim - 2)))
    scale = torch.rsqrt(running_var + eps)
    shift = -running_mean * scale
    normal = _affine(values, scale.view(per_channel), shift.view(per_channel))
    return _affine(normal, _shaped(weight, per_channel), _shaped(bias, per_channel)).to(input.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    normal = _standardise(input.to(_accumulation_dtype(input)), dims, eps)
    return _affine(normal, weight, bias).to(input.dtype)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1).to(_accumulation_dtype(input))
    normal = _standardise(grouped, (2,), eps).reshape(input.shape)
    per_channel = (1, -1, *([1] * (input.ndim - 2)))
    return _affine(normal, _shaped(weight, per_channel), _shaped(bias, per_channel)).to(input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normal = _standardise(input.to(_accumulation_dtype(input)), tuple(range(2, input.ndim)), eps)
    per_channel = (1, -1, *([1] * (input.ndim - 2)))
    return _affine(normal, _shaped(weight, per_channel), _shaped(bias, per_channel)).to(input.dtype)


# The functions below write primal and tangent apart: for a dual tensor times a constant PyTorch
# builds a zero tangent of the constant, which costs more than the product itself.


def _batch_standardise(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(values)
    scale, shift = (None if p is None else p.to(primal.dtype) for p in (weight, bias))
    outputs, mean, deviation = torch.native_batch_norm(
        primal, scale, shift, None, None, True, 0.0, eps
    )
    if tangent is None:
        return outputs
    change = _BatchNormTangent.apply(tangent, primal, scale, mean, deviation, eps)
    return forward_ad.make_dual(outputs, change)


class _BatchNormTangent(torch.autograd.Function):
    """Maps a tangent through batch normalisation, by the fused kernel of its backward pass.

    Within a channel the Jacobian is ``weight r (I - 1/N - n n^T / N)``, a symmetric matrix, so
    forward mode, reverse mode, and the reverse mode of either are one and the same product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tangent: Tensor,
        primal: Tensor,
        scale: Tensor | None,
        mean: Tensor,
        deviation: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(primal, scale, mean, deviation)
        ctx.eps = eps
        return _batch_norm_product(tangent, primal, scale, mean, deviation, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        primal, scale, mean, deviation = ctx.saved_tensors
        product = _batch_norm_product(gradient, primal, scale, mean, deviation, ctx.eps)
        return product, None, None, None, None, None


def _batch_norm_product(
    vector: Tensor,
    primal: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    eps: float,
) -> Tensor:
    product, _, _ = torch.ops.aten.native_batch_norm_backward(
        vector, primal, scale, None, None, mean, deviation, True, eps, [True, False, False]
    )
    return product


def _standardise(values: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Return ``n = (x - mean) r`` and its tangent ``r (x' - mean(x') - n mean(n x'))``."""
    primal, tangent = forward_ad.unpack_dual(values)
    variance, mean = torch.var_mean(primal, dims, correction=0, keepdim=True)
    deviation = torch.rsqrt(variance + eps)
    normal = (primal - mean) * deviation
    if tangent is None:
        return normal
    along = (normal * tangent).mean(dims, keepdim=True)
    change = tangent - tangent.mean(dims, keepdim=True) - normal * along
    return forward_ad.make_dual(normal, change * deviation)


def _affine(values: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return ``values * scale + shift`` for constant scale and shift."""
    primal, tangent = forward_ad.unpack_dual(values)
    if scale is None and shift is None:
        primal = primal.clone()  # the tangent's graph holds it, and code may change it in place
    if scale is not None:
        primal = primal * scale
        tangent = None if tangent is None else tangent * scale
    if shift is not None:
        primal = primal + shift
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def _shaped(parameter: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if parameter is None else parameter.view(shape)


def _accumulation_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.dtype in {torch.float16, torch.bfloat16} else values.dtype


def _refuse_single_value(values: Tensor) -> None:
    if values.numel() == values.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size "
            f"{tuple(values.shape)}"
        )


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (side.repeat_interleave(repeats, dim=-3) for side in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = MULTIPLY(query, factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.softmax(-1) if attn_mask is None else _masked_softmax(scores, attn_mask)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return attention weights, zero for a query that may look nowhere, as the fused kernels do."""
    blocked = mask.logical_not() if mask.dtype is torch.bool else mask == float("-inf")
    nowhere = blocked.all(-1, keepdim=True)
    if mask.dtype is not torch.bool:
        scores = ADD(scores, mask.masked_fill(blocked, 0.0))
    scores = scores.masked_fill(blocked & ~nowhere, float("-inf"))
    return scores.softmax(-1).masked_fill(nowhere, 0.0)


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    # Called from a rule, its own attention would not meet the rule for that.
    with ForwardModeRules():
        return multi_head_attention(F.linear, *args, **kwargs)


def _normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(input)
    if p != 2 or tangent is None:
        return F.normalize(input, p, dim, eps)
    norm = torch.linalg.vector_norm(primal, 2, dim, keepdim=True)
    normal, length = primal / norm.clamp_min(eps), norm.clamp_min(eps)
    along = (normal * tangent).sum(dim, keepdim=True) * (norm > eps)
    return forward_ad.make_dual(normal.clone(), (tangent - normal * along) / length)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = None if dim == -1 else [other for other in range(v.ndim) if other != dim]
    return v * (g / torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    left, right = input.chunk(2, dim)
    return left * right.sigmoid()


DIFFERENTIATES = "differentiates dual numbers"
"""What the error says that ends a derivative in which a response would be lost."""


def _refuse_derivative(outputs: Tensor | Sequence[Tensor], *_: Any, **__: Any) -> None:
    """Raise NotImplementedError if dual numbers would be differentiated.

    Hyper layers write the tangent themselves, where reverse mode does not see it.
    """
    several = [outputs] if isinstance(outputs, Tensor) else outputs
    if any(forward_ad.unpack_dual(output).tangent is not None for output in several):
        raise NotImplementedError(DIFFERENTIATES)


FORWARD_MODE_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    # Forward mode compiles only when these are written out; and the response pass must not
    # update running statistics.
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    # No forward-mode derivative in PyTorch.
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch._weight_norm: _weight_norm,
    torch.cdist: _cdist,
    # The derivative of PyTorch's rule is NaN for vectors of zeros, such as padding.
    F.normalize: _normalize,
    F.hardsigmoid: _hardsigmoid,
    F.glu: _glu,
    torch._pack_padded_sequence: pack,
    torch._pad_packed_sequence: pad,
    **{function: partial(network, F.linear) for function, network in RECURRENT_NETWORKS.items()},
    **{function: partial(cell, F.linear) for function, cell in RECURRENT_CELLS.items()},
}
"""Operator to the decomposition used in the linearised pass, and only there."""


PRODUCTS: set[Callable[..., Any]] = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    Tensor.mm,
    torch.sparse.mm,
    torch.spmm,
}
"""Operators that multiply a sparse matrix, such as who is whose neighbour, with activations."""


def _is_sparse(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is not torch.strided


def _sparse_product(func: Callable[..., Any], left: Tensor, right: Tensor) -> Any:
    """Multiply a sparse and a dense matrix; only the dense one may have a tangent."""
    if _is_sparse(left) and _is_sparse(right):
        return func(left, right)
    sparse, dense = (left, right) if _is_sparse(left) else (right, left)
    primal, tangent = forward_ad.unpack_dual(dense)

    def multiply(values: Tensor) -> Tensor:
        product: Tensor = func(sparse, values) if sparse is left else func(values, sparse)
        return product

    outputs = multiply(primal)
    return outputs if tangent is None else forward_ad.make_dual(outputs, multiply(tangent))


LINEAR_OPERATORS = {
    "torchvision::roi_align",
    "torchvision::ps_roi_align",
    "torchvision::ps_roi_pool",
}
"""Operators of other libraries that are linear in their first argument and constant in all others.

They have no forward-mode derivative, and may lose a tangent without an error.
"""


MET_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Those that eager code has called, to their rules: the compiler cannot tell them by name."""


REGISTERED = (OpOverloadPacket, OpOverload)
"""Types of operators, PyTorch's own among them."""


def _registered(func: Callable[..., Any], compiling: bool) -> Callable[..., Any]:
    """Return what takes the place of an operator: of another library's, its rule or a check."""
    if compiling:
        return MET_OPERATORS.get(func, func)
    own = _operator(func).startswith(("aten::", "prim::", "prims::"))
    return func if own else partial(_custom, func)


def _operator(func: Any) -> str:
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    return str(packet._qualified_op_name)


def _custom(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator of another library, with a rule if it has one.

    Raises:
        NotImplementedError: It has none and loses a tangent.
    """
    name = _operator(func)
    if name in LINEAR_OPERATORS:
        MET_OPERATORS[func] = partial(_linear, func)
        return _linear(func, *args, **kwargs)
    moves = _moves((args, kwargs))
    outputs = func(*args, **kwargs)
    if moves and (_writes(func) or (_numbers(outputs) and not _moves(outputs))):
        raise NotImplementedError(f"Trying to use forward AD with {name} that does not support it")
    return outputs


def _writes(func: Any) -> bool:
    """Whether an operator changes an argument in place and returns nothing that shows it."""
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    schemas = [getattr(packet, name)._schema for name in packet.overloads()]
    return any(schema.is_mutable and not schema.returns for schema in schemas)


def _linear(func: Callable[..., Any], inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call an operator that is linear in its first argument and constant in all others."""
    args, kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
    primal, tangent = forward_ad.unpack_dual(inputs)
    outputs = func(primal, *args, **kwargs)
    if tangent is None:
        return outputs
    return tree_map(_with_tangent, outputs, func(tangent, *args, **kwargs))


def _primal(value: Tensor) -> Tensor:
    return forward_ad.unpack_dual(value).primal


def _with_tangent(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal, tangent) if primal.is_floating_point() else primal


def _moves(nested: Any) -> bool:
    """Whether a tensor in there has a tangent."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _numbers(nested))


def _numbers(nested: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
    return [tensor for tensor in leaves if tensor.is_floating_point()]


class ForwardModeRules(TorchFunctionMode):
    """Replaces the operators that have a rule while active, also inside leaf modules."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the decomposition of ``func`` if there is one."""
        kwargs = kwargs or {}
        compiling = torch.compiler.is_compiling()
        rule = (FORWARD_MODE_RULES if compiling else _EAGER_RULES).get(func)
        if rule is not None:
            return rule(*args, **kwargs)
        if isinstance(func, REGISTERED):
            return _registered(func, compiling)(*args, **kwargs)
        if func in PRODUCTS and any(map(_is_sparse, args)):
            return _sparse_product(func, *args)
        if func is torch.autograd.grad:
            _refuse_derivative(*args, **kwargs)
        return func(*args, **kwargs)


_EAGER_RULES = {**FORWARD_MODE_RULES, **CONSTANT_RULES}
"""Rules where nothing is compiled: one look for each operator, of which there are many."""
