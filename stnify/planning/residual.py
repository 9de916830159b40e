"""Find the residual branches of a traced model: what an addition adds to a skip."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stnify.planning.computed import parameters_behind
from stnify.planning.functions import COMPOSITE_FUNCTIONS, DIRECT_FUNCTIONS
from stnify.products import MULTIPLICATIONS
from stnify.trace import Traced, caller
from stnify.trace.tracer import DROPOUTS, NORMALIZATIONS

ADDITIONS: set[Callable[..., Any] | str] = {operator.add, operator.iadd, torch.add, "add", "add_"}
"""Functions, and names of methods, that add two tensors."""

WEIGHTED_FUNCTIONS = {*DIRECT_FUNCTIONS, *COMPOSITE_FUNCTIONS, *MULTIPLICATIONS}
"""Functions that apply a weight, if they are given one."""

ABOUT = {
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "ndimension",
    "is_floating_point",
    "type",
} | {
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
}
"""Methods whose result does not depend on a tensor's elements."""

LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, len}
"""Functions whose result does not depend on a tensor's elements."""

VALUES = {"T", "mT", "H", "mH", "data", "real", "imag"}
"""Attributes whose value depends on a tensor's elements; others are shapes, types and the like."""

PARTS: set[Callable[..., Any] | str] = {
    torch.chunk,
    torch.split,
    torch.tensor_split,
    torch.unbind,
    "chunk",
    "split",
    "tensor_split",
    "unbind",
}
"""Functions, and names of methods, that return parts of a tensor."""

REARRANGEMENTS: set[Callable[..., Any] | str] = {
    operator.getitem,
    torch.flatten,
    torch.permute,
    torch.reshape,
    torch.squeeze,
    torch.transpose,
    torch.unflatten,
    torch.unsqueeze,
    "contiguous",
    "flatten",
    "permute",
    "reshape",
    "squeeze",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
}
"""Functions, and names of methods, that move elements."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that are one convolution."""

CONVOLUTION_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d}
"""Functions that are one convolution."""

ENLARGING = (
    nn.Upsample,
    nn.PixelShuffle,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules that raise the resolution."""

ENLARGING_FUNCTIONS = {
    F.interpolate,
    F.pixel_shuffle,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}
"""Functions that raise the resolution."""


@dataclass(frozen=True)
class ResidualBranch:
    """One operand of an addition that computes what is added to the other, the skip.

    Attributes:
        name: Qualified name of what the module that adds calls last on the branch, e.g.
            ``blocks.3.attn``; unique, if need be by a number.
        node: The branch's value; dropping it leaves the skip.
        addition: The node that adds it.
    """

    name: str
    node: str
    addition: str


def residual_branches(model: nn.Module, traced: Traced) -> list[ResidualBranch]:
    """Return the residual branches of ``model``, in the order of its additions.

    Both operands of a residual addition come from one value, the *fork*. The skip is the fork
    itself, or at most one weight away from it (a downsample); the branch applies more weights one
    after another than the skip, or computes with a parameter at least (pooling with a layer scale),
    and depends on no other activation than the fork. Masks and positions, which no weight has
    touched, are no activations. Several branches may be added to one skip; each is one.

    Not residual are additions

    * of parameters (positions, biases), and of equally heavy paths (parallel branches);
    * of a bare convolution or norm (positional or reparameterised convolutions);
    * of different parts of the fork;
    * around other residual additions (feature pyramids, U-Nets, skips around stages);
    * of what one module made and another enlarges (the innermost level of a U-Net);
    * inside an opaque module, which the graph does not show.

    Args:
        model: The model that was traced.
        traced: Its graph.
    """
    found = list(_Additions(model, traced.graph).branches())
    counts, seen = Counter(branch.name for branch in found), Counter[str]()
    unique: list[ResidualBranch] = []
    for branch in found:
        number = seen[branch.name]
        seen[branch.name] += 1
        repeated = counts[branch.name] > 1
        unique.append(replace(branch, name=f"{branch.name}:{number}") if repeated else branch)
    return unique


class _Additions:
    """The additions of a graph, told apart.

    Sets of nodes are integers, with one bit for each node in the order of the graph.

    Args:
        model: The model that was traced.
        graph: Its graph.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.inputs: list[int] = []  # activations each node computes with
        self.ancestors: list[int] = []  # those behind each activation, itself included
        self.parametric = self.weighted = self.plain = self.enlarging = 0
        for i, node in enumerate(self.nodes):
            self._read(i, node)
        self.residual = 0
        self.skips: dict[int, int] = {}

    def branches(self) -> Iterator[ResidualBranch]:
        """Yield every residual branch."""
        for i, node in enumerate(self.nodes):
            operands = self._operands(node)
            chosen = operands and self._branch(i, *operands)
            if chosen:
                branch, skip, fork = chosen
                self.skips[i] = skip
                self.residual |= 1 << i
                for addition, term in self._terms(i, branch, fork):
                    yield ResidualBranch(
                        self._name(addition, term, fork),
                        self.nodes[term].name,
                        self.nodes[addition].name,
                    )

    def _read(self, i: int, node: fx.Node) -> None:
        """Note what a node computes with, and of which sort it is."""
        sources = [self.index[n] for n in node.all_input_nodes]
        sources = [j for j in sources if self.ancestors[j]]
        carries = node.op == "placeholder" or (bool(sources) and not _is_about(node))
        self.inputs.append(sum(1 << j for j in sources) if carries else 0)
        self.ancestors.append(1 << i if carries else 0)
        if not carries:
            return
        for j in sources:
            self.ancestors[i] |= self.ancestors[j]
        parameters = self._parameters(node)
        applied = node.op == "call_module" or _function(node) in WEIGHTED_FUNCTIONS
        module = self._module(node)
        function = _function(node)
        self.parametric |= bool(parameters) << i
        self.weighted |= (applied and any(p.ndim >= 2 for p in parameters)) << i
        self.enlarging |= (isinstance(module, ENLARGING) or function in ENLARGING_FUNCTIONS) << i
        self.plain |= (_is_plain(module) or node.target in REARRANGEMENTS) << i

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """Return the parameters of the module a node calls, or behind a function's arguments."""
        module = self._module(node)
        if module is not None:
            return list(module.parameters())
        others = [n for n in node.all_input_nodes if not self.ancestors[self.index[n]]]
        found = [parameters_behind(self.model, other) or {} for other in others]
        return [parameter for behind in found for parameter in behind.values()]

    def _operands(self, node: fx.Node) -> tuple[int, int] | None:
        """Return the two activations a node adds."""
        if node.op not in {"call_function", "call_method"} or node.target not in ADDITIONS:
            return None
        given = [*node.args, *node.kwargs.values()]
        found = [self.index[a] for a in given if isinstance(a, fx.Node)]
        if len(found) != 2 or not all(self.ancestors[i] for i in found):
            return None
        return found[0], found[1]

    def _branch(self, addition: int, one: int, other: int) -> tuple[int, int, int] | None:
        """Return which of two operands is a branch, the skip, and the fork of both."""
        for branch, skip in self._pairs(one, other):
            common = self.ancestors[branch] & self.ancestors[skip]
            fork = common.bit_length() - 1
            if common and self._is_branch(addition, fork, branch, skip):
                return branch, skip, fork
        return None

    def _pairs(self, one: int, other: int) -> Iterator[tuple[int, int]]:
        """Yield what may be branch and skip, the skip also without what was added to it before."""
        yield from ((other, one), (one, other))
        for branch, added in ((other, one), (one, other)):
            skip = added
            while skip in self.skips:
                skip = self.skips[skip]
                yield branch, skip

    def _is_branch(self, addition: int, fork: int, branch: int, skip: int) -> bool:
        if self.nodes[fork].target in PARTS:
            return False
        path, beside = self._path(fork, branch), self._path(fork, skip)
        if path is None or beside is None or (path | beside) & self.residual:
            return False
        depth, others = self._depth(path), (beside & self.weighted).bit_count()
        if depth == others == 0 and path & self.parametric:  # such as pooling with a layer scale
            idle = self.plain | self.parametric
            depth, others = (path & ~idle).bit_count(), (beside & ~idle).bit_count()
        heavier = depth > others <= 1
        return heavier and not (self._is_bare(path) or self._is_level(addition, path, beside))

    def _depth(self, path: int) -> int:
        """Return how many weights are applied one after another, at most."""
        depths: dict[int, int] = {}
        for i in _members(path):
            before = [depths[j] for j in _members(self.inputs[i] & path)]
            depths[i] = max(before, default=0) + (self.weighted >> i & 1)
        return max(depths.values(), default=0)

    def _path(self, fork: int, end: int) -> int | None:
        """Return what depends on ``fork``, up to ``end``; None if it uses another activation."""
        path = used = 0
        for i in _members(self.ancestors[end] & ~self.ancestors[fork]):
            if self.ancestors[i] >> fork & 1:
                path |= 1 << i
                used |= self.inputs[i]
        others = _members(used & ~path & ~(1 << fork))
        return None if any(self.ancestors[i] & self.weighted for i in others) else path

    def _is_bare(self, path: int) -> bool:
        """Whether a path is one convolution or none, and otherwise normalises or rearranges."""
        computing = [self.nodes[i] for i in _members(path & ~self.plain)]
        return len(computing) < 2 and all(
            isinstance(self._module(node), CONVOLUTIONS) or _function(node) in CONVOLUTION_FUNCTIONS
            for node in computing
        )

    def _is_level(self, addition: int, path: int, beside: int) -> bool:
        """Whether a path enlarges what was made in another module than the one that enlarges."""
        if beside & self.enlarging:
            return False
        for i in _members(path & self.enlarging):
            before = path & self.ancestors[i] & self.weighted & ~(1 << i)
            places = {self._called(addition, j) for j in _members(before)}
            if places - {self._called(addition, i)}:
                return True
        return False

    def _terms(self, addition: int, branch: int, fork: int) -> Iterator[tuple[int, int]]:
        """Yield additions and the operand each adds; two where a branch is the sum of two."""
        operands = self._operands(self.nodes[branch])
        if operands and list(self.nodes[branch].users) == [self.nodes[addition]]:
            paths = [self.ancestors[i] & ~self.ancestors[fork] for i in operands]
            apart = not paths[0] & paths[1] & self.weighted
            if apart and all(self._depth(path) > 1 for path in paths):
                for operand in operands:
                    yield from self._terms(branch, operand, fork)
                return
        yield addition, branch

    def _name(self, addition: int, branch: int, fork: int) -> str:
        """Name a branch by the last module with weights, or parameters, that its adder calls."""
        path = self.ancestors[branch] & ~self.ancestors[fork]
        last = path & self.weighted or path & self.parametric
        return self._called(addition, last.bit_length() - 1)

    def _called(self, addition: int, i: int) -> str:
        """Return what the module that adds called, so that node ``i`` was made."""
        node = self.nodes[i]
        for called, other in zip_longest(_stack(node), _stack(self.nodes[addition])):
            if called is not None and called != other:
                return called
        function = getattr(node.target, "__name__", str(node.target))
        return ".".join(filter(None, (caller(node), function)))


def _members(nodes: int) -> Iterator[int]:
    while nodes:
        lowest = nodes & -nodes
        yield lowest.bit_length() - 1
        nodes ^= lowest


def _function(node: fx.Node) -> Any:
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" else None


def _is_about(node: fx.Node) -> bool:
    """Whether a node's value does not depend on the elements of its inputs."""
    if node.op == "call_method":
        return node.target in ABOUT
    if node.target is getattr:
        return node.args[1] not in VALUES
    return node.op == "call_function" and node.target in LIKE


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a module only normalises, or does nothing once noise is off."""
    inside = () if module is None else list(module.children())
    kinds = (*NORMALIZATIONS, *DROPOUTS, nn.Identity)
    return isinstance(module, kinds) and all(isinstance(child, nn.Identity) for child in inside)


def _stack(node: fx.Node) -> list[str]:
    """Return the qualified names of the modules being called when a node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    return [name for name, _ in stack.values()]
