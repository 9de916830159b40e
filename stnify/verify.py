"""3b. Prove a conversion on real inputs: same outputs in both modes, and whose rows are whose."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stnify.errors import StnifyError, TraceError, UnsupportedModuleError
from stnify.layouts import (
    PROBES,
    Inputs,
    first_examples,
    measured_layouts,
    of_both_modes,
    set_layouts,
)
from stnify.nested import leaves, map_tensors
from stnify.rows import batch_size
from stnify.streams import RandomStream
from stnify.tunable import TunableModule, evaluating, pass_inputs
from stnify.untouched import state_restored

QUIET = ("drop", "stochastic")
"""In the names of classes that are noise and nothing else, in lower case."""


@torch.no_grad()
def verify(
    model: TunableModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Check the graph against the original and set the row layout of every site.

    Outputs are compared in eval mode, bit for bit, and in train mode up to rounding, on a few
    examples and where noise can be switched off. Rows are measured in eval mode, and in train mode
    as well where the model's own code runs. Parameters, buffers and random state stay as they are.

    Args:
        model: Just converted.
        args: Positional inputs, as for the model.
        kwargs: Keyword inputs.

    Returns:
        Layout in words, by name of the hyper layer or noise site.

    Raises:
        TraceError: The graph's output differs from the original's.
        UnsupportedModuleError: Code of the model changes a parameter while it predicts, which
            perturbed passes would do as well.
    """
    inputs: Inputs = map_tensors(torch.clone, (args, dict(kwargs)))
    private = RandomStream(0, model._stnify.space.unconstrained.device)
    changed: list[str] = []
    try:
        with private.active(), _parameters_restored(model, changed):
            with evaluating(model):
                _refuse_difference(model, inputs)
            with _training(model):
                _refuse_difference_in_training(model, inputs)
            words = _layouts(model, inputs)
    except TraceError:
        if not changed:
            raise
    if changed:
        raise UnsupportedModuleError(
            f"a model must not change its parameters while it predicts, because perturbed passes "
            f"would do so as well, but {changed[0]!r} is changed by its code. Change it in the "
            f"loop, after optimizer.step(), or make it a buffer or a parametrization."
        )
    return words


def _layouts(model: TunableModule, inputs: Inputs) -> dict[str, str]:
    """Measure rows in eval mode, and where code of the model's own runs, in train mode too."""
    with evaluating(model), _untouched(model):
        words = measured_layouts(model, inputs)
    if model._stnify.swapped or model._stnify.functions:
        with _training(model), _untouched(model):
            trained = measured_layouts(model, inputs)
        words = {name: of_both_modes(word, trained[name]) for name, word in words.items()}
        set_layouts(model, words)
    return words


# The same outputs ---------------------------------------------------------------------------------


def _refuse_difference(model: TunableModule, inputs: Inputs) -> None:
    tensors = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    before = [tensor._version for tensor in tensors]
    expected = _outputs(model, model._stnify.original, inputs)
    if [tensor._version for tensor in tensors] != before:
        raise UnsupportedModuleError(
            f"a model must leave its inputs as they are, because every pass of a step gets the "
            f"same ones, but {type(model._stnify.original).__name__} changes them in place. Write "
            f"`x = x - mean` instead of `x -= mean`, or clone them first."
        )
    try:
        found = _outputs(model, model._stnify.graph, inputs)
    except (StnifyError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the graph took a way that the original does not
        raise _other(model, "exactly ", "eval") from error
    if not _agree(_identical, expected, found):
        raise _other(model, "exactly ", "eval")


def _refuse_difference_in_training(model: TunableModule, inputs: Inputs) -> None:
    """Compare in train mode, unless the original is random there, or cannot run on a few examples.

    Noise of PyTorch's and timm's modules, and all that was added, are off.
    """
    original, graph = model._stnify.original, model._stnify.graph
    for few in _fewer(inputs):
        try:
            expected, again = (_outputs(model, original, few, seed) for seed in (0, 1))
            break
        except torch.OutOfMemoryError:
            raise
        except Exception:
            continue
    else:
        return
    if not _agree(_close, expected, again):
        return
    values = pass_inputs(None, model._stnify.space.current)
    found = _outputs(model, partial(graph, **values), few)
    model._stnify.forget_records()
    if not _agree(_close, expected, found):
        raise _other(model, "", "train")


def _fewer(inputs: Inputs) -> Iterator[Inputs]:
    """Yield a few examples, then all: inputs that index into others cannot be cut."""
    full = batch_size(inputs)
    if full:
        yield first_examples(inputs, full, PROBES)
    yield inputs


def _other(model: TunableModule, how: str, mode: str) -> TraceError:
    return TraceError(
        f"the traced graph must compute {how}what {type(model._stnify.original).__name__} computes "
        f"in {mode} mode, but its output differs. The model's control flow depends on its inputs "
        f"or on something outside; name the module that does so in `leaves=`, the whole model as "
        f'"".'
    )


def _outputs(
    model: TunableModule, run: Callable[..., Any], inputs: Inputs, seed: int = 0
) -> list[Any]:
    """Return the leaves of what ``run`` returns; the model stays as it is."""
    stream = RandomStream(seed, model._stnify.space.unconstrained.device)
    args, kwargs = inputs
    with _untouched(model), stream.active():
        return list(leaves(run(*args, **kwargs)))


def _agree(same: Callable[[Any, Any], bool], expected: list[Any], found: list[Any]) -> bool:
    return len(expected) == len(found) and all(map(same, expected, found))


def _identical(one: Any, other: Any) -> bool:
    """Whether two tensors have the same numbers, and NaN in the same places."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        own: Any = type(one).__eq__
        incomparable = own is object.__eq__  # made anew by each run
        return type(one) is type(other) and (incomparable or bool(one == other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _close(one: Any, other: Any) -> bool:
    """Whether two tensors differ by no more than sums in another order may."""
    if _identical(one, other) or not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return _identical(one, other)
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return False
    rounding = torch.finfo(one.dtype).eps ** 0.5
    one, other = (value.double().nan_to_num() for value in (one, other))
    return bool((one - other).norm() <= rounding * one.norm())


# What stays as it is ------------------------------------------------------------------------------


@contextmanager
def _untouched(model: TunableModule) -> Iterator[None]:
    """Undo what the body does to buffers, attributes and generators."""
    with model._stnify.buffers_restored(), state_restored(model._stnify.original):
        yield


@contextmanager
def _training(model: TunableModule) -> Iterator[None]:
    """Put the model in train mode, if it is not, with noise off and norms at running statistics."""
    original, added = model._stnify.original, model._stnify
    modes = [(module, module.training) for module in model.modules()]
    root = original.training
    try:
        if not model.training:
            model.train()
        for module in original.modules():
            if _is_noise(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        for noise in (added.noises, added.fixed, added.weight_noises):
            noise.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        original.training = root


def _is_noise(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    holds = next(module.parameters(), None) is not None
    return not holds and any(word in name for word in QUIET)


@contextmanager
def _parameters_restored(model: TunableModule, changed: list[str]) -> Iterator[None]:
    """Put parameters back that the body changes, also on errors; add their names to ``changed``."""
    parameters = model._stnify.general_parameters()
    before = {name: (p.detach().clone(), p._version) for name, p in parameters.items()}
    try:
        yield
    finally:
        for name, (value, version) in before.items():
            parameter = parameters[name]
            if parameter._version != version or not _identical(parameter.detach(), value):
                changed.append(name)
                parameter.data.copy_(value)
