"""5c. Compile a perturbed pass as one graph, or run it as it is."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from stnify.linearize import Forward
from stnify.perturb import Perturbation


class CompiledForward:
    """Calls a forward function compiled as one graph; one that does not compile runs eagerly.

    It is one graph or none: at a break between two graphs tangents would be lost without an error.

    Args:
        forward: ``linearized_forward`` or ``perturbed_forward``.
        name: Of the step, for the warning.
    """

    def __init__(self, forward: Forward, name: str) -> None:
        self.forward = forward
        self.name = name
        self._compiled: Forward | None = torch.compile(forward, fullgraph=True)

    def __call__(
        self,
        graph: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        perturbation: Perturbation,
    ) -> Any:
        """Predict; the first failure to compile is warned of."""
        if self._compiled is not None:
            try:
                return self._compiled(graph, args, kwargs, perturbation)
            except TorchDynamoException as error:
                self._compiled = None
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"the {self.name} pass runs eagerly, because it does not compile as one graph: "
                    f"{reason}.",
                    stacklevel=2,
                )
        return self.forward(graph, args, kwargs, perturbation)
