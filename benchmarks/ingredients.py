"""The settings taken apart: each ingredient by itself left out, or at another price.

Their quality is in ``benchmarks/short_budget.py``, their cost in ``benchmarks/step_cost.py``.
"""

from typing import Any

SINGLE: dict[str, Any] = {"antithetic": False, "response_fraction": 1.0}
"""One perturbation for each example of the whole batch: the default where no decay is tuned."""

OPPOSITE: dict[str, Any] = {"antithetic": True, "response_fraction": 0.5}
"""Opposite perturbations of half of the batch: the default where a decay is tuned."""

INGREDIENTS: dict[str, dict[str, Any]] = {
    "single perturbations": SINGLE,
    "opposite perturbations": OPPOSITE,
    "fixed sigma": {**OPPOSITE, "scale": 1.0},
    "same optimizer": {**OPPOSITE, "response_lr": 1.0},
    "every step": {**OPPOSITE, "response_every": 1},
    "gated": {**OPPOSITE, "response": "gate"},
}
"""Name to what ``stnify`` is called with beside the defaults."""
