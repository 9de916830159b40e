"""7. One optimizer for the loop: the general step, then what the method does after it."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from stnify.errors import UsageError
from stnify.tunable import TunableModule

ROLE = "role"
"""Key of every param group: ``"general"`` or ``"response"``."""

_OWN_KEYS = {"params", "param_names", "lr", "weight_decay", ROLE}
_SCHEDULED = ("initial_lr", "lr_scale")
"""What schedulers of torch and timm keep in a group beside the optimizer's own settings."""

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

OWN, HIGHEST = "own_lr", "highest_general_lr"
"""Keys of a response group that has an optimizer of another kind than its general group."""

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""Param groups to their optimizer."""

Decays = Mapping[nn.Parameter, float | Tensor]
"""What tuned decay adds to gradients: a coefficient of the parameter, or the gradient itself."""


class STNOptimizer(Optimizer):
    """Steps the user's optimizer, then runs ``after_general_step``.

    ``param_groups`` and ``state`` show the user's groups, and behind them a response group for each
    that holds a weight with a response. Schedulers move both, also one that was built on the
    wrapped optimizer: before a step the learning rate of each response group is its own, times the
    general group's over the highest that has been so far.

    Args:
        base: The user's optimizer.
        model: What it trains.
        make_response: Returns the optimizer of the response parameters from their groups; None for
            the same kind as ``base``, with its settings, no weight decay, and ``response_lr``.
        response_lr: Learning rate relative to the general one, for the same kind of optimizer.
        decays: Returns what tuned weight decay adds to gradients.
        undecayed: Parameters that ``base`` steps without a decay of its own, whatever their group
            says, because theirs is tuned.
        before_general_step: Called first; raises if the loop missed a call.
        after_general_step: Called last, with the optimizer of the response parameters.
        joint: The user's backward pass trains the response parameters too, so they step together
            ([DeltaSTN] Algorithm 2).
    """

    def __init__(
        self,
        base: Optimizer,
        model: TunableModule,
        *,
        make_response: MakeOptimizer | None,
        response_lr: float = 1.0,
        decays: Callable[[], Decays],
        undecayed: Collection[nn.Parameter] = (),
        before_general_step: Callable[[], None],
        after_general_step: Callable[[Optimizer], None],
        joint: bool = False,
    ) -> None:
        refuse_unusable(base, model)
        for group in base.param_groups:
            group.setdefault(ROLE, "general")
        groups, self._sources = _response_groups(base, model)
        self.base = base
        make = make_response if groups else None
        self._is_twin = make is None
        self.response = _twin(base, groups) if make is None else _made(make, groups)
        self._response_lr = response_lr
        self._decays = decays
        self._undecayed = frozenset(undecayed)
        self._before = before_general_step
        self._after = after_general_step
        self._joint = joint
        self._buffers: dict[nn.Parameter, Tensor] = {}
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()
        self.synchronise()

    @property
    def kinds(self) -> list[str]:
        """Names of the classes of the general and of the response optimizer."""
        return [type(self.base).__name__, type(self.response).__name__]

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the wrapped optimizer."""
        return self.base.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """General groups, then response groups."""
        return [*self.base.param_groups, *self.response.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """State of general, then of response parameters."""
        return {**self.base.state, **self.response.state}

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            "an STNOptimizer cannot be copied or pickled, because it drives a training run. Save "
            "`stn.state_dict()` and load it into a freshly converted model."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hand loaded groups and state to the two optimizers they belong to."""
        groups, states = state["param_groups"], state["state"]
        count = len(self.base.param_groups)
        for optimizer, part in ((self.base, groups[:count]), (self.response, groups[count:])):
            members = {parameter for group in part for parameter in group["params"]}
            own = {parameter: entry for parameter, entry in states.items() if parameter in members}
            optimizer.__setstate__({"state": defaultdict(dict, own), "param_groups": part})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of general parameters to the wrapped optimizer."""
        self.base.add_param_group({ROLE: "general", **param_group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of general and response parameters."""
        self.base.zero_grad(set_to_none)
        self.response.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the general step; then the response step and, when it is due, the validation step.

        Args:
            closure: Evaluated once, before the step.

        Returns:
            What ``closure`` returned, if any.

        Raises:
            UsageError: No batch was observed since the last step, or a declared hyperparameter was
                not used by the loss.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._before()
        self.synchronise()
        with self._decayed_gradients(), _without_decay(self.base.param_groups, self._undecayed):
            self.base.step()
            if self._joint:
                self.response.step()
        self._after(self.response)
        return result

    @contextmanager
    def _decayed_gradients(self) -> Iterator[None]:
        """Add the decay to the gradients while the body runs."""
        decays = self._decays()
        before = {p: p.grad for p in decays if p.grad is not None}
        for parameter, gradient in before.items():
            parameter.grad = self._decayed(parameter, gradient, decays[parameter])
        try:
            yield
        finally:
            for parameter, gradient in before.items():
                parameter.grad = gradient

    def _decayed(self, parameter: nn.Parameter, gradient: Tensor, decay: float | Tensor) -> Tensor:
        if isinstance(decay, Tensor):
            return gradient + decay
        buffer = None  # kept on a CPU, where fresh memory is slow
        if gradient.device.type == "cpu" and gradient.layout is torch.strided:
            buffer = self._buffers.get(parameter)
            if buffer is None or buffer.dtype is not gradient.dtype:
                buffer = self._buffers[parameter] = torch.empty_like(gradient)
        # The very operation by which torch.optim.SGD decays.
        return torch.add(gradient, parameter.detach(), alpha=decay, out=buffer)

    def synchronise(self) -> None:
        """Let each response group follow its general group's settings, or learning rate.

        Weights that have not been allowed to move yet have no response either.
        """
        for source, group in zip(self._sources, self.response.param_groups, strict=True):
            general = self.base.param_groups[source]
            if self._is_twin:
                group.update(_settings(self.base, general))
                if "lr" in general:
                    group["lr"] = general["lr"] * self._response_lr
            elif "lr" in general:
                now = float(general["lr"])
                highest = group[HIGHEST] = max(group[HIGHEST], now)
                group["lr"] = group[OWN] * (now / highest if highest else 0.0)


@contextmanager
def _without_decay(
    groups: list[dict[str, Any]], undecayed: Collection[nn.Parameter]
) -> Iterator[None]:
    """Give these parameters groups without a decay while the body runs.

    Before and after there are the user's groups, which schedulers count.
    """
    count, before = len(groups), []
    for group in [group for group in groups if group.get("weight_decay")]:
        apart = [parameter for parameter in group["params"] if parameter in undecayed]
        rest = [parameter for parameter in group["params"] if parameter not in undecayed]
        if apart:
            before.append((group, {key: group[key] for key in ("params", "weight_decay")}))
            if rest:
                groups.append({**group, "params": rest})
            group.update(params=apart, weight_decay=0.0)
    try:
        yield
    finally:
        del groups[count:]
        for group, own in before:
            group.update(own)


def refuse_unusable(optimizer: object, model: TunableModule) -> None:
    """Raise UsageError unless ``optimizer`` is usable and holds all trainable parameters."""
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"`optimizer` must be a torch.optim.Optimizer, but got {type(optimizer).__name__}."
        )
    if isinstance(optimizer, STNOptimizer):
        raise UsageError("`optimizer` is an STNOptimizer already: pass the one it was built from.")
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if isinstance(optimizer, LBFGS) or inner:
        raise UsageError(
            f"`optimizer` must take one step for one gradient, but {type(optimizer).__name__} "
            f"{'evaluates the loss again' if not inner else f'wraps another ({inner[0]})'}. "
            f"Pass a first-order optimizer such as SGD or AdamW."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in model._stnify.general_parameters().items() if p.requires_grad}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if missing:
        raise UsageError(
            f"`optimizer` must hold all {len(trainable)} trainable parameters of the model, but "
            f"{len(missing)} are missing, first {missing[0]!r}. Build it from model.parameters() "
            f"of this very model, or freeze what it should not train with requires_grad_(False)."
        )


def _response_groups(
    base: Optimizer, model: TunableModule
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return one response group for each general group with responses, and which group that is."""
    source_of = {
        id(parameter): i
        for i, group in enumerate(base.param_groups)
        for parameter in group["params"]
    }
    general_parameters = model._stnify.general_parameters()
    members: dict[int, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for weight, layers in model._stnify.users().items():
        source = source_of.get(id(general_parameters[weight]), 0)  # a frozen weight: its bias alone
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            if id(parameter) not in taken:
                taken.add(id(parameter))
                members.setdefault(source, []).append(parameter)
    groups, sources = [], sorted(members)
    for source in sources:
        general = base.param_groups[source]
        group = _settings(base, general)
        group.update(params=members[source], lr=general.get("lr"), weight_decay=0.0)
        groups.append({**group, ROLE: "response"})
    return groups, sources


def _made(make: MakeOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer of another kind over ``groups``, which keep their roles.

    Raises:
        UsageError: ``make`` did not return an optimizer of all the parameters it was given.
    """
    made = make([{"params": group["params"], ROLE: group[ROLE]} for group in groups])
    given = [id(parameter) for group in groups for parameter in group["params"]]
    held = getattr(made, "param_groups", [])
    if not isinstance(made, Optimizer) or len(held) != len(groups):
        raise UsageError(
            f"`response_optimizer` must return a torch.optim.Optimizer with the {len(groups)} "
            f"groups it is given, such as `lambda groups: torch.optim.Adam(groups, lr=3e-3)`, but "
            f"it returned {made!r}."
        )
    if given != [id(parameter) for group in held for parameter in group["params"]]:
        raise UsageError("`response_optimizer` must keep the parameters of the groups it is given.")
    for group in held:
        group.update({OWN: float(group.get("lr", 1.0)), HIGHEST: 0.0})
    return made


def _settings(base: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a response group copies: settings, not the state some kinds keep in a group."""
    copied = {*base.defaults, *_SCHEDULED} - _OWN_KEYS
    return {key: value for key, value in group.items() if key in copied}


_SHARED = {"param_groups", "state", "defaults", *_HOOKS}
"""What a twin gets in another way, or never changes."""


def _own_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an optimizer's attribute, such as a generator, or itself if it has none."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:
        return value


def _twin(base: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer of the same kind over other groups, with its own state and no hooks."""
    twin: Optimizer = object.__new__(type(base))
    own = base.__dict__.items()
    kept = {key: value for key, value in own if key not in _SHARED and not callable(value)}
    memo = {id(p): p for group in base.param_groups for p in group["params"]}
    twin.__dict__.update(base.__dict__)
    twin.__dict__.update({key: _own_copy(value, memo) for key, value in kept.items()})
    twin.__dict__.pop("step", None)  # a scheduler puts its own counting step on the instance
    twin.param_groups, twin.state = groups, defaultdict(dict)
    for name in _HOOKS:
        setattr(twin, name, OrderedDict())
    return twin
