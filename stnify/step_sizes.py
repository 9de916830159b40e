"""How far a step of an optimizer goes, by what it keeps of each parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def step_sizes(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | float | None:
    """Return how far a constant small change of the gradient moves ``parameter`` in one step.

    That is the learning rate over one minus the momentum, and over the root of the running mean
    square of the gradients for optimizers that keep one; nought for a parameter that the optimizer
    does not move, None for optimizers that are not among ``STEP_SIZES``.
    """
    rule = next((STEP_SIZES[kind] for kind in type(optimizer).__mro__ if kind in STEP_SIZES), None)
    if rule is None:
        return None
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return rule(group, optimizer.state.get(parameter, {}))
    return 0.0


Settings = Mapping[str, Any]
State = Mapping[str, Any]


def _of_sgd(group: Settings, state: State) -> float:
    momentum = group["momentum"]
    kept = 1 - group["dampening"] if momentum else 1.0
    return float(group["lr"]) * kept / (1 - momentum)


def _of_adam(group: Settings, state: State) -> Tensor | float:
    if not state:
        return 0.0
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    square = square / (1 - group["betas"][1] ** float(state["step"]))
    size: Tensor = float(group["lr"]) / (square.sqrt() + group["eps"])
    return size


def _of_adamax(group: Settings, state: State) -> Tensor | float:
    return float(group["lr"]) / state["exp_inf"] if state else 0.0


def _of_rmsprop(group: Settings, state: State) -> Tensor | float:
    if not state:
        return 0.0
    square = state["square_avg"]
    if group["centered"]:
        square = square - state["grad_avg"].square()
    rate = float(group["lr"]) / (1 - group["momentum"])
    size: Tensor = rate / (square.sqrt() + group["eps"])
    return size


def _of_adagrad(group: Settings, state: State) -> Tensor:
    rate = float(group["lr"]) / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    size: Tensor = rate / (state["sum"].sqrt() + group["eps"])
    return size


def _of_adadelta(group: Settings, state: State) -> Tensor | float:
    if not state:
        return 0.0
    ratio = (state["acc_delta"] + group["eps"]) / (state["square_avg"] + group["eps"])
    size: Tensor = float(group["lr"]) * ratio.sqrt()
    return size


STEP_SIZES: dict[type[Optimizer], Callable[[Settings, State], Tensor | float]] = {
    torch.optim.SGD: _of_sgd,
    torch.optim.Adam: _of_adam,
    torch.optim.AdamW: _of_adam,
    torch.optim.NAdam: _of_adam,
    torch.optim.Adamax: _of_adamax,
    torch.optim.RMSprop: _of_rmsprop,
    torch.optim.Adagrad: _of_adagrad,
    torch.optim.Adadelta: _of_adadelta,
}
"""Kind of optimizer to its step sizes, from a param group and what it keeps of a parameter."""
