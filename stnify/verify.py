"""3b. Prove a conversion on real inputs: same outputs, and which rows belong to which example."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stnify.errors import TraceError
from stnify.nested import leaves, map_tensors
from stnify.rows import RowLayout, batch_size, by_example
from stnify.streams import RandomStream
from stnify.tunable import TunableModule, evaluating, pass_inputs
from stnify.untouched import state_restored

PROBES = 5
"""Examples a layout probe runs."""

CHANGED = (1, 3)
"""Examples that are changed, one at a time: code that reorders a batch moves one of them."""

SILENT = ("batch (independent of the input)", "shared (independent of the input)")
"""Said of a site whose input does not depend on the model's: with a row an example, and without."""

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
    private = RandomStream(0, model._stnify.space.unconstrained.device)
    with evaluating(model), private.active():
        _refuse_difference(model, args, kwargs)
        with model._stnify.buffers_restored(), state_restored(model._stnify.original):
            return _probe_layouts(model, (args, dict(kwargs)))


def set_layouts(model: TunableModule, words: Mapping[str, str]) -> None:
    """Set the layouts that ``verify`` returned in words, for example in another process."""
    for name, word in words.items():
        _sites(model)[name].layout = RowLayout(word.split()[0])


def _sites(model: TunableModule) -> dict[str, Any]:
    layers, noises = model._stnify.layers.items(), model._stnify.noises.items()
    return {f"layers.{n}": s for n, s in layers} | {f"noises.{n}": s for n, s in noises}


def _refuse_difference(
    model: TunableModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    runs = []
    original = model._stnify.original
    for run in (original, model._stnify.graph):
        with model._stnify.buffers_restored(), state_restored(original):
            runs.append(run(*args, **kwargs))
    expected, found = (list(leaves(outputs)) for outputs in runs)
    if len(expected) != len(found) or not all(map(_identical, expected, found)):
        raise TraceError(
            f"the traced graph must compute exactly what {type(original).__name__} computes in "
            f"eval mode, but its output differs. The model's control flow depends on its inputs or "
            f"on something outside; name the module that does so in `leaves=`."
        )


def _identical(one: Any, other: Any) -> bool:
    """Whether two tensors have the same numbers, and NaN in the same places."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        own: Any = type(one).__eq__
        incomparable = own is object.__eq__  # made anew by each run
        return type(one) is type(other) and (incomparable or bool(one == other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _probe_layouts(
    model: TunableModule, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, str]:
    """Run a few examples, then with one of them changed; if that fails, the batch as it is."""
    full = batch_size(inputs)
    if full == 0:
        return {}

    def few() -> dict[str, str]:
        words = _probe(model, _first_examples(inputs, full, PROBES), PROBES)
        return words | _constant(model, _first_examples(inputs, full, PROBES - 1), words)

    # Inputs that index into others, such as edges of a graph, cannot be cut.
    for measured in (few, partial(_probe, model, inputs, full)):
        try:
            return measured()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            continue
    for site in _sites(model).values():
        site.layout = RowLayout.SHARED
    return dict.fromkeys(_sites(model), "shared (could not be measured)")


def _probe(
    model: TunableModule, base: tuple[tuple[Any, ...], dict[str, Any]], batch: int
) -> dict[str, str]:
    sites, rows = _sites(model), list[Rows]()
    # Of each picture in a list a detector finds some other number of objects.
    listed = any(by_example(value, batch) for value in (*base[0], *base[1].values()))
    changed = [index for index in CHANGED if index < batch] or [0]
    for args, kwargs in (base, *(_with_one_changed(base, batch, index) for index in changed)):
        rows.append(_seen(model, sites, args, kwargs, batch))
    words = {}
    for name, site in sites.items():
        calls = [
            _layout(before, after, batch, index, _row_dims(site))
            for index, probe in zip(changed, rows[1:], strict=True)
            for before, after in zip(rows[0][name], probe[name], strict=True)
        ]
        site.layout, words[name] = _agreed(calls)
        if listed and " x " in words[name]:
            site.layout, words[name] = RowLayout.SHARED, "shared (rows are what is found)"
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


def _constant(
    model: TunableModule, inputs: tuple[tuple[Any, ...], dict[str, Any]], words: Mapping[str, str]
) -> dict[str, str]:
    """Find sites without rows that happen to receive as many as there were examples.

    Such a site sees no difference between examples, and receives as many rows for fewer of them.
    """
    doubtful = {name: site for name, site in _sites(model).items() if words[name] == SILENT[0]}
    found: dict[str, str] = {}
    if not doubtful:
        return found
    with suppress(Exception):  # a model may need its number of examples; then nothing is known
        seen = _seen(model, doubtful, *inputs, PROBES - 1)
        for name, site in doubtful.items():
            if all(received.shape[0] == PROBES for received in seen[name]):
                site.layout, found[name] = RowLayout.SHARED, SILENT[1]
    return found


def _row_dims(site: Any) -> tuple[int, ...]:
    return getattr(site, "row_dims", (0, 1))


def _agreed(calls: list[tuple[RowLayout, str]]) -> tuple[RowLayout, str]:
    """Return the layout of all calls of a site; calls that see no difference agree with any."""
    if not calls:
        return RowLayout.SHARED, "shared (never called)"
    telling = [call for call in calls if call[1] not in SILENT] or calls
    layout, word = telling[0]
    if any(other != layout for other, _ in telling):
        return RowLayout.SHARED, "shared (mixed)"
    return layout, word if len({word for _, word in telling}) == 1 else str(layout)


def _first_examples(inputs: Any, full: int, count: int) -> Any:
    """Return inputs of ``count`` examples, repeating the batch if it has fewer."""
    chosen = torch.arange(count) % full

    def pick(value: Any) -> Any:
        if isinstance(value, list):
            return [value[index] for index in chosen.tolist()]
        batched = value.ndim > 0 and value.shape[0] == full
        return value[chosen.to(value.device)] if batched else value

    return map_tensors(pick, inputs, partial(by_example, batch=full))


def _with_one_changed(inputs: Any, batch: int, index: int) -> Any:
    """Change one example: new noise for real inputs, shifted entries for integers."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            entry = map_tensors(lambda tensor: _changed(tensor, ...), value[index])
            return [*value[:index], entry, *value[index + 1 :]]
        return _changed(value, index) if value.ndim and value.shape[0] == batch else value

    return map_tensors(change, inputs, partial(by_example, batch=batch))


def _changed(tensor: Tensor, index: Any) -> Tensor:
    """Return a copy of ``tensor`` with other numbers at ``index``."""
    if tensor.numel() == 0:
        return tensor
    tensor = tensor.clone()
    if tensor.is_floating_point():
        spread = tensor.float().std(correction=0).clamp_min(1e-2).to(tensor.dtype)
        tensor[index] += spread * torch.randn_like(tensor[index])
    elif tensor.dtype is not torch.bool:
        highest = tensor.max()
        tensor[index] = torch.where(tensor[index] == highest, 0, highest)
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
) -> tuple[RowLayout, str]:
    """Tell from which rows changed, when one example did, whom rows belong to."""
    if before.numel() == 0 or before.ndim == 0 or before.shape != after.shape:
        return RowLayout.SHARED, "shared (no batch)"
    different = before != after
    size = before.shape[0]
    if not different.any():
        return (RowLayout.BATCH, SILENT[0]) if size == batch else (RowLayout.SHARED, SILENT[1])
    rows = different.reshape(size, -1).any(1).nonzero().flatten()
    block = size // batch
    if size % batch == 0:
        if bool((rows // block == changed).all()):
            return RowLayout.BATCH, "batch" if block == 1 else f"batch x {block}"
        if bool((rows % batch == changed).all()):
            return RowLayout.INTERLEAVED, f"interleaved x {block}"
    if 1 in row_dims and before.ndim > 1 and before.shape[1] == batch:
        columns = different.movedim(1, 0).reshape(batch, -1).any(1).nonzero().flatten()
        if bool((columns == changed).all()):
            return RowLayout.SECOND, "second dimension"
    return RowLayout.SHARED, "shared (rows mix examples)"
