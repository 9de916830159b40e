"""What fits the response unless told otherwise: Adam, in one kernel where PyTorch has one."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

LEARNING_RATE = 3e-3
"""Of Adam on the response parameters."""

FUSED = {"cpu", "cuda"}
"""Devices on which a step of Adam is one kernel, which passes over memory once."""


def adam(groups: list[dict[str, Any]]) -> Adam:
    """Return Adam over ``groups``, right in every memory format."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= FUSED
    made = Adam(groups, lr=LEARNING_RATE, fused=fused)
    if fused:
        made.register_step_pre_hook(_aligned)
    return made


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
