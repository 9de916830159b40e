"""11. Property tests for your own model, and for your own hyper layer.

Each assertion takes ``(model, inputs, hparams=None)``: any module, which is copied and converted,
or an ``STN``; a tensor, a tuple of positional or a dict of keyword arguments; and declarations, by
default two hyperparameters that have no effect but that weights respond to them. The caller's model
and generators stay as they are. A failure names the first operation that differs.

``stnify.testing.strategies`` draws random models, hyperparameters and batches; it needs hypothesis.
"""

from stnify.testing.compilation import assert_compiles as assert_compiles
from stnify.testing.contract import HyperLayerContract as HyperLayerContract
from stnify.testing.exactness import assert_export_exact as assert_export_exact
from stnify.testing.exactness import assert_identity as assert_identity
from stnify.testing.exactness import assert_state_roundtrip as assert_state_roundtrip
from stnify.testing.materialization import (
    assert_perturbation_exact as assert_perturbation_exact,
)
from stnify.testing.perturbations import (
    assert_linear_in_perturbation as assert_linear_in_perturbation,
)
from stnify.testing.perturbations import assert_rows_independent as assert_rows_independent
from stnify.testing.perturbations import (
    assert_tangent_matches_differences as assert_tangent_matches_differences,
)
from stnify.testing.separation import assert_gradients_separated as assert_gradients_separated
from stnify.testing.verdict import converts_or_refuses as converts_or_refuses
