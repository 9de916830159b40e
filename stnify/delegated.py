"""Methods of the user's model, whose own calls of it become calls of the converted model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn


class _Converted:
    """Takes the place of the forward of a model while one of its methods runs.

    Args:
        converted: What is called.
        own: Forward that the instance has of its own, or None.
    """

    def __init__(self, converted: nn.Module, own: Callable[..., Any] | None) -> None:
        self.converted = converted
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as the converted model does."""
        return self.converted(*args, **kwargs)


def delegated(value: Any, original: nn.Module, converted: nn.Module) -> Any:
    """Return an attribute of ``original``; a method of it predicts as ``converted`` does.

    So ``converted.loss(batch)`` trains what it should, if ``loss`` calls ``self(inputs)``.
    """
    if not isinstance(value, MethodType) or value.__self__ is not original:
        return value

    @wraps(value.__func__)
    def call(*args: Any, **kwargs: Any) -> Any:
        own = vars(original).get("forward")
        if isinstance(own, _Converted):
            return value(*args, **kwargs)
        vars(original)["forward"] = _Converted(converted, own)
        try:
            return value(*args, **kwargs)
        finally:
            _set_forward(original, own)

    return call


@contextmanager
def undelegated(original: nn.Module) -> Iterator[None]:
    """Let calls of ``original`` in the body be its own, also while one of its methods runs."""
    found = vars(original).get("forward")
    if not isinstance(found, _Converted):
        yield
        return
    _set_forward(original, found.own)
    try:
        yield
    finally:
        vars(original)["forward"] = found


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = forward
