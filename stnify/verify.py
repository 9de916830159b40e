"""3b. Prove a conversion on real inputs: same outputs, and which rows belong to which example."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from stnify.errors import TraceError
from stnify.rows import RowLayout, batch_size
from stnify.streams import RandomStream
from stnify.tunable import TunableModule

PROBES = 5
"""Examples a layout probe runs; the middle one is changed."""

Rows = dict[str, list[Tensor]]


@torch.no_grad()
def verify(
    model: TunableModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Check the graph against the original and set the row layout of every site.

    Runs in eval mode; buffers and random state stay as they are.

    Args:
        model: Just converted.
        args: Positional inputs, as for the model.
        kwargs: Keyword inputs.

    Returns:
        Layout in words, by name of the hyper layer or noise site.

    Raises:
        TraceError: In eval mode the graph's output differs from the original's in any bit.
    """
    private = RandomStream(0, model.hyperparameters.unconstrained.device)
    with model.evaluating(), model.buffers_restored(), private.active():
        _refuse_difference(model, args, kwargs)
        return _probe_layouts(model, (args, dict(kwargs)))


def set_layouts(model: TunableModule, words: Mapping[str, str]) -> None:
    """Set the layouts that ``verify`` returned in words, for example in another process."""
    for name, word in words.items():
        _sites(model)[name].layout = RowLayout(word.split()[0])


def _sites(model: TunableModule) -> dict[str, Any]:
    layers, noises = model.tunables.layers.items(), model.tunables.noises.items()
    return {f"layers.{n}": s for n, s in layers} | {f"noises.{n}": s for n, s in noises}


def _refuse_difference(
    model: TunableModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    expected, expected_form = tree_flatten(model._original(*args, **kwargs))
    found, found_form = tree_flatten(model._graph(*args, **kwargs))
    same = expected_form == found_form and all(
        _identical(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected, found, strict=True)
    )
    if not same:
        raise TraceError(
            f"the traced graph must compute exactly what {type(model._original).__name__} computes "
            f"in eval mode, but its output differs. The model's control flow depends on its inputs "
            f"or on something outside; name the module that does so in `leaves=`."
        )


def _identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, and NaN in the same places."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _probe_layouts(
    model: TunableModule, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, str]:
    base = _few_examples(inputs)
    if base is None:
        return {}
    changed = _with_middle_changed(base)
    sites = _sites(model)
    rows: list[Rows] = []
    for probe in (base, changed):
        with _recorded(sites) as seen:
            model._graph(*probe[0], **probe[1])
        rows.append(seen)
    words = {}
    for name, site in sites.items():
        found = {_layout(*pair) for pair in zip(rows[0][name], rows[1][name], strict=True)}
        layout, word = found.pop() if len(found) == 1 else (RowLayout.SHARED, "shared (mixed)")
        site.layout = layout
        words[name] = word
    return words


def _few_examples(inputs: Any) -> Any:
    """Return inputs of ``PROBES`` examples, repeating the batch if it has fewer."""
    full = batch_size(inputs)
    if full == 0:
        return None
    chosen = torch.arange(PROBES) % full

    def pick(tensor: Tensor) -> Tensor:
        batched = tensor.ndim > 0 and tensor.shape[0] == full
        return tensor[chosen.to(tensor.device)] if batched else tensor

    return tree_map_only(Tensor, pick, inputs)


def _with_middle_changed(inputs: Any) -> Any:
    """Change the middle example: new noise for real inputs, shifted entries for integers."""
    middle = PROBES // 2

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != PROBES:
            return tensor
        tensor = tensor.clone()
        if tensor.is_floating_point():
            spread = tensor.float().std().clamp_min(1e-2).to(tensor.dtype)
            tensor[middle] += spread * torch.randn_like(tensor[middle])
        elif tensor.dtype is not torch.bool:
            highest = tensor.max()
            tensor[middle] = torch.where(tensor[middle] == highest, 0, highest)
        return tensor

    return tree_map_only(Tensor, change, inputs)


@contextmanager
def _recorded(sites: Mapping[str, nn.Module]) -> Iterator[Rows]:
    """Record what every site receives, call by call."""
    seen: Rows = {name: [] for name in sites}

    def record(name: str) -> Any:
        return lambda module, inputs: seen[name].append(inputs[0].detach().clone())

    handles = [site.register_forward_pre_hook(record(name)) for name, site in sites.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _layout(before: Tensor, after: Tensor) -> tuple[RowLayout, str]:
    """Tell from which rows changed, when the middle example did, whom rows belong to."""
    rows = before.shape[0] if before.ndim else 0
    if rows == 0 or before.shape != after.shape:
        return RowLayout.SHARED, "shared (no batch)"
    different = (before != after).reshape(rows, -1).any(1)
    if rows % PROBES == 0:
        block = rows // PROBES
        middle = torch.zeros_like(different)
        middle[PROBES // 2 * block : (PROBES // 2 + 1) * block] = True
        if different.any() and not (different & ~middle).any():
            return RowLayout.BATCH, "batch" if block == 1 else f"batch x {block}"
        if rows == PROBES and not different.any():
            return RowLayout.BATCH, "batch (the site is dead)"
    if different.any():
        return RowLayout.SHARED, "shared (rows mix examples)"
    return RowLayout.SHARED, "shared (independent of the input)"
