"""The default settings taken apart: each ingredient by itself left out, or at another price.

Their quality is in ``benchmarks/short_budget.py``, their cost in ``benchmarks/step_cost.py``.
"""

from typing import Any

INGREDIENTS: dict[str, dict[str, Any]] = {
    "fixed sigma": {"scale": 1.0},
    "opposite perturbations": {"antithetic": True, "response_fraction": 0.5},
    "same optimizer": {"response_lr": 1.0},
    "every step": {"response_every": 1},
    "gated": {"response": "gate"},
}
"""Name to what ``stnify`` is called with beside the defaults."""
