"""3c. Measure which rows belong to which example: change one, and see where."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stnify.nested import leaves, map_tensors
from stnify.rows import RowLayout, batch_size, by_example
from stnify.tunable import TunableModule, pass_inputs

PROBES = 5
"""Examples a layout probe runs."""

CHANGED = (1, 3)
"""Examples that are changed, one at a time: code that reorders a batch moves one of them."""

SILENT = ("batch (independent of the input)", "shared (independent of the input)")
"""Said of a site whose input does not depend on the model's: with a row an example, and without."""

UNSEEN = ("shared (never called)", "shared (could not be measured)")
"""Said of a site of which nothing is known."""

ONE_ROW = "batch"
"""Said where each example has one row: in whatever order more rows were, it would look the same."""

MIXED = "shared (rows mix examples)"
"""Said where other rows change as well, as behind a norm over the batch."""

Rows = dict[str, list[Tensor]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def measured_layouts(model: TunableModule, inputs: Inputs) -> dict[str, str]:
    """Set the row layout of every site, and return it in words.

    Everything runs in the mode the modules are in.

    Args:
        model: Converted.
        inputs: Positional and keyword arguments.
    """
    words = _measured(model, inputs)
    set_layouts(model, words)
    return words


def set_layouts(model: TunableModule, words: Mapping[str, str]) -> None:
    """Set the layouts that were measured, given in words, for example in another process."""
    for name, word in words.items():
        _sites(model)[name].layout = _meant(word)


def of_both_modes(evaluated: str, trained: str) -> str:
    """Return the layout that holds in eval and in train mode, all in words.

    Rows in an order of the mode's own belong to no example. Norms and noise that mix rows in
    training only do not change whose they are.
    """
    if trained in (*UNSEEN, *SILENT, MIXED) or trained == evaluated:
        return evaluated
    if evaluated in (*UNSEEN, *SILENT):
        return trained
    one, other = _meant(evaluated), _meant(trained)
    if RowLayout.SHARED in (one, other) or _common({one, other}) is None:
        return "shared (otherwise in train mode)"
    return evaluated if other is RowLayout.SINGLE else trained


def _meant(word: str) -> RowLayout:
    """Return the layout that stands in words."""
    return RowLayout.SINGLE if word == ONE_ROW else RowLayout(word.split()[0])


def _common(layouts: set[RowLayout]) -> RowLayout | None:
    """Return the layout that holds for all calls of a site; None if they contradict each other."""
    ordered = layouts - {RowLayout.SINGLE}
    if ordered in ({RowLayout.BATCH}, {RowLayout.INTERLEAVED}):
        return ordered.pop()  # one row for each example agrees with either
    return next(iter(layouts)) if len(layouts) == 1 else None


def _sites(model: TunableModule) -> dict[str, Any]:
    layers, noises = model._stnify.layers.items(), model._stnify.noises.items()
    return {f"layers.{n}": s for n, s in layers} | {f"noises.{n}": s for n, s in noises}


def _measured(model: TunableModule, inputs: Inputs) -> dict[str, str]:
    """Run a few examples, then with one of them changed; if that fails, the batch as it is."""
    full = batch_size(inputs)
    if full == 0:
        return {}

    def few() -> dict[str, str]:
        words = _probe(model, first_examples(inputs, full, PROBES), PROBES)
        return words | _constant(model, first_examples(inputs, full, PROBES - 1), words)

    # Inputs that index into others, such as edges of a graph, cannot be cut.
    for measured in (few, partial(_probe, model, inputs, full)):
        try:
            return measured()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            continue
    return dict.fromkeys(_sites(model), UNSEEN[1])


def _probe(model: TunableModule, base: Inputs, batch: int) -> dict[str, str]:
    sites, rows = _sites(model), list[Rows]()
    # Of each picture in a list a detector finds some other number of objects.
    listed = any(by_example(value, batch) for value in (*base[0], *base[1].values()))
    changed = [index for index in CHANGED if index < batch] or [0]
    same_noise = model._stnify.stream.rewinder()
    for args, kwargs in (base, *(_with_one_changed(base, batch, index) for index in changed)):
        same_noise()
        with model._stnify.buffers_restored():  # a spectral norm's would differ from run to run
            rows.append(_seen(model, sites, args, kwargs, batch))
    words = {}
    for name, site in sites.items():
        calls = [
            _layout(before, after, batch, index, _row_dims(site))
            for index, probe in zip(changed, rows[1:], strict=True)
            for before, after in zip(rows[0][name], probe[name], strict=False)  # fewer, if shorter
        ]
        words[name] = _agreed(calls)
        if listed and " x " in words[name]:
            words[name] = "shared (rows are what is found)"
    return words


def _seen(
    model: TunableModule,
    sites: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: int,
) -> Rows:
    """Run the graph and return what every site receives, call by call."""
    nowhere = None
    if model._stnify.swapped or model._stnify.functions:
        # Perturbed by nought, because only perturbed passes watch the calls of other code.
        nowhere = torch.zeros_like(model._stnify.space.unconstrained).expand(batch, -1)
    values = model._stnify.space.current  # in eval mode noise lets all pass, but is called
    with _recorded(sites) as seen:
        model._stnify.graph(*args, **kwargs, **pass_inputs(nowhere, values))
    return seen


def _constant(model: TunableModule, inputs: Inputs, words: Mapping[str, str]) -> dict[str, str]:
    """Find sites without rows that happen to receive as many as there were examples.

    Such a site sees no difference between examples, and receives as many rows for fewer of them.
    """
    doubtful = {name: site for name, site in _sites(model).items() if words[name] == SILENT[0]}
    if not doubtful:
        return {}
    with suppress(Exception):  # a model may need its number of examples; then nothing is known
        seen = _seen(model, doubtful, *inputs, PROBES - 1)
        constant = [n for n in doubtful if all(each.shape[0] == PROBES for each in seen[n])]
        return dict.fromkeys(constant, SILENT[1])
    return {}


def _row_dims(site: Any) -> tuple[int, ...]:
    return getattr(site, "row_dims", (0, 1))


def _agreed(calls: list[str]) -> str:
    """Return the layout of all calls of a site; calls that see no difference agree with any."""
    if not calls:
        return UNSEEN[0]
    telling = [word for word in calls if word not in SILENT] or calls
    if MIXED in telling:
        return MIXED
    if _common({_meant(word) for word in telling}) is None:
        return "shared (mixed)"
    return " and ".join(sorted(set(telling), reverse=True))


def first_examples(inputs: Any, full: int, count: int) -> Any:
    """Return inputs of ``count`` examples, repeating the batch if it has fewer."""
    chosen = torch.arange(count) % full

    def pick(value: Any) -> Any:
        if isinstance(value, list):
            return [value[index] for index in chosen.tolist()]
        batched = value.ndim > 0 and value.shape[0] == full and value.layout is torch.strided
        return value[chosen.to(value.device)] if batched else value

    return map_tensors(pick, inputs, partial(by_example, batch=full))


def _with_one_changed(inputs: Any, batch: int, index: int) -> Any:
    """Change one example: new noise for real inputs, other entries of the batch for integers.

    A number larger than those of all others stays, if something else changes: were it the length of
    a sequence, all would be shorter.
    """
    tensors = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    several = sum(t.ndim > 0 and t.shape[0] == batch for t in tensors) > 1

    def change(value: Any) -> Any:
        if isinstance(value, list):
            entry = map_tensors(lambda tensor: _changed(tensor, ...), value[index])
            return [*value[:index], entry, *value[index + 1 :]]
        batched = value.ndim > 0 and value.shape[0] == batch and value.layout is torch.strided
        if not batched or (several and _is_largest(value, index)):
            return value
        return _changed(value, index)

    return map_tensors(change, inputs, partial(by_example, batch=batch))


def _is_largest(tensor: Tensor, index: int) -> bool:
    """Whether an entry of a vector of integers is larger than all others."""
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype is torch.bool:
        return False
    return int((tensor >= tensor[index]).sum()) == 1


def _changed(tensor: Tensor, index: Any) -> Tensor:
    """Return a copy of ``tensor`` with other numbers at ``index``."""
    if tensor.numel() == 0:
        return tensor
    tensor = tensor.clone()
    if tensor.is_floating_point():
        spread = tensor.float().std(correction=0).clamp_min(1e-2).to(tensor.dtype)
        tensor[index] += spread * torch.randn_like(tensor[index])
    elif tensor.dtype is not torch.bool:
        lowest, highest = tensor.aminmax()
        other = lowest if lowest < highest else (highest - 1).clamp_min(0)
        tensor[index] = torch.where(tensor[index] == highest, other, highest)
    return tensor


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


def _layout(
    before: Tensor, after: Tensor, batch: int, changed: int, row_dims: tuple[int, ...]
) -> str:
    """Tell from which rows changed, when one example did, whom rows belong to."""
    if before.numel() == 0 or before.ndim == 0 or before.shape != after.shape:
        return "shared (no batch)"
    different = before != after
    size = before.shape[0]
    if not different.any():
        return SILENT[0] if size == batch else SILENT[1]
    rows = different.reshape(size, -1).any(1).nonzero().flatten()
    block = size // batch
    if size % batch == 0:
        if bool((rows // block == changed).all()):
            return ONE_ROW if block == 1 else f"batch x {block}"
        if bool((rows % batch == changed).all()):
            return f"interleaved x {block}"
    if 1 in row_dims and before.ndim > 1 and before.shape[1] == batch:
        columns = different.movedim(1, 0).reshape(batch, -1).any(1).nonzero().flatten()
        if bool((columns == changed).all()):
            return "second dimension"
    own = size % batch == 0 and int((rows // block == changed).sum()) == block
    return MIXED if own else "shared (rows of other examples)"
