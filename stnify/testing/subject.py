"""A private, converted copy of a model, and every pass through it that an assertion compares."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stnify.bundle import STN
from stnify.convert import stnify
from stnify.declare import Declaration, Hyperparameter
from stnify.errors import UsageError
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.rows import batch_size
from stnify.streams import RandomStream
from stnify.tunable import TunableModule, intermediate_results, pass_inputs
from stnify.verify import verify

Model = nn.Module | STN
Hparams = Sequence[Declaration] | Mapping[str, float] | None
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

Criterion = Callable[[Any], Tensor]
"""``prediction -> scalar``."""

STRENGTH = 0.2
"""Standard deviation of gates that were closed, so that responses have an effect."""


REPEATED = 3
"""Examples made of a single one."""


def idle() -> list[Declaration]:
    """Return two hyperparameters without any effect of their own, to which weights respond."""
    return [Hyperparameter(name, init=0.5) for name in ("first", "second")]


def mean_square(prediction: Any) -> Tensor:
    """Return the mean of the squares of every real number in a prediction, ``()``.

    Raises:
        UsageError: There is none.
    """
    squares = [t.square().mean() for t in real(tensors(prediction))]
    return torch.stack(squares).sum()


def real(values: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors of real numbers.

    Raises:
        UsageError: There is none.
    """
    found = [value for value in values if value.is_floating_point()]
    if not found:
        raise UsageError(
            "a prediction must hold real numbers to be differentiated, but every tensor in it "
            "holds integers or booleans. Test the model without its last step, such as `argmax`."
        )
    return found


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested mappings, sequences and dataclasses, in order.

    One of several lengths counts as a sequence.
    """
    match value:
        case Tensor() if value.is_nested:
            return list(value.unbind())
        case Tensor():
            return [value]
        case Mapping():
            children: list[Any] = list(value.values())
        case list() | tuple():
            children = list(value)
        case _ if is_dataclass(value):
            children = [getattr(value, field.name) for field in fields(value)]
        case _:
            return []
    return [tensor for child in children for tensor in tensors(child)]


@dataclass(frozen=True)
class Subject:
    """A converted model nobody else uses, with inputs.

    Attributes:
        model: Converted.
        inputs: Positional and keyword arguments; each pass gets a copy.
        seed: Of the random numbers of every pass.
    """

    model: TunableModule
    inputs: Call
    seed: int = 0

    @property
    def batch(self) -> int:
        """Examples in the inputs."""
        return batch_size(self.inputs)

    @property
    def name(self) -> str:
        """Class of the user's model."""
        return type(self.model._stnify.original).__name__

    def several(self) -> "Subject":
        """Return a subject with several examples; a single one is repeated, with some noise.

        Norms divide by the differences between examples, so copies alone would not do.
        """
        if self.batch != 1:
            return self

        def repeat(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or len(tensor) != 1:
                return tensor
            repeated = tensor.repeat(REPEATED, *[1] * (tensor.ndim - 1))
            if not tensor.is_floating_point():
                return repeated
            spread = 0.5 * tensor.abs().mean().clamp_min(0.1)
            return repeated + spread * torch.randn_like(repeated)

        with RandomStream(2, self.device()).active():
            return replace(self, inputs=tree_map_only(Tensor, repeat, self.inputs))

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """Call ``function`` with the inputs; every pass draws the same random numbers."""
        args, kwargs = tree_map_only(Tensor, torch.clone, self.inputs)
        with RandomStream(self.seed, self.device()).active():
            return function(*args, **kwargs, **options)

    def original(self) -> Any:
        """Predict as the user's model does."""
        return self.call(self.model._stnify.original)

    def plain(self) -> Any:
        """Run the graph as it is, without noise or response."""
        return self.call(self.model._stnify.graph)

    def general(self) -> Any:
        """Predict as the converted model does."""
        return self.call(self.model)

    def zero(self) -> Any:
        """Run the graph with a response input of zeros."""
        return self.call(self.model._stnify.graph, **pass_inputs(0 * self.draw()))

    def perturbed(self, response_input: Tensor) -> Any:
        """Predict with the perturbed weights themselves."""
        return self._pass(perturbed_forward, response_input)

    def linearized(self, response_input: Tensor) -> Any:
        """Predict to first order in the perturbation."""
        return self._pass(linearized_forward, response_input)

    def _pass(self, forward: Callable[..., Any], response_input: Tensor) -> Any:
        space = self.model._stnify.space
        constrained = None
        if self.model.training:
            constrained = space.current.expand(len(response_input), -1)

        def run(graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            return forward(graph, args, kwargs, Perturbation(response_input, constrained))

        with self.model._stnify.running(run, constrained):
            return self.call(self.model)

    def draw(self, seed: int = 0) -> Tensor:
        """Return one perturbation for each example, ``(batch, h)``."""
        space = self.model._stnify.space
        with RandomStream(seed, self.device()).active():
            return torch.randn(
                self.batch, len(space.columns), dtype=space.raw_scale.dtype, device=self.device()
            )

    def twin(self) -> nn.Module:
        """Return a copy of the user's model, in the mode it is in and with all it keeps."""
        return copied(self.model._stnify.original)

    @property
    def tunes_noise(self) -> bool:
        """Whether what is tuned, or the method, changes what train mode computes."""
        tunables = self.model._stnify
        noisy = tunables.noises or tunables.weight_noises or tunables.augment is not None
        return bool(noisy) or tunables.training_pass is not None

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Run the body in train or eval mode; buffers come back as they were."""
        self.model.train(training)
        with self.model._stnify.buffers_restored():
            yield

    def layouts(self) -> dict[str, str]:
        """Measure whom rows belong to; return it in words for each layer."""
        words = verify(self.model, *tree_map_only(Tensor, torch.clone, self.inputs))
        layers = [name for name in words if name.startswith("layers.")]
        return {name.removeprefix("layers."): words[name] for name in layers}

    def shared_sites(self) -> list[str]:
        """Measure whom rows belong to; return the layers where they belong to no example."""
        return [name for name, word in self.layouts().items() if word.startswith("shared")]

    @torch.no_grad()
    def close(self, layers: Iterable[str]) -> None:
        """Set all response parameters of these layers to zero."""
        for name in layers:
            for parameter in self.model._stnify.hyper_layers[name].parameters():
                parameter.zero_()

    @torch.no_grad()
    def open(self) -> None:
        """Give every response parameter that is zero a value, so that the response has an effect.

        A fresh response is closed: its gates are zero.
        """
        with RandomStream(1, self.device()).active():
            for parameter in self.model._stnify.response_parameters().values():
                if not parameter.any():
                    parameter.normal_(0, STRENGTH)

    def device(self) -> torch.device:
        """Return where the model is."""
        return self.model._stnify.space.unconstrained.device


@contextmanager
def prepared(
    model: Model,
    inputs: Any,
    hparams: Hparams = None,
    *,
    double: bool = False,
) -> Iterator[Subject]:
    """Convert a copy of ``model`` for the time of the body.

    The caller's model, gradients, generators and default dtype stay as they are.

    Args:
        model: Any module, or an STN, whose response is used as it is.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        hparams: Of the conversion; two without effect by default.
        double: Compute in float64.

    Raises:
        UsageError: ``hparams`` came with an STN, which has its own; or there are no examples in
            ``inputs``.
        StnifyError: The model cannot be converted.
    """
    refuse_arguments(model, inputs, hparams)
    dtype = torch.get_default_dtype()
    with _generators_restored():
        if double:
            torch.set_default_dtype(torch.float64)
        try:
            call = _arguments(inputs)
            call = _as_double(call) if double else call
            subject = Subject(_converted(model, call, hparams, double), call)
            subject.open()
            yield subject
        finally:
            torch.set_default_dtype(dtype)


def refuse_arguments(model: Model, inputs: Any, hparams: Hparams) -> None:
    """Raise UsageError if hyperparameters come with an STN, or inputs without examples."""
    if isinstance(model, STN) and hparams is not None:
        raise UsageError("an STN has its own hyperparameters: leave `hparams` out.")
    if not batch_size(_arguments(inputs)):
        found = [tuple(tensor.shape) for tensor in tensors(_arguments(inputs))]
        raise UsageError(
            f"the inputs must hold a tensor whose first dimension counts examples, one at least, "
            f"but the shapes of their tensors are {found}. Give a batch: `tensor[None]` is one of "
            f"a single example."
        )


def _converted(model: Model, call: Call, hparams: Hparams, double: bool) -> TunableModule:
    if isinstance(model, STN):
        own = copy.deepcopy(model.model)
        return own.double() if double else own
    private = copied(model)
    for parameter in private.parameters():
        parameter.grad = None
    if double:
        private = private.double()
    hparams = idle() if hparams is None else hparams
    return stnify(
        private, hparams, example_inputs=example(call), seed=0, compile=False, verify=False
    ).model


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model on which forward code left tensors it computed."""
    return copy.deepcopy(model, intermediate_results(model))


def example(call: Call) -> Any:
    """Return positional and keyword arguments as ``example_inputs`` of ``stnify``."""
    args, kwargs = call
    return kwargs or args


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Put the states of Python's and PyTorch's generators back after the body."""
    python, cpu = random.getstate(), torch.get_rng_state()
    accelerator = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    module = torch.get_device_module(accelerator) if accelerator else None
    states = module.get_rng_state_all() if module and hasattr(module, "get_rng_state_all") else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if module is not None and states is not None:
            module.set_rng_state_all(states)


def _arguments(inputs: Any) -> Call:
    """Return positional and keyword arguments, as ``example_inputs`` of ``stnify`` reads them."""
    match inputs:
        case dict():
            return (), inputs
        case tuple() | list():
            return tuple(inputs), {}
        case _:
            return (inputs,), {}


def _as_double(call: Call) -> Call:
    double: Call = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, call)
    return double
