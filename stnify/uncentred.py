"""5b. The passes of ``method="stn"``: hyper layers receive lambda itself, in training and in eval.

This is the parameterisation of MacKay et al. (ICLR 2019), where the user's own backward pass trains
general and response parameters at once, [DeltaSTN] Algorithm 2.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stnify.penalties import weight_decay
from stnify.perturb import Perturbation, training_perturbation
from stnify.plan import DecaySite
from stnify.rows import batch_size
from stnify.space import HyperparameterSpace
from stnify.streams import RandomStream
from stnify.tunable import PREFIX, TunableModule, Tunables, pass_inputs


class UncentredTraining:
    """Trains at ``lambda + epsilon``, and remembers each draw until the optimizer steps.

    Args:
        stream: Where perturbations and masks are drawn from.

    Attributes:
        drawn: Perturbations since the last step, for the penalties.
    """

    def __init__(self, stream: RandomStream) -> None:
        self.stream = stream
        self.drawn: list[Perturbation] = []
        self._repeats = False

    def __call__(
        self, graph: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the graph perturbed, differentiably in general and response parameters."""
        space = _space(graph)
        with self.stream.active():
            perturbation = self._perturbation(space, batch_size((args, kwargs)))
            space.active = perturbation.constrained
            tunables = _tunables(graph)
            args, kwargs = tunables.augmented(args, kwargs, perturbation.constrained)
            with tunables.weights_disturbed(cast(nn.Module, graph), perturbation.constrained):
                return graph(*args, **kwargs, **pass_inputs(*perturbation))

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Let passes of the body be at the latest draw, as far as their batch is as large."""
        before, self._repeats = self._repeats, True
        try:
            yield
        finally:
            self._repeats = before

    @contextmanager
    def apart(self, space: HyperparameterSpace) -> Iterator[None]:
        """Keep the draws of the body to itself: it knows no others, and they are forgotten."""
        before, active, self.drawn = self.drawn, space.active, []
        try:
            yield
        finally:
            self.drawn, space.active = before, active

    def _perturbation(self, space: HyperparameterSpace, batch: int) -> Perturbation:
        if self._repeats and self.drawn and len(self.drawn[-1].response_input) == batch:
            return self.drawn[-1]
        perturbation = training_perturbation(space, batch, centred=False)
        if torch.is_grad_enabled():
            self.drawn.append(perturbation)
        return perturbation

    def decay_gradients(
        self, model: TunableModule, sites: tuple[DecaySite, ...]
    ) -> dict[nn.Parameter, Tensor]:
        """Return the gradient of all weight decays over the draws since the last step."""
        general = model._stnify.general_parameters()
        responses = model._stnify.weight_responses()
        parameters = [general[name] for site in sites for name in site.parameters]
        parameters += [p for p in model._stnify.response_parameters().values() if p.requires_grad]
        rows = sum(len(draw.response_input) for draw in self.drawn)
        total = torch.zeros((), device=model._stnify.space.unconstrained.device)
        with torch.enable_grad():
            for draw in self.drawn:
                assert draw.constrained is not None
                for site in sites:
                    coefficient = draw.constrained[:, model._stnify.space.index(site.column)]
                    penalty = weight_decay(
                        coefficient, site.parameters, general, responses, draw.response_input
                    )
                    total = total + penalty * (len(draw.response_input) / rows)
        found = torch.autograd.grad(total, parameters, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    def forget(self, space: HyperparameterSpace) -> None:
        """Drop the draws after an optimizer step."""
        self.drawn.clear()
        space.active = None


def uncentred_evaluation(
    graph: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run the graph at lambda, unperturbed and without noise."""
    batch = batch_size((args, kwargs))
    response_input = _space(graph).unconstrained.detach().expand(batch, -1)
    return graph(*args, **kwargs, **pass_inputs(response_input))


def _space(graph: Any) -> HyperparameterSpace:
    return _tunables(graph).space


def _tunables(graph: Any) -> Tunables:
    return cast(Tunables, graph.get_submodule(PREFIX))
