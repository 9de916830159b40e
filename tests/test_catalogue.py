"""Every kind of hyperparameter keeps the same promises in a converted model."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import (
    BATCH,
    COMPILED,
    KINDS,
    ConvolutionalNetwork,
    Kind,
    SentenceClassifier,
    declared_of,
    final_kinds,
    perceptron,
    transformer,
)
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError

from stnify import STN, stnify
from stnify.declare import (
    ActivationPenalty,
    AttentionDropout,
    Augmentation,
    Decay,
    Dropout,
    DropPath,
    EmbeddingDropout,
    Hyperparameter,
    L1Penalty,
    LockedDropout,
    Site,
    TemporalActivationPenalty,
    WeightNoise,
)
from stnify.errors import DeclarationError
from stnify.linearize import Forward, linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.regularizers.base import Noise
from stnify.space import HyperparameterSpace
from stnify.step import response_step

every_kind = pytest.mark.parametrize("name", KINDS)

STOCHASTIC = [*declared_of(Site), *declared_of(WeightNoise), *declared_of(Augmentation)]
"""Kinds that change predictions in training, by what they draw."""

TARGETS = {"Mixup", "CutMix", "LabelSmoothing"}
"""Kinds whose targets are probabilities, of which the cross-entropy is rounded in another way."""

ROUNDED = {"AttentionDropout"}
"""Kinds that write out what PyTorch has a fused kernel for."""

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Sums in another order, in float32."""


def test_every_kind_has_a_row():
    assert final_kinds() == set(KINDS)
    assert {"Dropout", "CutMix", "L1Penalty"} <= final_kinds()
    assert "ColorJitter" not in final_kinds(), "a group stands for several kinds"


def set_strength(stn: STN, value: float) -> None:
    (name,) = stn.values()
    stn.hyperparameters.set_values({name: value})
    assert stn.values()[name] == pytest.approx(value)


@pytest.fixture
def no_strength(monkeypatch) -> None:
    """Every hyperparameter reads its low end, which no unconstrained value reaches."""
    monkeypatch.setattr(
        HyperparameterSpace, "constrain", lambda space, unconstrained: 0 * unconstrained
    )


def step_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take the plain training step, without noise; return its prediction and loss."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.AlphaDropout):
            module.p = 0.0
    prediction = model(batch[0])
    loss = F.cross_entropy(prediction, batch[1])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    return prediction.detach(), loss.detach()


def step_of(stn: STN, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take one step of the user's loop; return its prediction and loss."""
    stn.observe(batch)
    prediction = stn.model(batch[0])
    loss = stn.criterion(prediction, batch[1])
    loss.backward()
    stn.optimizer.step()
    stn.optimizer.zero_grad()
    return prediction.detach(), loss.detach()


def general_state(stn: STN) -> dict[str, Tensor]:
    state = stn.model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("_stnify")}


# Nothing is done where nothing is asked for -------------------------------------------------------


@every_kind
@pytest.mark.usefixtures("no_strength")
def test_without_strength_a_training_step_is_the_plain_one(name):
    kind = KINDS[name]
    stn, plain, batch = kind.convert(), kind.fresh(), kind.batch()
    expected, found = step_by_hand(plain, batch), step_of(stn, batch)
    for one, other in zip(found, expected, strict=True):
        same(name, one, other)
    for key, value in plain.state_dict().items():
        same(name, general_state(stn)[key], value)


def same(name: str, found: Tensor, expected: Tensor) -> None:
    if name in TARGETS | ROUNDED:
        torch.testing.assert_close(found, expected, **TOLERANCE)
    else:
        assert torch.equal(found, expected)


@every_kind
def test_with_strength_it_is_another(name):
    kind = KINDS[name]
    stn, plain, batch = kind.convert(), kind.fresh(), kind.batch()
    set_strength(stn, kind.strong)
    expected, found = step_by_hand(plain, batch), step_of(stn, batch)
    changes = [not torch.allclose(*pair, atol=1e-3) for pair in zip(found, expected, strict=True)]
    in_prediction, in_loss = name in STOCHASTIC, name not in declared_of(Decay)
    assert changes == [in_prediction, in_loss]
    weights = dict(plain.named_parameters())
    moved = [not torch.allclose(general_state(stn)[n], w, atol=1e-4) for n, w in weights.items()]
    assert any(moved)


@every_kind
def test_in_eval_mode_it_is_the_original_and_the_plain_loss(name):
    kind = KINDS[name]
    stn, plain, (inputs, target) = kind.convert(), kind.fresh().eval(), kind.batch()
    set_strength(stn, kind.strong)
    stn.model.eval()
    prediction = stn.model(inputs)
    assert torch.equal(prediction, plain(inputs))
    assert torch.equal(stn.criterion(prediction, target), F.cross_entropy(prediction, target))
    stn.model.train()
    assert torch.equal(stn.model(inputs), plain.train()(inputs)) is (name not in STOCHASTIC)


# Random numbers -----------------------------------------------------------------------------------


def trajectory(kind: Kind, seed: int) -> list[Tensor]:
    """A step: prediction and loss, and where everything is after it."""
    stn = kind.convert(seed=seed)
    set_strength(stn, kind.strong)
    return [*step_of(stn, kind.batch()), *stn.model.state_dict().values()]


@every_kind
def test_a_run_is_replayed_by_its_seed_and_leaves_the_users_generator_alone(name):
    kind = KINDS[name]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = trajectory(kind, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    for one, other in zip(first, trajectory(kind, seed=0), strict=True):
        assert torch.equal(one, other)
    others = trajectory(kind, seed=1)
    assert torch.equal(first[0], others[0]) is (name not in STOCHASTIC)
    assert not all(map(torch.equal, first, others)), "perturbations are drawn in any case"


# The response pass --------------------------------------------------------------------------------


def open_gates(stn: STN) -> None:
    """Give every response an effect; a fresh one has none."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter.normal_(0, 0.5, generator=generator)


def close_gates(stn: STN) -> None:
    with torch.no_grad():
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate"):
                parameter.zero_()


def perturbed(
    kind: Kind,
    stn: STN,
    response_input: Tensor,
    constrained: Tensor,
    forward: Forward = linearized_forward,
    seed: int = 0,
) -> Tensor:
    """Predict in the response pass, with the draws of a seed."""
    drawn = Perturbation(response_input, constrained)

    def run(graph, args, kwargs):
        args, kwargs = stn.model._stnify.augmented(args, kwargs, drawn.constrained)
        return forward(graph, args, kwargs, drawn)

    with torch.random.fork_rng(), stn.model._stnify.running(run, constrained):
        torch.manual_seed(seed)
        return stn.model(kind.batch(dtype=response_input.dtype)[0]).detach()


def norms_evaluated(stn: STN) -> None:
    """Let BatchNorm use its running statistics: in training those of the batch join the rows."""
    for module in stn.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@every_kind
def test_each_row_of_the_response_pass_has_its_own_perturbation(name):
    kind, row = KINDS[name], 3
    stn = kind.convert()
    open_gates(stn)
    norms_evaluated(stn)
    given = [torch.linspace(-1, 1, BATCH)[:, None], torch.full((BATCH, 1), kind.strong)]
    before = perturbed(kind, stn, *given)
    for changed in (0, 1):
        other = [tensor.clone() for tensor in given]
        other[changed][row] *= 1e-3
        after = perturbed(kind, stn, *other)
        same_rows = (after == before).all(1)
        acts = changed == 0 or name in STOCHASTIC
        shared = changed == 1 and name in declared_of(WeightNoise)
        expected = [not acts or (index != row and not shared) for index in range(BATCH)]
        assert same_rows.tolist() == expected


@every_kind
def test_examples_add_up_in_the_response_step(name, monkeypatch):
    """What an example adds to the gradient is the same whatever the others' perturbations are."""
    kind = KINDS[name]
    stn = kind.convert(dtype=torch.float64)
    open_gates(stn)
    norms_evaluated(stn)

    def gradient(*changed: int) -> Tensor:
        epsilon = torch.linspace(-1, 1, BATCH).double()[:, None]
        values = torch.full_like(epsilon, kind.strong)
        epsilon[list(changed)] += 0.7
        values[list(changed)] *= 0.2
        drawn = Perturbation(epsilon, values)
        monkeypatch.setattr("stnify.step.training_perturbation", lambda space, batch: drawn)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            batch = kind.batch(dtype=torch.float64)
            found = response_step(stn.model, [batch], stn._tuner.objective).gradients
        return torch.cat([part.flatten() for part in found.values()])

    one, both, other, neither = gradient(1), gradient(1, 4), gradient(4), gradient()
    # Sums in another order, in float64.
    add_up = torch.allclose(both - other, one - neither, rtol=1e-8, atol=1e-10)
    assert add_up is (name not in declared_of(WeightNoise)), "a mask serves the batch"
    assert not torch.allclose(one, neither, rtol=1e-3)


STEP = 1e-5


def derivative_and_difference(name: str, seeds: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a prediction, its tangent, and the central difference with the draws of two seeds."""
    kind = KINDS[name]
    stn = kind.convert(dtype=torch.float64)
    open_gates(stn)
    epsilon = torch.linspace(-1, 1, BATCH).double()[:, None]
    values = torch.full_like(epsilon, kind.strong)
    plain, ahead, behind = (
        perturbed(kind, stn, share * epsilon, values, perturbed_forward, seed)
        for share, seed in ((0.0, 0), (STEP, seeds[0]), (-STEP, seeds[1]))
    )
    tangent = perturbed(kind, stn, epsilon, values) - plain
    return plain, tangent, (ahead - behind) / (2 * STEP)


# Of the third derivative, and rounding: 1e-16 / 1e-5, magnified by norms.
DIFFERENCES = {"rtol": 1e-5, "atol": 1e-7}


@every_kind
def test_primal_and_tangent_meet_the_same_draws(name):
    plain, tangent, difference = derivative_and_difference(name, (0, 0))
    torch.testing.assert_close(tangent, difference, **DIFFERENCES)
    assert not torch.allclose(tangent, torch.zeros_like(plain), atol=1e-2)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_other_draws_for_each_pass_would_be_seen(name):
    _, tangent, difference = derivative_and_difference(name, (0, 1))
    assert not torch.allclose(tangent, difference, rtol=1e-2)


# Methods ------------------------------------------------------------------------------------------

METHODS = ("delta", "centered", "stn", "fixed")
REFUSED = {("L1Penalty", "stn")}


def with_methods(*methods: str) -> pytest.MarkDecorator:
    """Run a test for every kind with these methods, where they take it."""
    pairs = [(name, method) for name in KINDS for method in methods]
    return pytest.mark.parametrize(("name", "method"), [p for p in pairs if p not in REFUSED])


@pytest.mark.parametrize(("name", "method"), sorted(REFUSED))
def test_a_method_that_does_not_take_a_kind_says_so(name, method):
    with pytest.raises(
        DeclarationError, match='which must be centred, but `method="stn"` has none'
    ):
        KINDS[name].convert(method=method)


@with_methods("delta", "stn")
def test_lambda_has_a_gradient_only_through_the_response(name, method):
    kind = KINDS[name]
    stn = kind.convert(method=method)
    stn.observe(kind.batch())
    stn.criterion(stn.model(kind.batch()[0]), kind.batch()[1]).backward()
    assert stn.hyperparameters.unconstrained.grad is None
    before = stn.hyperparameters.unconstrained.clone()
    stn.freeze()
    stn.optimizer.step()
    assert stn.hyperparameters.unconstrained.grad is None
    assert torch.equal(stn.hyperparameters.unconstrained, before)
    close_gates(stn)
    closed = stn.validation_step(kind.batch(1)).gradients["unconstrained"]
    assert torch.equal(closed, torch.zeros(1))
    open_gates(stn)
    opened = stn.validation_step(kind.batch(1)).gradients["unconstrained"]
    assert opened.abs() > 1e-5


@with_methods(*METHODS)
def test_two_steps_by_every_method(name, method):
    take_two_steps(name, method, torch.float32)


@every_kind
def test_two_steps_in_half_precision(name):
    take_two_steps(name, "delta", torch.bfloat16)


def take_two_steps(name: str, method: str, dtype: torch.dtype) -> None:
    """Train for two steps and check that all that moves is finite."""
    kind = KINDS[name]
    stn = kind.convert(method=method, dtype=dtype)
    set_strength(stn, kind.strong)
    before = stn.values()
    for seed in range(2):
        prediction, loss = step_of(stn, kind.batch(seed, dtype))
        assert prediction.dtype is dtype
        assert loss.isfinite()
    assert all(value.isfinite().all() for value in stn.model.state_dict().values())
    assert vars(stn.counters) == {
        "training_steps": 2,
        "validation_steps": 0 if method == "fixed" else 2,
        "skipped": 0,
        "skipped_responses": 0,
    }
    assert (stn.values() == before) is (method == "fixed")


# Everything at once -------------------------------------------------------------------------------

MODELS = {
    "images": ConvolutionalNetwork,
    "sentences": SentenceClassifier,
    "patches": transformer,
    "vectors": perceptron,
}


def everything(model: Callable[[], nn.Module], **options: Any) -> tuple[STN, Kind]:
    """Declare all kinds that have a row with this model at once."""
    rows = [kind for kind in KINDS.values() if kind.model is model]
    return rows[0].convert(*(kind.declaration for kind in rows[1:]), **options), rows[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_run_continues_from_its_state_to_the_same_bits(model):
    stn, kind = everything(MODELS[model])
    for seed in range(2):
        step_of(stn, kind.batch(seed))
    file = io.BytesIO()
    torch.save(stn.state_dict(), file)
    file.seek(0)
    loaded, _ = everything(MODELS[model], seed=1)
    other, _ = everything(MODELS[model], seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    ends = []
    for run in (stn, loaded, other):
        found = [part for seed in range(2, 4) for part in step_of(run, kind.batch(seed))]
        ends.append([*found, *run.model.state_dict().values()])
    assert all(map(torch.equal, ends[0], ends[1]))
    assert not any(map(torch.equal, ends[0][:4], ends[2][:4]))
    assert loaded.values() == stn.values()


@pytest.mark.parametrize("model", MODELS)
def test_the_export_is_the_model_in_eval_mode_and_holds_nothing_of_stnify(model):
    stn, kind = everything(MODELS[model])
    step_of(stn, kind.batch())
    plain, inputs = stn.export(), kind.batch(1)[0]
    assert type(plain) is type(kind.fresh())
    assert all(not type(part).__module__.startswith("stnify") for part in plain.modules())
    assert plain.state_dict().keys() == kind.fresh().state_dict().keys()
    assert torch.equal(plain.eval()(inputs), stn.model.eval()(inputs))
    assert not torch.equal(plain(inputs), kind.fresh().eval()(inputs)), "a step must have moved it"
    json.loads(stn.plan.to_json())
    assert all(name in str(stn.plan) for name in stn.values())


# Compiled -----------------------------------------------------------------------------------------

VALUES = 10
EAGER = {name: kind.eager for name, kind in KINDS.items() if kind.eager}


def test_every_kind_is_compiled_somewhere():
    assert set(COMPILED) == set(KINDS)
    assert not any(kind.eager for kind in COMPILED.values())
    assert set(EAGER) == {name for name in KINDS if KINDS[name].model is SentenceClassifier}


def of_one_model(kinds: dict[str, Kind]) -> list[list[str]]:
    """Sort names by the model of their rows, so that all kinds of a model are declared at once."""
    models = {id(kind.model): [] for kind in kinds.values()}
    for name, kind in kinds.items():
        models[id(kind.model)].append(name)
    return list(models.values())


@pytest.fixture
def whole_graphs(monkeypatch) -> None:
    """Every pass must compile as one graph. Kernels are PyTorch's own, to be quick."""
    quickly = partial(torch.compile, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch, "compile", quickly)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


once_compiled = torch._dynamo.config.patch(error_on_recompile=True)


def at_ten_values(stn: STN, kind: Kind) -> list[Tensor]:
    """Take a step, and one at each of ten values of lambda, without compiling; return losses."""
    start = stn.values()
    losses = [step_of(stn, kind.batch())[1]]
    with once_compiled:
        for share in torch.linspace(0.2, 1.8, VALUES).tolist():
            stn.hyperparameters.set_values({name: share * start[name] for name in start})
            losses.append(step_of(stn, kind.batch())[1])
    assert vars(stn.counters)["validation_steps"] == 1 + VALUES
    return losses


asks_for_gradients = pytest.mark.filterwarnings(
    # The compiler asks every tensor for its gradient, and silences the warning only by a filter.
    "ignore:The .grad attribute of a Tensor:UserWarning"
)


@asks_for_gradients
@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize("names", of_one_model(COMPILED), ids="-".join)
def test_ten_values_of_lambda_need_one_compilation(names):
    """A pass that ran eagerly would warn, and warnings are errors."""
    kind, *others = (COMPILED[name] for name in names)
    found = []
    for compiled in (True, False):
        stn = kind.convert(*(other.declaration for other in others), compile=compiled)
        assert len(stn.values()) == len(names)
        found.append([*at_ten_values(stn, kind), *general_state(stn).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@asks_for_gradients
@pytest.mark.usefixtures("whole_graphs")
def test_a_strength_kept_as_a_number_would_be_compiled_anew(monkeypatch):
    """Negative control: what Python holds is a constant of the compiled code."""

    def constant(noise: Noise, inputs: Tensor, constrained: Tensor) -> Tensor:
        return inputs.new_tensor(noise.number)

    monkeypatch.setattr(Noise, "strength", constant)
    monkeypatch.setattr(Noise, "number", 0.1, raising=False)
    kind = KINDS["Dropout"]
    stn = kind.convert(compile=True)
    step_of(stn, kind.batch())
    with once_compiled:
        step_of(stn, kind.batch())
        monkeypatch.setattr(Noise, "number", 0.2)
        with pytest.raises(RecompileError, match="number"):
            step_of(stn, kind.batch())


@asks_for_gradients
@pytest.mark.parametrize("name", EAGER)
def test_perturbed_passes_of_recurrent_models_run_eagerly_and_say_so(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    kind = KINDS[name]
    with pytest.warns(UserWarning, match="runs eagerly, because it does not compile") as caught:
        losses = at_ten_values(kind.convert(compile=True), kind)
    assert [str(warning.message).split()[1] for warning in caught] == list(kind.eager)
    assert all(loss.isfinite() for loss in losses)
    torch._dynamo.reset()


# Refusals -----------------------------------------------------------------------------------------

OUTER = ("lr", "learning_rate", "momentum", "batch_size")


@pytest.mark.parametrize("name", OUTER)
def test_numbers_of_the_optimization_are_refused_with_the_reason(name):
    for declared in ({name: 0.1}, [Hyperparameter(name, 0.1, (0.0, 1.0))]):
        with pytest.raises(DeclarationError, match=rf"but '{name}' only changes how the minimum"):
            stnify(perceptron(), declared)
    stnify(perceptron(), [Hyperparameter(f"{name}_of_mine", 0.1, (0.0, 1.0))])


REFUSALS = {
    "no branches": (perceptron, DropPath(), "acts on residual branches, but no addition"),
    "no attention": (perceptron, AttentionDropout(), "takes over .*, but Sequential calls none"),
    "no words": (perceptron, EmbeddingDropout(), "takes over existing modules"),
    "no place": (perceptron, LockedDropout(), "takes over existing modules"),
    "no dropout": (perceptron, Dropout(), "takes over existing modules"),
    "no weights": (perceptron, L1Penalty(at="missing"), "`at` of 'l1_penalty'"),
    "no activations": (perceptron, ActivationPenalty(after="missing"), "`after` of 'activation"),
}


@pytest.mark.parametrize(("model", "declared", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_kind_without_a_place_is_refused(model, declared, message):
    with pytest.raises(DeclarationError, match=message):
        stnify(model(), [declared])


def test_a_branch_is_all_that_a_path_needs():
    plan = stnify(ConvolutionalNetwork(), [DropPath()]).plan
    assert [site.name for site in plan.noises] == ["branch"]


@pytest.mark.parametrize("kind", [ActivationPenalty, TemporalActivationPenalty])
def test_a_penalty_on_activations_must_say_which(kind):
    with pytest.raises(DeclarationError, match="must say where it acts, but got no `after`"):
        kind()


@pytest.mark.parametrize("name", declared_of(Augmentation))
def test_an_augmentation_of_a_kind_is_declared_once(name):
    again = replace(KINDS[name].declaration, name="again")
    with pytest.raises(DeclarationError, match="one augmentation of"):
        KINDS[name].convert(again)
