"""What fits the response unless told otherwise: Adam, in one kernel where PyTorch has one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

LEARNING_RATE = 3e-3
"""Of Adam on the response parameters."""

FUSED = {"cpu", "cuda"}
"""Devices on which a step of Adam is one kernel, which passes over memory once."""


def adam(groups: list[dict[str, Any]]) -> Optimizer:
    """Return Adam over ``groups``, right in every memory format and in half precision."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(parameter.dtype is torch.float16 for parameter in parameters):
        return HalfAdam(groups, lr=LEARNING_RATE)
    fused = {parameter.device.type for parameter in parameters} <= FUSED
    made = Adam(groups, lr=LEARNING_RATE, fused=fused)
    if fused:
        made.register_step_pre_hook(_aligned)
    return made


class HalfAdam(Optimizer):
    """Adam whose state fits in half precision.

    Squares of gradients below 2e-4 are nought in half precision, and the share of theirs that
    enters a mean is so below 8e-3. So the state holds the root of that mean; all is computed in
    single precision, and rounded when it is kept. With ``beta2 = 0.999`` a step would change the
    root by less than it is rounded by.

    Args:
        groups: Param groups.
        lr: Learning rate.
        betas: Weights of the past in the means of gradients and of their squares.
        eps: Added to the root, in single precision.

    Source: Kingma & Ba, ICLR 2015, Algorithm 1, with the second moment kept as its root.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step for the gradients there are, and return what ``closure`` returned, if any."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                self._move(parameter, group)
        return result

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        (mean_weight, square_weight), state = group["betas"], self.state[parameter]
        if not state:
            zeros = torch.zeros_like(parameter)
            state.update(step=torch.zeros(()), mean=zeros, root=zeros.clone())
        gradient = parameter.grad.float()
        state["step"] += 1
        steps = float(state["step"])
        mean = mean_weight * state["mean"].float() + (1 - mean_weight) * gradient
        square = square_weight * state["root"].float().square()
        root = (square + (1 - square_weight) * gradient.square()).sqrt()
        state["mean"].copy_(mean)
        state["root"].copy_(root)
        change = mean / (1 - mean_weight**steps)
        change /= root / (1 - square_weight**steps) ** 0.5 + group["eps"]
        parameter.copy_(parameter.float() - group["lr"] * change)


def _aligned(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Lay gradients and state out as their parameters are.

    The kernel pairs numbers by their place in memory. They come apart where a parameter changes its
    memory format after a step, or before a state is loaded.
    """
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if parameter.grad is not None:
            parameter.grad = _laid_out(parameter.grad, parameter)
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = _laid_out(value, parameter)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
