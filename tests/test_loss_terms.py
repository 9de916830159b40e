"""Loss terms are what they say: their response gradients are those of the objective, written out.

Each example is predicted by itself, through weights written out for its own perturbation, to first
order by ``torch.func.jvp``; everything in float64.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.func import functional_call, jvp

from stnify import STN, stnify
from stnify.declare import (
    ActivationPenalty,
    ConfidencePenalty,
    Declaration,
    Hyperparameter,
    JacobianPenalty,
    L1Penalty,
    LabelSmoothing,
    LockedDropout,
    TemporalActivationPenalty,
    WeightDecay,
)
from stnify.errors import DeclarationError, ShapeError, UsageError
from stnify.perturb import Perturbation
from stnify.rows import RowLayout
from stnify.step import response_step

BATCH, STEPS, FEATURES, CLASSES = 5, 4, 3, 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
"""The same numbers in float64, summed in another order."""


class Sequential(nn.Module):
    """Classifies sequences of vectors, with an activation for each step."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 4)
        self.act = nn.Tanh()
        self.head = nn.Linear(4, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(inputs)).square().mean(1))


def activations(model: Sequential, inputs: Tensor) -> Tensor:
    return model.act(model.hidden(inputs))


def batch(classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(classes, (BATCH,), generator=generator)


def converted(*declared: Declaration, outputs: int = CLASSES, **options: Any) -> STN:
    """A converted model whose response has an effect."""
    torch.manual_seed(0)
    model = Sequential(outputs).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    defaults = {"criterion": F.cross_entropy, "seed": 0, "verify": False}
    stn = stnify(model, declared, optimizer=optimizer, **{**defaults, **options})
    with torch.no_grad():
        for name, parameter in stn.model._stnify.response_parameters().items():
            if name.endswith("gate"):
                parameter.normal_(0, 0.5)
    return stn


# The objective, written out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One example of a perturbed batch.

    Attributes:
        predict: ``(model, inputs) -> result`` to the result at the example's own weights.
        inputs: ``(1, steps, features)``.
        target: ``(1,)``.
        values: Hyperparameters in the order they are declared, constrained units.
    """

    predict: Callable[..., Tensor]
    inputs: Tensor
    target: Tensor
    values: Tensor


def examples_of(stn: STN, drawn: Perturbation, linearized: bool) -> list[Example]:
    """Give every example of ``batch()`` its own weights."""
    inputs, target = batch()
    return [
        Example(
            _at_weights_of(stn, drawn.response_input[i], linearized),
            inputs[i : i + 1],
            target[i : i + 1],
            drawn.constrained[i],
        )
        for i in range(BATCH)
    ]


def _at_weights_of(stn: STN, epsilon: Tensor, linearized: bool) -> Callable[..., Tensor]:
    original = stn.model._stnify.original
    general = {name: p.detach() for name, p in original.named_parameters()}
    layers = {name: stn.model.hyper_layers[name] for name in ("hidden", "head")}
    change = {}
    for name, layer in layers.items():
        weight, bias = layer.weight_response, layer.bias_response
        change[f"{name}.weight"] = (weight.gate @ epsilon)[:, None] * weight.response
        change[f"{name}.bias"] = (bias.gate @ epsilon) * bias.response

    def predict(function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        def at(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(_Method(original, function), _inside(weights), (inputs,))

        if linearized:
            return sum(jvp(at, (general,), (change,)))
        return at({name: general[name] + change[name] for name in general})

    return predict


class _Method(nn.Module):
    """A function of a model as the forward of a module."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.model, inputs)


def _inside(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": weight for name, weight in weights.items()}


def mean_cross_entropy(examples: Sequence[Example]) -> Tensor:
    losses = [F.cross_entropy(e.predict(nn.Module.__call__, e.inputs), e.target) for e in examples]
    return torch.stack(losses).mean()


def smoothing(example: Example) -> Tensor:
    prediction = example.predict(nn.Module.__call__, example.inputs)
    plain = F.cross_entropy(prediction, example.target)
    spread = -prediction.log_softmax(1).mean()
    return example.values[0] * (spread - plain)


def negative_entropy(example: Example) -> Tensor:
    logits = example.predict(nn.Module.__call__, example.inputs)
    return -example.values[0] * Categorical(logits=logits).entropy().mean()


def mean_square_activation(example: Example) -> Tensor:
    found = example.predict(activations, example.inputs)
    return example.values[0] * sum(v * v for v in found.flatten()) / found.numel()


def mean_square_change(example: Example) -> Tensor:
    found = example.predict(activations, example.inputs)[0]
    changes = [found[t + 1] - found[t] for t in range(STEPS - 1)]
    return example.values[0] * torch.stack([c.square().mean() for c in changes]).mean()


def squared_jacobian(example: Example) -> Tensor:
    def predict(inputs: Tensor) -> Tensor:
        return example.predict(nn.Module.__call__, inputs)

    slopes = torch.autograd.functional.jacobian(predict, example.inputs, create_graph=True)
    return 0.5 * example.values[0] * slopes.square().sum()


def users_own(example: Example) -> Tensor:
    found = example.predict(nn.Module.__call__, example.inputs)
    return example.values[0] * found.pow(4).mean()


def fourth_power(model: nn.Module, batch: Any, value: Tensor) -> Tensor:
    return value * model(batch[0]).pow(4).mean(-1)


@dataclass(frozen=True)
class Term:
    """A declaration and what it adds to the loss of one example; ``outputs`` of the model."""

    declaration: Declaration
    added: Callable[[Example], Tensor]
    outputs: int = CLASSES


TERMS = {
    "label smoothing": Term(LabelSmoothing(init=0.2), smoothing),
    "confidence": Term(ConfidencePenalty(init=0.5), negative_entropy),
    "activation": Term(ActivationPenalty(after="act", init=0.5), mean_square_activation),
    "temporal activation": Term(
        TemporalActivationPenalty(after="act", init=0.5), mean_square_change
    ),
    "jacobian": Term(JacobianPenalty(init=0.5), squared_jacobian, outputs=1),
    "own": Term(Hyperparameter("own", 0.5, (0.0, 1.0), penalty=fourth_power), users_own),
}

every_term = pytest.mark.parametrize("name", TERMS)
methods = pytest.mark.parametrize("method", ["delta", "centered"])


def convert_for(term: Term, method: str) -> STN:
    criterion = F.cross_entropy if term.outputs > 1 else no_loss
    return converted(term.declaration, outputs=term.outputs, method=method, criterion=criterion)


def no_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.0 * prediction.sum()


def drawn_for(stn: STN) -> Perturbation:
    """A perturbation for each example, and the values it leads to."""
    count = len(stn.values())
    generator = torch.Generator().manual_seed(1)
    epsilon = torch.randn(BATCH, count, dtype=torch.float64, generator=generator)
    space = stn.hyperparameters
    return Perturbation(epsilon, space.constrain(space.unconstrained.detach() + epsilon))


def response_gradients(stn: STN, drawn: Perturbation, method: str, monkeypatch) -> list[Tensor]:
    """What the response step finds, by the library."""
    monkeypatch.setattr("stnify.step.training_perturbation", lambda space, batch: drawn)
    linearized = method == "delta"
    objective = stn._tuner.objective
    result = response_step(stn.model, [batch()], objective, linearized=linearized)
    return list(result.gradients.values())


def by_hand(stn: STN, loss: Tensor) -> list[Tensor]:
    parameters = list(stn.model._stnify.response_parameters().values())
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return any(not torch.allclose(one, other, rtol=0.01) for one, other in pairs)


@every_term
@methods
def test_response_gradients_are_those_of_the_objective_written_out(name, method, monkeypatch):
    term = TERMS[name]
    stn = convert_for(term, method)
    drawn = drawn_for(stn)
    found = response_gradients(stn, drawn, method, monkeypatch)
    examples = examples_of(stn, drawn, method == "delta")
    plain = mean_cross_entropy(examples) if term.outputs > 1 else torch.zeros(())
    added = torch.stack([term.added(example) for example in examples]).mean()
    assert_all_close(found, by_hand(stn, plain + added))
    if term.outputs > 1:
        assert differ(found, by_hand(stn, plain)), "the term must count"
    shuffled = drawn._replace(constrained=drawn.constrained.roll(1, 0))
    others = response_gradients(stn, shuffled, method, monkeypatch)
    assert differ(found, others), "each example must have its own coefficient"


@every_term
def test_the_general_step_minimises_the_plain_loss_and_the_term(name):
    term = TERMS[name]
    stn = convert_for(term, "delta")
    inputs, target = batch()
    stn.observe((inputs, target))
    found = stn.criterion(stn.model(inputs), target)
    model = stn.model._stnify.original
    examples = [
        Example(lambda f, x: f(model, x), x[None], t[None], stn.hyperparameters.current)
        for x, t in zip(inputs, target, strict=True)
    ]
    plain = mean_cross_entropy(examples) if term.outputs > 1 else torch.zeros(())
    added = torch.stack([term.added(example) for example in examples]).mean()
    torch.testing.assert_close(found, plain + added, **TOLERANCE)
    assert abs(added) > 1e-4, "the term must count"
    parameters = list(stn.model._stnify.general_parameters().values())
    expected = torch.autograd.grad(plain + added, parameters, materialize_grads=True)
    assert_all_close(torch.autograd.grad(found, parameters, materialize_grads=True), expected)


def test_label_smoothing_is_pytorchs():
    stn = converted(LabelSmoothing(init=0.2))
    inputs, target = batch()
    prediction = stn.model(inputs)
    found, plain = stn.criterion(prediction, target), F.cross_entropy(prediction, target)
    expected = F.cross_entropy(prediction, target, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert not torch.allclose(found, plain, rtol=1e-3)


DRAWS = 400


def test_the_mean_of_projections_is_the_norm_of_the_jacobian():
    stn = converted(JacobianPenalty(init=0.5), criterion=no_loss)
    inputs, target = batch()
    stn.observe((inputs, target))
    prediction = stn.model(inputs)
    found = torch.stack([stn.criterion(prediction, target).detach() for _ in range(DRAWS)])
    slopes = torch.autograd.functional.jacobian(lambda x: stn.model(x).sum(0), inputs)
    expected = 0.5 * 0.5 * slopes.square().sum() / BATCH
    error = found.std() / DRAWS**0.5
    assert abs(found.mean() - expected) < 4 * error, "four standard errors: one failure in 16,000"
    assert 4 * error < 0.2 * expected, "the test must see an error of a fifth"
    assert found.std() > 0.05 * expected, "every call must draw another projection"


# Whose activations --------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Activations with time first and examples second."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.RNN(FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrence(inputs.transpose(0, 1))[0][-1])


class Folded(nn.Module):
    """Activations whose rows are the steps of one example after another."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.Linear(FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.recurrence(inputs.flatten(0, 1)).tanh()
        return self.head(rows.unflatten(0, inputs.shape[:2]).mean(1))


class Interleaved(Folded):
    """Activations whose rows are all examples of one step after another."""

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.recurrence(inputs.transpose(0, 1).flatten(0, 1)).tanh()
        return self.head(rows.unflatten(0, (inputs.shape[1], len(inputs))).mean(0))


LAYOUTS = {
    "time first": (TimeFirst, ActivationPenalty, lambda model, x: model.recurrence(x)[0]),
    "changes, time first": (
        TimeFirst,
        TemporalActivationPenalty,
        lambda model, x: model.recurrence(x)[0].diff(dim=0),
    ),
    "folded": (Folded, ActivationPenalty, lambda model, x: model.recurrence(x)),
    "interleaved": (Interleaved, ActivationPenalty, lambda model, x: model.recurrence(x)),
}


@pytest.mark.parametrize("steps", [3, BATCH])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_example_has_its_own_coefficient_wherever_its_activations_are(
    name, steps, monkeypatch
):
    """Also where there are as many steps as examples, so that every shape fits."""
    build, kind, activation = LAYOUTS[name]
    time = {"time": 0} if kind is TemporalActivationPenalty else {}
    torch.manual_seed(0)
    inputs, target = torch.randn(BATCH, steps, FEATURES).double(), batch()[1]
    model = build().double()
    stn = stnify(
        model,
        [kind(after="recurrence", init=0.5, **time)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=no_loss,
        seed=0,
    )
    stn.step((inputs, target))  # verifies the layout
    drawn = Perturbation(torch.zeros(BATCH, 1).double(), torch.arange(1.0, 6.0).double()[:, None])
    monkeypatch.setattr("stnify.step.training_perturbation", lambda space, size: drawn)
    found = response_step(stn.model, [(inputs, target)], stn._tuner.objective).loss
    # Without a perturbation an example alone has the activations it has in the batch.
    squares = [activation(model, x).square().mean() for x in inputs]
    expected = sum(i * square for i, square in enumerate(squares, 1)) / BATCH
    torch.testing.assert_close(found, expected.detach(), **TOLERANCE)
    shuffled = sum(i * square for i, square in enumerate(squares[::-1], 1)) / BATCH
    assert not torch.allclose(found, shuffled.detach())


def test_a_sequence_of_one_step_has_no_change():
    stn = converted(TERMS["temporal activation"].declaration)
    inputs, target = batch()
    prediction = stn.model(inputs[:, :1])
    assert torch.equal(stn.criterion(prediction, target), F.cross_entropy(prediction, target))
    prediction = stn.model(inputs[:, :2])
    assert stn.criterion(prediction, target) > F.cross_entropy(prediction, target)
    assert stn.step((inputs[:, :1], target)) > 0
    assert stn.counters.skipped_responses == 0


@pytest.mark.parametrize("time", [3, 9, -4])
def test_steps_in_a_dimension_that_is_not_there_are_refused(time):
    stn = converted(TemporalActivationPenalty(after="act", time=time))
    prediction = stn.model(batch()[0])
    with pytest.raises(ShapeError, match=rf"no dimension {time} in activations .*Choose another"):
        stn.criterion(prediction, batch()[1])


def test_steps_may_be_counted_from_the_last_dimension():
    losses = []
    for time in (1, -2):
        stn = converted(TemporalActivationPenalty(after="act", init=0.5, time=time))
        losses.append(stn.criterion(stn.model(batch()[0]), batch()[1]))
    assert torch.equal(*losses)


@pytest.mark.parametrize("time", [-1, -2, 1.0])
def test_a_lock_counts_dimensions_from_the_first(time):
    with pytest.raises(DeclarationError, match="must count dimensions from the first, 0, but got"):
        LockedDropout(after="act", time=time)
    assert LockedDropout(after="act", time=0).settings() == {"time": 0}


def test_steps_that_are_examples_are_refused():
    declared = TemporalActivationPenalty(after="act", time=0)
    stn = converted(declared)
    stn.observe(batch())
    stn.criterion(stn.model(batch()[0]), batch()[1]).backward()
    with pytest.raises(ShapeError, match=r"must compare steps of an example, but dimension 0"):
        stn.optimizer.step()


# Which passes -------------------------------------------------------------------------------------

STEPS_TAKEN = 7
"""Response steps are taken after the first, fourth and seventh."""


def losses_with(
    other: Callable[[STN, Tensor], None], place: str, **options: Any
) -> tuple[list[float], STN]:
    """Train with ``other`` called at a place of the loop; return the losses and the STN."""
    stn = converted(TERMS["activation"].declaration, **options)
    inputs, target = batch()
    losses = []
    for _ in range(STEPS_TAKEN):
        stn.observe((inputs, target))
        for when in ("before", "between", "behind", "after"):
            if when == place:
                other(stn, inputs)
            if when == "before":
                prediction = stn.model(inputs)
            elif when == "between":
                loss = stn.criterion(prediction, target)
                stn.optimizer.zero_grad()
                loss.backward()
            elif when == "behind":
                stn.optimizer.step()
        losses.append(loss.item())
    return losses, stn


def a_log_line(stn: STN, inputs: Tensor) -> None:
    """Predict something far off, in train mode and with gradients."""
    stn.model(100 * inputs)


def nothing(stn: STN, inputs: Tensor) -> None:
    """Do nothing."""


@pytest.mark.parametrize("method", ["delta", "centered", "fixed"])
@pytest.mark.parametrize("place", ["before", "between", "behind", "after"])
def test_predictions_the_loss_does_not_depend_on_do_not_count(place, method):
    expected, plain = losses_with(nothing, place, method=method)
    found, stn = losses_with(a_log_line, place, method=method)
    assert found == expected
    assert all(map(torch.equal, stn.model.parameters(), plain.model.parameters()))
    assert len(set(expected)) == STEPS_TAKEN, "the loss must move"


def test_nothing_is_kept_beyond_the_step():
    _, stn = losses_with(a_log_line, "behind")
    (recorder,) = stn.model._stnify.recorders
    assert not recorder.passes
    stn.model(batch()[0])
    assert [len(each) for each in recorder.passes] == [1], "the test must see what is kept"


def test_predictions_that_one_loss_depends_on_count_by_their_mean():
    stn = converted(TERMS["activation"].declaration)
    inputs, target = batch()
    separate = [stn.criterion(stn.model(x), target) for x in (inputs, 2 * inputs)]
    plain = [F.cross_entropy(stn.model(x), target) for x in (inputs, 2 * inputs)]
    stn.optimizer.zero_grad()
    for recorder in stn.model._stnify.recorders:
        recorder.forget()
    both = stn.model(inputs), stn.model(2 * inputs)
    together = stn.criterion(torch.cat(both), target.repeat(2))
    penalties = [one - other for one, other in zip(separate, plain, strict=True)]
    mean = F.cross_entropy(torch.cat(both), target.repeat(2)) + sum(penalties) / 2
    torch.testing.assert_close(together, mean, **TOLERANCE)
    assert not torch.allclose(penalties[0], penalties[1])


def test_each_of_two_losses_counts_the_activations_of_its_own_prediction():
    stn = converted(TERMS["activation"].declaration)
    inputs, target = batch()
    expected = [stn.criterion(stn.model(x), target) for x in (inputs, 2 * inputs)]
    predictions = [stn.model(x) for x in (inputs, 2 * inputs)]
    for prediction, loss in zip(predictions[::-1], expected[::-1], strict=True):
        torch.testing.assert_close(stn.criterion(prediction, target), loss, **TOLERANCE)
    assert not torch.allclose(*expected)


def test_a_loss_that_depends_on_no_pass_that_is_known_is_refused():
    stn = converted(TERMS["activation"].declaration)
    inputs, target = batch()
    stn.model(inputs)
    prediction = stn.model(2 * inputs).detach()
    with pytest.raises(UsageError, match=r"2 predictions .* depends on none of them"):
        stn.criterion(prediction, target)


def test_activations_without_a_gradient_are_those_of_the_latest_pass():
    torch.manual_seed(0)
    model = Sequential().double()
    model.hidden.requires_grad_(False)
    stn = stnify(model, [ActivationPenalty(after="act")], criterion=F.cross_entropy)
    inputs, target = batch()
    expected = stn.criterion(stn.model(inputs), target)
    stn.model(100 * inputs)
    torch.testing.assert_close(stn.criterion(stn.model(inputs), target), expected, **TOLERANCE)


def test_a_copied_model_keeps_whose_rows_are_whose_and_no_activations():
    torch.manual_seed(0)
    stn = stnify(TimeFirst().double(), [ActivationPenalty(after="recurrence")])
    (recorder,) = stn.model._stnify.recorders
    recorder.layout = RowLayout.SECOND
    stn.model(batch()[0])
    (twin,) = copy.deepcopy(stn.model.eval())._stnify.recorders
    assert (twin.layout, twin.column, twin.training) == (RowLayout.SECOND, recorder.column, False)
    assert recorder.passes
    assert not twin.passes


# Passes of their own ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["delta", "stn"])
def test_a_penalty_predicts_at_the_values_it_is_multiplied_by(method):
    seen: list[tuple[Tensor, Tensor]] = []

    def kept(model: nn.Module, given: Any, value: Tensor) -> Tensor:
        model(given[0])
        seen.append((value.detach().clone(), stn.hyperparameters["own"].detach().clone()))
        return 0.0 * value

    stn = converted(Hyperparameter("own", 0.5, (0.0, 1.0), penalty=kept), method=method)
    stn.step(batch())
    assert seen
    assert all(torch.equal(value, active) for value, active in seen)
    drawn = [value for value, _ in seen if value.ndim]
    assert drawn
    assert all(value.std() > 0 for value in drawn)


def test_a_penalty_of_the_uncentred_method_responds_to_the_draw_it_is_multiplied_by():
    """Weights of the penalty's pass are those of the prediction: both outputs are the same."""
    outputs: list[Tensor] = []

    def kept(model: nn.Module, given: Any, value: Tensor) -> Tensor:
        outputs.append(model(given[0]).detach())
        return 0.0 * value

    stn = converted(Hyperparameter("own", 0.5, (0.0, 1.0), penalty=kept), method="stn")
    inputs, target = batch()
    stn.observe((inputs, target))
    first = stn.model(inputs)
    stn.criterion(first, target)
    torch.testing.assert_close(outputs[0], first.detach(), **TOLERANCE)
    assert not torch.allclose(stn.model(inputs), first), "another pass draws anew"


def through_parameters(model: nn.Module, given: Any, value: Tensor) -> Tensor:
    return value.mean() * model.hidden.weight.norm(dim=1).sum()


def of_nothing(model: nn.Module, given: Any, value: Tensor) -> Tensor:
    return 3.0 * value


@pytest.mark.parametrize("penalty", [through_parameters, of_nothing])
@pytest.mark.parametrize("method", ["delta", "centered"])
def test_a_penalty_to_which_nothing_responds_is_warned_of_once(penalty, method):
    declared = Hyperparameter("lasso", 0.5, (0.0, 1.0), penalty=penalty)
    stn = converted(declared, TERMS["own"].declaration, method=method)
    with pytest.warns(UserWarning, match="that of 'lasso' depends on no prediction") as seen:
        stn.step(batch())
    told = [str(one.message) for one in seen if "must act through predictions" in str(one.message)]
    assert len(told) == 1, "the other one is not warned of"
    stn.step(batch())


# Penalties on weights -----------------------------------------------------------------------------


@torch.no_grad()
def first_order_l1(stn: STN, drawn: Perturbation) -> float:
    """The batch mean of ``c_i <sign(w), (U epsilon_i) W_response>``."""
    total = 0.0
    for epsilon, values in zip(*drawn, strict=True):
        for name, weight in WEIGHTS.items():
            layer = stn.model.hyper_layers[name].weight_response
            change = (layer.gate @ epsilon)[:, None] * layer.response
            slope = stn.model.get_parameter(weight).detach().sign()
            total += float(values[0] * (slope * change).sum())
    return total / BATCH


WEIGHTS = {"hidden": "hidden.weight", "head": "head.weight"}
STEP = 1e-6


def test_the_response_gradient_of_l1_is_the_difference_of_the_first_order_penalty(monkeypatch):
    stn = converted(L1Penalty(init=0.5), criterion=no_loss)
    drawn = drawn_for(stn)
    found = response_gradients(stn, drawn, "delta", monkeypatch)
    for (name, parameter), gradient in zip(
        stn.model._stnify.response_parameters().items(), found, strict=True
    ):
        for place in range(0, parameter.numel(), 3):
            entry = parameter.data.view(-1)[place : place + 1]
            before = entry.clone()
            sides = []
            for side in (STEP, -STEP):
                entry.copy_(before + side)
                sides.append(first_order_l1(stn, drawn))
            entry.copy_(before)
            # The penalty is linear in each entry, so that only rounding over the step is left.
            difference = (sides[0] - sides[1]) / (2 * STEP)
            assert abs(gradient.view(-1)[place] - difference) < 1e-8, name
        assert bool(gradient.abs().max() > 1e-3) is ("weight_response" in name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_general_step_follows_both_penalties_on_weights(momentum):
    """Against autograd of the penalties, with the same optimizer."""
    declared = [L1Penalty(init=0.3), WeightDecay(init=0.2, at="head")]
    torch.manual_seed(0)
    model = Sequential().double()
    plain = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    stn = stnify(
        model,
        declared,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum),
        criterion=no_loss,
        seed=0,
    )
    optimizer = torch.optim.SGD(plain, lr=0.1, momentum=momentum)
    for _ in range(3):
        stn.step(batch())
        optimizer.zero_grad()
        hidden, _, head, _ = plain
        penalty = 0.3 * (hidden.abs().sum() + head.abs().sum()) + 0.1 * head.square().sum()
        penalty.backward()
        optimizer.step()
    assert_all_close(list(model.parameters()), plain)
    torch.manual_seed(0)
    assert differ(list(model.parameters()), list(Sequential().double().parameters()))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_a_term_that_the_loop_leaves_out_is_refused_before_anything_moves(name):
    stn = convert_for(TERMS[name], "delta")
    before = [parameter.clone() for parameter in stn.model.parameters()]
    inputs, target = batch()
    stn.observe((inputs, target))
    stn.model(inputs).sum().backward()
    with pytest.raises(UsageError, match=r"was declared but the training loss never used it"):
        stn.optimizer.step()
    assert all(map(torch.equal, stn.model.parameters(), before))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_and_forward_loss_are_refused(name):
    def forward_loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    declared = TERMS[name].declaration
    with pytest.raises(DeclarationError, match=rf"{declared.name!r} acts in `stn.criterion`"):
        converted(declared, forward_loss=forward_loss, criterion=None)


@pytest.mark.parametrize("declaration", [LabelSmoothing(), ConfidencePenalty()])
def test_predictions_that_are_no_tensor_are_refused(declaration):
    class Pair(Sequential):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(inputs), inputs

    model = Pair().double()
    stn = stnify(model, [declaration], criterion=lambda pair, t: F.cross_entropy(pair[0], t))
    with pytest.raises(ShapeError, match=r"must return one tensor for .* but returned tuple"):
        stn.criterion(stn.model(batch()[0]), batch()[1])
