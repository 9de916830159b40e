"""8. The STN: model, optimizer and loader that drop into a loop, and what can be asked of them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stnify.diagnosis import Diagnosis, diagnose
from stnify.errors import UsageError
from stnify.export import export, export_folded
from stnify.flops import WHOLE
from stnify.inventory import Regularizer, table, with_values
from stnify.loaders import ObservedLoader
from stnify.methods import Counters
from stnify.optimizer import STNOptimizer
from stnify.plan import Flops, Plan
from stnify.schedule import History
from stnify.space import HyperparameterSpace
from stnify.step import StepResult, to_device
from stnify.tunable import TunableModule
from stnify.tuner import Tuner


class STN:
    """A model that tunes its own hyperparameters, and everything that drives it.

    Unpacks into ``(model, optimizer, train_loader)``, which replace the three of an ordinary loop.

    Attributes:
        model: Behaves as the user's model.
        optimizer: Behaves as the user's optimizer; None if none was given.
        train_loader: Yields the user's batches; None if none was given.
        hyperparameters: lambda and sigma; ``[name]`` reads a value inside a loss.
        plan: What was changed and what was not.
        history: Values over time.
        counters: Steps taken and skipped.
    """

    def __init__(
        self,
        model: TunableModule,
        plan: Plan,
        tuner: Tuner,
        optimizer: STNOptimizer | None,
        train_loader: Iterable[Any] | None,
        regularizers: Sequence[Regularizer],
    ) -> None:
        self.model = model
        self._plan = plan
        self.optimizer = optimizer
        self._tuner = tuner
        self._regularizers = regularizers
        self.train_loader = (
            None if train_loader is None else ObservedLoader(train_loader, self._fetch)
        )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.optimizer, self.train_loader))

    @property
    def hyperparameters(self) -> HyperparameterSpace:
        """The hyperparameters."""
        return self.model._stnify.space

    @property
    def plan(self) -> Plan:
        """What was changed and what was not, with rows and costs as far as they were measured."""
        layer_of, words = self.model._stnify.layer_of(), self._tuner.layouts
        sizes = {n: p.numel() for n, p in self.model.named_parameters(remove_duplicate=False)}
        plan = self._plan.with_sizes(sizes).with_layouts(
            {node: words.get(f"layers.{layer}", "") for node, layer in layer_of.items()}
        )
        costs = {name: Flops(*pair) for name, pair in self._tuner.flops.items()}
        if not costs:
            return plan
        calls: dict[str, Flops] = {}
        for node, layer in layer_of.items():
            calls[node] = costs.pop(layer, Flops(0, 0))
        return plan.with_flops(costs[WHOLE], calls)

    @property
    def history(self) -> History:
        """Every validation step's values, scales and loss."""
        return self._tuner.history

    @property
    def counters(self) -> Counters:
        """Steps taken and skipped."""
        return self._tuner.counters

    def values(self) -> dict[str, float]:
        """Return the hyperparameters by name, constrained units."""
        return self.hyperparameters.values()

    def scales(self) -> dict[str, float]:
        """Return the perturbation scales by name, unconstrained units."""
        return self.hyperparameters.scales()

    def regularizers(self) -> list[Regularizer]:
        """Return what regularises this run: tuned now, fixed at the conversion, or absent."""
        return with_values(self._regularizers, self.values())

    def report(self) -> str:
        """Return plan, regularisers with their values, and counters as text."""
        shared = [n for n, word in self._tuner.layouts.items() if word.startswith("shared")]
        lines = [str(self.plan), "", table(self.regularizers())]
        if shared:
            lines.append(f"one perturbation for the whole batch at: {', '.join(shared)}")
        counters = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in vars(self.counters).items())
        return "\n".join([*lines, counters])

    def criterion(self, prediction: Any, target: Any) -> Tensor:
        """Return the training loss with all that is tuned in it; in eval mode the plain criterion.

        Use it in the loop if anything was declared that acts in the loss: a ``Hyperparameter``
        with a ``penalty``, label smoothing, mixup, a penalty on activations.

        Raises:
            UsageError: No criterion was given, or a penalty needs the batch and none was observed.
        """
        objective = self._tuner.objective
        if objective.criterion is None:
            raise UsageError("`stn.criterion` needs `criterion=` to be passed to stnify().")
        if not self.model.training:
            return objective.criterion(prediction, target)
        loss = objective.criterion_of(self.model, prediction, target)
        own = list(objective.passes)
        if not own:
            return loss
        if not self._tuner.observed:
            raise UsageError(
                f"the penalty of {own[0]!r} needs the batch, but none was "
                f"observed. Iterate over the train_loader that stnify returned, or call "
                f"stn.observe(batch) first."
            )
        return loss + objective.penalty(self.model, to_device(self._tuner.observed[-1], self.model))

    def _fetch(self, batch: Any) -> None:
        if self.optimizer is not None:
            self._tuner.fetch(batch)

    def observe(self, batch: Any) -> None:
        """Tell stnify the batch of the next ``optimizer.step()``; for loops without a loader."""
        if self.optimizer is not None:
            self._tuner.observe(batch)

    def step(self, batch: Any) -> float:
        """Do all of one iteration on ``batch`` and return the training loss.

        Raises:
            UsageError: No optimizer was given.
        """
        optimizer, objective = self._require_optimizer(), self._tuner.objective
        if not self.model.training:
            raise UsageError("`stn.step` trains, but the model is in eval mode: model.train().")
        self._tuner.forget()
        self._tuner.observe(batch)
        optimizer.zero_grad()
        loss = objective.training(self.model, to_device(batch, self.model))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def validation_step(self, batch: Any) -> StepResult:
        """Take one validation step on ``batch``; for loops without a ``valid_loader``.

        Raises:
            UsageError: The method does not tune.
        """
        if not self._tuner.method.tunes:
            raise UsageError('method="fixed" does not tune: there is no validation step to take.')
        if self._tuner.objective.criterion is None and self._tuner.objective.forward_loss is None:
            raise UsageError(
                "`stn.validation_step` needs `criterion=` or `forward_loss=` to be passed to "
                "stnify()."
            )
        return self._tuner.validate(batch)

    def diagnose(self, draws: int = 8, controls: str | Sequence[str] = ()) -> Diagnosis:
        """Return how sure the hypergradient is of its sign, and how far ahead it looks.

        Costs about ``2 * draws`` plain training steps, up to half as many more where layers are
        small, and changes nothing. Print the result.

        Args:
            draws: How often the effect of a step is taken.
            controls: Globs on the names of hyperparameters you declared to have no effect, four at
                least. Directions are then measured by theirs, which are what the response has
                wrong and nothing else.

        Raises:
            UsageError: There is no optimizer, the method does not tune, or there were too few
                validation steps, or too few controls.

        Example:
            ``print(stn.diagnose())`` once an epoch.
        """
        if not isinstance(draws, Integral) or draws < 2:
            raise UsageError(f"`draws` must be an integer of at least 2, but got {draws!r}.")
        return diagnose(self._tuner, self._require_optimizer().base, draws, controls)

    def freeze(self) -> None:
        """Stop scheduled validation steps; one called by hand still moves hyperparameters."""
        self._tuner.frozen = True

    def unfreeze(self) -> None:
        """Take validation steps again."""
        self._tuner.frozen = False

    def export(self) -> nn.Module:
        """Return a copy of the user's model with its trained weights and nothing of stnify in it.

        With ``method="stn"`` the response at lambda is folded into the weights.
        """
        return export(self.model) if self._tuner.method.centred else export_folded(self.model)

    def save_values(self, path: str | Path) -> None:
        """Write the hyperparameters with their ranges, values and scales to ``path`` as JSON."""
        Path(path).write_text(self.hyperparameters.to_json())

    def state_dict(self) -> dict[str, Any]:
        """Return everything a run needs to continue to the same bits; loads with weights_only."""
        return {
            "model": copy.copy(self.model.state_dict()),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "kinds": None if self.optimizer is None else self.optimizer.kinds,
            "tuner": self._tuner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned, in an STN that was converted the same way.

        Step sizes, lambda's too, are those of the state, as with any optimizer; what ``stnify`` was
        told about the cadence, such as the warm-up, is not in it.

        Raises:
            UsageError: The state is of another model, other hyperparameters or other kinds of
                optimizers; nothing was loaded.
        """
        self._refuse_other_state(state)
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._tuner.load_state_dict(state["tuner"])

    def _refuse_other_state(self, state: Mapping[str, Any]) -> None:
        missing = {"model", "optimizer", "tuner"} - state.keys()
        if missing:
            raise UsageError(f"a state must come from `stn.state_dict()`, but lacks {missing}.")
        found = [tuple(column) for column in state["tuner"]["columns"]]
        if found != self._tuner.columns():
            raise UsageError(
                f"a state can be loaded where the same hyperparameters are declared in the same "
                f"order, but it has the hyperparameters (name, low, high) {found} and this one "
                f"{self._tuner.columns()}. Convert with the declarations of that run."
            )
        kinds = None if self.optimizer is None else self.optimizer.kinds
        if kinds and state.get("kinds", kinds) not in (kinds, None):
            raise UsageError(
                f"a state can be loaded where optimizers are of the same kind, but it has those of "
                f"{state['kinds']} (weights, response) and this run {kinds}. Convert with the "
                f"optimizer, `response_optimizer` and `response_lr` of that run."
            )
        own = {name: value.shape for name, value in self.model.state_dict().items()}
        other = {name: value.shape for name, value in state["model"].items()}
        differing = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
        if differing:
            raise UsageError(
                f"a state can be loaded where model, `response` and `exclude` are the same, but "
                f"{len(differing)} tensors differ, first {differing[0]!r}. Convert as in that run."
            )

    def save(self, path: str | Path) -> None:
        """Write ``state_dict()`` to ``path``; ``torch.load(path, weights_only=True)`` reads it."""
        torch.save(self.state_dict(), path)

    def _require_optimizer(self) -> STNOptimizer:
        if self.optimizer is None:
            raise UsageError("a step needs `optimizer=` to be passed to stnify().")
        return self.optimizer
