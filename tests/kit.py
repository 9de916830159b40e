"""What the tests of the property-test kit share."""

import pytest
import torch
from torch import Tensor

from stnify import testing

ASSERTIONS = {
    name: getattr(testing, f"assert_{name}")
    for name in (
        "identity",
        "rows_independent",
        "linear_in_perturbation",
        "tangent_matches_differences",
        "perturbation_exact",
        "gradients_separated",
        "export_exact",
        "state_roundtrip",
    )
}
"""All but the one that compiles, which takes longer."""

every_assertion = pytest.mark.parametrize("name", ASSERTIONS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
