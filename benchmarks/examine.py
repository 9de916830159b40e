"""Examine one converted model: what responds, what is exact, whose rows are whose.

Nothing here looks at how stnify finds weights: they are found anew, by watching which parameters
the model's own forward multiplies with activations.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.structures import Built
from stnify import STN, WeightDecay, stnify
from stnify.objective import Objective
from stnify.step import response_step
from stnify.tunable import evaluating, pass_inputs
from stnify.verify import verify

BATCH = 3
LARGE = 150_000_000
"""Parameters beyond which the response is made of gates only, to save memory."""

Row = dict[str, Any]


def examine(built: Built) -> Iterator[tuple[str, Row]]:
    """Yield the name of each stage as it begins, and afterwards what it found."""
    torch.manual_seed(0)
    model, row = built.model, Row()
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(parameters.values())
    row.update(parameters=total, response="gate" if total > LARGE else "full")
    yield "weights", row
    found = multiplied(model.train(), built.train_call(2))
    row["without_activations"] = "; ".join(f"{n}: {parameters[n]}" for n in sorted(found.others))
    yield "convert", row
    start = time.process_time()
    stn = stnify(model.train(), [WeightDecay()], response=row["response"], seed=0)
    row["convert_s"] = round(time.process_time() - start, 3)
    row.update(coverage(stn, found.weights, parameters))
    yield "verify", row
    start = time.process_time()
    words = verify(stn.model, built.call(BATCH), {})
    row["verify_s"] = round(time.process_time() - start, 3)
    row.update(shared(stn, words))
    yield "exact", row
    open_gates(stn)
    row.update(exactness(stn, built.call))
    yield "rows", row
    row.update(independence(stn, built.call(BATCH), words))
    yield "train", row
    row["exact_train"] = train_exactness(stn, built.train_call(BATCH))
    yield "response", row
    row.update(response_pass(stn, built.train_call(BATCH)))
    yield "done", row


SOUND_ROWS = (
    "independent",
    "mixed by the model itself",
    "one perturbation for the batch",
    "nothing detected",
)


def judged(row: Row) -> Row:
    """Return whether a finished row is fine, and if not, why not."""
    wrong = [name for name in ("exact", "exact_train", "finite") if not row[name]]
    if row["exact_zero"] == "False":
        wrong.append("exact_zero")
    if row["rows"] not in SOUND_ROWS:
        wrong.append(f"rows {row['rows']}")
    return {"status": "wrong" if wrong else "fine", "reason": ", ".join(wrong)}


# What responds ------------------------------------------------------------------------------------

CONVOLUTIONS: tuple[Callable[..., Any], ...] = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
WITH_WEIGHT: dict[Callable[..., Any], tuple[int, str]] = {
    F.linear: (1, "weight"),
    F.bilinear: (2, "weight"),
    **dict.fromkeys(CONVOLUTIONS, (1, "weight")),
}
"""Functions of activations and a weight: which argument the weight is."""

PRODUCTS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm),
    *(torch.mv, Tensor.mv, torch.einsum, torch.tensordot),
)
"""Functions in which a weight is whatever comes from parameters alone and meets activations."""

WHOLE = (
    F.multi_head_attention_forward,
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
)
"""Functions all of whose matrices are weights."""

BLANK = (
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
)
"""Functions that use no number of the tensor they receive."""

FITTED = (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)
"""Functions that use the numbers of their first tensor only."""

READS = (
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
)
"""Functions that give a tensor's numbers to Python."""


class Multiplied(NamedTuple):
    """Parameters of two or more dimensions, by name, that a forward multiplies.

    Attributes:
        weights: With activations, or in a layer's function: what coverage is a share of.
        others: With constants and other parameters only.
    """

    weights: set[str]
    others: set[str]


class _Watch(TorchFunctionMode):
    """Follows what is known without the model's inputs to where it meets what is not: activations.

    Known are parameters, buffers, tensors made from nothing, such as positions, and whatever is
    computed from these alone. Sizes of inputs are known, their numbers are not: once a number of an
    activation has been given to Python, what is made from nothing counts as an activation, and so
    does all memory an activation is written to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = dict(model.named_parameters())
        self.matrices = {name for name, p in named.items() if p.ndim >= 2}
        self.vectors = {n for n, p in named.items() if p.numel() == max(p.shape, default=1)}
        # By memory, which views share; what is known stays alive, else its memory might be reused.
        self.behind: dict[int, frozenset[str]] = {}
        self.kept: list[Tensor] = []
        self.numbers_read = False
        self.weights: set[str] = set()
        self.others: set[str] = set()
        for buffer in model.buffers():
            self._learn(buffer, frozenset())
        for name, parameter in named.items():
            self._learn(parameter, frozenset({name}))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        used = [] if func in BLANK else inputs[:1] if func in FITTED else inputs
        known = all(map(self._known, used)) and bool(used or not self.numbers_read)
        if func in WITH_WEIGHT:
            place, name = WITH_WEIGHT[func]
            self.weights |= self._matrices([args[place] if len(args) > place else kwargs[name]])
        elif func in WHOLE or (func in PRODUCTS and not known):
            self.weights |= self._matrices(inputs)
        elif func in PRODUCTS:
            self.others |= self._matrices(inputs)
        elif func in READS:
            self.numbers_read |= not known
        versions = [tensor._version for tensor in inputs]
        outputs = func(*args, **kwargs)
        pairs = zip(inputs, versions, strict=True)
        written = [tensor for tensor, version in pairs if tensor._version != version]
        if known:
            origins = frozenset[str]().union(*(self.behind[_memory(tensor)] for tensor in used))
            for tensor in [*_tensors(outputs), *written]:
                self._learn(tensor, origins)
        else:
            for tensor in written:
                self.behind.pop(_memory(tensor), None)
        return outputs

    def _learn(self, tensor: Tensor, origins: frozenset[str]) -> None:
        memory = _memory(tensor)
        self.behind[memory] = self.behind.get(memory, frozenset()) | origins
        self.kept.append(tensor)

    def _known(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self.behind

    def _matrices(self, tensors: Iterable[Tensor]) -> set[str]:
        found = set[str]()
        for tensor in filter(self._known, tensors):
            behind = self.behind[_memory(tensor)]
            # A column that scales a computed weight is no weight itself.
            found |= (behind & self.matrices) - (self.vectors if len(behind) > 1 else set())
        return found


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def multiplied(model: nn.Module, args: tuple[Any, ...]) -> Multiplied:
    """Return which parameters one forward multiplies, and with what.

    A parameter is a weight if one of ``PRODUCTS`` multiplies it with activations, or one of
    ``WITH_WEIGHT`` and ``WHOLE`` with anything: itself, or what is computed from it without the
    inputs. A table whose rows are chosen by a product with constants and then added, as positions
    often are, is no weight.

    In train mode, so that PyTorch's fast paths, which are single calls, stay off.
    """
    with buffers_restored(model), _Watch(model) as watch:
        model(*args)
    return Multiplied(watch.weights, watch.others - watch.weights)


def coverage(stn: STN, weights: set[str], sizes: dict[str, int]) -> Row:
    """Return how the model was traced, and how much of its weights responds."""
    plan, opaque = stn.plan, stn.plan.traced.opaque
    responding = {site.weight for site in plan.weights if site.weight_responds}
    missing = sorted(weights - responding)
    reasons = {r.name: r.reason for r in plan.refusals}

    def reason(name: str) -> str:
        owners = [other for other in reasons if name == other or name.startswith(f"{other}.")]
        return reasons[max(owners, key=len)] if owners else "no reason given"

    weighty = sum(sizes[name] for name in weights)
    covered = sum(sizes[name] for name in weights & responding)
    return {
        "way": "whole" if "" in opaque else "leaves" if opaque else "graph",
        "untraced": "; ".join(f"{name or '(root)'}: {why}" for name, why in opaque.items()),
        "sites": len(plan.weights),
        "swapped": sum(site.way == "swap" for site in plan.weights),
        "weights": len(weights),
        "weight_parameters": weighty,
        "covered_parameters": covered,
        "share": round(covered / weighty, 6) if weighty else 1.0,
        "uncovered": "; ".join(f"{name}: {reason(name)}" for name in missing),
    }


def shared(stn: STN, words: dict[str, str]) -> Row:
    """Return how many layers have one perturbation for the whole batch, and why."""
    found = [word for word in words.values() if word.startswith("shared")]
    return {
        "shared_sites": len(found),
        "shared_because": "; ".join(f"{found.count(w)} {w}" for w in sorted(set(found))),
    }


# What is exact ------------------------------------------------------------------------------------


@torch.no_grad()
def open_gates(stn: STN) -> None:
    """Let every response have an effect: gates start at nought."""
    for parameter in stn.model._stnify.response_parameters().values():
        if not parameter.any():
            parameter.normal_(0, 0.05)


def exactness(stn: STN, call: Callable[[int], tuple[Any, ...]]) -> Row:
    """Return whether the graph in eval mode is the original bit for bit, at two batch sizes.

    With a response input of nought (``exact_zero``) it may be that up to rounding: attention and
    recurrent networks are computed in other steps then.
    """
    found: Row = {"exact": True, "finite_outputs": True}
    zero = set()
    original, graph = stn.model._stnify.original.eval(), stn.model._stnify.graph
    with torch.no_grad(), evaluating(stn.model):
        for batch in (2, BATCH):
            args = call(batch)
            expected = original(*args)
            found["exact"] &= identical(graph(*args), expected)
            nothing = torch.zeros(batch, len(stn.values()))
            zero.add(_closeness(graph(*args, **pass_inputs(nothing)), expected))
            found["finite_outputs"] &= all(bool(t.isfinite().all()) for t in tensors(expected))
    return {**found, "exact_zero": max(zero, key=CLOSENESS.index)}


CLOSENESS = ("True", "rounding", "False")


def _closeness(one: Any, other: Any) -> str:
    if identical(one, other):
        return CLOSENESS[0]
    pairs = list(zip(tensors(one), tensors(other), strict=False))
    close = len(tensors(one)) == len(tensors(other)) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        for a, b in pairs
    )
    return CLOSENESS[1] if close else CLOSENESS[2]


def train_exactness(stn: STN, args: tuple[Any, ...]) -> bool:
    """Return whether train mode gives the original's outputs and buffers, at the same seed."""
    model, runs = stn.model, []
    for run in (model._stnify.original, model):
        model.train()
        with torch.no_grad(), model._stnify.buffers_restored():
            torch.manual_seed(1)
            outputs = run(*args)
            buffers = {n: b.clone() for n, b in model._stnify.original.named_buffers()}
            runs.append((outputs, buffers, torch.get_rng_state()))
    return identical(*runs)


def identical(one: Any, other: Any) -> bool:
    """Whether two nested structures hold the same tensors, bit for bit."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=False))
    same = len(tree_leaves(one)) == len(tree_leaves(other)) and len(pairs) > 0
    return same and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in pairs
    )


def alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether detections are the same up to rounding, which depends on how many there are."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def tensors(outputs: Any) -> list[Tensor]:
    """Return every tensor of real numbers in nested ``outputs``."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what the body does to buffers."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


# Whose rows ---------------------------------------------------------------------------------------


@torch.no_grad()
def independence(stn: STN, args: tuple[Any, ...], words: dict[str, str]) -> Row:
    """Return whether the middle example's perturbation moves its own outputs and no others.

    Layers with one perturbation for the whole batch have none while this is tried.
    """
    kept = [
        (parameter, parameter.clone())
        for name, word in words.items()
        if name.startswith("layers.") and word.startswith("shared")
        for parameter in stn.model._stnify.hyper_layers[name.removeprefix("layers.")].parameters()
    ]
    for parameter, _ in kept:
        parameter.zero_()
    before = torch.randn(BATCH, len(stn.values()))
    after = before.clone()
    after[BATCH // 2] += 1.0
    with evaluating(stn.model):
        one, other = (
            by_example(stn.model._stnify.graph(*args, **pass_inputs(response_input)))
            for response_input in (before, after)
        )
        same = alike if any(isinstance(value, list) for value in args) else identical
        moved = [bool(a) and not same(a, b) for a, b in zip(one, other, strict=True)]
        middle = moved.pop(BATCH // 2)
        if not any(tensor.numel() for values in one for tensor in values):
            found = "nothing detected"
        elif any(moved):
            found = (
                "mixed by the model itself" if _mixes(stn.model._stnify.original, args) else "mixed"
            )
        else:
            everywhere = all(word.startswith("shared") for word in words.values()) and words
            found = "one perturbation for the batch" if everywhere else "dead"
            found = "independent" if middle else found
    for parameter, value in kept:
        parameter.copy_(value)
    return {"rows": found}


@torch.enable_grad()
def _mixes(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether an example's outputs depend on the inputs of others: their gradients are not nought.

    Gradients tell it where the dependence is too weak to show in the outputs' last bit.
    """
    inputs = [t.clone().requires_grad_() for t in args if isinstance(t, Tensor)]
    if len(inputs) < len(args):  # lists of pictures
        return False
    middle = by_example(model(*inputs))[BATCH // 2]
    total = torch.stack([tensor.float().sum() for tensor in middle]).sum()
    gradients = torch.autograd.grad(total, inputs, materialize_grads=True)
    others = [i for i in range(BATCH) if i != BATCH // 2]
    return any(bool(gradient[others].any()) for gradient in gradients)


def by_example(outputs: Any) -> list[list[Tensor]]:
    """Sort the tensors of ``outputs`` by the example they belong to."""
    if isinstance(outputs, list) and len(outputs) == BATCH and isinstance(outputs[0], dict):
        return [tensors(entry) for entry in outputs]
    found = [tensor for tensor in tensors(outputs) if tensor.shape[:1] == (BATCH,)]
    return [[tensor[i] for tensor in found] for i in range(BATCH)]


# The response pass --------------------------------------------------------------------------------


def response_pass(stn: STN, args: tuple[Any, ...]) -> Row:
    """Take the gradient of one response step in train mode."""

    def loss(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        return torch.stack([t.float().square().mean() for t in tensors(model(*batch))]).sum()

    stn.model.train()
    result = response_step(stn.model, [args], Objective(forward_loss=loss))
    gates = [g for name, g in result.gradients.items() if name.endswith("gate")]
    return {
        "finite": result.is_finite,
        "moved": round(sum(bool(g.any()) for g in gates) / max(len(gates), 1), 4),
    }
