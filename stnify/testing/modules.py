"""Small modules of every kind, and how a random one is written down so that it can be rebuilt.

Each takes one tensor with the batch first and returns one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stnify.streams import RandomStream


@dataclass(frozen=True)
class Call:
    """A module that has not been built yet; it prints as the Python that builds it.

    Attributes:
        make: A class of ``torch.nn`` or of this file.
        args: Positional arguments; calls among them are built first.
        kwargs: Keyword arguments, as pairs.
    """

    make: Callable[..., nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """Make the module, its parameters drawn from the global generator."""
        args = [part.build() if isinstance(part, Call) else part for part in self.args]
        return self.make(*args, **dict(self.kwargs))

    def __repr__(self) -> str:
        ours = self.make.__module__ == __name__
        args = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs)]
        return f"{'' if ours else 'nn.'}{self.make.__name__}({', '.join(args)})"


def call(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Call:
    """Write down ``make(*args, **kwargs)``."""
    return Call(make, args, tuple(kwargs.items()))


@dataclass(frozen=True)
class RandomModule:
    """A random module and a random batch for it; it prints as the Python that rebuilds both.

    Attributes:
        body: The module.
        shape: Of the batch.
        entries: Of the vocabulary, if the batch is integers; None for real numbers.
        seed: Of parameters and batch.
    """

    body: Call
    shape: tuple[int, ...]
    entries: int | None
    seed: int

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return module and batch, the same each time; the global generator is left alone."""
        with RandomStream(self.seed, torch.device("cpu")).active():
            model = shaken(self.body.build())
            if self.entries is None:
                return model, torch.randn(self.shape)
            return model, torch.randint(self.entries, self.shape)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print to hypothesis what is printed to anyone."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        drawn = f"randint({self.entries}, {self.shape})"
        return (
            f"(torch.manual_seed({self.seed}), shaken({self.body!r}), "
            f"torch.{f'randn({self.shape})' if self.entries is None else drawn})[1:]"
        )


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Give parameters and statistics that start at nought or one values of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim <= 1 or not parameter.any():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# Around other modules -----------------------------------------------------------------------------


class Residual(nn.Module):
    """Adds what a module computes to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs + inner(inputs)``."""
        return inputs + self.inner(inputs)


class Normed(nn.Module):
    """Computes each matrix and kernel of a module from its directions and lengths."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for module in list(inner.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.ndim > 1:
                    parametrizations.weight_norm(module, name)
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inner(inputs)``."""
        outputs: Tensor = self.inner(inputs)
        return outputs


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inner(tanh(inner(inputs)))``."""
        return self.inner(self.inner(inputs).tanh())


class Parallel(nn.Module):
    """Adds what two modules make of one input."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList([left, right])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both branches."""
        outputs = [branch(inputs) for branch in self.branches]
        return outputs[0] + outputs[1]


class Frozen(nn.Module):
    """Holds a module whose parameters do not train."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inner(inputs)``."""
        return self.inner(inputs)


class Branching(nn.Module):
    """Looks at its data, so that it cannot be traced through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inner(inputs)``, or twice that if the inputs are not numbers."""
        outputs = self.inner(inputs)
        return outputs + outputs if bool(inputs.isnan().any()) else outputs


class Folded(nn.Module):
    """Folds the steps of a sequence into the batch for the module inside.

    Args:
        inner: Takes ``(rows, features)``.
        time_major: Whether rows of one step are consecutive, not rows of one example.
    """

    def __init__(self, inner: nn.Module, time_major: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.time_major = time_major

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inner`` of every step."""
        if self.time_major:
            inputs = inputs.transpose(0, 1)
        first, second = inputs.shape[:2]
        outputs = self.inner(inputs.reshape(first * second, -1)).reshape(first, second, -1)
        return outputs.transpose(0, 1) if self.time_major else outputs


# Shapes -------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """Averages over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mean."""
        return inputs.mean(self.dims)


class Swap(nn.Module):
    """Swaps features and positions: ``(batch, c, *space)`` and ``(batch, positions, c)``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the positions flattened, the other way round."""
        return inputs.flatten(2).transpose(1, 2)


# Weights that meet activations in other ways than as layers ---------------------------------------


class Functional(nn.Module):
    """A linear map by a function of its own parameters.

    Args:
        inner: Input features.
        outer: Output features.
        way: ``"linear"``, ``"matmul"``, ``"at"``, ``"einsum"`` or ``"scaled"``, where the weight is
            computed from its parameter.
    """

    def __init__(self, inner: int, outer: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(outer, inner) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(outer) / 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``."""
        match self.way:
            case "linear":
                return F.linear(inputs, self.weight, self.bias)
            case "scaled":
                return F.linear(inputs, self.weight / self.weight.norm(dim=1, keepdim=True))
            case "matmul":
                return torch.matmul(inputs, self.weight.t()) + self.bias
            case "einsum":
                return torch.einsum("...i,oi->...o", inputs, self.weight) + self.bias
            case _:
                return inputs @ self.weight.mT + self.bias


class Tied(nn.Module):
    """Two linear layers that share one weight.

    Args:
        features: Of input and output.
        transposed: Whether the second layer uses the weight the other way round.
    """

    def __init__(self, features: int, transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = None if transposed else nn.Linear(features, features)
        if self.second is not None:
            self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the second of the first."""
        hidden = self.first(inputs).tanh()
        if self.second is None:
            return F.linear(hidden, self.first.weight.t(), self.first.bias)
        outputs: Tensor = self.second(hidden)
        return outputs


class TiedVocabulary(nn.Module):
    """Embeds tokens and scores them with the table of the embedding."""

    def __init__(self, entries: int, features: int, inner: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(entries, features)
        self.inner = inner
        self.score = nn.Linear(features, entries)
        self.score.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return a score for every entry at every position."""
        return self.score(self.inner(self.embed(tokens)))


class Square(nn.Module):
    """A bilinear form of the input with itself."""

    def __init__(self, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__()
        self.form = nn.Bilinear(inner, inner, outer, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``x A x + b``."""
        return self.form(inputs, inputs)


# Attention and recurrence -------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention written by hand with ``F.scaled_dot_product_attention``."""

    def __init__(self, features: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Attend over the second dimension."""
        batch, steps, features = inputs.shape
        qkv = self.qkv(inputs).reshape(batch, steps, 3, self.heads, features // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, steps, features))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of the input with itself, batch first or not."""

    def __init__(self, features: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(features, heads, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        """Attend over the second dimension."""
        if self.attend.batch_first:
            outputs: Tensor = self.attend(inputs, inputs, inputs, need_weights=False)[0]
            return outputs
        inputs = inputs.transpose(0, 1)
        outputs = self.attend(inputs, inputs, inputs)[0]
        return outputs.transpose(0, 1)


class Recurrent(nn.Module):
    """A recurrent network, of which the outputs at all steps are kept.

    Args:
        kind: ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
        inner: Input features.
        hidden: Features of the hidden state.
        options: Of ``nn.LSTM`` and its relatives.
    """

    def __init__(self, kind: str, inner: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(inner, hidden, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run over the second dimension."""
        if self.cells.batch_first:
            outputs: Tensor = self.cells(inputs)[0]
            return outputs
        outputs = self.cells(inputs.transpose(0, 1))[0]
        return outputs.transpose(0, 1)


class Cell(nn.Module):
    """A recurrent cell called in a loop over steps.

    Args:
        kind: ``"LSTMCell"``, ``"GRUCell"`` or ``"RNNCell"``.
        inner: Input features.
        hidden: Features of the hidden state.
    """

    def __init__(self, kind: str, inner: int, hidden: int) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(inner, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the hidden state after the last step of ``(batch, steps, features)``."""
        state: Any = None
        for step in range(inputs.shape[1]):
            state = self.cell(inputs[:, step], state)
        return state[0] if isinstance(state, tuple) else state


NAMES: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "shaken": shaken,
    **{
        name: value
        for name, value in dict(globals()).items()
        if inspect.isclass(value) and issubclass(value, nn.Module)
    },
}
"""What the print of a random module refers to: ``eval(repr(module), NAMES)`` rebuilds it."""
