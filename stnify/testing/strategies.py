"""Hypothesis strategies for random modules, sets of hyperparameters and batches.

This file alone of the kit needs hypothesis. A drawn module prints as the Python that rebuilds it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from stnify.declare import Declaration, Dropout, Hyperparameter, WeightDecay
from stnify.streams import RandomStream
from stnify.testing.modules import (
    Attention,
    Branching,
    Call,
    Cell,
    Folded,
    Frozen,
    Functional,
    Mean,
    Normed,
    Parallel,
    RandomModule,
    Recurrent,
    Residual,
    SelfAttention,
    Square,
    Swap,
    Tied,
    TiedVocabulary,
    Twice,
    call,
)

Shape = tuple[int, ...]
"""Of one example, without the batch."""

LARGEST = 192
"""Numbers in one example, so that two thousand modules take a minute or two."""

ENTRIES = 5
"""Size of every vocabulary."""


@dataclass(frozen=True)
class Part:
    """A module and the shape of what it returns for one example."""

    module: Call
    shape: Shape


Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def random_modules(draw: Draw, max_parts: int = 4) -> RandomModule:
    """Draw a composition of supported layers, and a batch for it.

    Linear layers, convolutions of one to three dimensions and transposed ones, embeddings and
    bags, bilinear forms, weights met by ``F.linear``, ``matmul`` and ``einsum``, attention by hand
    and ``nn.MultiheadAttention``, recurrent layers and cells, norms, activations, pooling, dropout;
    residuals, branches, modules used twice, tied, frozen and normed weights, modules that cannot be
    traced through, steps folded into the batch; batches, channels and sequences of one.

    Args:
        draw: Given by hypothesis.
        max_parts: Modules in a row, at most; parts hold others.
    """
    batch = draw(st.sampled_from([1, 2, 3]))
    form = draw(st.sampled_from(["vector", "sequence", "image", "image", "tokens"]))
    entries = None
    if form == "tokens":
        shape: Shape = (draw(st.integers(1, 4)),)
        first, entries = draw(_of_tokens(shape[0])), ENTRIES
    else:
        shape = draw(_SHAPES[form])
        first = draw(_weighted(shape))
    parts = [first]
    for _ in range(draw(st.integers(0, max_parts - 1))):
        parts.append(draw(_part(parts[-1].shape)))
    if len(parts[-1].shape) > 1 and draw(st.booleans()):
        parts.append(_to_vector(parts[-1].shape))
    body = call(nn.Sequential, *(part.module for part in parts))
    return RandomModule(body, (batch, *shape), entries, draw(st.integers(0, 2**20)))


@st.composite
def hyperparameter_sets(draw: Draw, floating: bool = True) -> list[Declaration]:
    """Draw one to three declarations of different kinds, in any order.

    Args:
        draw: Given by hypothesis.
        floating: Whether the model's input is real numbers, which a dropout can act on.
    """
    kinds: list[Declaration] = [
        WeightDecay(init=draw(st.sampled_from([1e-4, 1e-2])), per_layer=draw(st.booleans())),
        Hyperparameter("number", init=0.5, range=(0.0, 1.0), per_example=draw(st.booleans())),
    ]
    if floating:
        kinds.append(Dropout(at="input", init=draw(st.sampled_from([0.1, 0.5]))))
    chosen = draw(st.permutations(kinds))
    return list(chosen[: draw(st.integers(1, len(kinds)))])


@st.composite
def batches(draw: Draw, shape: Shape, entries: int | None = None, largest: int = 4) -> Tensor:
    """Draw a batch of one to ``largest`` examples.

    Args:
        draw: Given by hypothesis.
        shape: Of one example.
        entries: Size of the vocabulary for integers; None for normal numbers.
        largest: Examples, at most.
    """
    size, seed = draw(st.integers(1, largest)), draw(st.integers(0, 2**20))
    with RandomStream(seed, torch.device("cpu")).active():
        if entries is None:
            return torch.randn(size, *shape)
        return torch.randint(entries, (size, *shape))


# Parts for every shape ----------------------------------------------------------------------------


def _sizes(low: int, high: int, dims: int) -> st.SearchStrategy[Shape]:
    return st.tuples(*[st.integers(low, high)] * dims)


_SHAPES: dict[str, st.SearchStrategy[Shape]] = {
    "vector": _sizes(1, 5, 1),
    "sequence": _sizes(1, 4, 2),
    "image": st.integers(1, 3).flatmap(
        lambda dims: st.tuples(st.integers(1, 4), *[st.integers(1, 5 if dims < 3 else 3)] * dims)
    ),
}


def _part(shape: Shape) -> st.SearchStrategy[Part]:
    """Draw any part that takes ``shape``."""
    kinds = st.sampled_from([_weighted, _weighted, _plain, _around, _reshaped])
    return kinds.flatmap(lambda kind: kind(shape))


def _weighted(shape: Shape) -> st.SearchStrategy[Part]:
    """Draw a part with weights that should respond."""
    kinds = [_linear(shape)]
    if len(shape) == 1:
        kinds.append(_bilinear(shape))
    if len(shape) == 2:
        kinds += [_attention(shape), _recurrent(shape), _convolution(shape)]
    if len(shape) > 2:
        kinds += [_convolution(shape), _transposed_convolution(shape)]
    return st.tuples(st.one_of(kinds), st.integers(0, 7)).map(_sometimes_normed)


def _sometimes_normed(drawn: tuple[Part, int]) -> Part:
    part, number = drawn
    return Part(call(Normed, part.module), part.shape) if number == 7 else part


def _small(part: Part) -> bool:
    return math.prod(part.shape) <= LARGEST


@st.composite
def _linear(draw: Draw, shape: Shape) -> Part:
    *front, inner = shape
    outer = draw(st.integers(1, 5))
    way = draw(st.sampled_from(["module", "module", "linear", "matmul", "at", "einsum", "scaled"]))
    if way == "module":
        module = call(nn.Linear, inner, outer, bias=draw(st.booleans()))
    else:
        module = call(Functional, inner, outer, way)
    return Part(module, (*front, outer))


@st.composite
def _bilinear(draw: Draw, shape: Shape) -> Part:
    outer = draw(st.integers(1, 3))
    return Part(call(Square, shape[0], outer, bias=draw(st.booleans())), (outer,))


@st.composite
def _attention(draw: Draw, shape: Shape) -> Part:
    features = shape[1]
    heads = draw(st.sampled_from([n for n in (1, 2) if features % n == 0]))
    kind = draw(st.sampled_from(["hand", "module", "encoder"]))
    if kind == "hand":
        return Part(call(Attention, features, heads, causal=draw(st.booleans())), shape)
    options = {"batch_first": draw(st.booleans())}
    if kind == "module":
        options["bias"] = draw(st.booleans())
        return Part(call(SelfAttention, features, heads, **options), shape)
    layer = call(
        nn.TransformerEncoderLayer,
        features,
        heads,
        draw(st.integers(1, 4)),
        dropout=0.0,
        batch_first=True,
        norm_first=draw(st.booleans()),
    )
    return Part(layer, shape)


@st.composite
def _recurrent(draw: Draw, shape: Shape) -> Part:
    steps, features = shape
    hidden, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    if draw(st.integers(0, 3)) == 0:
        return Part(call(Cell, f"{kind}Cell", features, hidden), (hidden,))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    width = hidden
    if kind == "LSTM" and hidden > 1 and draw(st.booleans()):
        options["proj_size"] = width = hidden - 1
    module = call(Recurrent, kind, features, hidden, **options)
    return Part(module, (steps, width * (2 if options["bidirectional"] else 1)))


@st.composite
def _convolution(draw: Draw, shape: Shape) -> Part:
    channels, *space = shape
    groups = draw(st.sampled_from([n for n in (1, 2, channels) if channels % n == 0]))
    outer = groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, min(3, size))) for size in space]
    padding = [draw(st.integers(0, (size - 1) // 2)) for size in kernel]
    stride = [draw(st.integers(1, 2)) for _ in space]
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
    module = call(
        getattr(nn, f"Conv{len(space)}d"),
        channels,
        outer,
        tuple(kernel),
        stride=tuple(stride),
        padding=tuple(padding),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    geometry = zip(space, kernel, padding, stride, strict=True)
    sizes = [(size + 2 * pad - width) // step + 1 for size, width, pad, step in geometry]
    return Part(module, (outer, *sizes))


@st.composite
def _transposed_convolution(draw: Draw, shape: Shape) -> Part:
    channels, *space = shape
    groups = draw(st.sampled_from([n for n in (1, channels) if channels % n == 0]))
    outer = groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 2)) for _ in space]
    stride = [draw(st.integers(1, 2)) for _ in space]
    sizes = [
        (size - 1) * step + width for size, width, step in zip(space, kernel, stride, strict=True)
    ]
    if math.prod(sizes) * outer > LARGEST:
        kernel, stride, sizes = [1] * len(space), [1] * len(space), space
    module = call(
        getattr(nn, f"ConvTranspose{len(space)}d"),
        channels,
        outer,
        tuple(kernel),
        stride=tuple(stride),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return Part(module, (outer, *sizes))


ACTIVATIONS = ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "Hardswish", "Hardsigmoid",
               "ELU", "Softplus", "Mish", "PReLU", "LogSoftmax")  # fmt: skip


def _plain(shape: Shape) -> st.SearchStrategy[Part]:
    """Draw a part without weights that should respond: norms, activations, pooling, dropout."""
    kinds = [_activation(shape), _normalisation(shape)]
    if len(shape) > 1:
        kinds.append(_pooling(shape))
    return st.one_of(kinds)


@st.composite
def _activation(draw: Draw, shape: Shape) -> Part:
    name = draw(st.sampled_from([*ACTIVATIONS, "Dropout", "GLU"]))
    if name == "GLU":
        if shape[-1] % 2:
            return Part(call(nn.Identity), shape)
        return Part(call(nn.GLU), (*shape[:-1], shape[-1] // 2))
    options: dict[str, dict[str, Any]] = {"Dropout": {"p": 0.3}, "LogSoftmax": {"dim": -1}}
    return Part(call(getattr(nn, name), **options.get(name, {})), shape)


@st.composite
def _normalisation(draw: Draw, shape: Shape) -> Part:
    dims = max(1, len(shape) - 1)
    kinds = [call(nn.LayerNorm, shape[-1]), call(nn.RMSNorm, shape[-1], eps=1e-3)]
    kinds.append(call(getattr(nn, f"BatchNorm{dims}d"), shape[0]))
    groups = [n for n in (1, 2) if shape[0] % n == 0 and math.prod(shape) > n]
    if groups:
        kinds.append(call(nn.GroupNorm, draw(st.sampled_from(groups)), shape[0]))
    if len(shape) > 1 and math.prod(shape[1:]) > 1:
        kinds.append(call(getattr(nn, f"InstanceNorm{dims}d"), shape[0], affine=True))
    return Part(draw(st.sampled_from(kinds)), shape)


@st.composite
def _pooling(draw: Draw, shape: Shape) -> Part:
    channels, *space = shape
    dims = len(space)
    width = tuple(draw(st.integers(1, min(2, size))) for size in space)
    sizes = [size // side for size, side in zip(space, width, strict=True)]
    kind = draw(st.sampled_from(["MaxPool", "AvgPool", "Adaptive", "Upsample", "Dropout"]))
    if kind == "Adaptive":
        return Part(call(getattr(nn, f"AdaptiveAvgPool{dims}d"), 1), (channels, *[1] * dims))
    if kind == "Upsample":
        part = Part(call(nn.Upsample, scale_factor=2), (channels, *(2 * size for size in space)))
        return part if _small(part) else Part(call(nn.Identity), shape)
    if kind == "Dropout":
        return Part(call(getattr(nn, f"Dropout{dims}d"), 0.3), shape)
    return Part(call(getattr(nn, f"{kind}{dims}d"), width), (channels, *sizes))


@st.composite
def _reshaped(draw: Draw, shape: Shape) -> Part:
    """Draw a part that changes the form of the data."""
    if len(shape) == 1:
        return Part(call(nn.Unflatten, 1, (1, *shape)), (1, *shape))
    kinds = [_to_vector(shape), _mean(shape)]
    kinds.append(Part(call(Swap), (math.prod(shape[1:]), shape[0])))
    return draw(st.sampled_from(kinds))


def _mean(shape: Shape) -> Part:
    if len(shape) == 2:
        return Part(call(Mean, 1), shape[1:])
    return Part(call(Mean, *range(2, len(shape) + 1)), shape[:1])


def _to_vector(shape: Shape) -> Part:
    return Part(call(nn.Flatten), (math.prod(shape),))


# Parts around parts -------------------------------------------------------------------------------


@st.composite
def _around(draw: Draw, shape: Shape) -> Part:
    """Draw a part that holds others."""
    kinds = ["keeping", "parallel", "frozen", "branching", "tied"]
    if len(shape) == 2:
        kinds += ["folded"] * 3
    kind = draw(st.sampled_from(kinds))
    if kind == "folded":
        inner = draw(_weighted(shape[1:]))
        module = call(Folded, inner.module, time_major=draw(st.booleans()))
        return Part(module, (shape[0], *inner.shape))
    if kind == "tied":
        return Part(call(Tied, shape[-1], transposed=draw(st.booleans())), shape)
    if kind == "keeping":
        return Part(call(draw(st.sampled_from([Residual, Twice])), draw(_keeping(shape))), shape)
    if kind == "parallel":
        return Part(call(Parallel, draw(_keeping(shape)), draw(_keeping(shape))), shape)
    inner = draw(_weighted(shape))
    return Part(call(Frozen if kind == "frozen" else Branching, inner.module), inner.shape)


@st.composite
def _keeping(draw: Draw, shape: Shape) -> Call:
    """Draw a module that returns the shape it takes."""
    kinds = [call(nn.Linear, shape[-1], shape[-1])]
    if len(shape) == 2:
        kinds += [
            call(Attention, shape[1], 1),
            call(SelfAttention, shape[1], 1, batch_first=True),
            call(Recurrent, "GRU", shape[1], shape[1], batch_first=True),
        ]
    if len(shape) > 2:
        convolution = getattr(nn, f"Conv{len(shape) - 1}d")
        kinds.append(call(convolution, shape[0], shape[0], 3, padding=1))
    chosen: Call = draw(st.sampled_from(kinds))
    if draw(st.booleans()):
        return chosen
    return call(nn.Sequential, draw(_activation_alone()), chosen)


def _activation_alone() -> st.SearchStrategy[Call]:
    return st.sampled_from([call(getattr(nn, name)) for name in ("Tanh", "ReLU", "GELU")])


@st.composite
def _of_tokens(draw: Draw, steps: int) -> Part:
    """Draw a part that takes ``(steps,)`` integers."""
    width = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["embedding", "embedding", "bag", "tied"]))
    if kind == "bag":
        mode = draw(st.sampled_from(["sum", "mean", "max"]))
        return Part(call(nn.EmbeddingBag, ENTRIES, width, mode=mode), (width,))
    if kind == "tied":
        inner = draw(_keeping((steps, width)))
        return Part(call(TiedVocabulary, ENTRIES, width, inner), (steps, ENTRIES))
    padding = draw(st.sampled_from([None, 0]))
    module = call(nn.Embedding, ENTRIES, width, padding_idx=padding)
    return Part(module, (steps, width))
