"""Assertions that nothing is lost: the original's numbers, its weights, its state."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from stnify.bundle import STN
from stnify.convert import stnify
from stnify.declare import Hyperparameter, declarations
from stnify.export import export, export_folded
from stnify.layers import HyperConv, HyperEmbedding, HyperLinear
from stnify.streams import RandomStream
from stnify.testing.differences import (
    Step,
    distance,
    first_difference,
    first_missing,
    identical,
    record,
    record_functions,
)
from stnify.testing.subject import (
    Criterion,
    Hparams,
    Model,
    Subject,
    copied,
    example,
    idle,
    mean_square,
    prepared,
    tensors,
)
from stnify.tunable import PREFIX, TunableModule

PLAIN_LAYERS: tuple[type[nn.Module], ...] = (HyperLinear, HyperConv, HyperEmbedding)
"""Hyper layers that run the very kernel of the original, also with a response input of zeros."""

COMPOSITES: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.EmbeddingBag,
    nn.TransformerEncoderLayer,
)
"""Modules whose fused kernels are taken apart in perturbed passes."""


# The same numbers ---------------------------------------------------------------------------------


def assert_identity(
    model: Model, inputs: Any, hparams: Hparams = None, *, tolerance: float | None = None
) -> None:
    """Assert that without a response the converted model is the original, bit for bit.

    In eval mode, by ``torch.equal``: the graph without a response input, and with one of zeros.
    Then again after every weight and buffer of the original has moved, which the graph must follow;
    and in train mode, under the same random numbers and with what becomes of its buffers, unless
    noise is tuned or the original fails.
    ``nn.TransformerEncoder`` writes zeros in place of padding where it takes PyTorch's fast path,
    which a perturbed pass cannot take: a response input of zeros is compared with that path off.

    Args:
        model: Any module, or an STN.
        inputs: Of the model.
        hparams: Of the conversion.
        tolerance: Relative error allowed with a response input of zeros; by default none, but
            the root of the dtype's epsilon where fused kernels (``nn.MultiheadAttention``, LSTM...)
            are taken apart, because sums are taken in another order.
    """
    with prepared(model, inputs, hparams) as subject:
        check_identity(subject, tolerance)


def check_identity(subject: Subject, tolerance: float | None = None) -> None:
    """Do what ``assert_identity`` does; the subject's weights have moved afterwards."""
    with subject.mode(training=False), torch.no_grad():
        for when in ("", " after its weights and buffers moved"):
            if when:
                _move(subject.model._stnify.original)
            _check_plain(subject, when)
            _check_zero(subject, when, _tolerance(subject) if tolerance is None else tolerance)
    subject = subject.several()
    with subject.mode(training=True), torch.no_grad():
        _check_general(subject)


def _check_plain(subject: Subject, when: str) -> None:
    difference = _difference(subject.original(), subject.plain())
    if difference:
        _refuse_difference(subject, f"in eval mode{when}", subject.plain, difference)


def _check_general(subject: Subject) -> None:
    """Compare train mode with the original's own; noise that no seed repeats is left out."""
    if subject.tunes_noise:
        return
    twin = subject.twin()
    try:
        expected = subject.call(twin)
    except Exception:  # such inputs are not meant for training
        return
    found = subject.general()
    difference = _difference(expected, found)
    if not difference:
        _check_buffers(subject, twin)
    elif _difference(expected, subject.call(twin)):
        repeated = not _difference(found, subject.general())
        difference = "it repeats what the original draws anew" if repeated else ""
    if difference:
        _refuse_difference(subject, "in train mode", subject.general, difference)


def _check_buffers(subject: Subject, twin: nn.Module) -> None:
    """Compare buffers after a pass in train mode with those of a copy that took one, too."""
    found = dict(subject.model._stnify.original.named_buffers())
    for name, value in twin.named_buffers():
        if not identical(value, found[name]):
            raise AssertionError(
                f"in train mode the graph must change {name!r} of {subject.name} exactly as the "
                f"original does, but it differs by {distance(value, found[name]):.3g}."
            )


def _refuse_difference(
    subject: Subject, when: str, run: Callable[[], Any], difference: str
) -> None:
    """Raise AssertionError, and name the first function whose value the graph lacks."""
    passes = ((subject.model._stnify.original, subject.original), (subject.model, run))
    trails = [record_functions(*each) for each in passes]
    raise AssertionError(
        f"{when} the graph must compute exactly what {subject.name} computes, but {difference}. "
        f"{first_missing(*trails)}"
    )


def _check_zero(subject: Subject, when: str, tolerance: float) -> None:
    with fused_kernels_off():
        _compare_zero(subject, when, tolerance)


def _compare_zero(subject: Subject, when: str, tolerance: float) -> None:
    expected, found = subject.plain(), subject.zero()
    difference = _difference(expected, found)
    if difference and not _relative(tensors(expected), tensors(found)) <= tolerance:
        trails = [record(subject, run) for run in (subject.plain, subject.zero)]
        raise AssertionError(
            f"in eval mode{when} a response input of zeros must change nothing in {subject.name} "
            f"(tolerance {tolerance:.1g}), but {difference}. "
            f"{first_difference(trails, _farther_than(tolerance))}"
        )


@contextmanager
def fused_kernels_off() -> Iterator[None]:
    """Let no module of PyTorch's take its fast path, which writes zeros in place of padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _tolerance(subject: Subject) -> float:
    """Return zero if every layer runs the original's kernel, else what rounding may cost."""
    plain = all(
        type(layer) in PLAIN_LAYERS for layer in subject.model._stnify.hyper_layers.values()
    )
    if plain and not any(
        isinstance(m, COMPOSITES) for m in subject.model._stnify.original.modules()
    ):
        return 0.0
    dtypes = {p.dtype for p in subject.model.parameters() if p.is_floating_point()}
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _move(model: nn.Module) -> None:
    """Change every real parameter and buffer in place, without changing any sign."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor))


def _difference(expected: Any, found: Any) -> str:
    """Return in words how two predictions differ; empty if they do not in any bit."""
    one, form = tree_flatten(expected)
    other, other_form = tree_flatten(found)
    if form != other_form:
        return f"its structure is {other_form}, not {form}"
    pairs = zip(tensors(expected), tensors(found), strict=True)
    sizes = [distance(a, b) for a, b in pairs if not identical(a, b)]
    if sizes:
        return f"the prediction differs by {max(sizes):.3g}"
    plain = [(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, int | float | str)]
    return next((f"it returns {b!r}, not {a!r}" for a, b in plain if a != b), "")


def _relative(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest distance, relative to the largest number where that is above one."""
    return max(
        (
            distance(one, other) / max(1.0, float(one.abs().max()))
            for one, other in zip(expected, found, strict=True)
            if not identical(one, other)
        ),
        default=0.0,
    )


def _farther_than(tolerance: float) -> Callable[[Sequence[Step]], float]:
    def judge(steps: Sequence[Step]) -> float:
        one, other = steps
        error = _relative(one.values, other.values)
        return 0.0 if error <= tolerance else error

    return judge


# The same weights ---------------------------------------------------------------------------------


def assert_export_exact(
    model: Model, inputs: Any, hparams: Hparams = None, *, criterion: Criterion | None = None
) -> None:
    """Assert that what is exported after training is the user's own class with the trained weights.

    One general step is taken first; where no noise was inserted it must move weights and buffers
    exactly as the original's own step would. The export then holds the model's very numbers, shares
    no memory with it, has nothing of stnify inside and predicts, in eval mode, what the model and
    its graph predict: by ``torch.equal``, or closely where ``method="stn"`` folds the response.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        criterion: ``prediction -> scalar`` to train with; the mean square by default.
    """
    with prepared(model, inputs, hparams) as subject:
        subject = subject.several()
        _check_step(subject, criterion or mean_square)
        centred = subject.model._stnify.evaluation_pass is None
        plain = export(subject.model) if centred else export_folded(subject.model)
        _check_class(subject, plain)
        with torch.no_grad(), subject.mode(training=False):
            plain.eval()
            _check_export(subject, plain, centred)


def _check_step(subject: Subject, criterion: Criterion) -> None:
    """Take a general step, and compare it with the original's own."""
    subject.model.train()
    twin = subject.twin()
    _descend(subject.model._stnify.original, criterion(subject.call(subject.model)))
    if subject.tunes_noise:
        return
    _descend(twin, criterion(subject.call(twin)))
    found = dict(_state(subject.model._stnify.original))
    for name, value in _state(twin):
        if not identical(value, found[name]):
            raise AssertionError(
                f"a general step must move {name!r} of {subject.name} exactly as the original's "
                f"own, but it differs by {distance(value, found[name]):.3g}."
            )


def _descend(model: nn.Module, loss: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(0.01 * gradient)


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _check_class(subject: Subject, plain: nn.Module) -> None:
    if type(plain) is not type(subject.model._stnify.original):
        raise AssertionError(
            f"the export must be a {subject.name}, but it is a {type(plain).__name__}."
        )
    for name, module in plain.named_modules():
        if type(module).__module__.startswith("stnify.") and not _testing(module):
            raise AssertionError(
                f"an export must hold nothing of stnify, but {name!r} of {subject.name} is a "
                f"{type(module).__name__}."
            )
    own = {tensor.data_ptr() for _, tensor in _state(subject.model) if tensor.numel()}
    for name, tensor in _state(plain):
        if tensor.numel() and tensor.data_ptr() in own:
            raise AssertionError(
                f"an export must share no memory with the model, as {name!r} does."
            )


def _testing(module: nn.Module) -> bool:
    return type(module).__module__.startswith("stnify.testing.")


def _check_export(subject: Subject, plain: nn.Module, centred: bool) -> None:
    found = subject.call(plain)
    wanted = {"model": subject.call(subject.model)}
    if centred:
        wanted["graph"] = subject.plain()
    for what, expected in wanted.items():
        difference = _difference(expected, found)
        close = _relative(tensors(expected), tensors(found)) <= 1e-3
        if difference and (centred or not close):
            passes = ((plain, lambda: subject.call(plain)), (subject.model, subject.plain))
            trails = [record_functions(*each) for each in passes]
            raise AssertionError(
                f"the export of {subject.name} must predict what its {what} predicts, but "
                f"{difference}. {first_missing(*trails)}"
            )
    if not centred:
        return
    state = subject.model.state_dict()
    for name, value in plain.state_dict().items():
        if isinstance(value, Tensor) and not identical(value, state[name]):
            raise AssertionError(
                f"the export of {subject.name} must hold the trained {name!r}, but it differs by "
                f"{distance(value, state[name]):.3g}."
            )


# The same state -----------------------------------------------------------------------------------


def assert_state_roundtrip(
    model: Model, inputs: Any, hparams: Hparams = None, *, criterion: Criterion | None = None
) -> None:
    """Assert that a saved model or run continues to the same bits.

    The model's ``state_dict`` is saved, loaded with ``weights_only=True`` into a copy whose numbers
    were all changed, and both must then agree in every pass; so must a ``deepcopy`` and a pickle.
    For an ordinary module a whole run is saved after two steps, hyperparameters moving, and
    continued by a fresh conversion.

    Args:
        model: Any module, or an STN.
        inputs: Of the model; a single example is repeated.
        hparams: Of the conversion.
        criterion: ``prediction -> scalar`` to train with; the mean square by default.
    """
    with prepared(model, inputs, hparams) as subject:
        subject = subject.several()
        subject.shared_sites()
        copies = {"deepcopy": copy.deepcopy(subject.model)}
        if _can_be_pickled(subject.model._stnify.original):
            copies["pickle"] = pickle.loads(pickle.dumps(subject.model))
        copies["state_dict"] = _scrambled(subject.model)
        copies["state_dict"].load_state_dict(_through_file(subject.model.state_dict()))
        for way, twin in copies.items():
            _check_twin(subject, replace(subject, model=twin), way)
        if not isinstance(model, STN):
            _check_resume(model, subject, hparams, criterion or mean_square)


def _through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _can_be_pickled(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:  # a module's own, as parametrized ones raise a RuntimeError
        return False
    return True


@torch.no_grad()
def _scrambled(model: TunableModule) -> TunableModule:
    """Return a copy of ``model`` in which every number of its state is another one."""
    twin = copy.deepcopy(model)
    for value in twin.state_dict().values():
        if isinstance(value, Tensor):
            value.copy_(1.5 * value + 1 if value.is_floating_point() else value + 1)
    return twin


def _check_twin(subject: Subject, twin: Subject, way: str) -> None:
    """Compare state, and every pass in eval mode."""
    own, other = subject.model.state_dict(), twin.model.state_dict()
    for name, value in own.items():
        if isinstance(value, Tensor) and not identical(value, other[name]):
            raise AssertionError(
                f"{name!r} of {subject.name} must come back from a {way} as it was, but it differs "
                f"by {distance(value, other[name]):.3g}."
            )
    passes: dict[str, Callable[[Subject], Any]] = {
        "original's": lambda each: each.original(),
        "plain": lambda each: each.plain(),
        "perturbed": lambda each: each.perturbed(each.draw()),
        "linearized": lambda each: each.linearized(each.draw()),
    }
    for name, run in passes.items():
        with torch.no_grad(), subject.mode(training=False), twin.mode(training=False):
            difference = _difference(run(subject), run(twin))
            if difference:
                trails = [record(each, partial(run, each)) for each in (subject, twin)]
                raise AssertionError(
                    f"after a {way} the {name} pass of {subject.name} must be as it was, but "
                    f"{difference}. {first_difference(trails, _farther_than(0.0))}"
                )


def _check_resume(
    model: nn.Module, subject: Subject, hparams: Hparams, criterion: Criterion
) -> None:
    """Interrupt a run after two steps and continue it in another conversion."""
    declared = declarations(idle() if hparams is None else hparams)
    silent = [replace(d, penalty=None) if isinstance(d, Hyperparameter) else d for d in declared]

    def loss(model: Any, batch: Any) -> Tensor:
        for name in model._stnify.space.names if model.training else ():
            model._stnify.space[name]
        return criterion(model(*batch[0], **batch[1]))

    def convert() -> STN:
        private = copied(model).train()
        parameters = [p for p in private.parameters() if p.requires_grad]
        return stnify(
            private,
            silent,
            optimizer=torch.optim.SGD(parameters, 1e-3, momentum=0.9),
            forward_loss=loss,
            valid_loader=[subject.inputs],
            example_inputs=example(subject.inputs),
            train_steps=1,
            warmup_steps=0,
            compile=False,
            seed=0,
        )

    def step(stn: STN, number: int) -> None:
        with RandomStream(number, subject.device()).active():  # the user's own generators
            stn.step(tree_map_only(Tensor, torch.clone, subject.inputs))

    first, second = convert(), convert()
    for number in range(2):
        step(first, number)
    second.load_state_dict(_through_file(first.state_dict()))
    for stn in (first, second):
        step(stn, 2)
    expected, found = first.model.state_dict(), second.model.state_dict()
    for name, value in expected.items():
        if isinstance(value, Tensor) and not identical(value, found[name]):
            where = "the model's own" if not name.startswith(PREFIX) else "stnify's"
            raise AssertionError(
                f"a run of {subject.name} that is resumed must continue to the same bits, but "
                f"{where} {name!r} differs by {distance(value, found[name]):.3g}."
            )
