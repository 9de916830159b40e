"""The weights PyTorch's modules own, or compute at each call, and the operators that apply them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from stnify.planning.computed import computing

WEIGHT_MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.modules.linear.NonDynamicallyQuantizableLinear: "Linear",
    nn.Conv1d: "Conv1d",
    nn.Conv2d: "Conv2d",
    nn.Conv3d: "Conv3d",
    nn.ConvTranspose1d: "ConvTranspose1d",
    nn.ConvTranspose2d: "ConvTranspose2d",
    nn.ConvTranspose3d: "ConvTranspose3d",
    nn.Embedding: "Embedding",
}
"""Exact types of modules that a hyper layer replaces, with the kind of operator."""

GATED_AXIS = {"Embedding": 1, "ConvTranspose1d": 1, "ConvTranspose2d": 1, "ConvTranspose3d": 1}
"""Weight dimension of the gated units, where it is not the first."""


class OwnWeight(NamedTuple):
    """A weight of a module, by the names of its attributes.

    Attributes:
        kind: Of the operator that applies it.
        weight: Name of the parameter, or of the tensor that is computed in its place.
        bias: Name of the parameter that is added with it, if there is one.
    """

    kind: str
    weight: str
    bias: str | None = None


def _one(kind: str) -> Callable[[Any], Iterator[OwnWeight]]:
    def weights(module: Any) -> Iterator[OwnWeight]:
        yield OwnWeight(kind, "weight", "bias")

    return weights


def _attention(module: nn.MultiheadAttention) -> Iterator[OwnWeight]:
    yield OwnWeight("Linear", "in_proj_weight", "in_proj_bias")
    yield from (OwnWeight("Linear", f"{side}_proj_weight") for side in "qkv")


def _recurrent(module: nn.RNNBase) -> Iterator[OwnWeight]:
    for names in module._all_weights:
        for name in (name for name in names if name.startswith("weight")):
            yield OwnWeight("Linear", name, name.replace("weight", "bias"))


def _cell(module: nn.RNNCellBase) -> Iterator[OwnWeight]:
    yield OwnWeight("Linear", "weight_ih", "bias_ih")
    yield OwnWeight("Linear", "weight_hh", "bias_hh")


MODULE_WEIGHTS: dict[type[nn.Module], Callable[[Any], Iterator[OwnWeight]]] = {
    **{kind: _one(name) for kind, name in WEIGHT_MODULES.items()},
    nn.EmbeddingBag: _one("Embedding"),
    nn.Bilinear: _one("Product"),
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
}
"""Type of module, subclasses included, to the weights that calls of its code apply."""


def public_names(kind: type[nn.Module]) -> list[str]:
    """Return the name of a type in ``torch.nn``, or of what inherits from it if it is abstract."""
    kinds = kind.__subclasses__() if kind.__name__.endswith("Base") else [kind]
    return [one.__name__ for one in kinds if vars(nn).get(one.__name__) is one]


def own_weights(module: nn.Module) -> list[OwnWeight]:
    """Return the weights that are parameters of a module itself; its children have their own."""
    return [own for own in _weights(module) if module._parameters.get(own.weight) is not None]


def computed_weights(module: nn.Module) -> list[OwnWeight]:
    """Return the weights that a module computes, as by a parametrization or by pruning."""
    return [own for own in _weights(module) if computing(module, own.weight)]


def _weights(module: nn.Module) -> Iterator[OwnWeight]:
    """Yield what may be weights of a module, with the biases that are parameters."""
    known = [kind for kind in type(module).__mro__ if kind in MODULE_WEIGHTS]
    for own in MODULE_WEIGHTS[known[0]](module) if known else ():
        has_bias = module._parameters.get(own.bias or "") is not None
        yield own if has_bias else own._replace(bias=None)


def reason_against(module: nn.Module) -> str:
    """Return why the weights of a module cannot respond; empty if they can."""
    if any(p is not None and p.dtype.is_complex for p in module._parameters.values()):
        return "has complex weights"
    table = module if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None
    if table is not None and (table.sparse or table.max_norm is not None):
        return "is an embedding with sparse gradients or max_norm"
    return ""
