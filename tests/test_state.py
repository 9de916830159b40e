"""One state dict holds a whole run: interrupted anywhere, it goes on to the same bits."""

import copy
import io
import itertools
import math
import pickle
from functools import cache

import pytest
import torch
from cases import (
    FEATURES,
    IDLE,
    BranchingNetwork,
    batches,
    convert,
    convolutional_network,
    examples,
    perceptron,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import stnify
from stnify import Dropout, History, Hyperparameter, UsageError, WeightDecay
from stnify.response_optimizer import adam
from stnify.testing import assert_tangent_matches_differences

STEPS = 9
METHODS = ["delta", "centered", "stn", "fixed"]
OPTIMIZERS = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01),
}


def same(left, right):
    """Whether two nested states hold the same bits; NaN equals NaN."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def stored(state):
    """Write the state to a file and read it as a careful person does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@cache
def training_batches():
    """Two shuffled epochs and a bit, drawn once, so that every run sees equal batches."""
    loader = batches(shuffle=True, generator=torch.Generator().manual_seed(3))
    return [batch for _ in range(2) for batch in loader][:STEPS]


class Run:
    """A conversion, its scheduler, and the loop."""

    def __init__(self, method, optimizer, seeded_loader, seed, **options):
        torch.manual_seed(seed)
        model = nn.Sequential(convolutional_network())
        generator = torch.Generator().manual_seed(seed) if seeded_loader else None
        valid_loader = DataLoader(
            examples(20, seed=1), batch_size=8, shuffle=True, generator=generator
        )
        self.stn = convert(
            model,
            [Dropout(at="input", init=0.2), Dropout("inner", after="0.3", init=0.3), WeightDecay()],
            OPTIMIZERS[optimizer](model),
            method=method,
            train_loader=None,
            valid_loader=valid_loader,
            train_steps=2,
            seed=seed,
            jitter="gaussian" if method == "fixed" else None,
            **options,
        )
        self.scheduler = StepLR(self.stn.optimizer, 4, gamma=0.5)

    def train(self, sequence):
        for inputs, target in sequence:
            self.stn.observe((inputs, target))
            self.stn.optimizer.zero_grad()
            nn.functional.cross_entropy(self.stn.model(inputs), target).backward()
            self.stn.optimizer.step()
            self.scheduler.step()
        return self

    def state(self):
        return {"stn": self.stn.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load(self, state):
        self.stn.load_state_dict(state["stn"])
        self.scheduler.load_state_dict(state["scheduler"])
        return self


@cache
def uninterrupted(method, optimizer, seeded_loader):
    return stored(Run(method, optimizer, seeded_loader, seed=0).train(training_batches()).state())


@given(
    step=st.integers(0, STEPS),
    method=st.sampled_from(METHODS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    seeded_loader=st.booleans(),
)
@example(step=5, method="delta", optimizer="sgd", seeded_loader=False)
@example(step=0, method="delta", optimizer="adamw", seeded_loader=True)
@settings(max_examples=16, deadline=None)
def test_an_interrupted_run_continues_to_the_same_bits(step, method, optimizer, seeded_loader):
    sequence = training_batches()
    state = stored(Run(method, optimizer, seeded_loader, 0).train(sequence[:step]).state())
    resumed = Run(method, optimizer, seeded_loader, seed=77).load(state)
    assert same(resumed.state(), state)
    resumed.train(sequence[step:])
    assert same(resumed.state(), uninterrupted(method, optimizer, seeded_loader))


def final(run):
    stn = run.stn
    return {"model": dict(stn.model.state_dict()), "history": stn.history.to_dict()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("forgotten", ["model", "optimizer", "tuner"])
def test_every_part_of_the_state_is_needed(method, forgotten):
    sequence = training_batches()
    state = stored(Run(method, "adamw", False, 0).train(sequence[:5]).state())
    whole = Run(method, "adamw", False, seed=77).load(state)
    partial = Run(method, "adamw", False, seed=77)
    fresh = partial.stn.state_dict()[forgotten]
    partial.load({**state, "stn": {**state["stn"], forgotten: fresh}})
    whole.train(sequence[5:])
    partial.train(sequence[5:])
    assert same(final(whole), final(whole))
    assert not same(final(partial), final(whole))


def test_streams_of_the_tuner_alone_decide_masks():
    sequence = training_batches()
    state = stored(Run("delta", "sgd", False, 0).train(sequence[:5]).state())
    runs = [Run("delta", "sgd", False, seed=77).load(state) for _ in range(2)]
    with runs[1].stn._tuner.stream.active():
        torch.rand(1)
    weights = [dict(run.train(sequence[5:6]).stn.model.state_dict()) for run in runs]
    assert not same(*weights)


@pytest.mark.parametrize("used", [0, 3, STEPS])
def test_a_state_can_be_loaded_into_a_run_that_has_begun(used):
    sequence = training_batches()
    state = stored(Run("delta", "sgd", True, 0).train(sequence[:4]).state())
    resumed = Run("delta", "sgd", True, seed=5).train(sequence[:used]).load(state)
    assert same(resumed.state(), state)
    resumed.train(sequence[4:])
    assert same(resumed.state(), uninterrupted("delta", "sgd", True))


def test_a_state_without_validation_can_be_loaded_into_a_run_that_has_begun():
    state = stored(Run("delta", "sgd", True, 0).state())
    resumed = Run("delta", "sgd", True, seed=5).train(training_batches()[:4]).load(state)
    assert same(resumed.state(), state)
    resumed.train(training_batches())
    assert same(resumed.state(), uninterrupted("delta", "sgd", True))


def test_save_writes_what_state_dict_returns(tmp_path):
    run = Run("delta", "sgd", False, 0).train(training_batches()[:4])
    run.stn.save(tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert same(state, run.stn.state_dict())
    run.train(training_batches()[4:5])
    assert not same(state, run.stn.state_dict())


def test_freezing_and_skips_are_part_of_the_state():
    run = Run("delta", "sgd", False, 0).train(training_batches()[:2])
    run.stn.freeze()
    bad = (torch.full((8, FEATURES), math.nan), torch.zeros(8, dtype=torch.long))
    with pytest.warns(UserWarning, match="was skipped"):
        run.stn.validation_step(bad)
    resumed = Run("delta", "sgd", False, seed=77).load(stored(run.state()))
    assert resumed.stn.counters == run.stn.counters
    assert resumed.stn.counters.skipped == 1
    values = resumed.stn.values()
    resumed.train(training_batches()[2:6])
    assert resumed.stn.values() == values
    resumed.stn.unfreeze()
    resumed.train(training_batches()[6:8])
    assert resumed.stn.values() != values


def test_a_replay_resumes():
    sequence = training_batches()
    recorded = Run("delta", "sgd", False, 0).train(sequence).stn.history
    schedule = History.from_dict(recorded.to_dict())

    def replay(seed):
        run = object.__new__(Run)
        torch.manual_seed(seed)
        model = nn.Sequential(convolutional_network())
        run.stn = convert(
            model,
            [Dropout(at="input", init=0.2), Dropout("inner", after="0.3", init=0.3), WeightDecay()],
            method="fixed",
            schedule=schedule,
            seed=seed,
        )
        run.scheduler = StepLR(run.stn.optimizer, 4)
        return run

    whole = replay(0).train(sequence)
    first = replay(0).train(sequence[:5])
    resumed = replay(9).load(stored(first.state())).train(sequence[5:])
    assert same(resumed.state(), whole.state())
    assert not same(first.state(), whole.state())


def test_jitter_goes_on_about_the_start_of_the_run_it_resumes():
    def converted(init):
        torch.manual_seed(0)
        hparams = [Dropout(at="input", init=init)]
        return convert(perceptron(), hparams, method="fixed", jitter="gaussian", scale=0.1)

    sequence = training_batches()
    whole, first, other = converted(0.2), converted(0.2), converted(0.7)
    for batch in sequence:
        whole.step(batch)
    for batch in sequence[:5]:
        first.step(batch)
    other.load_state_dict(stored(first.state_dict()))
    for batch in sequence[5:]:
        other.step(batch)
    assert same(other.state_dict(), whole.state_dict())
    assert not same(converted(0.7).state_dict(), converted(0.2).state_dict())


def test_a_model_that_cannot_be_traced_resumes():
    def converted(seed):
        torch.manual_seed(seed)
        return convert(BranchingNetwork(), [Dropout(init=0.3), WeightDecay()], seed=seed)

    sequence = training_batches()
    whole, first = converted(0), converted(0)
    for batch in sequence:
        whole.step(batch)
    for batch in sequence[:5]:
        first.step(batch)
    resumed = converted(9)
    resumed.load_state_dict(stored(first.state_dict()))
    for batch in sequence[5:]:
        resumed.step(batch)
    assert same(resumed.state_dict(), whole.state_dict())
    assert not same(first.state_dict(), whole.state_dict())


def test_a_model_without_optimizer_saves_and_loads():
    def converted(seed):
        torch.manual_seed(seed)
        model = perceptron(0.3)
        return stnify.stnify(model, [Dropout()], seed=seed)

    stn, other = converted(0), converted(1)
    inputs = torch.randn(4, FEATURES)
    stn.model(inputs)  # draws a mask
    assert not torch.equal(other.model.eval()(inputs), stn.model.eval()(inputs))
    other.load_state_dict(stored(stn.state_dict()))
    assert torch.equal(other.model(inputs), stn.model(inputs))
    assert torch.equal(other.model.train()(inputs), stn.model.train()(inputs))


def test_a_state_of_other_hyperparameters_is_refused_and_nothing_is_loaded():
    def converted(name):
        return convert(perceptron(), [Hyperparameter(name, 0.5, (0.0, 1.0), penalty=IDLE.penalty)])

    state = converted("left").state_dict()
    stn = converted("right")
    before = stored(stn.state_dict())
    with pytest.raises(
        UsageError,
        match=r"hyperparameters .*\('left', 0.0, 1.0\).*this one .*\('right', 0.0, 1.0\)",
    ):
        stn.load_state_dict(state)
    assert same(stn.state_dict(), before)
    converted("left").load_state_dict(state)


def test_inputs_are_not_kept_once_the_conversion_is_verified():
    state = stored(Run("delta", "sgd", False, 0).train(training_batches()[:1]).state())
    resumed = Run("delta", "sgd", False, seed=7).load(state).train(training_batches()[1:3])
    assert resumed.stn.model._stnify.inputs is None
    example_inputs = next(itertools.chain(training_batches()))[0]
    verified = Run("delta", "sgd", False, seed=7, example_inputs=example_inputs)
    assert verified.train(training_batches()[:1]).stn.model._stnify.inputs is None


def test_a_state_of_another_model_or_range_is_refused_and_nothing_is_loaded():
    state = stored(convert(perceptron(), [WeightDecay()]).state_dict())
    others = {
        r"differ, first '_stnify.*Convert as": convert(
            perceptron(), [WeightDecay()], response="gate"
        ),
        r"\(name, low, high\)": convert(perceptron(), [WeightDecay(range=(0.0, 1.0))]),
        r"those of \['SGD', 'SGD'\] .*this run \['SGD', 'Adam'\]": convert(
            perceptron(), [WeightDecay()], response_optimizer=adam
        ),
    }
    for message, other in others.items():
        before = stored(other.state_dict())
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(state)
        assert same(other.state_dict(), before)
    with pytest.raises(UsageError, match=r"must come from `stn\.state_dict\(\)`, but lacks"):
        convert(perceptron(), [WeightDecay()]).load_state_dict({"model": {}})


def test_restored_buffers_do_not_bring_back_old_values():
    model = stnify.stnify(perceptron(0.2), [Dropout()]).model
    model.hyperparameters.set_values({"dropout": 0.7})
    with model._stnify.buffers_restored():
        assert model.hyperparameters.current[0] == pytest.approx(0.7)
    assert model.hyperparameters.current[0] == pytest.approx(0.7)


# Norms of weights that leave the weight they computed on the module, as hooks of PyTorch's do -----

HOOKS = {"weight": nn.utils.weight_norm, "spectral": nn.utils.spectral_norm}
WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("affine", [False, True], ids=["matrices", "affine"])
@pytest.mark.parametrize("norm", HOOKS)
def test_models_whose_weights_are_normed_by_hooks_train_and_can_be_copied(norm, affine, way):
    torch.manual_seed(0)
    model = nn.Sequential(HOOKS[norm](nn.Linear(FEATURES, 5)), nn.Tanh(), nn.Linear(5, 4))
    stn = convert(model, [WeightDecay()], affine=affine)
    for batch in training_batches()[:3]:
        stn.step(batch)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(model)
    inputs, twin = torch.randn(4, FEATURES), WAYS[way](stn.model)
    assert same(dict(twin.state_dict()), dict(stn.model.state_dict()))
    assert torch.equal(twin.train()(inputs), stn.model.train()(inputs))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not torch.equal(twin(inputs), stn.model(inputs))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("affine", [False, True], ids=["matrices", "affine"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_tangents_of_weights_normed_by_hooks_agree_with_differences(affine, dim):
    torch.manual_seed(0)
    norm = nn.utils.weight_norm(nn.Linear(FEATURES, 5), dim=dim)
    stn = convert(nn.Sequential(norm, nn.Tanh(), nn.Linear(5, 4)), [WeightDecay()], affine=affine)
    assert_tangent_matches_differences(stn, torch.randn(4, FEATURES))
