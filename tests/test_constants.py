"""Operations of a dual number and a constant, against ``torch.func.jvp``."""

import operator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stnify.constants import CONSTANT_RULES
from stnify.forward_mode import ForwardModeRules

OPERATIONS = {
    "sum": operator.add,
    "difference": operator.sub,
    "product": operator.mul,
    "quotient": operator.truediv,
    "torch.add": torch.add,
    "torch.subtract": torch.subtract,
    "torch.multiply": torch.multiply,
    "torch.true_divide": torch.true_divide,
    "scaled sum": lambda one, other: torch.add(one, other, alpha=3),
    "rounded quotient": lambda one, other: torch.div(one, other, rounding_mode="floor"),
}
SHAPES = {"as large": (2, 3, 4), "row": (4,), "column": (3, 1), "larger": (5, 2, 3, 4)}
CONSTANTS = {**SHAPES, "scalar tensor": (), "number": None}


def away_from_zero(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(shape, dtype=torch.float64) + 0.5).to(dtype)


def by_rules(function, primal: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level(), ForwardModeRules():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent))))


@given(
    st.sampled_from(sorted(OPERATIONS)),
    st.sampled_from(sorted(CONSTANTS)),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float64, torch.float32, torch.int64]),
)
def test_they_are_what_forward_mode_finds(name, kind, turned, dtype, other_dtype):
    shape = CONSTANTS[kind]
    constant = 2.5 if shape is None else away_from_zero(shape).mul(4).to(other_dtype)

    def function(values: Tensor) -> Tensor:
        one, other = (constant, values) if turned else (values, constant)
        if isinstance(one, float) and name not in ("sum", "difference", "product", "quotient"):
            one = torch.tensor(one)
        return OPERATIONS[name](one, other)

    primal, tangent = away_from_zero((2, 3, 4), dtype), away_from_zero((2, 3, 4), dtype)
    expected = torch.func.jvp(function, (primal,), (tangent,))
    found = by_rules(function, primal, tangent)
    # A quotient's derivative may be multiplied in another order: one rounding more.
    rounding = 4 * torch.finfo(expected[1].dtype).eps
    for value, judge in zip(found, expected, strict=True):
        assert value.dtype is judge.dtype
        assert value.shape == judge.shape
        torch.testing.assert_close(value, judge, rtol=rounding, atol=0)


def test_two_dual_numbers_meet_by_the_rule_for_both():
    primal, tangent = away_from_zero((3,)), away_from_zero((3,))
    outputs, change = by_rules(lambda values: values * values, primal, tangent)
    assert torch.equal(outputs, primal * primal)
    torch.testing.assert_close(change, 2 * primal * tangent)
    assert not torch.allclose(change, primal * tangent), "as if one were a constant"


@pytest.mark.parametrize("function", [lambda v: v + 1.0, lambda v: v - 1.0, lambda v: 1.0 + v])
def test_a_sum_that_is_changed_in_place_leaves_its_operand_alone(function):
    primal, tangent = away_from_zero((3,)), away_from_zero((3,))
    with forward_ad.dual_level(), ForwardModeRules():
        dual = forward_ad.make_dual(primal, tangent.clone())
        function(dual).mul_(7.0)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)


def test_tangents_can_be_differentiated():
    tangent = away_from_zero((3,)).requires_grad_()
    constant = away_from_zero((3,))
    _, change = by_rules(lambda v: (2.0 - v * constant) / 4.0 + constant, constant, tangent)
    (slope,) = torch.autograd.grad(change.sum(), tangent)
    torch.testing.assert_close(slope, -constant / 4.0)


def test_every_way_to_write_them_has_a_rule():
    """Each operator and its names, so that none is left to PyTorch's slow way."""
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    one, other = away_from_zero((3,)), away_from_zero((3,))
    with Watch():
        for operation in (operator.add, operator.sub, operator.mul, operator.truediv):
            for pair in ((one, other), (one, 2.0), (2.0, one)):
                operation(*pair)
        for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide"):
            getattr(torch, name)(one, other)
            getattr(one, name)(other)
    assert seen == set(CONSTANT_RULES)
