"""Batches and predictions are nested: tuples, lists, dictionaries, dataclasses."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value`` with every tensor in it replaced by what ``function`` returns for it."""

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, dict):  # of a type that PyTorch does not know
            changed = copy.copy(leaf)
            changed.update({key: map_tensors(function, value) for key, value in leaf.items()})
            return changed
        if not _is_record(leaf):
            return leaf
        changed = copy.copy(leaf)
        for field in fields(leaf):
            mapped = map_tensors(function, getattr(leaf, field.name))
            object.__setattr__(changed, field.name, mapped)
        return changed

    return tree_map(change, value)


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
