"""Code that does something else in training, or more than it returns: it runs, as it is."""

import pytest
import torch
import torch.nn.functional as F
from cases import IDLE, convert
from torch import nn

from stnify import Dropout, TraceError, UnsupportedModuleError
from stnify.tunable import evaluating, pass_inputs


def layers(*sizes):
    return nn.ModuleList(nn.Linear(*pair) for pair in sizes)


class Module(nn.Module):
    """Two layers in a row and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = layers((6, 6), (6, 6), (6, 2))


class HeadOfTraining(Module):
    def forward(self, x):
        features = self.first(x).relu()
        return self.second(features) if self.training else self.head(features)


class OneMoreOutput(Module):
    def forward(self, x):
        features = self.first(x).relu()
        return (self.head(features), self.second(features)) if self.training else features


class OtherOrder(Module):
    def forward(self, x):
        pair = self.first(x), self.second(x)
        return pair if self.training else pair[::-1]


class OtherFactor(Module):
    def forward(self, x):
        return self.first(x) * (2.0 if self.training else 1.0)


class OneMoreLayer(Module):
    def forward(self, x):
        features = self.first(x)
        if self.training:
            features = self.second(features)
        return features


class Inside(nn.Module):
    """Another module around one of them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.plain = inner, nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(self.plain(x))


def tensors(output):
    return list(output) if isinstance(output, tuple) else [output]


OF_THE_MODE = (HeadOfTraining, OneMoreOutput, OtherOrder, OtherFactor, OneMoreLayer)


@pytest.mark.parametrize("make", OF_THE_MODE)
@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
def test_what_depends_on_the_mode_is_itself_in_both(make, around):
    torch.manual_seed(0)
    model = around(make())
    x = torch.randn(4, 6)
    expected = {mode: tensors(model.train(mode)(x)) for mode in (True, False)}
    stn = convert(model, [IDLE], example_inputs=x)
    for mode, outputs in expected.items():
        found = tensors(stn.model.train(mode)(x))
        assert all(map(torch.equal, found, outputs))
    assert {site.way for site in stn.plan.weights} >= {"swap"}
    differs = expected[True][0].shape != expected[False][0].shape
    assert differs or not torch.equal(expected[True][0], expected[False][0])


def test_noise_that_is_off_in_eval_mode_keeps_its_module_traced():
    class Functional(Module):
        def forward(self, x):
            return F.dropout(self.first(x), 0.5, self.training)

    assert {site.way for site in convert(Functional(), [IDLE]).plan.weights} == {"module"}


def test_a_model_can_be_named_a_leaf():
    model = Inside(nn.Linear(6, 2))
    assert {site.way for site in convert(model, [IDLE], leaves=[""]).plan.weights} == {"swap"}
    assert {site.way for site in convert(model, [IDLE]).plan.weights} == {"module"}


class Auxiliary(Module):
    """Leaves a loss in a list, as mixtures of experts do."""

    def __init__(self, holder):
        super().__init__()
        self.holder = holder

    def forward(self, x):
        gates = self.first(x).softmax(-1)
        loss = gates.mean(0).square().sum()
        match self.holder:
            case list():
                self.holder.append(loss)
            case dict():
                self.holder["loss"] = loss
            case set():
                self.holder.add(loss)
        return self.head(gates)


@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
@pytest.mark.parametrize("kind", [list, dict, set])
def test_what_code_keeps_is_kept_in_training_too(kind, around):
    model = Auxiliary(kind())
    stn = convert(around(model), [IDLE])
    assert not model.holder
    stn.model(torch.randn(4, 6))
    (loss,) = model.holder.values() if kind is dict else model.holder
    assert loss.requires_grad


class Cache(Module):
    """Keeps what does not change in eval mode, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(6)), {}

    def forward(self, x):
        if self.training:
            table = self.table.exp()
        else:
            if "table" not in self.cache:
                self.cache["table"] = self.table.exp()
            table = self.cache["table"]
        return self.first(x) * table


def test_what_is_kept_in_eval_mode_only_is_traced():
    model, x = Cache(), torch.randn(4, 6)
    stn = convert(model, [IDLE], example_inputs=x)
    assert {site.way for site in stn.plan.weights} == {"module"}
    model.cache.clear()
    stn.model.eval()(x)
    assert torch.equal(model.cache["table"], model.table.exp())


class Constrained(Module):
    """Keeps its weight's norm below one, as networks of EEG do."""

    def forward(self, x):
        self.first.weight.data = torch.renorm(self.first.weight.data, 2, 0, 0.1)
        return self.head(self.first(x))


@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
def test_what_code_sets_on_a_tensor_is_set_in_training_too(around):
    model = Constrained()
    stn = convert(around(model), [IDLE])
    before = model.first.weight.norm(dim=1)
    assert (before > 0.2).any()
    stn.model(torch.randn(4, 6))
    assert (model.first.weight.norm(dim=1) < 0.11).all()


class ByType(Module):
    """Another branch for what is no tensor, such as fx's stand-in, but in training only."""

    def forward(self, x):
        usual = self.training and type(x) is torch.Tensor
        return self.first(x) if usual else self.second(x)


def test_a_difference_in_train_mode_is_told():
    x = torch.randn(4, 6)
    model = ByType()
    with pytest.warns(UserWarning, match="in train mode, but its output differs"):
        stn = convert(model, [IDLE], example_inputs=x)
    assert torch.equal(stn.model(x), model.first(x))
    stn = convert(ByType(), [IDLE])
    with pytest.raises(TraceError, match="in train mode, but its output differs"):
        stn.step((x, torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize("noise", [nn.Dropout(0.5), nn.AlphaDropout(0.5)])
def test_noise_is_no_difference(noise):
    model = nn.Sequential(nn.Linear(6, 6), noise, nn.BatchNorm1d(6), nn.Linear(6, 2))
    hparams = [Dropout(at="1", init=0.3)] if type(noise) is nn.Dropout else [IDLE]
    convert(model, [*hparams], example_inputs=torch.randn(4, 6))


class Fold(Module):
    """Folds time into rows, time first in the modes named."""

    def __init__(self, *time_first):
        super().__init__()
        self.time_first = time_first

    def forward(self, x):
        batch, time, features = x.shape
        if self.training not in self.time_first:
            return self.first(x.reshape(batch * time, features)).view(batch, time, -1)
        rows = self.first(x.transpose(0, 1).reshape(time * batch, features))
        return rows.view(time, batch, -1).transpose(0, 1)


@pytest.mark.parametrize(
    ("modes", "word"),
    [
        ((), "batch x 5"),
        ((True, False), "interleaved x 5"),
        ((True,), "shared (otherwise in train mode)"),
    ],
)
def test_rows_are_measured_in_both_modes(modes, word):
    stn = convert(Fold(*modes), [IDLE], example_inputs=torch.randn(4, 5, 6))
    assert {site.name: site.layout for site in stn.plan.weights}["first"] == word


class Train(Module):
    """Does something to the rows in training only."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.head(self.change(self.first(x)) if self.training else self.first(x))


def permuted(features):
    return features[torch.randperm(len(features))]


def mixed(features):
    return features + features[torch.randperm(len(features))]


def normalised(features):
    return features - features.mean(0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (normalised, "batch"),
        (mixed, "batch"),
        (lambda features: F.dropout(features), "batch"),
        (lambda features: features.roll(1, 0), "shared (otherwise in train mode)"),
    ],
)
def test_what_mixes_rows_in_training_leaves_them_whose_they_are(change, word):
    torch.manual_seed(0)
    stn = convert(Train(change), [IDLE], example_inputs=torch.randn(8, 6))
    assert {site.name: site.layout for site in stn.plan.weights}["head"] == word


def leak(stn, x):
    """Return how far each example's prediction moves with the perturbation of the second."""
    open_gates(stn)
    given = torch.randn(len(x), 1)
    other = given.clone()
    other[1] += 1
    with torch.no_grad(), evaluating(stn.model):
        ends = [stn.model._stnify.graph(x, **pass_inputs(each, None)) for each in (given, other)]
    return (ends[0] - ends[1]).flatten(1).abs().amax(1)


def open_gates(stn):
    with torch.no_grad():
        for parameter in stn.model._stnify.response_parameters().values():
            parameter.normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("modes", [(), (True, False)], ids=["batch first", "time first"])
def test_a_first_batch_of_length_one_says_nothing_of_the_order_of_rows(modes):
    stn = convert(Fold(*modes), [IDLE], example_inputs=torch.randn(4, 1, 6))
    moved = leak(stn, torch.randn(4, 1, 6))
    assert moved[1] > 0
    assert moved[[0, 2, 3]].eq(0).all()
    assert leak(stn, torch.randn(4, 5, 6)).gt(0).all(), "all share the mean"
    stn = convert(Fold(*modes), [IDLE], example_inputs=torch.randn(4, 2, 6))
    moved = leak(stn, torch.randn(4, 5, 6))
    assert moved[1] > 0
    assert moved[[0, 2, 3]].eq(0).all()


class Momentum(Module):
    """Keeps an average of its first layer's weight in its second's, as MoCo does."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.second.weight.mul_(0.9).add_(self.first.weight, alpha=0.1)
        return self.first(x) + self.second(x).detach()


class TracedMomentum(Module):
    """The same in every mode, so that the trace of it changes the weight as well."""

    def forward(self, x):
        with torch.no_grad():
            for one, other in zip(self.first.parameters(), self.second.parameters(), strict=True):
                other.mul_(0.9).add_(one, alpha=0.1)
        return self.first(x) - self.second(x)


@pytest.mark.parametrize("kind", [Momentum, TracedMomentum])
def test_code_that_changes_a_parameter_is_refused_and_undone(kind):
    model = kind()
    before = model.second.weight.clone()
    with pytest.raises(UnsupportedModuleError, match=r"'second\.weight' is changed by its code"):
        convert(model, [IDLE], example_inputs=torch.randn(4, 6))
    assert torch.equal(model.second.weight, before)
    model(torch.randn(4, 6))
    assert not torch.equal(model.second.weight, before)


class Clamped(Module):
    """Clamps its weight, and takes another branch for what is no tensor, such as fx's stand-in."""

    def forward(self, x):
        self.first.weight.data.clamp_(-0.1, 0.1)
        return self.first(x) if type(x) is torch.Tensor else self.second(x)


def test_a_parameter_is_put_back_also_where_the_proof_fails():
    model, x = Clamped(), torch.randn(4, 6)
    before = model.first.weight.clone()
    with pytest.raises(UnsupportedModuleError, match=r"'first\.weight' is changed by its code"):
        convert(model, [IDLE], example_inputs=x)
    assert torch.equal(model.first.weight, before)
    model(x)
    assert not torch.equal(model.first.weight, before)


# Code that asks for types -------------------------------------------------------------------------


class OnTensors(Module):
    """Drops only what is a tensor, as code does that takes several kinds of input."""

    def __init__(self, asks):
        super().__init__()
        self.dropout, self.asks = nn.Dropout(0.5), asks

    def forward(self, x):
        return self.head(self.dropout(x) if self.asks(self.first(x)) else x)


def ask_is_tensor(x):
    return torch.is_tensor(x)


def ask_kinds(x):
    return isinstance(x, (float, torch.Tensor)) and not isinstance(x, list)


def ask_union(x):
    return isinstance(x, torch.Tensor | None)


def ask_size(x):
    return not isinstance(x.shape[0], torch.Tensor) and not torch.is_tensor(x.dim() + len(x))


@pytest.mark.parametrize("asks", [ask_is_tensor, ask_kinds, ask_union, ask_size])
def test_what_acts_on_tensors_acts_in_training(asks):
    torch.manual_seed(0)
    model, x = OnTensors(asks), torch.randn(4, 6)
    stn = convert(model, [IDLE], example_inputs=x)
    assert not stn.plan.traced.opaque
    stn.model.train()
    assert not torch.equal(stn.model(x), stn.model(x))
    model.dropout.p = 0.0  # negative control
    assert torch.equal(stn.model(x), stn.model(x))


class OfAnLSTM(Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(6, 6, batch_first=True)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        found = self.recurrent(x)
        if isinstance(found, tuple):
            found = found[0]
        return self.head(self.dropout(self.first(found)))


@pytest.mark.parametrize("declared", [IDLE, Dropout(init=0.2)])
def test_the_type_of_what_a_module_returns_is_asked_of_the_module(declared):
    model, x = OfAnLSTM(), torch.randn(4, 5, 6)
    stn = convert(model, [declared], example_inputs=x)
    assert "asks for the type of what a module returns" in stn.plan.traced.opaque[""]
    assert torch.equal(stn.model.eval()(x), model(x))


def test_no_stand_in_is_left_behind():
    before = torch.is_tensor
    convert(OnTensors(ask_kinds), [IDLE], example_inputs=torch.randn(4, 6))
    assert torch.is_tensor is before
    assert "isinstance" not in globals()


def test_backward_hooks_do_not_run_in_perturbed_passes():
    """Also where the module that has them is copied, because tuned noise is inside."""
    calls = []
    model = nn.Sequential(nn.Linear(6, 6), OnTensors(ask_data))
    model[1].register_full_backward_hook(lambda *_: calls.append(1))
    batch = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    stn = convert(
        model, [Dropout(init=0.2)], valid_loader=[batch], warmup_steps=0, response_every=1
    )
    stn.step(batch)
    calls.clear()
    for _ in range(6):
        stn.step(batch)
    assert stn.model.response_parameters()
    assert len(calls) == 6


def ask_data(x):
    return bool(x.isfinite().all())
