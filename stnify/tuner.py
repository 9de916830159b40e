"""7b. When each step happens: what follows a general step, and what is due when."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stnify.errors import UsageError
from stnify.flops import Inputs, count_flops, prove_response_pass
from stnify.layouts import set_layouts
from stnify.linearize import Forward
from stnify.loaders import EndlessLoader
from stnify.methods import Cadence, Counters, Method
from stnify.nested import map_tensors
from stnify.objective import Objective, mixing_columns
from stnify.optimizer import Decays
from stnify.schedule import History, Record
from stnify.step import StepResult, response_step, to_device, validation_step
from stnify.streams import RandomStream
from stnify.tunable import TunableModule
from stnify.uncentred import UncentredTraining, uncentred_evaluation
from stnify.verify import verify

BASELINE_MEMORY = 0.9
"""Weight of the past in the running mean of the validation loss."""

RECENT = 64
"""Validation steps whose hypergradients are kept for a diagnosis."""

_COUNTED = {"validation": "validation_steps", "response": "training_steps"}


@dataclass
class Tuner:
    """Decides after each general step what else runs, and keeps the record.

    Attributes:
        model: The tunable model.
        objective: Training loss; validation uses it without penalties.
        method: What the steps are.
        cadence: How often they run.
        hyper_optimizer: Moves lambda and sigma.
        validation: Endless validation batches, if a loader was given.
        stream: Random numbers for perturbations and masks.
        schedule: Values to replay, for ``method="fixed"``.
        jitter: Moves fixed values about: ``(unconstrained, sigma, step) -> unconstrained``.
        forwards: Compiled stand-ins for the forward functions, by step.
        frozen: Validation steps are off.
        observed: Training batches since the last step.
        layouts: Row layout in words by site, once it has been measured.
        recent: Latest hypergradients, ``(h,)`` each.
        latest_training: Batches of the last general step.
        latest_validation: Batch of the last validation step, if there was one.
    """

    model: TunableModule
    objective: Objective
    method: Method
    cadence: Cadence
    hyper_optimizer: Optimizer
    validation: EndlessLoader | None
    stream: RandomStream
    schedule: History | None = None
    jitter: Callable[[Tensor, Tensor, int], Tensor] | None = None
    forwards: dict[str, Forward] = field(default_factory=dict)
    verify_inputs: bool = True
    counters: Counters = field(default_factory=Counters)
    history: History = field(default_factory=History)
    frozen: bool = False
    observed: list[Any] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    recent: deque[Tensor] = field(default_factory=partial(deque, maxlen=RECENT))
    latest_training: Sequence[Any] = ()
    latest_validation: Any = None

    def __post_init__(self) -> None:
        self._baseline: float | None = None
        self._sample: Inputs | None = None
        self._flops: dict[str, tuple[int, int]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._versions: list[tuple[Tensor, int]] = []
        self._latest_versions: list[tuple[Tensor, int]] = []
        self._fetched: list[Any] = []
        self._calls_seen = False
        self.model._stnify.call_before_training(self._before_training_pass)
        self._centre = self.model._stnify.space.unconstrained.detach().clone()
        self._uncentred = None if self.method.centred else UncentredTraining(self.stream)
        if self._uncentred is not None:
            self.model._stnify.run_by(self._uncentred, uncentred_evaluation)
        if not self.method.tunes:
            self._set_fixed_values()
        self._record(math.nan)
        if self.verify_inputs:
            self.model._stnify.remember_inputs()

    # Observing ------------------------------------------------------------------------------------

    def observe(self, batch: Any) -> None:
        """Remember a training batch until the next optimizer step."""
        self.model._stnify.forget_inputs()
        # Containers of its own, because loops take things out of theirs.
        self.observed.append(map_tensors(self._remember_version, batch))

    def fetch(self, batch: Any) -> None:
        """Take note of a batch the loop fetches; it is observed once the model is called."""
        if torch.is_grad_enabled():
            if self._calls_seen or not self.model.training:
                self._fetched.clear()
            self._fetched.append(batch)

    def _before_training_pass(self) -> None:
        """Tell what this pass keeps from what others kept, and observe what was fetched for it."""
        for recorder in self.model._stnify.recorders:
            recorder.begin()
        self._observe_fetched()

    def _observe_fetched(self) -> None:
        """Observe the latest batch fetched, now that the model is called with gradients."""
        self._calls_seen = True
        if self._fetched:
            self.observe(self._fetched[-1])
            self._fetched.clear()

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.observed = []
        self._versions.clear()
        self._fetched.clear()

    def _remember_version(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))
        return tensor

    def before_general_step(self) -> None:
        """Check that the loop made every call it has to.

        Raises:
            UsageError: No batch was observed, or the loss does not use a declared hyperparameter.
        """
        if not self.observed:  # calls cannot be seen where the user compiles the whole model
            fetched, self._fetched = self._fetched, []
            for batch in fetched:
                self.observe(batch)
        if self.method.response is not None and not self.observed:
            raise UsageError(
                "optimizer.step() needs the batches since the last step, but none was observed. "
                "Iterate over the train_loader that stnify returned, or call "
                "stn.observe(batch) before optimizer.step()."
            )
        self._refuse_unused()
        if _changed(self._versions):
            raise UsageError(
                "a batch must stay what it was until optimizer.step(), because the response step "
                "uses it again, but the loop or the model changed it in place. Change a copy, or "
                "use inplace=False in the model's first layer."
            )
        self.model._stnify.refuse_changed_attributes()
        inputs = self.model._stnify.remembered_inputs()
        if inputs is not None:
            self._refuse_other_batch(inputs[0])
            if self.verify_inputs:
                self.verify(*inputs)
        if self.counters.training_steps == 0 and self.method.response is not None:
            self._rehearse()

    def _refuse_other_batch(self, args: tuple[Any, ...]) -> None:
        """Raise UsageError if the model saw other inputs than the batch that was observed."""
        batch = self.observed[-1] if self.observed else None
        if self.objective.forward_loss is not None:
            return
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            return
        seen, observed = args[0] if args else None, batch[0]
        if not isinstance(seen, Tensor) or not isinstance(observed, Tensor):
            return
        if not _same(seen, observed.to(seen)):
            raise UsageError(
                "the model must be trained on the batches that stnify observes, but its inputs "
                "differ from the batch's: the loop changes them in between. Do that in the dataset "
                "or collate function, or iterate over the loader you had and call "
                "stn.observe((inputs, target)) with what the model receives."
            )

    def _rehearse(self) -> None:
        """Take the first response step without effect, so that it fails before anything moves."""
        before = self.stream.state_dict()
        self.model._stnify.predicted = False
        try:
            self._response(self.observed)
            self._refuse_other_model()
            self._warn_of_unanswered()
        finally:
            self.stream.load_state_dict(before)

    def _refuse_other_model(self) -> None:
        if not self.model._stnify.predicted:
            raise UsageError(
                "`forward_loss` must predict by calling the model it is given, `model(inputs)`, "
                "or a method of it that does, but it did not: parts of the model that are called "
                "by themselves run as they were."
            )

    def _warn_of_unanswered(self) -> None:
        """Warn of penalties on which the response has no influence, so that they never move."""
        for name, alone in self.objective.each_penalty().items():
            result = self._response(self.observed, alone)
            answered = any(gradient.any() for gradient in result.gradients.values())
            if float(result.loss) and not answered:
                warnings.warn(
                    f"a penalty must act through predictions to be tuned, but that of {name!r} "
                    f"depends on no prediction, only on parameters perhaps, to which nothing "
                    f"responds: its gradient is nought and it stays as it is. WeightDecay and "
                    f"L1Penalty are penalties on weights that respond.",
                    stacklevel=2,
                )

    def _refuse_unused(self) -> None:
        if self.counters.training_steps:
            return
        space = self.model._stnify.space
        acting = [site.column for site in self.objective.losses] + mixing_columns(space)
        unused = [column for column in acting if column not in space.read]
        if unused:
            kind = space.columns[space.index(unused[0])].kind
            own = "if it has a penalty, " if kind == "Hyperparameter" else ""
            other = (
                f"or read `stn.hyperparameters[{unused[0]!r}]` inside your criterion or "
                f"forward_loss."
            )
            raise UsageError(
                f"hyperparameter {unused[0]!r} was declared but the training loss never used it. "
                f"Compute the loss with `stn.criterion(model(x), y)` {own}{other}"
            )

    def verify(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Prove the conversion on these inputs, once."""
        self.layouts = verify(self.model, args, kwargs)
        idle = [name for name, word in self.layouts.items() if "never called" in word]
        prefix = "noises."
        idle = [n.removeprefix(prefix).replace("/", ".") for n in idle if n.startswith(prefix)]
        if idle:
            warnings.warn(
                f"tuned noise at {idle} has no effect, because the model never calls what it "
                f"replaces: its code uses the rate by itself. Take it out by `exclude`, and set "
                f"the rate there to 0 or keep it as it is.",
                stacklevel=2,
            )
        linearized = self.method.response == "linearized"
        self._sample = prove_response_pass(self.model, args, kwargs, linearized=linearized)
        self.verify_inputs = False

    @property
    def flops(self) -> dict[str, tuple[int, int]]:
        """Cost of an example before and after, by hyper layer, once inputs have been seen."""
        if self._sample is not None:
            inputs = to_device(self._sample, self.model)
            linearized = self.method.response == "linearized"
            self._flops, self._sample = {}, None
            self._flops = count_flops(self.model, inputs, linearized=linearized)
        return self._flops

    # Stepping -------------------------------------------------------------------------------------

    def decays(self) -> Decays:
        """Return what tuned decay adds to each gradient in the general step."""
        parameters = self.model._stnify.general_parameters()
        sites = self.objective.decays
        if not sites:
            return {}
        if self._uncentred is not None:
            return self._uncentred.decay_gradients(self.model, sites)
        values = self.model._stnify.space.values()
        coefficients = {
            kind: {n: values[s.column] for s in sites if s.kind == kind for n in s.parameters}
            for kind in ("WeightDecay", "L1Penalty")
        }
        squared, absolute = coefficients["WeightDecay"], coefficients["L1Penalty"]
        found: dict[nn.Parameter, float | Tensor] = {parameters[n]: c for n, c in squared.items()}
        for name, coefficient in absolute.items():
            weight = parameters[name].detach()
            found[parameters[name]] = coefficient * weight.sign() + squared.get(name, 0.0) * weight
        return found

    @property
    def latest_is_changed(self) -> bool:
        """Whether the loop has changed the batches of the last general step since."""
        return _changed(self._latest_versions)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Let passes of the body be none of the loop's: the next step knows nothing of them."""
        kept = self._fetched, self._calls_seen
        space, uncentred = self.model._stnify.space, self._uncentred
        self._fetched = []
        try:
            with nullcontext() if uncentred is None else uncentred.apart(space):
                yield
        finally:
            self._fetched, self._calls_seen = kept

    def after_general_step(self, optimizer: Optimizer) -> None:
        """Take the response step and validation steps, if they are due.

        Args:
            optimizer: Of the response parameters.
        """
        batches, self.observed = self.observed, []
        self.latest_training = batches
        for recorder in self.model._stnify.recorders:
            recorder.forget()
        self._latest_versions, self._versions = self._versions, []
        if self._uncentred is not None:
            self._uncentred.forget(self.model._stnify.space)
        due = self.counters.training_steps % self.cadence.response_every == 0
        if self.method.response is not None and due:
            self._respond(batches, optimizer)
        self.counters.training_steps += 1
        steps = self.counters.training_steps
        if not self.method.tunes:
            if self.schedule is not None or self.jitter is not None:
                self._set_fixed_values()
                self._record(math.nan)
        elif steps > self.cadence.warmup_steps and steps % self.cadence.train_steps == 0:
            self._tune()

    def _response(self, batches: Sequence[Any], objective: Objective | None = None) -> StepResult:
        """Take a response step without effect, for the run's objective unless told otherwise."""
        frozen = [
            n for n, p in self.model._stnify.response_parameters().items() if not p.requires_grad
        ]
        if frozen:
            raise UsageError(
                f"response parameters must require gradients, but {frozen[0]!r} does not. To "
                f"freeze layers after a conversion, leave names that start with '_stnify' alone."
            )
        with self.stream.active(), torch.enable_grad():
            return response_step(
                self.model,
                batches,
                self.objective if objective is None else objective,
                linearized=self.method.response == "linearized",
                fraction=self.cadence.response_fraction,
                antithetic=self.cadence.antithetic,
                forward=self.forwards.get("response"),
                buffers=self._buffers(),
            )

    def _buffers(self) -> dict[str, Tensor] | None:
        """Return memory for the response gradients, kept on a CPU, where fresh memory is slow."""
        if self.model._stnify.space.unconstrained.device.type != "cpu":
            return None
        for name, parameter in self.model._stnify.response_parameters().items():
            buffer = self._gradients.get(name)
            if buffer is None or buffer.dtype is not parameter.dtype:
                self._gradients[name] = torch.empty_like(parameter)
        return self._gradients

    def _respond(self, batches: Sequence[Any], optimizer: Optimizer) -> None:
        result = self._response(batches)
        if not result.is_finite:
            self.counters.skipped_responses += 1
            self._warn_of_skip("response", self.counters.skipped_responses, result)
            return
        parameters = self.model._stnify.response_parameters()
        for name, gradient in result.gradients.items():
            parameters[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    def _tune(self) -> None:
        if self.frozen or self.validation is None:
            return
        for _ in range(self.cadence.valid_steps):
            self.validate(self.validation.next())

    def validate(self, batch: Any) -> StepResult:
        """Take one validation step on ``batch``: move lambda and sigma, and record them.

        A loss or gradient that is not finite moves nothing, is counted, and is warned of once.
        """
        space = self.model._stnify.space
        known, space.read = space.read, set()
        self.latest_validation = batch
        try:
            with self.stream.active(), torch.enable_grad():
                result = validation_step(
                    self.model,
                    batch,
                    self.objective,
                    entropy_weight=self.cadence.entropy_weight,
                    centred=self.method.centred,
                    forward=self.forwards.get("validation"),
                    baseline=self._baseline,
                )
        finally:
            read, space.read = space.read, space.read | known
        self.counters.validation_steps += 1
        self._warn_of_reads(read - {s.column for s in self.objective.losses if s.at_validation})
        if result.is_finite:
            self._move(result)
            self._follow(float(result.loss))
        else:
            self._skip(result)
        self._record(float(result.loss))
        return result

    def _move(self, result: StepResult) -> None:
        space = self.model._stnify.space
        space.unconstrained.grad = result.gradients["unconstrained"]
        self.recent.append(result.gradients["unconstrained"].clone())
        space.raw_scale.grad = result.gradients["raw_scale"] if self.cadence.tune_scale else None
        self.hyper_optimizer.step()
        self.hyper_optimizer.zero_grad()
        space.follow_values()
        space.refresh()

    def _follow(self, loss: float) -> None:
        """Let the baseline of the score function follow the validation loss."""
        before = loss if self._baseline is None else self._baseline
        self._baseline = BASELINE_MEMORY * before + (1 - BASELINE_MEMORY) * loss

    @torch.no_grad()
    def _set_fixed_values(self) -> None:
        """Hold the start, or the schedule's values at this step, and jitter about them."""
        space, step = self.model._stnify.space, self.counters.training_steps
        if self.schedule is not None:
            space.set_values(self.schedule.at(step))
            self._centre = space.unconstrained.detach().clone()
        if self.jitter is not None:
            with self.stream.active():
                space.unconstrained.copy_(self.jitter(self._centre, space.scale, step))

    def _skip(self, result: StepResult) -> None:
        self.counters.skipped += 1
        self._warn_of_skip("validation", self.counters.skipped, result)

    def _warn_of_reads(self, names: set[str]) -> None:
        """Warn, the first time, if the validation loss holds a regulariser."""
        if names and self.counters.validation_steps == 1:
            warnings.warn(
                f"the validation loss reads {sorted(names)}, so it contains what they regularise, "
                f"and their gradient is not that of the plain loss. Add it only while "
                f"`model.training` is true.",
                stacklevel=2,
            )

    def _warn_of_skip(self, step: str, count: int, result: StepResult) -> None:
        if count == 1:
            warnings.warn(
                f"{step} step {getattr(self.counters, _COUNTED[step]) + (step == 'response')} was "
                f"skipped: its loss ({float(result.loss)}) or gradient is not finite. Nothing it "
                f"would have moved has moved; later skips are counted in stn.counters without a "
                f"warning.",
                stacklevel=2,
            )

    def _record(self, validation_loss: float) -> None:
        space = self.model._stnify.space
        step = self.counters.training_steps
        self.history.append(Record(step, space.values(), space.scales(), validation_loss))

    # State ----------------------------------------------------------------------------------------

    def columns(self) -> list[tuple[str, float, float]]:
        """Return name and range of each hyperparameter: what a state must agree in."""
        return [(c.name, *c.range) for c in self.model._stnify.space.columns]

    def state_dict(self) -> dict[str, Any]:
        """Return counters, history, random streams, lambda's optimizer: all but the model."""
        return {
            "columns": [list(column) for column in self.columns()],
            "counters": dict(vars(self.counters)),
            "history": self.history.to_dict(),
            "stream": self.stream.state_dict(),
            "validation": None if self.validation is None else self.validation.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "frozen": self.frozen,
            "centre": self._centre.clone(),
            "verify_inputs": self.verify_inputs,
            "layouts": dict(self.layouts),
            "flops": dict(self.flops),
            "baseline": self._baseline,
            "recent": list(self.recent),
            "read": sorted(self.model._stnify.space.read),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; the model's own state is loaded before."""
        self.counters = Counters(**state["counters"])
        self.history = History.from_dict(state["history"])
        self.stream.load_state_dict(state["stream"])
        if self.validation is not None and state["validation"] is not None:
            self.validation.load_state_dict(state["validation"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self.frozen = state["frozen"]
        self._centre = state["centre"].to(self._centre)
        self.verify_inputs = state["verify_inputs"]
        if self.verify_inputs:
            self.model._stnify.remember_inputs()
        self.layouts = dict(state["layouts"])
        set_layouts(self.model, self.layouts)
        self._flops, self._sample = dict(state["flops"]), None
        self._baseline = state["baseline"]
        self.recent.clear()
        self.recent.extend(gradient.to(self._centre) for gradient in state["recent"])
        self.model._stnify.space.read.update(state["read"])
        self.observed = []


def _changed(versions: Sequence[tuple[Tensor, int]]) -> bool:
    return any(tensor._version != version for tensor, version in versions)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, and NaN in the same places."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())
