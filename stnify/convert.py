"""8b. ``stnify()``: all stages in a row, behind checks of what was passed."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from stnify.augment import MIXES, Stats
from stnify.bundle import STN
from stnify.checks import (
    length_of_run,
    refuse_arguments,
    refuse_distributed,
    refuse_empty,
    refuse_model,
)
from stnify.compiled import CompiledForward
from stnify.declare import Hyperparameters, L1Penalty, Pattern, WeightDecay, declarations
from stnify.errors import (
    DeclarationError,
    TraceError,
    UnsupportedModuleError,
    UsageError,
    nearest,
)
from stnify.inventory import doubled, inventory, repeated
from stnify.linearize import Forward, linearized_forward, perturbed_forward
from stnify.loaders import EndlessLoader
from stnify.methods import METHODS, Cadence, Method
from stnify.objective import PASSES, PREDICTIONS, Objective
from stnify.optimizer import MakeOptimizer, STNOptimizer
from stnify.plan import Plan, ResponseKind
from stnify.planning import make_plan
from stnify.response_optimizer import adam
from stnify.rewrite import rewrite
from stnify.schedule import History
from stnify.space import HyperparameterSpace
from stnify.streams import RandomStream
from stnify.targets import has_classes, takes_indices_alone
from stnify.trace import trace
from stnify.tunable import TunableModule
from stnify.tuner import Tuner

HyperOptimizer = Callable[[list[Tensor]], Optimizer]
Jitter = Literal["gaussian", "sinusoid"]

SINUSOID_PERIOD = 1200
"""[STN] F, in training steps. The amplitude is ``scale``, unconstrained units; there it is 0.1."""

ON_CLASSES = {"LabelSmoothing", *PREDICTIONS}
"""Kinds of loss terms that need predictions of classes."""


def stnify(
    model: nn.Module,
    hparams: Hyperparameters,
    *,
    optimizer: Optimizer | None = None,
    criterion: Callable[..., Tensor] | None = None,
    forward_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    train_loader: Iterable[Any] | None = None,
    valid_loader: Iterable[Any] | None = None,
    method: str = "delta",
    response: ResponseKind = "full",
    response_fraction: float | None = None,
    antithetic: bool | None = None,
    response_every: int = 3,
    train_steps: int = 5,
    valid_steps: int = 1,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    epochs: int | None = None,
    scale: float | None = None,
    tune_scale: bool = True,
    entropy_weight: float = 1e-3,
    hyper_optimizer: HyperOptimizer | None = None,
    response_optimizer: MakeOptimizer | None = None,
    response_lr: float | None = None,
    exclude: Pattern = (),
    affine: bool = False,
    leaves: Sequence[str | type[nn.Module]] = (),
    example_inputs: Any = None,
    input_stats: Stats | None = None,
    amp_dtype: torch.dtype | None = None,
    compile: bool | None = None,
    verify: bool = True,
    seed: int | None = None,
    schedule: History | None = None,
    jitter: Jitter | None = None,
) -> STN:
    """Turn ``model`` into one that tunes ``hparams`` by gradients while it trains.

    Args:
        model: Any module; its parameters are shared, not copied.
        hparams: Declarations such as ``Dropout()``, or ``{"dropout": 0.1, "weight_decay": 5e-4}``.
        optimizer: The optimizer of the model's parameters; None to convert only.
        criterion: ``(prediction, target) -> scalar`` for batches ``(inputs, target)``.
        forward_loss: ``(model, batch) -> scalar`` for any other kind of batch.
        train_loader: Comes back in a wrapper that remembers the batches since the last step.
        valid_loader: Held-out data for the validation step, iterated for ever. Without one, call
            ``stn.validation_step(batch)``.
        method: ``"delta"``, ``"centered"``, ``"stn"`` or ``"fixed"``.
        response: ``"full"``, or ``"gate"`` for gates of the general weights alone.
        response_fraction: Leading part of each (shuffled) batch the response step uses; None for
            all of it, or for half of a batch ``(inputs, target)`` whose examples are used twice.
        antithetic: Whether the response step takes each of these examples twice, with opposite
            perturbations under the same noise, at twice the cost; None where a decay is tuned,
            whose effect is small beside the noise that a pair cancels.
        response_every: Training steps for each response step. Shuffle: of batches in a fixed order
            the response may see the same ones each time.
        train_steps: Training steps between validation steps.
        valid_steps: Validation steps each time.
        warmup_steps: Training steps before hyperparameters move; a twentieth of ``total_steps`` if
            that is known, else 100.
        total_steps: Length of the run in training steps; sets the warm-up and lambda's step size.
            Where it is not known, that size is the papers', for runs of 100,000 steps.
        epochs: The same in passes over ``train_loader``, with one training step for each batch.
        scale: Initial perturbation scale sigma, unconstrained units. None lets it follow the value
            where the range has two ends: a fifth of the range, but 2 at most; else it is 1.
        tune_scale: Whether sigma moves by its gradient, where it does not follow the value.
        entropy_weight: tau, which keeps sigma from collapsing.
        hyper_optimizer: ``[lambda, sigma] -> optimizer``; RMSprop by default, learning rate 0.01,
            or so much more that lambda can cross its range in ``total_steps``, 0.1 at most.
        response_optimizer: ``groups -> optimizer`` of the response parameters; Adam by default,
            learning rate 0.003. Their learning rate falls as that of the general parameters does.
        response_lr: Instead of it, the same kind of optimizer as ``optimizer`` with this multiple
            of its learning rate; 1.0 is the papers' ([DeltaSTN] Algorithm 1).
        exclude: Layers that get no response, by pattern or type.
        affine: Whether all other parameters respond as well: scales and shifts of norms,
            LayerScale, class tokens, position tables.
        leaves: Modules not to trace through, by pattern or type.
        example_inputs: Inputs to verify the conversion on at once; a tensor, tuple or dict.
            Optional arguments of the model's forward keep their defaults in training unless they
            are given here.
        input_stats: Mean and standard deviation of each channel that images were normalised with;
            colour augmentations undo and redo it. None for images in [0, 1] or of 8 bits.
        amp_dtype: Autocast dtype of the response and validation steps.
        compile: Compile the passes; None compiles on CUDA. A perturbed pass that does not compile
            as one graph runs eagerly.
        verify: Check the conversion on ``example_inputs`` or the first batch.
        seed: Of stnify's own random numbers; None takes torch's initial seed.
        schedule: Values to replay with ``method="fixed"``.
        jitter: Move fixed values about by ``scale``: ``"gaussian"`` or ``"sinusoid"`` ([STN] F).

    Returns:
        An ``STN``; unpack it into model, optimizer and train loader.

    Raises:
        DeclarationError: A hyperparameter cannot be used as declared.
        UnsupportedModuleError: The model cannot be converted.
        TraceError: The proof on ``example_inputs`` fails even for the model's own code.
        UsageError: An argument is missing or does not fit the others.

    Warns:
        UserWarning: The proof on ``example_inputs`` fails for the traced graph, so that the model's
            own code runs. The train loader, the criterion or fixed noise in the same place does
            what is tuned as well.

    Example:
        ``stn = stnify(model, [Dropout(after="layer*.*"), WeightDecay()], optimizer=optimizer,
        criterion=criterion, train_loader=train_loader, valid_loader=valid_loader)``
    """
    chosen = _method(method, schedule, jitter)
    refuse_distributed()
    refuse_model(model)
    refuse_arguments(
        optimizer,
        criterion,
        forward_loss,
        response,
        scale,
        response_lr,
        tunes=chosen.tunes,
    )
    refuse_empty(train_loader, "train_loader")
    refuse_empty(valid_loader, "valid_loader")
    total_steps = length_of_run(total_steps, epochs, train_loader)
    declared = declarations(hparams)
    if antithetic is None:
        antithetic = any(isinstance(each, WeightDecay | L1Penalty) for each in declared)
    if response_fraction is None:
        response_fraction = 0.5 if antithetic and forward_loss is None else 1.0
    cadence = Cadence(
        train_steps=train_steps,
        valid_steps=valid_steps,
        warmup_steps=_warmup(warmup_steps, total_steps),
        response_fraction=response_fraction,
        antithetic=antithetic,
        response_every=response_every,
        entropy_weight=entropy_weight,
        tune_scale=tune_scale,
    )
    if chosen.tunes and total_steps is not None and valid_loader is not None:
        _refuse_no_tuning(total_steps, cadence)
    device, dtype = _place(model)
    seed = torch.initial_seed() if seed is None else seed
    compile = device.type == "cuda" if compile is None else compile

    def converted(leaves: Sequence[str | type[nn.Module]]) -> tuple[Plan, TunableModule, Tuner]:
        plan = make_plan(
            model,
            trace(model, leaves, _given(model, example_inputs)),
            declared,
            response=response,
            exclude=exclude,
            affine=affine,
            scale=scale,
            responds=chosen.response is not None or not chosen.centred,
            decays=_decays(model, optimizer),
        )
        _refuse_terms(plan, criterion, forward_loss, chosen)
        space = HyperparameterSpace(plan.columns, dtype, device)
        tunable = rewrite(model, plan, space, RandomStream(_mix(seed, 0), device), input_stats)
        tuner = Tuner(
            model=tunable,
            objective=Objective(criterion, forward_loss, plan.decays, plan.losses, amp_dtype),
            method=chosen,
            cadence=cadence,
            hyper_optimizer=_hyper_optimizer(hyper_optimizer, space, total_steps, cadence),
            validation=_validation(valid_loader, _mix(seed, 1), device),
            stream=tunable._stnify.stream,
            schedule=schedule,
            jitter=None if jitter is None else JITTERS[jitter],
            forwards=_forwards(tunable, plan, method) if compile else {},
            verify_inputs=verify,
        )
        if verify and example_inputs is not None:
            tuner.verify(*_call(example_inputs))
        return plan, tunable, tuner

    try:
        plan, tunable, tuner = converted(leaves)
    except TraceError as error:
        if "" in leaves:
            raise
        try:
            plan, tunable, tuner = converted([""])
        except DeclarationError:  # it names places in a graph
            raise error from None
        warnings.warn(_runs_itself(error), stacklevel=2)
    if not chosen.centred and tunable._stnify.computed_weights():
        warnings.warn(
            f"export() will be refused: with method={method!r} it folds the response into weights, "
            f"but {tunable._stnify.computed_weights()[0]!r} is one that others are computed from. "
            f'Exclude its layer, or use method="delta".',
            stacklevel=2,
        )
    wrapped, decayed = None, _decayed(tunable, plan)
    if optimizer is not None:
        wrapped = STNOptimizer(
            optimizer,
            tunable,
            make_response=_response_optimizer(response_optimizer, response_lr, chosen),
            response_lr=1.0 if response_lr is None else response_lr,
            decays=tuner.decays,
            undecayed=decayed,
            before_general_step=tuner.before_general_step,
            after_general_step=tuner.after_general_step,
            joint=not chosen.centred,
        )
        _replace_decay(optimizer, decayed)
    regularizers = inventory(model, plan, optimizer, criterion, train_loader)
    for message in [*doubled(regularizers), *repeated(regularizers, plan)]:
        warnings.warn(message, stacklevel=2)
    return STN(tunable, plan, tuner, wrapped, train_loader, regularizers)


def _runs_itself(error: TraceError) -> str:
    return (
        f'{error} Until then the model\'s own code runs, as with leaves=[""], and its layers are '
        f"converted one by one."
    )


# Defaults -----------------------------------------------------------------------------------------


def _method(name: str, schedule: History | None, jitter: Jitter | None) -> Method:
    if name not in METHODS:
        raise UsageError(
            f"`method` must be one of {sorted(METHODS)}, but got {name!r}; nearest: "
            f"{nearest(name, METHODS, 1)}."
        )
    if jitter not in {None, *JITTERS}:
        raise UsageError(f"`jitter` must be one of {sorted(JITTERS)} or None, but got {jitter!r}.")
    if name != "fixed" and (schedule is not None or jitter is not None):
        raise UsageError(
            f'`schedule` and `jitter` need method="fixed", but got method={name!r}: the other '
            f"methods choose the values themselves."
        )
    return METHODS[name]


def _refuse_terms(
    plan: Plan, criterion: Callable[..., Tensor] | None, forward_loss: object, method: Method
) -> None:
    """Raise DeclarationError if something is declared that these arguments leave without effect."""
    absolute = [site.column for site in plan.decays if site.kind == "L1Penalty"]
    if absolute and not method.centred:
        raise DeclarationError(
            f"{absolute[0]!r} is taken to first order in the response, which must be centred, but "
            f'`method="stn"` has none that is. Use method="delta" or method="centered".'
        )
    if criterion is not None:
        _refuse_criterion(plan, criterion)
    if forward_loss is None:
        return
    passes = [s.column for s in plan.losses if s.penalty is not None or s.kind in PASSES]
    if passes:
        raise DeclarationError(
            f"{passes[0]!r} acts in `stn.criterion` (a `penalty` is added there), which "
            f"`forward_loss` replaces: declare a Hyperparameter and read "
            f"`stn.hyperparameters[name]` inside forward_loss instead."
        )
    terms = [site.column for site in plan.losses if site.kind != "Hyperparameter"]
    terms += [site.column for site in plan.augmentations if site.kind in MIXES]
    if terms and criterion is None:
        raise DeclarationError(
            f"{terms[0]!r} acts in `stn.criterion`, which needs `criterion=` beside "
            f"`forward_loss=`: pass both, and let forward_loss call "
            f"`stn.criterion(prediction, target)` with the tensor it is about."
        )


def _refuse_criterion(plan: Plan, criterion: Callable[..., Tensor]) -> None:
    """Raise DeclarationError if something acts on classes or probabilities this criterion lacks."""
    acting = [site.column for site in plan.losses if site.kind in ON_CLASSES]
    if acting and not has_classes(criterion):
        raise DeclarationError(
            f"{acting[0]!r} acts on classes of which one is right, but the criterion "
            f"{criterion!r} has none. Leave it out."
        )
    changing = [site.column for site in plan.losses if site.kind == "LabelSmoothing"]
    changing += [site.column for site in plan.augmentations if site.kind in MIXES]
    if changing and takes_indices_alone(criterion):
        raise DeclarationError(
            f"{changing[0]!r} makes probabilities of targets, but the criterion {criterion!r} "
            f"takes class indices alone. Use nn.CrossEntropyLoss() on logits, which is "
            f"nn.NLLLoss() on log-probabilities."
        )


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where the model is, and the dtype of lambda: single precision at least."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModuleError(
            f"the model must be on one device, but its parameters are on "
            f"{sorted(map(str, devices))}."
        )
    double = any(parameter.dtype is torch.float64 for parameter in model.parameters())
    device = devices.pop() if devices else torch.device("cpu")
    return device, torch.float64 if double else torch.float32


def _decays(model: nn.Module, optimizer: Optimizer | None) -> dict[str, float]:
    """Return the decay that the optimizer has for each parameter, by name."""
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []
    own = {
        id(parameter): float(group.get("weight_decay") or 0.0)
        for group in groups
        for parameter in group["params"]
    }
    return {name: own[id(p)] for name, p in model.named_parameters() if id(p) in own}


def _warmup(warmup_steps: int | None, total_steps: int | None) -> int:
    if warmup_steps is not None:
        return warmup_steps
    return 100 if total_steps is None else total_steps // 20


def _hyper_optimizer(
    make: HyperOptimizer | None,
    space: HyperparameterSpace,
    total_steps: int | None,
    cadence: Cadence,
) -> Optimizer:
    parameters: list[Tensor] = [space.unconstrained, space.raw_scale]
    if make is None:
        lr, alpha = _step_size(total_steps, cadence)
        return RMSprop(parameters, lr=lr, alpha=alpha)
    if not callable(make):
        raise UsageError(
            f"`hyper_optimizer` must be a function from a list of tensors to an optimizer, such as "
            f"`lambda p: torch.optim.Adam(p, lr=0.01)`, but got {type(make).__name__}."
        )
    made = make(parameters)
    known = {id(parameter) for parameter in parameters}
    if not isinstance(made, Optimizer) or not known >= {
        id(parameter) for group in made.param_groups for parameter in group["params"]
    }:
        raise UsageError(
            f"`hyper_optimizer` must return a torch.optim.Optimizer of the tensors it is given, "
            f"such as `lambda p: torch.optim.Adam(p, lr=0.01)`, but it returned {made!r}."
        )
    return made


def _response_optimizer(
    make: MakeOptimizer | None, response_lr: float | None, method: Method
) -> MakeOptimizer | None:
    """Return what makes the optimizer of the response parameters; None for the user's kind."""
    if make is not None and response_lr is not None:
        raise UsageError(
            f"give either `response_optimizer` or `response_lr`, but got both: "
            f"response_lr={response_lr} means the same kind of optimizer as the model's."
        )
    if make is not None and not callable(make):
        raise UsageError(
            f"`response_optimizer` must be a function from param groups to an optimizer, such as "
            f"`lambda groups: torch.optim.Adam(groups, lr=3e-3)`, but got {type(make).__name__}."
        )
    if make is None and (response_lr is not None or not method.centred):
        return None
    return make or adam


def _refuse_no_tuning(total_steps: int, cadence: Cadence) -> None:
    """Raise UsageError if a run ends before its first validation step."""
    if cadence.warmup_steps >= total_steps:
        raise UsageError(
            f"`warmup_steps < total_steps` must hold, or nothing is tuned, but got "
            f"warmup_steps={cadence.warmup_steps} of {total_steps}."
        )
    every = cadence.train_steps
    if total_steps // every == cadence.warmup_steps // every:
        raise UsageError(
            f"a run must have validation steps, or nothing is tuned, but between the end of its "
            f"warm-up (warmup_steps={cadence.warmup_steps}) and its own ({total_steps}) there is "
            f"none: they follow every {every} training steps (train_steps={every})."
        )


CROSSING = 12.0
"""Unconstrained distance between the practical ends of a range: sigmoid(-6) to sigmoid(6)."""


def _step_size(total_steps: int | None, cadence: Cadence) -> tuple[float, float]:
    """Return RMSprop's ``lr`` and ``alpha``: the papers', or for a short run more and less memory.

    The step size lets lambda cross its range in the run, if that has 120 validation steps. The
    memory is a tenth of the run, because the first step is the larger the longer the memory:
    ``lr / sqrt(1 - alpha)``.
    """
    if total_steps is None:
        return 0.01, 0.99
    tuned = max(total_steps - cadence.warmup_steps, 1)
    validation_steps = max(tuned // cadence.train_steps * cadence.valid_steps, 1)
    lr = min(max(0.01, CROSSING / validation_steps), 0.1)
    return lr, min(max(0.9, 1 - 10 / validation_steps), 0.99)


def _validation(
    loader: Iterable[Any] | None, seed: int, device: torch.device
) -> EndlessLoader | None:
    return None if loader is None else EndlessLoader(loader, RandomStream(seed, device))


def _gaussian(centre: Tensor, scale: Tensor, step: int) -> Tensor:
    return centre + scale * torch.randn_like(centre)


def _sinusoid(centre: Tensor, scale: Tensor, step: int) -> Tensor:
    return centre + scale * math.sin(2 * math.pi * step / SINUSOID_PERIOD)


JITTERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "gaussian": _gaussian,
    "sinusoid": _sinusoid,
}
"""Perturbations of fixed values, the baselines of [STN] Table 1."""


def _mix(seed: int, stream: int) -> int:
    """Return a seed for one of stnify's streams, another one for each distributed process."""
    rank = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    return (seed * 1_000_003 + 7919 * rank + stream) % 2**63


def _forwards(model: TunableModule, plan: Plan, method: str) -> dict[str, Forward]:
    """Compile the general pass, eval mode and, if all is traced, the passes of the two steps."""
    model._stnify.compile_passes()
    if plan.traced.opaque:
        return {}  # code that is not traced may change attributes, which a perturbed pass must not
    response = linearized_forward if method == "delta" else perturbed_forward
    return {
        "response": CompiledForward(response, "response"),
        "validation": CompiledForward(perturbed_forward, "validation"),
    }


def _call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match example_inputs:
        case dict():
            return (), example_inputs
        case tuple() | list():
            return tuple(example_inputs), {}
        case _:
            return (example_inputs,), {}


def _given(model: nn.Module, example_inputs: Any) -> set[str]:
    """Return the optional arguments of the model's forward that the example gives."""
    if example_inputs is None:
        return set()
    args, kwargs = _call(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return set()
    optional = {n for n, p in signature.parameters.items() if p.default is not p.empty}
    return {n for n in optional & arguments.keys() if arguments[n] is not None}


def _decayed(model: TunableModule, plan: Plan) -> set[nn.Parameter]:
    """Return the weights with a tuned decay."""
    parameters = model._stnify.general_parameters()
    sites = [site for site in plan.decays if site.kind == "WeightDecay"]
    return {parameters[name] for site in sites for name in site.parameters}


def _replace_decay(optimizer: Optimizer, decayed: set[nn.Parameter]) -> None:
    """Take the optimizer's own decay out of groups of nothing but weights with a tuned one."""
    for group in optimizer.param_groups:
        if group.get("weight_decay") and decayed.issuperset(group["params"]):
            group["weight_decay"] = 0.0
