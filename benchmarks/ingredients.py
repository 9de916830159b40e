"""What the default settings could have been besides: one ingredient more, less or at another price.

Opposite perturbations were the default once; all others vary those settings. Their quality is in
``benchmarks/short_budget.py``, their cost in ``benchmarks/step_cost.py``.
"""

from typing import Any

OPPOSITE: dict[str, Any] = {"antithetic": True, "response_fraction": 0.5}
"""As many rows as the whole batch has, half of its examples with opposite perturbations."""

INGREDIENTS: dict[str, dict[str, Any]] = {
    "opposite perturbations": OPPOSITE,
    "fixed sigma": {**OPPOSITE, "scale": 1.0},
    "same optimizer": {**OPPOSITE, "response_lr": 1.0},
    "every step": {**OPPOSITE, "response_every": 1},
    "gated": {**OPPOSITE, "response": "gate"},
}
"""Name to what ``stnify`` is called with beside the defaults."""
