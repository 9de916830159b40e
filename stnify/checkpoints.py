"""Gradient checkpoints that keep what they compute, where computing it again would differ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as checkpoint_functions


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let ``torch.utils.checkpoint`` just call: recomputing would happen outside this pass.

    Backward computes again without perturbation, and without noise that is added for a pass.
    """
    scope = vars(checkpoint_functions)
    generators = [n for n in scope if n.startswith("_checkpoint_without_reentrant_generator")]
    plain = {**dict.fromkeys(generators, _plain_checkpoint), "CheckpointFunction": _PlainCheckpoint}
    before = {name: scope[name] for name in plain}
    scope.update(plain)
    try:
        yield
    finally:
        scope.update(before)


class _PlainCheckpoint:
    """Takes the place of the reentrant checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Call the function."""
        return function(*args)


def _plain_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    yield
