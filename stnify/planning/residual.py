"""Find the residual branches of a traced model: what an addition adds to a skip."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from stnify.planning.computed import parameters_behind
from stnify.planning.functions import COMPOSITE_FUNCTIONS, DIRECT_FUNCTIONS
from stnify.products import MULTIPLICATIONS
from stnify.trace import Traced

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
    itself, or at most one weight away from it (a downsample); the branch holds more weights than
    the skip and depends on no other activation than the fork. Masks and positions, which no weight
    has touched, are no activations.

    Not residual are: additions of equally heavy paths (parallel branches); additions of parameters
    (positions, biases); additions around other residual additions (feature pyramids, U-Nets, skips
    around stages); whatever an opaque module adds inside. Several branches may be added to one
    skip: each is one.

    Args:
        model: The model that was traced.
        traced: Its graph.
    """
    found = list(_Additions(model, traced.graph).branches())
    counts, seen = Counter(branch.name for branch in found), Counter[str]()
    unique = []
    for branch in found:
        name = branch.name
        if counts[name] > 1:
            branch = replace(branch, name=f"{name}:{seen[name]}")
        seen[name] += 1
        unique.append(branch)
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
        self.inputs: list[int] = []
        self.ancestors: list[int] = []
        self.weighted = 0
        for i, node in enumerate(self.nodes):
            self._read(i, node)
        self.residual = 0
        self.skips: dict[int, int] = {}

    def branches(self) -> Iterator[ResidualBranch]:
        """Yield every residual branch."""
        for i, node in enumerate(self.nodes):
            operands = self._operands(node)
            if operands is None:
                continue
            chosen = self._branch(*operands)
            if chosen is None:
                continue
            branch, skip = chosen
            self.residual |= 1 << i
            self.skips[i] = skip
            yield ResidualBranch(self._name(branch, i), self.nodes[branch].name, node.name)

    def _read(self, i: int, node: fx.Node) -> None:
        """Note where a node's value comes from, and whether a weight is applied to it."""
        sources = [self.index[n] for n in node.all_input_nodes]
        sources = [j for j in sources if self.ancestors[j]]
        carries = node.op == "placeholder" or (bool(sources) and not _is_about(node))
        self.inputs.append(sum(1 << j for j in sources) if carries else 0)
        self.ancestors.append(1 << i if carries else 0)
        if carries:
            for j in sources:
                self.ancestors[i] |= self.ancestors[j]
            if self._applies_weight(node):
                self.weighted |= 1 << i

    def _applies_weight(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return any(parameter.ndim >= 2 for parameter in module.parameters())
        if node.op == "placeholder" or _function(node) not in WEIGHTED_FUNCTIONS:
            return False
        return any(
            parameter.ndim >= 2
            for source in node.all_input_nodes
            for parameter in (parameters_behind(self.model, source) or {}).values()
        )

    def _operands(self, node: fx.Node) -> tuple[int, int] | None:
        """Return the two activations a node adds."""
        if node.op not in {"call_function", "call_method"} or node.target not in ADDITIONS:
            return None
        given = [*node.args, *node.kwargs.values()]
        found = [self.index[a] for a in given if isinstance(a, fx.Node)]
        if len(found) != 2 or not all(self.ancestors[i] for i in found):
            return None
        return found[0], found[1]

    def _branch(self, one: int, other: int) -> tuple[int, int] | None:
        """Return which of two operands is a branch, and the skip."""
        for branch, skip in ((other, one), (one, other)):
            if self._is_branch(branch, skip):
                return branch, skip
        for branch, added in ((other, one), (one, other)):
            skip = added
            while skip in self.skips:
                skip = self.skips[skip]
                if self._is_branch(branch, skip):
                    return branch, skip
        return None

    def _is_branch(self, branch: int, skip: int) -> bool:
        common = self.ancestors[branch] & self.ancestors[skip]
        if not common or branch == skip:
            return False
        fork = common.bit_length() - 1
        on_branch = self._path(fork, branch)
        on_skip = self._path(fork, skip)
        if on_branch is None or on_skip is None:
            return False
        heavy, light = on_branch & self.weighted, on_skip & self.weighted
        if light.bit_count() > 1 or heavy.bit_count() <= light.bit_count():
            return False
        return not (on_branch | on_skip) & self.residual

    def _path(self, fork: int, end: int) -> int | None:
        """Return the nodes after ``fork`` up to ``end``; None if they use another activation."""
        path = self.ancestors[end] & ~self.ancestors[fork]
        used = 0
        for i in _members(path):
            used |= self.inputs[i]
        others = used & ~path & ~(1 << fork)
        if any(self.ancestors[i] & self.weighted for i in _members(others)):
            return None
        return path

    def _name(self, branch: int, addition: int) -> str:
        """Name a branch by what the module that adds called last, of all that holds weights."""
        adding = _stack(self.nodes[addition])
        last = (self.ancestors[branch] & self.weighted).bit_length() - 1
        called = _stack(self.nodes[last])
        depth = 0
        while depth < min(len(adding), len(called)) and adding[depth] == called[depth]:
            depth += 1
        return called[depth] if depth < len(called) else (called[-1] if called else "")


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


def _stack(node: fx.Node) -> list[str]:
    """Return the qualified names of the modules being called when a node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    return [name for name, _ in stack.values()]
