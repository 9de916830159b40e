"""Calls of functions on parameters, and on weights computed from parameters."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from stnify.layers import OPERATOR_ARGUMENTS
from stnify.plan import Refusal, WeightSite
from stnify.planning.computed import calls_whole, evaluate, main_part, parameters_behind
from stnify.planning.modules import GATED_AXIS, own_weights
from stnify.products import MULTIPLICATIONS, gated_axis, multiplication, product
from stnify.trace import Traced, caller

DIRECT_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.linear: "Linear",
    F.conv1d: "Conv1d",
    F.conv2d: "Conv2d",
    F.conv3d: "Conv3d",
    F.conv_transpose1d: "ConvTranspose1d",
    F.conv_transpose2d: "ConvTranspose2d",
    F.conv_transpose3d: "ConvTranspose3d",
}
"""Functions a hyper layer replaces: ``(input, weight, bias, geometry...)``."""

_ATTENTION = list(inspect.signature(F.multi_head_attention_forward).parameters)
_BAG = list(inspect.signature(F.embedding_bag).parameters)
COMPOSITE_FUNCTIONS: dict[
    Callable[..., Any], tuple[Sequence[str], Mapping[str, tuple[str, str | None]]]
] = {
    F.embedding: (("input", "weight"), {"weight": ("Embedding", None)}),
    F.embedding_bag: (_BAG, {"weight": ("Embedding", None)}),
    F.bilinear: (("input1", "input2", "weight", "bias"), {"weight": ("Product", "bias")}),
    F.multi_head_attention_forward: (
        _ATTENTION,
        {
            "in_proj_weight": ("Linear", "in_proj_bias"),
            "out_proj_weight": ("Linear", "out_proj_bias"),
            "q_proj_weight": ("Linear", None),
            "k_proj_weight": ("Linear", None),
            "v_proj_weight": ("Linear", None),
        },
    ),
}
"""Functions that run as they are, watched: their arguments' names, which are weights, of which
kind, and the bias that goes with each."""

_TRANSPOSES = {"t", "transpose", "swapaxes", "swapdims"}


class FunctionSites:
    """Finds the sites in calls of functions.

    Args:
        model: The traced model.
        traced: Its graph.
    """

    def __init__(self, model: nn.Module, traced: Traced) -> None:
        self.model = model
        self.traced = traced
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._firsts: dict[str, str] = {}
        self._computations: dict[fx.Node, str] = {}

    def find(self, node: fx.Node) -> Iterator[WeightSite | Refusal]:
        """Yield what a node that is no call of a module does with weights."""
        function = _function(node)
        if function in DIRECT_FUNCTIONS:
            yield from self._direct(node)
        elif function in MULTIPLICATIONS:
            yield from self._multiplication(node, function)
        elif function in COMPOSITE_FUNCTIONS:
            yield from self._composite(node, *COMPOSITE_FUNCTIONS[function])
        elif node.op == "call_function":
            yield from self._whole(node)

    def renamed(self, site: WeightSite, module: nn.Module) -> WeightSite:
        """Return a site found in a module by itself, with the names of the whole model."""
        parameters = dict(module.named_parameters())
        weight, bias = self.names[id(parameters[site.weight])], None
        if site.bias is not None:
            bias = self.names[id(parameters[site.bias])]
        return replace(
            site,
            name=weight.rpartition(".")[0],
            weight=weight,
            bias=bias,
            value=None,
            value_bias=None,
        )

    def _direct(self, node: fx.Node) -> Iterator[WeightSite | Refusal]:
        assert callable(node.target)
        names = OPERATOR_ARGUMENTS[node.target]
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        weight, bias = arguments.get("weight"), arguments.get("bias")
        kind, groups = DIRECT_FUNCTIONS[node.target], arguments.get("groups", 1)
        groups = groups if isinstance(groups, int) else 1
        if parameters_behind(self.model, weight) is not None:
            yield self._site(node, node.name, kind, weight, bias, groups=groups)

    def _multiplication(
        self, node: fx.Node, function: Callable[..., Any]
    ) -> Iterator[WeightSite | Refusal]:
        found = multiplication(function, node.args, dict(node.kwargs))
        if found is None:
            return
        behind = [parameters_behind(self.model, operand) for operand in found.operands]
        places = [i for i, parameters in enumerate(behind) if parameters]
        if len(places) != 1 or not any(parameters is None for parameters in behind):
            return
        value = found.operands[places[0]]
        direct, transposed = self._untransposed(value)
        shape = self._shape(direct)
        if len(shape) < 2:
            return
        dims = [len(shape)] * len(found.operands)  # of the others only their own letters matter
        if found.equation is not None:
            terms = found.equation.partition("->")[0].split(",")
            if "..." in terms[places[0]]:
                return
            dims = [len(term.replace("...", "")) for term in terms]
        named = product(found, dims, places[0])
        named = named.transposed() if transposed else named
        yield self._site(
            node,
            node.name,
            "Product",
            direct,
            None,
            axis=gated_axis(named, shape),
            value=value,
            transposed=transposed,
        )

    def _composite(
        self,
        node: fx.Node,
        names: Sequence[str],
        weights: Mapping[str, tuple[str, str | None]],
    ) -> Iterator[WeightSite | Refusal]:
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        for name, (kind, bias) in weights.items():
            value = arguments.get(name)
            if isinstance(value, fx.Node) and parameters_behind(self.model, value):
                of_bias = arguments.get(bias) if bias else None
                yield self._site(node, f"{node.name}:{name}", kind, value, of_bias, value=value)

    def _whole(self, node: fx.Node) -> Iterator[WeightSite | Refusal]:
        """Yield the weights of known modules that a function receives, with their biases."""
        if not calls_whole(node):
            return
        given = {str(n.target): n for n in node.all_input_nodes if n.op == "get_attr"}
        for name, value in given.items():
            owner, _, attribute = name.rpartition(".")
            for own in own_weights(self.model.get_submodule(owner)):
                if own.weight == attribute:
                    bias = given.get(f"{owner}.{own.bias}".lstrip("."))
                    key = f"{node.name}:{name}"
                    yield self._site(node, key, own.kind, value, bias, value=value)

    def _site(
        self,
        node: fx.Node,
        key: str,
        kind: str,
        weight: object,
        bias: object,
        *,
        axis: int | None = None,
        groups: int = 1,
        value: fx.Node | None = None,
        transposed: bool = False,
    ) -> WeightSite | Refusal:
        user = caller(node) or "(root)"
        behind = parameters_behind(self.model, weight)
        if not behind or not isinstance(weight, fx.Node):
            return Refusal(user, f"calls {_name(node)} with a weight that is no parameter")
        parameter = main_part(behind.values())
        name, of_bias = self.names[id(parameter)], self._parameter(bias)
        computed = None if self._parameter(weight) is not None else self._shape(weight)
        shape = computed or tuple(parameter.shape)
        axis = GATED_AXIS.get(kind, 0) if axis is None else axis
        site = WeightSite(
            name=name.rpartition(".")[0],
            kind=kind,
            way="function",
            node=key,
            weight=name,
            bias=None if of_bias is None else self.names[id(of_bias)],
            weight_responds=parameter.requires_grad,
            bias_responds=of_bias is not None and of_bias.requires_grad,
            axis=axis,
            units=shape[axis] * (groups if kind.startswith("ConvTranspose") else 1),
            computed=computed,
            computed_by=self._first(weight) if computed else None,
            value=None if value is None else value.name,
            value_bias=bias.name if isinstance(bias, fx.Node) else None,
            transposed=transposed,
        )
        if not (site.weight_responds or site.bias_responds):
            return Refusal(name, "frozen (requires_grad=False)")
        return site

    def _first(self, node: fx.Node) -> str:
        """Return the first node that computes what this one does, as a layer called twice has."""
        if node not in self._computations:
            args, kwargs = map_arg((node.args, node.kwargs), self._first)
            computation = f"{node.op} {node.target} {args} {kwargs}"
            self._computations[node] = self._firsts.setdefault(computation, node.name)
        return self._computations[node]

    def _untransposed(self, value: Any) -> tuple[Any, bool]:
        """Return the parameter whose transpose ``value`` is, if it is one."""
        if not isinstance(value, fx.Node) or not value.args:
            return value, False
        source = value.args[0]
        attribute = value.op == "call_function" and value.target is getattr
        called = value.op == "call_method" and value.target in _TRANSPOSES
        named = (attribute and value.args[1] in {"T", "mT"}) or called
        parameter = self._parameter(source)
        swaps = set(value.args[1:]) in ({0, 1}, {-1, -2}, set()) or attribute
        if named and swaps and parameter is not None and parameter.ndim == 2:
            return source, True
        return value, False

    def _shape(self, value: fx.Node) -> tuple[int, ...]:
        parameter = self._parameter(value)
        if parameter is not None:
            return tuple(parameter.shape)
        found = evaluate(self.model, value, self.traced.constants)
        return tuple(found.shape) if isinstance(found, Tensor) else ()

    def _parameter(self, value: object) -> nn.Parameter | None:
        """Return the parameter a node reads, if it does nothing else."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, attribute = str(value.target).rpartition(".")
        return self.model.get_submodule(path)._parameters.get(attribute)


def _function(node: fx.Node) -> Any:
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" else None


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
