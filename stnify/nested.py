"""Batches and predictions are nested: tuples, lists, dictionaries, dataclasses."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(
    function: Callable[[Any], Any], value: Any, whole: Callable[[Any], bool] | None = None
) -> Any:
    """Return ``value`` with every tensor in it replaced by what ``function`` returns for it.

    Args:
        function: Of a tensor, or of what is ``whole``.
        value: Nested.
        whole: Whether something that holds tensors is to be given to ``function`` itself.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or (whole is not None and whole(leaf)):
            return function(leaf)
        if isinstance(leaf, dict):  # of a type that PyTorch does not know
            changed = copy.copy(leaf)
            changed.update(
                {key: map_tensors(function, value, whole) for key, value in leaf.items()}
            )
            return changed
        if not _is_record(leaf):
            return leaf
        changed = copy.copy(leaf)
        for field in fields(leaf):
            mapped = map_tensors(function, getattr(leaf, field.name), whole)
            object.__setattr__(changed, field.name, mapped)
        return changed

    return tree_map(change, value, is_leaf=whole)


def leaves(value: Any) -> Iterator[Any]:
    """Yield everything in ``value`` that holds nothing else; of a type of one's own that too."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, dict):
            yield type(leaf)
            yield from leaves(dict(leaf))
        elif _is_record(leaf):
            yield type(leaf)
            yield from leaves([getattr(leaf, field.name) for field in fields(leaf)])
        else:
            yield leaf


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
