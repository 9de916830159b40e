"""Modules written as people write them, not as a tracer likes them, each with inputs it takes."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

Call = tuple[tuple[Any, ...], dict[str, Any]]
NOTHING: frozenset[str] = frozenset()
WIDTH = 6


@dataclass(frozen=True)
class Case:
    """One awkward module.

    Attributes:
        build: Builds it; call it under a seed.
        inputs: ``(examples, size) -> (args, kwargs)``, always the same for the same numbers.
        sizes: Resolutions or lengths it takes.
        smooth: Whether the tangent must agree with central differences.
        left: Matrices and kernels that do not respond.
        shared: Layers whose rows belong to no single example.
        computed: Whether a weight that responds is computed from its parameter.
        parametrized: Whether a module computes it, so that it is recognised in any code.
        optional: Whether an argument that may be left out is given; an example must show it.
        lost: Whether no weight of it can be recognised in code that is not traced.
        views: Whether it applies a view of a weight: another tensor, where code is not traced.
        uncalled: Layers that a call of the smallest size does not reach.
        blind: How many of the last outputs no response reaches.
        independent: False where the first dimension of the inputs does not count examples, or the
            module itself mixes them.
        inside: What the names of its modules begin with.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Call]
    sizes: tuple[int, ...]
    smooth: bool = True
    left: frozenset[str] = NOTHING
    shared: frozenset[str] = NOTHING
    computed: bool = False
    parametrized: bool = False
    optional: bool = False
    lost: bool = False
    views: bool = False
    uncalled: frozenset[str] = NOTHING
    blind: int = 0
    independent: bool = True
    inside: str = ""


AWKWARD: dict[str, Case] = {}
"""By the name of the class."""


def awkward(
    inputs: Callable[[int, int], Call], **options: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a module class in ``AWKWARD``."""
    options["computed"] = options.get("computed") or options.get("parametrized", False)
    sizes = options.pop("sizes", RESOLUTIONS.get(inputs, (WIDTH,)))

    def enter(build: type[nn.Module]) -> type[nn.Module]:
        AWKWARD[build.__name__] = Case(build, inputs, sizes, **options)
        return build

    return enter


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers for the same shape and seed, whatever the default dtype."""
    generator = torch.Generator().manual_seed(100 * seed + sum(shape))
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return numbers.to(torch.get_default_dtype())


@contextmanager
def double_precision():
    """Build modules and inputs in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested structure, dataclasses too."""
    match value:
        case Tensor():
            return [value]
        case Mapping():
            children = list(value.values())
        case list() | tuple():
            children = list(value)
        case _ if is_dataclass(value):
            children = [getattr(value, field.name) for field in fields(value)]
        case _:
            return []
    return [tensor for child in children for tensor in tensors(child)]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


# Inputs -------------------------------------------------------------------------------------------


def vectors(examples: int, size: int) -> Call:
    return (normal(examples, size),), {}


def sequences(examples: int, size: int) -> Call:
    return (normal(examples, size, WIDTH),), {}


def time_major(examples: int, size: int) -> Call:
    return (normal(size, examples, WIDTH),), {}


def tokens(examples: int, size: int) -> Call:
    generator = torch.Generator().manual_seed(examples)
    return (torch.randint(0, 11, (examples, size), generator=generator),), {}


def images(examples: int, size: int) -> Call:
    return (normal(examples, 3, size, size),), {}


def videos(examples: int, size: int) -> Call:
    return (normal(examples, 4, 3, size, size),), {}


def keywords(examples: int, size: int) -> Call:
    return (), {"left": normal(examples, WIDTH), "right": normal(examples, WIDTH, seed=1)}


def mixed(examples: int, size: int) -> Call:
    return (normal(examples, WIDTH),), {"scale": normal(examples, 1, seed=1)}


def several(examples: int, size: int) -> Call:
    return tuple(normal(examples, WIDTH, seed=seed) for seed in range(3)), {}


def in_list(examples: int, size: int) -> Call:
    return (list(several(examples, size)[0]),), {}


def in_tuple(examples: int, size: int) -> Call:
    return (several(examples, size)[0][:2],), {}


def in_dict(examples: int, size: int) -> Call:
    return (keywords(examples, size)[1],), {}


@dataclass
class Batch:
    """Inputs in a dataclass of the user's."""

    left: Tensor
    right: Tensor


def in_dataclass(examples: int, size: int) -> Call:
    return (Batch(**keywords(examples, size)[1]),), {}


def masked(examples: int, size: int) -> Call:
    keep = torch.arange(size) < torch.arange(1, examples + 1)[:, None]
    return (normal(examples, size, WIDTH),), {"mask": keep}


def with_lengths(examples: int, size: int) -> Call:
    lengths = (torch.arange(examples) * 2 + 1) % size + 1
    return (normal(examples, size, WIDTH), lengths), {}


def with_table(examples: int, size: int) -> Call:
    """A mask that belongs to no example, and is as long as there are examples at size 3."""
    return (normal(examples, size, WIDTH), torch.ones(size, size, dtype=torch.bool).tril()), {}


def pairs(examples: int, size: int) -> Call:
    return (normal(2 * examples, WIDTH),), {}


def graphs(examples: int, size: int) -> Call:
    """``examples`` rings of ``size`` nodes, in one list of nodes."""
    nodes = torch.arange(examples * size)
    first = nodes // size * size
    edges = torch.stack([nodes, first + (nodes + 1 - first) % size])
    return (normal(examples * size, WIDTH), edges, nodes // size), {}


RESOLUTIONS: dict[Callable[..., Call], tuple[int, ...]] = {
    sequences: (4, 7),
    time_major: (4, 7),
    tokens: (4, 7),
    masked: (4, 7),
    with_lengths: (4, 7),
    with_table: (3, 7),
    images: (8, 11),
    videos: (6, 8),
}
"""Sizes of inputs that have a length or a resolution."""


# Weights that are shared, partly used or computed -------------------------------------------------


@awkward(vectors)
class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        return self.layer(self.layer(inputs).tanh())


@awkward(vectors)
class UnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.second = self.first
        self.last = nn.ModuleList([self.first[0], nn.Linear(WIDTH, 2)])

    def forward(self, inputs):
        return self.last[1](self.last[0](self.second(self.first(inputs))))


@awkward(vectors)
class TiedModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def forward(self, inputs):
        return self.other(self.one(inputs).sigmoid())


@awkward(vectors, computed=True, views=True)
class TiedToItsTranspose(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 4)
        self.bias = parameter(WIDTH)

    def forward(self, inputs):
        return F.linear(self.encoder(inputs).tanh(), self.encoder.weight.t(), self.bias)


@awkward(tokens)
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.mix(self.embedding(words)).tanh())


@awkward(sequences, lost=True, computed=True)
class SlicesOfOneParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = parameter(16, WIDTH), parameter(16)

    def forward(self, inputs):
        queries = F.linear(inputs, self.weight[:4], self.bias[:4])
        keys = F.linear(inputs, self.weight[4:8], self.bias[4:8])
        values = F.linear(inputs, self.weight[8:], self.bias[8:])
        return (queries @ keys.transpose(1, 2)).softmax(-1) @ values


@awkward(sequences, lost=True, computed=True)
class ChunksOfOneParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(12, WIDTH)

    def forward(self, inputs):
        gate, candidate, value = self.weight.chunk(3)
        gated = F.linear(inputs, gate).sigmoid() * F.linear(inputs, candidate).tanh()
        return gated + F.linear(inputs, value)


@awkward(vectors, sizes=(4, 6), left=frozenset({"weight"}))
class PartlyUsedByShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(3, WIDTH)
        self.last = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.last(F.linear(inputs, self.weight[:, : inputs.shape[1]]).tanh())


@awkward(vectors, left=frozenset({"spare.weight"}), uncalled=frozenset({"spare"}))
class NeverUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, inputs):
        return self.used(inputs)


@awkward(vectors, computed=True)
class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(WIDTH, 4)
        self.weight, self.temperature = parameter(5, 4), nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs):
        features = F.normalize(self.trunk(inputs), dim=-1)
        return self.temperature * F.linear(features, F.normalize(self.weight, dim=-1))


@awkward(vectors, lost=True)
class ParametersInContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([parameter(5, WIDTH), parameter(4, 5)])
        self.named = nn.ParameterDict({"last": parameter(3, 4), "bias": parameter(3)})

    def forward(self, inputs):
        for weight in self.weights:
            inputs = F.linear(inputs, weight).tanh()
        return F.linear(inputs, self.named["last"], self.named["bias"])


@awkward(sequences, left=frozenset({"trunk.weight", "shift.weight"}))
class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.shift = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)
        self.trunk.requires_grad_(False)
        self.shift.weight.requires_grad_(False)

    def forward(self, inputs):
        return self.last(torch.celu_(self.shift(self.trunk(inputs).tanh())))


@awkward(sequences, left=frozenset({"base.weight"}))
class LowRankAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = parameter(WIDTH, 2), parameter(2, WIDTH)

    def forward(self, inputs):
        return self.base(inputs) + (inputs @ self.down) @ self.up


# Products with parameters -------------------------------------------------------------------------


@awkward(sequences)
class EinsumOnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.heads = parameter(WIDTH, 4), parameter(2, 3, 4)

    def forward(self, inputs):
        hidden = torch.einsum("bld,do->blo", inputs, self.weight).tanh()
        return torch.einsum("blo,hko->bhlk", hidden, self.heads)


@awkward(sequences)
class MatmulOnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.other, self.third = parameter(WIDTH, 5), parameter(5, 4), parameter(4, 3)

    def forward(self, inputs):
        hidden = torch.matmul((inputs @ self.weight).tanh(), self.other)
        return hidden.tanh().matmul(self.third)


@awkward(vectors)
class ParameterFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.last = parameter(4, WIDTH), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last((self.weight @ inputs.unsqueeze(-1)).squeeze(-1).tanh())


@awkward(vectors)
class AddmmOnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = parameter(WIDTH, 4), parameter(4)
        self.last = parameter(4, 3)

    def forward(self, inputs):
        hidden = torch.addmm(self.bias, inputs, self.weight)
        return torch.mm(hidden.tanh(), self.last)


@awkward(sequences)
class BaddbmmOnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = parameter(WIDTH, 4), parameter(4)
        self.last = nn.Linear(4, 2)

    def forward(self, inputs):
        weight = self.weight.expand(inputs.shape[0], -1, -1)
        return self.last(torch.baddbmm(self.bias, inputs, weight).tanh())


@awkward(sequences, left=frozenset({"bias"}))
class BmmOnParameter(nn.Module):
    """Has one matrix for each position, and batches the product by position."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.last = (
            parameter(4, WIDTH, 5),
            parameter(4, 1, 5),
            nn.Linear(5, 2),
        )

    def forward(self, inputs):
        positions = inputs[:, :4].transpose(0, 1)
        hidden = torch.bmm(positions, self.weight) + torch.baddbmm(
            self.bias, positions, self.weight
        )
        return self.last(hidden.transpose(0, 1).tanh())


@awkward(sequences)
class MixtureOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up, self.down = parameter(3, WIDTH, 5), parameter(3, 5, WIDTH)

    def forward(self, inputs):
        shares = self.router(inputs).softmax(-1)
        hidden = torch.einsum("bld,edf->blef", inputs, self.up).tanh()
        return torch.einsum("blef,efd,ble->bld", hidden, self.down, shares)


@awkward(images, left=frozenset({"filter"}))
class FourierFilter(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter, self.last = parameter(3, 1, 1, 2), nn.Conv2d(3, 2, 1)

    def forward(self, inputs):
        spectrum = torch.fft.rfft2(inputs) * torch.view_as_complex(self.filter)
        return self.last(torch.fft.irfft2(spectrum, s=inputs.shape[-2:]))


# Normalised and parametrised weights --------------------------------------------------------------


def silently(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call one of PyTorch's deprecated functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@awkward(vectors, left=frozenset({"layer.weight_g"}), parametrized=True)
class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = silently(nn.utils.weight_norm, nn.Linear(WIDTH, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.layer(inputs).tanh())


@awkward(vectors, left=frozenset({"layer.parametrizations.weight.original0"}), parametrized=True)
class NewWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(WIDTH, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.layer(inputs).tanh())


@awkward(images, parametrized=True)
class OldSpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = silently(nn.utils.spectral_norm, nn.Conv2d(3, 4, 3))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, inputs):
        return self.last(self.layer(inputs).tanh())


@awkward(images, parametrized=True)
class NewSpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, inputs):
        return self.last(self.layer(inputs).tanh())


class Symmetric(nn.Module):
    """A parametrisation of the user's."""

    def forward(self, matrix):
        return matrix.triu() + matrix.triu(1).transpose(-1, -2)


@awkward(vectors, parametrized=True)
class OwnParametrization(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        parametrize.register_parametrization(self.layer, "weight", Symmetric())

    def forward(self, inputs):
        return self.last(self.layer(self.layer(inputs).tanh()))


@awkward(
    sequences,
    left=frozenset({"recurrent.parametrizations.weight_hh_l0.original0"}),
    parametrized=True,
)
class NewWeightNormInside(nn.Module):
    """One of a recurrent layer's weights is computed; its code is not Python."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, 4, batch_first=True)
        parametrizations.weight_norm(self.recurrent, "weight_hh_l0")
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.recurrent(inputs)[0].mean(1))


@awkward(sequences, left=frozenset({"recurrent.weight_hh_l0_g"}), parametrized=True)
class OldWeightNormInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, 4, batch_first=True, bidirectional=True)
        silently(nn.utils.weight_norm, self.recurrent, "weight_hh_l0")
        self.last = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(self.recurrent(inputs)[0].mean(1))


@awkward(sequences, parametrized=True)
class Pruned(nn.Module):
    """Its weights are masked, in a recurrent cell and in a layer."""

    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.GRUCell(WIDTH, 4), nn.Linear(4, 3)
        prune.l1_unstructured(self.cell, "weight_ih", 0.5)
        prune.l1_unstructured(self.last, "weight", 0.5)
        prune.l1_unstructured(self.last, "bias", 1)

    def forward(self, inputs):
        state = None
        for step in inputs.unbind(1):
            state = self.cell(step, state)
        return self.last(state)


@awkward(
    sequences,
    left=frozenset({"attention.out_proj.parametrizations.weight.original0"}),
    parametrized=True,
)
class ParametrizedAttention(nn.Module):
    """Both projections are computed, and the module of one of them is never called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        parametrizations.spectral_norm(self.attention, "in_proj_weight")
        parametrizations.weight_norm(self.attention.out_proj)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, inputs):
        return self.last(self.attention(inputs, inputs, inputs)[0].mean(1))


@awkward(sequences)
class NamesOfMethods(nn.Module):
    """Its layers are called as the methods of PyTorch's containers are."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.items, self.update, self.pop = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs):
        hidden = self.items(self.keys(inputs)).tanh() * self.update(self.values(inputs))
        return self.pop(hidden)


# Control flow, calls and containers ---------------------------------------------------------------


@awkward(vectors)
class LoopByAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.rounds = nn.Linear(WIDTH, WIDTH), 3

    def forward(self, inputs):
        for _ in range(self.rounds):
            inputs = inputs + self.cell(inputs).tanh()
        return inputs


@awkward(sequences)
class LoopByShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.hidden = nn.Linear(WIDTH, 4), nn.Linear(4, 4, bias=False)

    def forward(self, inputs):
        state = inputs.new_zeros(inputs.shape[0], 4)
        for step in range(inputs.shape[1]):
            state = (self.inputs(inputs[:, step]) + self.hidden(state)).tanh()
        return state


@awkward(sequences, uncalled=frozenset({"long"}))
class EarlyReturn(nn.Module):
    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, inputs):
        if inputs.shape[1] < 5:
            return self.short(inputs).mean(1)
        return self.long(inputs).tanh().mean(1)


@awkward(vectors)
class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, depth=2):
        if depth == 0:
            return inputs
        return self.forward(self.layer(inputs).tanh(), depth - 1)


@awkward(vectors)
class NestedContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict(
            {
                "first": nn.ModuleList([nn.Linear(WIDTH, 5), nn.Sequential(nn.Tanh())]),
                "second": nn.ModuleList([nn.ModuleDict({"inner": nn.Linear(5, 4)})]),
            }
        )
        self.last = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Identity()))

    def forward(self, inputs):
        for stage in self.stages.values():
            for part in stage:
                parts = part.values() if isinstance(part, nn.ModuleDict) else [part]
                for layer in parts:
                    inputs = layer(inputs)
        return self.last(inputs)


@awkward(vectors)
class IndexedModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.order = (2, 0, -1)

    def forward(self, inputs):
        for index in self.order:
            inputs = self.blocks[index](inputs).tanh()
        for block in self.blocks[1:2]:
            inputs = block(inputs)
        return inputs


@awkward(vectors)
class ModulesInPlainContainers(nn.Module):
    """Hides layers from ``parameters()``; they stay ordinary."""

    def __init__(self):
        super().__init__()
        self.hidden = {"list": [nn.Linear(WIDTH, WIDTH)], "tuple": (nn.Linear(WIDTH, WIDTH),)}
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, inputs):
        for layers in self.hidden.values():
            inputs = layers[0](inputs).tanh()
        return self.last(inputs)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def features(self, inputs):
        return self.body(inputs).tanh()

    def classify(self, features, *, scale):
        return scale * self.head(features)

    def forward(self, inputs):
        return self.classify(self.features(inputs), scale=1.0)


@awkward(vectors)
class OtherMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Features()

    def forward(self, inputs):
        return self.net.classify(self.net.features(inputs), scale=2.0)


class Doubling(nn.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Bypassing(nn.Module):
    """Has a ``__call__`` of its own, and a ``forward`` nobody calls."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __call__(self, inputs):
        return self.inner(inputs).tanh()

    def forward(self, inputs):
        raise AssertionError("__call__ does not come here")


@awkward(vectors)
class OverriddenCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Doubling(WIDTH, 4), Bypassing()

    def forward(self, inputs):
        return self.last(self.first(inputs))


@awkward(vectors)
class OverriddenCallOfTheRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def __call__(self, inputs):
        return super().__call__(inputs.tanh()) + 1

    def forward(self, inputs):
        return self.layer(inputs)


class Residual(nn.Sequential):
    def forward(self, inputs):
        return inputs + super().forward(inputs)


@awkward(vectors)
class SubclassedContainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Residual(
            nn.Linear(WIDTH, 4), nn.Tanh(), Residual(nn.Linear(4, 4)), nn.Linear(4, WIDTH)
        )

    def forward(self, inputs):
        return self.net(inputs)


@awkward(sequences)
class MappedOverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, inputs):
        return torch.stack([self.layer(example).tanh() for example in inputs.unbind(1)], 1)


@awkward(vectors)
class KeywordsOfPyTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(WIDTH, 4), nn.Dropout(0.0)

    def forward(self, inputs):
        return self.drop(input=self.layer(input=inputs)).tanh()


@awkward(vectors)
class LooksAtTypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3)])

    def forward(self, inputs):
        for part in self.parts:
            inputs = part(inputs) if isinstance(part, nn.Linear) else 2 * part(inputs)
        return inputs


@awkward(sequences)
class Vectorised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(torch.vmap(torch.tanh)(self.layer(inputs)))


class DataDependent(nn.Module):
    """Looks at its inputs, so that it cannot be traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        first = tensors((args, kwargs))[0]
        if first.isnan().any():
            raise ValueError("not a number")
        return self.inner(*args, **kwargs)


@awkward(vectors)
class SharedWithAnUntraceablePart(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.part = DataDependent(nn.Sequential(self.layer, DataDependent(nn.Linear(WIDTH, 4))))

    def forward(self, inputs):
        return self.part(self.layer(inputs).tanh())


# In-place operations ------------------------------------------------------------------------------


@awkward(sequences)
class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        hidden += inputs
        hidden.mul_(0.5).sigmoid_()
        return self.last(hidden).add_(1)


@awkward(sequences)
class InPlaceOnParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        hidden[:, 0] = 0
        hidden[..., 1:3] *= 2
        hidden[:, -1].add_(inputs[:, 0])
        return self.last(hidden.tanh())


# State --------------------------------------------------------------------------------------------


@awkward(vectors, smooth=False)
class MovingAverages(nn.Module):
    """Keeps averages of its activations in buffers, in place, beside a weight of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.register_buffer("average", torch.ones(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, inputs):
        hidden = self.layer(inputs)
        if self.training:
            self.count += 1
            self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.last((hidden - self.average).tanh())


@awkward(vectors, smooth=False)
class ReplacedBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)
        self.register_buffer("average", torch.ones(4))

    def forward(self, inputs):
        hidden = self.layer(inputs)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        return self.last((hidden - self.average).tanh())


class Average(nn.Module):
    """Holds no weight, only a buffer it updates."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(4))

    def forward(self, hidden):
        with torch.no_grad():
            self.average.lerp_(hidden.mean(0), 0.1)
        return hidden - self.average


@awkward(vectors, shared=frozenset({"last"}), independent=False)
class AverageInAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.average, self.last = nn.Linear(WIDTH, 4), Average(), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.average(self.layer(inputs)).tanh())


@awkward(vectors)
class CountsItsCalls(nn.Module):
    """Warms up by a plain Python counter."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(WIDTH, 4), 3

    def forward(self, inputs):
        if self.training:
            self.calls += 1
        return self.layer(inputs) * max(0.1, 1.0 - self.calls / 100)


class Experts(nn.Module):
    """Leaves a loss on itself, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 8)
        self.balance = None

    def forward(self, inputs):
        shares = self.router(inputs).softmax(-1)
        self.balance = shares.mean(0).square().sum()
        return torch.einsum("be,bef->bf", shares, self.experts(inputs).unflatten(-1, (2, 4)))


@awkward(vectors)
class LeavesALossOnItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Experts()

    def forward(self, inputs):
        outputs = self.body(inputs)
        return outputs, self.body.balance


@awkward(vectors)
class ComputesOnItsBuffers(nn.Module):
    """Scales by a function of a buffer, which a schedule may change."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)
        self.register_buffer("temperature", torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def forward(self, inputs):
        return self.layer(inputs) * self.temperature.exp() + self.mask.cumsum(0).roll(1)


@awkward(vectors, blind=1)
class PenalisesItself(nn.Module):
    """Reads its parameters as a collection."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, inputs):
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        return self.layer(inputs), penalty


# Context managers, checkpoints, gradients that stop -----------------------------------------------


@awkward(vectors, smooth=False)
class WithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, inputs):
        with torch.no_grad():
            goal = self.teacher(inputs).tanh()
        return self.student(inputs), goal


@awkward(vectors, smooth=False)
class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    @torch.no_grad()
    def goal(self, inputs):
        return self.teacher(inputs).tanh()

    def forward(self, inputs):
        return self.student(inputs) * self.goal(inputs)


@awkward(vectors, smooth=False)
class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        rounded = hidden + (hidden.round() - hidden).detach()
        return self.last(rounded)


@awkward(vectors, smooth=False)
class AutocastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.first(inputs)
        return self.last(hidden.to(inputs.dtype))


class Checkpointed(nn.Module):
    reentrant: bool

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh())

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.last(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


@awkward(vectors)
class ReentrantCheckpoint(Checkpointed):
    reentrant = True


@awkward(vectors)
class Checkpoint(Checkpointed):
    reentrant = False


@awkward(sequences)
class CheckpointInUntraceable(Checkpointed):
    reentrant = False

    def forward(self, inputs):
        return super().forward(inputs) if len(list(inputs)) > 0 else inputs


@awkward(sequences)
class ReentrantCheckpointInUntraceable(CheckpointInUntraceable):
    reentrant = True


# Inputs and outputs -------------------------------------------------------------------------------


class TwoSided(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def join(self, left, right):
        return self.left(left).tanh() * self.right(right)


@awkward(keywords)
class KeywordInputs(TwoSided):
    def forward(self, *, left, right):
        return self.join(left, right)


@awkward(mixed)
class KeywordRest(TwoSided):
    def forward(self, inputs, **options):
        return self.join(inputs, inputs) * options["scale"]


@awkward(several)
class PositionalRest(TwoSided):
    def forward(self, *inputs):
        return sum(self.join(one, one) for one in inputs)


@awkward(in_list)
class ListInput(TwoSided):
    def forward(self, inputs):
        first, *rest = inputs
        return self.join(first, torch.stack(rest).sum(0))


@awkward(in_tuple)
class TupleInput(TwoSided):
    def forward(self, inputs):
        left, right = inputs
        return self.join(left, right)


@awkward(in_dict)
class DictInput(TwoSided):
    def forward(self, inputs):
        return self.join(inputs["left"], inputs["right"])


@awkward(in_dict)
class DictInputByItems(TwoSided):
    def forward(self, inputs):
        return self.join(**dict(inputs.items()))


@awkward(in_dataclass)
class DataclassInput(TwoSided):
    def forward(self, batch):
        return self.join(batch.left, batch.right)


@awkward(masked, optional=True)
class OptionalMask(nn.Module):
    """Its mask may be left out, and is given."""

    def __init__(self):
        super().__init__()
        self.score, self.value = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, inputs, mask=None):
        scores = self.score(inputs).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        return (scores.softmax(-1).unsqueeze(1) @ self.value(inputs)).squeeze(1)


@dataclass
class Prediction:
    """Outputs in a dataclass of the user's."""

    logits: Tensor
    hidden: Tensor | None = None


class Pair(NamedTuple):
    """Outputs in a named tuple."""

    logits: Tensor
    hidden: Tensor


@awkward(vectors)
class DataclassOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        return Prediction(self.last(hidden), hidden)


class Attributes(dict):
    """Outputs in a dict whose entries are attributes too."""

    __getattr__ = dict.__getitem__


@awkward(vectors)
class OwnDictOutput(DataclassOutput):
    def forward(self, inputs):
        prediction = super().forward(inputs)
        return Attributes(logits=prediction.logits, hidden=prediction.hidden)


class Cache:
    """Something that is no tensor and equals nothing but itself."""


@awkward(vectors)
class ObjectBesideTensors(DataclassOutput):
    def forward(self, inputs):
        return super().forward(inputs).logits, Cache()


@awkward(vectors)
class DataclassInside(DataclassOutput):
    def forward(self, inputs):
        prediction = super().forward(inputs)
        return prediction.logits.sum(-1, keepdim=True) * prediction.hidden


@awkward(vectors)
class NestedOutput(DataclassOutput):
    def forward(self, inputs):
        prediction = super().forward(inputs)
        pair = Pair(prediction.logits, prediction.hidden)
        return {"pair": pair, "list": [pair.hidden, (pair.logits + 1,)], "none": None, "number": 3}


# Rows that are no longer one for each example -----------------------------------------------------


@awkward(videos)
class FramesFoldedIntoTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, videos):
        frames = self.convolution(videos.flatten(0, 1)).tanh().mean((2, 3))
        return self.last(frames.unflatten(0, videos.shape[:2]).mean(1))


@awkward(videos)
class FramesFoldedInFront(nn.Module):
    """As before, but frame by frame: row r belongs to example ``r % batch``."""

    def __init__(self):
        super().__init__()
        self.convolution, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, videos):
        frames = self.convolution(videos.transpose(0, 1).flatten(0, 1)).tanh().mean((2, 3))
        return self.last(frames.unflatten(0, (4, -1)).mean(0))


@awkward(sequences)
class TimeMajorInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        hidden = self.inner(inputs.transpose(0, 1)).tanh()
        return self.last(hidden.mean(0))


@awkward(several)
class ViewsOneAfterTheOther(nn.Module):
    """Encodes several views of each example as one batch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, one, other, third):
        first, second, last = self.encoder(torch.cat([one, other, third])).chunk(3)
        return first * second + last


@awkward(pairs, shared=frozenset({"layer"}))
class PairsInTheBatch(nn.Module):
    """Takes neighbours in the batch for pairs, so that odd batches fail."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(WIDTH, 4), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.layer(self.first(inputs).tanh().view(-1, 8))


@awkward(with_lengths, shared=frozenset({"inner"}))
class SortedByLength(nn.Module):
    """Puts the longest first, as code for packed sequences once had to."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs, lengths):
        order = lengths.argsort(descending=True)
        kept = torch.arange(inputs.shape[1]) < lengths[order, None]
        hidden = (self.inner(inputs[order]).tanh() * kept.unsqueeze(-1)).sum(1)
        return self.last(hidden[order.argsort()])


@awkward(with_table)
class MaskOfNoExample(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.value = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, inputs, mask):
        scores = self.score(inputs).transpose(1, 2).masked_fill(~mask, -1e4)
        return scores.softmax(-1) @ self.value(inputs)


@awkward(sequences)
class HeadsFoldedIntoTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, 8), nn.Linear(4, 3)

    def forward(self, inputs):
        heads = self.inner(inputs).unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)
        return self.head(heads.tanh()).unflatten(0, (-1, 2)).sum(1)


@awkward(sequences, shared=frozenset({"table"}))
class LooksAtATable(nn.Module):
    """Computes biases of positions from coordinates, as Swin v2 does."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = nn.Linear(WIDTH, 4), nn.Linear(2, 4)
        self.register_buffer("coordinates", torch.randn(9, 2))

    def forward(self, inputs):
        return self.inner(inputs) + self.table(self.coordinates)[: inputs.shape[1]].tanh()


@awkward(graphs, sizes=(4, 5), shared=frozenset({"message", "update", "head"}), independent=False)
class MessagePassing(nn.Module):
    """Two rounds of messages along edges, then a mean over each graph's nodes."""

    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(2 * WIDTH, 5), nn.Linear(WIDTH + 5, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, nodes, edges, graph):
        source, target = edges
        for _ in range(2):
            messages = self.message(torch.cat([nodes[source], nodes[target]], -1)).tanh()
            gathered = messages.new_zeros(nodes.shape[0], 5).index_add_(0, target, messages)
            nodes = self.update(torch.cat([nodes, gathered], -1)).tanh()
        count = int(graph.max()) + 1
        pooled = nodes.new_zeros(count, WIDTH).scatter_reduce(
            0, graph[:, None].expand_as(nodes), nodes, "mean", include_self=False
        )
        return self.head(pooled)


@awkward(sequences, shared=frozenset({"experts.0", "experts.1"}))
class RoutedTokens(nn.Module):
    """Sends each token to one of its experts, so that these see any number of any example's."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, inputs):
        tokens = inputs.flatten(0, 1)
        shares = self.router(tokens).softmax(-1)
        chosen, outputs = shares.argmax(-1), tokens.new_zeros(len(tokens), 4)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            outputs = outputs.index_add(0, rows, expert(tokens[rows]) * shares[rows, index, None])
        return self.last(outputs.unflatten(0, inputs.shape[:2]).mean(1))


# PyTorch's own composites -------------------------------------------------------------------------


@awkward(sequences)
class RecurrentLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.head = nn.GRU(8, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, inputs):
        hidden, _ = self.lstm(inputs)
        _, last = self.gru(hidden)
        return self.head(last[0])


@awkward(sequences)
class RecurrentCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(WIDTH, 4), nn.GRUCell(4, 3), nn.Linear(3, 2)

    def forward(self, inputs):
        state, hidden = None, None
        for step in inputs.unbind(1):
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
        return self.head(hidden)


@awkward(sequences)
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(
            WIDTH, 2, 8, dropout=0.0, activation=F.gelu, batch_first=True
        )
        self.pair = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, inputs):
        attended, _ = self.attention(inputs, inputs, inputs, need_weights=False)
        return self.pair(self.encoder(attended), inputs)


@awkward(tokens)
class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, words):
        return self.head(self.bag(words))


class OneComposite(nn.Module):
    """Puts a layer before and a layer behind what a subclass does in ``middle``."""

    width = WIDTH

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(self.width, 3)

    def forward(self, inputs):
        return self.last(self.middle(self.first(inputs).tanh()))


@awkward(sequences)
class MaskedAttention(OneComposite):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def middle(self, hidden):
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        padding = hidden.new_zeros(hidden.shape[:2], dtype=torch.bool).logical_or(
            hidden[..., 0] > 1e3
        )
        attended, weights = self.attention(
            hidden, hidden, hidden, key_padding_mask=padding, attn_mask=causal
        )
        return attended + weights.sum(-1, keepdim=True) + weights[..., :1]


@awkward(sequences, left=frozenset({"attention.bias_k", "attention.bias_v"}))
class CrossAttention(OneComposite):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, 3, kdim=4, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=True
        )
        self.keys, self.values = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 5)

    def middle(self, hidden):
        keys, values = self.keys(hidden), self.values(hidden)
        return self.attention(hidden[:, :2], keys, values, average_attn_weights=False)[0]


@awkward(sequences)
class TimeMajorAttention(OneComposite):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False)

    def middle(self, hidden):
        hidden = hidden.transpose(0, 1)
        return self.attention(hidden, hidden, hidden)[0].transpose(0, 1)


@awkward(sequences)
class EncoderAndDecoder(OneComposite):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation=F.silu
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(
            WIDTH, 2, 8, dropout=0.0, batch_first=True, activation=F.gelu
        )

    def middle(self, hidden):
        return self.decoder(hidden[:, :2], self.encoder(hidden))


@awkward(sequences, left=frozenset({"start"}))
class TimeMajorRecurrence(OneComposite):
    width = 4

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 5, proj_size=4)
        self.rnn, self.start = nn.RNN(4, 2, bidirectional=True, bias=False), parameter(1, 1, 4)

    def middle(self, hidden):
        hidden = hidden.transpose(0, 1)
        start = self.start.expand(1, hidden.shape[1], 4).contiguous()
        outputs, (_, cell) = self.lstm(hidden, (start, hidden.new_zeros(1, hidden.shape[1], 5)))
        return (self.rnn(outputs)[0] + cell[..., :4]).transpose(0, 1)


@awkward(sequences)
class PackedRecurrence(OneComposite):
    width = 4

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, 4, num_layers=2, batch_first=True)

    def middle(self, hidden):
        lengths = torch.arange(hidden.shape[0]) % 3 + 2
        packed = nn.utils.rnn.pack_padded_sequence(
            hidden, lengths, batch_first=True, enforce_sorted=False
        )
        outputs, _ = self.gru(packed)
        return nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0].sum(1)


@awkward(tokens)
class BagsOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.sums = nn.EmbeddingBag(11, WIDTH, mode="sum", padding_idx=2)
        self.means, self.last = nn.EmbeddingBag(11, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, words):
        offsets = torch.arange(words.shape[0]) * words.shape[1]
        weights = (words + 1).to(self.last.weight.dtype) / 10
        return self.last(self.sums(words, None, weights) + self.means(words.flatten(), offsets))


# Hooks --------------------------------------------------------------------------------------------


@awkward(vectors)
class Hooked(nn.Module):
    """Its layers, a block and the model itself have hooks that change what passes."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh())
        self.wide, self.last = Features(), nn.Linear(3 + 5, 3)
        self.block.register_forward_hook(_scaled)
        self.wide.register_forward_pre_hook(_shifted)
        self.last.register_forward_hook(_scaled)
        self.last.register_forward_pre_hook(_shifted)
        self.register_forward_hook(_scaled)
        self.register_forward_pre_hook(_shifted)

    def forward(self, inputs):
        return self.last(torch.cat([self.block(inputs), self.wide(inputs)], -1))


def _scaled(module, inputs, outputs):
    return 0.5 * outputs + 0.1 * inputs[0].sum(-1, keepdim=True)


def _shifted(module, inputs):
    return (inputs[0] + 1,)


@awkward(vectors)
class BackwardHooks(nn.Module):
    """Halves the gradients that come out of a layer and of a block."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.block = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 5),
            Features(),
        )
        self.last = nn.Linear(5 + 3, 3)
        self.layer.register_full_backward_hook(_halved)
        self.block.register_full_backward_hook(_halved)

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.last(torch.cat([self.layer(hidden), self.block(hidden)], -1))


def _halved(module, inputs, outputs):
    return tuple(0.5 * gradient for gradient in inputs)


@awkward(keywords)
class HookedWithKeywords(TwoSided):
    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(_swap_sides, with_kwargs=True)
        self.register_forward_hook(_add_left, with_kwargs=True)

    def forward(self, left, right):
        return self.join(left, right)


def _swap_sides(module, args, kwargs):
    return args, {"left": kwargs["right"], "right": kwargs["left"]}


def _add_left(module, args, kwargs, outputs):
    return outputs + kwargs["left"].sum(-1, keepdim=True)


@awkward(time_major, shared=frozenset({"last"}), independent=False)
class TimeMajorInput(nn.Module):
    """Takes ``(time, batch, features)``, as recurrent layers do by default."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.inner(inputs).tanh().cumsum(0)[-1])
