"""8a. What is refused at the door, before anything is built."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stnify.errors import UnsupportedModuleError, UsageError
from stnify.kept import named_globals
from stnify.tunable import TunableModule

WRAPPERS: dict[str, str] = {
    "DataParallel": "Convert the `.module` inside.",
    "DistributedDataParallel": "Convert the `.module` inside.",
    "OptimizedModule": "Convert the model before it is compiled, and pass `compile=True`.",
    "ScriptModule": "Convert the Python module it was made from.",
}
"""Class names of wrappers that hide a model, and what to do instead."""


def refuse_model(model: nn.Module) -> None:
    """Refuse what cannot be converted, whatever the plan.

    Raises:
        UnsupportedModuleError: Not a module; wrapped, scripted or compiled; quantised; a parameter
            that is lazy, on the meta device, complex, or not a dense tensor.
        UsageError: The model, or a part of it, was converted already.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModuleError(
            f"`model` must be an nn.Module, but got {type(model).__name__}."
        )
    converted = [name for name, part in model.named_modules() if isinstance(part, TunableModule)]
    if converted:
        raise UsageError(
            f"{f'{converted[0]!r} of ' if converted[0] else ''}`model` was converted already. "
            f"Convert `stn.export()`, or the original model, with all hyperparameters in one call."
        )
    for name, part in model.named_modules():
        _refuse_part(name, part)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UnsupportedModuleError(
                f"every parameter must be materialised, but {name!r} is lazy. Run one batch "
                f"through the model first."
            )
        if tensor.is_meta:
            raise UnsupportedModuleError(
                f"every parameter must hold data, but {name!r} is on the meta device. Move the "
                f'model with `model.to_empty(device="cpu")` and initialise it first.'
            )
    for name, parameter in model.named_parameters():
        if parameter.layout is not torch.strided:
            raise UnsupportedModuleError(
                f"every parameter must be a dense tensor, but {name!r} has layout "
                f"{parameter.layout}. Replace it by `.to_dense()`."
            )
        if parameter.is_complex():
            raise UnsupportedModuleError(
                f"every parameter must hold real numbers, but {name!r} is {parameter.dtype}. Keep "
                f"`torch.view_as_real(weight)` as the parameter, and use "
                f"`torch.view_as_complex` in forward."
            )


def _refuse_part(name: str, part: nn.Module) -> None:
    label = f"{name or 'the model'!r} ({type(part).__name__})"
    names = {kind.__name__ for kind in type(part).__mro__ if kind.__module__.startswith("torch")}
    for wrapper in sorted(names & WRAPPERS.keys()):
        raise UnsupportedModuleError(
            f"the model must be plain modules, but {label} is a {wrapper}. {WRAPPERS[wrapper]}"
        )
    named = [scope.get(global_name) for scope, global_name in named_globals(type(part))]
    called = [part.forward, *vars(part).values(), *vars(type(part)).values(), *named]
    if part._compiled_call_impl or any(map(_is_compiled, called)):
        raise UnsupportedModuleError(
            f"the model must be plain modules, but {label} is compiled, or calls a function that "
            f"is. {WRAPPERS['OptimizedModule']}"
        )
    stub = type(part).__name__ == "FloatFunctional"  # holds no weight, and computes in floats
    if ".quantized" in type(part).__module__ and not stub:
        raise UnsupportedModuleError(
            f"weights must be trainable numbers, but {label} is quantised. Convert and train the "
            f"floating-point model, and quantise `stn.export()`."
        )


def _is_compiled(function: object) -> bool:
    """Whether a function is compiled, and not kept from being compiled."""
    wrapped = hasattr(function, "_torchdynamo_orig_callable")
    return wrapped and not getattr(function, "_torchdynamo_disable", False)


def refuse_distributed() -> None:
    """Raise UsageError in a run of several processes: responses are not averaged over them."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            raise UsageError(
                f"a self-tuning run must have one process, but this one has {size}: response "
                f"parameters and hyperparameters would drift apart. Train on one device."
            )


def refuse_arguments(
    optimizer: Optimizer | None,
    criterion: Callable[..., Tensor] | None,
    forward_loss: Callable[..., Tensor] | None,
    response: str,
    scale: float | None,
    response_lr: float | None,
    tunes: bool,
) -> None:
    """Refuse arguments of ``stnify`` that do not fit each other.

    Raises:
        UsageError: No criterion with an optimizer, or a number or choice that is out of bounds.
    """
    if optimizer is not None and tunes and criterion is None and forward_loss is None:
        raise UsageError(
            "`criterion` must be given with an optimizer, because the response and validation "
            "steps compute losses themselves. Pass the criterion of your loop, or "
            "`forward_loss=fn(model, batch) -> scalar`."
        )
    for name, function in (("criterion", criterion), ("forward_loss", forward_loss)):
        if function is not None and not callable(function):
            raise UsageError(f"`{name}` must be callable, but got {type(function).__name__}.")
    if response not in {"full", "gate"}:
        raise UsageError(f"`response` must be 'full' or 'gate', but got {response!r}.")
    for name, value in (("scale", scale), ("response_lr", response_lr)):
        if value is not None and not (isinstance(value, Real) and 0 < value < math.inf):
            raise UsageError(f"`0 < {name} < inf` must hold, but got {name}={value!r}.")


def _length(loader: Iterable[Any]) -> int | None:
    """Return the length of a loader that knows it; one over an ``IterableDataset`` does not."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def length_of_run(
    total_steps: int | None, epochs: int | None, train_loader: Iterable[Any] | None
) -> int | None:
    """Return the length of the run in training steps, if it was told.

    Raises:
        UsageError: It was told twice, is no positive integer, or the loader has no length.
    """
    for name, value in (("total_steps", total_steps), ("epochs", epochs)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise UsageError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
    if epochs is None:
        return total_steps
    if total_steps is not None:
        raise UsageError(
            f"give either `epochs` or `total_steps`, but got both: epochs={epochs}, "
            f"total_steps={total_steps}."
        )
    length = None if train_loader is None else _length(train_loader)
    if length is None:
        raise UsageError(
            "`epochs` needs a `train_loader` whose length is known, but there is none. Pass "
            "`total_steps`, the number of times the loop calls optimizer.step()."
        )
    return int(epochs) * length


def refuse_empty(loader: Iterable[Any] | None, name: str) -> None:
    """Refuse a loader that can be seen to yield nothing; None is no loader.

    Raises:
        UsageError: It is empty or no iterable, or validates and can be iterated only once.
    """
    if loader is None:
        return
    if not hasattr(loader, "__iter__"):
        raise UsageError(f"`{name}` must be iterable, but got {type(loader).__name__}.")
    if _length(loader) == 0:
        raise UsageError(
            f"`{name}` must yield at least one batch, but its length is 0. Check the dataset's "
            f"length against batch_size and drop_last."
        )
    if name == "valid_loader" and hasattr(loader, "__next__"):
        raise UsageError(
            "`valid_loader` must be iterable again and again, but got an iterator, which is "
            "exhausted after one pass. Pass the DataLoader itself."
        )
