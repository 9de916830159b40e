"""Whatever a user's model and its forward call their things, stnify leaves them the names."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stnify import UnsupportedModuleError, UsageError, stnify
from stnify.tunable import REACHABLE, TunableModule, Tunables

WORDS = sorted(
    {name for name in (*vars(Tunables), *REACHABLE) if not name.startswith("__")}
    | {"attach", "tunables", "users", "running", "graph", "code", "meta", "recompile", "original"}
    | {"stream", "_graph", "_code", "_original", "_stream", "_inputs", "_compiled", "_fixed"}
)
FREE = [word for word in WORDS if not hasattr(nn.Module(), word)]


class Part(nn.Module):
    """Its only layer, parameter and buffer have a given name."""

    def __init__(self, name, kind):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.name = name
        if kind == "module":
            self.add_module(name, nn.Linear(6, 6))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(torch.randn(6, 6)))
        elif kind == "buffer":
            self.register_buffer(name, torch.randn(6, 6))
        else:
            setattr(self, name, torch.randn(6, 6))

    def forward(self, x):
        found = getattr(self, self.name)
        return self.head(found(x) if isinstance(found, nn.Module) else F.linear(x, found))


def converted(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    batch = torch.randn(4, 6), torch.randn(4, 3)
    stn = stnify(
        model,
        {"weight_decay": 1e-3},
        optimizer=optimizer,
        criterion=F.mse_loss,
        valid_loader=[batch],
        train_steps=1,
        warmup_steps=0,
        response_every=1,
        seed=0,
        **options,
    )
    return stn, batch


def trains(stn, batch):
    """Train, and expect every parameter of the user to have moved."""
    general = {n: p.clone() for n, p in stn.model._stnify.general_parameters().items()}
    for _ in range(2):
        stn.step(batch)
    assert stn.counters.validation_steps == 2
    for name, parameter in stn.model._stnify.general_parameters().items():
        assert not torch.equal(parameter, general[name]), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "module") for name in FREE],
        *itertools.product(
            ["users", "graph", "meta", "_graph", "_code"], ["parameter", "buffer", "tensor"]
        ),
    ],
)
def test_a_part_may_have_any_name(name, kind):
    torch.manual_seed(0)
    model = Part(name, kind)
    stn, batch = converted(model)
    assert getattr(stn.model, name) is getattr(model, name)
    expected = model(batch[0])
    for tunable in (stn.model, copy.deepcopy(stn.model), pickle.loads(pickle.dumps(stn.model))):
        assert torch.equal(tunable.train()(batch[0]), expected)
        assert torch.equal(tunable.eval()(batch[0]), expected)
    stn.model.train()
    trains(stn, batch)
    assert not torch.equal(stn.model(batch[0]), expected)


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer", "tensor"])
def test_the_names_of_what_is_added_are_refused(kind):
    with pytest.raises(UnsupportedModuleError, match=r"Part has '_stnify_graph'\. Rename it"):
        converted(Part("_stnify_graph", kind))


def test_names_that_are_tried_are_those_of_the_library():
    assert {"general_parameters", "set_aside", "predict", "hyperparameters"} <= set(FREE)
    public = [n for n in vars(TunableModule) if not n.startswith("_")]
    assert set(public) <= set(dir(nn.Module))


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self._inputs = "mine"

    def users(self):
        return "mine"

    def hyperparameters(self):
        return "mine"

    def forward(self, x):
        return self.layer(x)


def test_methods_and_attributes_of_the_user_win():
    model = Methods()
    stn, batch = converted(model)
    assert stn.model.users() == stn.model.hyperparameters() == stn.model._inputs == "mine"
    stn.model._inputs = "still mine"
    assert model._inputs == "still mine"
    trains(stn, batch)
    assert list(stn.model.response_parameters()) == list(stn.model._stnify.response_parameters())


def test_names_the_user_leaves_free_are_reachable():
    stn, _ = converted(nn.Sequential(nn.Linear(6, 3)))
    assert stn.model.hyperparameters is stn.hyperparameters
    assert list(stn.model.general_parameters()) == ["0.weight", "0.bias"]
    with pytest.raises(AttributeError, match="no attribute 'set_aside'"):
        stn.model.set_aside  # noqa: B018
    with pytest.raises(UsageError, match="'other' would be set"):
        stn.model.other = nn.Linear(2, 2)


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, constrained, linearized, response_input=2.0):
        return self.layer(constrained) * linearized * response_input


def test_arguments_of_forward_may_have_any_name():
    model, inputs, factor = Arguments(), torch.randn(4, 6), torch.rand(4, 1)
    stn = stnify(model, {"weight_decay": 1e-3}, example_inputs=(inputs, factor))
    expected = model(inputs, factor)
    assert torch.equal(stn.model.train()(inputs, factor), expected)
    assert torch.equal(stn.model(inputs, linearized=factor), expected)
    assert not torch.equal(stn.model(inputs, linearized=2 * factor), expected)


# A plain tensor attribute of the root ----------------------------------------------------------


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.mean = torch.randn(6)

    def forward(self, x):
        return self.layer(x - self.mean)


@pytest.mark.parametrize("change", ["none", "in place", "replaced", "replaced on the tunable"])
def test_a_plain_tensor_of_the_root_is_read_in_each_pass(change):
    torch.manual_seed(0)
    model = Centred()
    stn, batch = converted(model)
    before = model(batch[0])
    trains(stn, batch)
    if change == "in place":
        model.mean.mul_(2)
    elif change == "replaced":
        model.mean = torch.randn(6)
    elif change == "replaced on the tunable":
        stn.model.mean = torch.randn(6)
    expected = model(batch[0])
    assert not torch.equal(expected, before)
    assert torch.equal(stn.model.train()(batch[0]), expected)
    twin = copy.deepcopy(stn.model)
    model.mean = torch.zeros(6)
    assert torch.equal(twin(batch[0]), expected)
    assert not torch.equal(stn.model(batch[0]), expected)


def test_a_plain_tensor_of_the_root_may_be_moved():
    model = Centred()
    stn, batch = converted(model)
    stn.model.double()
    model.mean = model.mean.double()
    assert torch.equal(stn.model.train()(batch[0].double()), model(batch[0].double()))


def test_a_plain_tensor_of_the_root_is_verified():
    stn = stnify(Centred(), {"weight_decay": 1e-3}, example_inputs=torch.randn(4, 6))
    assert str(stn.plan.weights[0].layout) != ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_plain_tensor_of_the_root_is_read_by_compiled_code():
    torch._dynamo.reset()
    model, batch = Centred(), torch.randn(4, 6)
    graph = stnify(model, {"weight_decay": 1e-3}).model._stnify.graph
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(batch), model(batch))
        before, model.mean = model(batch), torch.randn(6)
        assert not torch.allclose(model(batch), before, rtol=1e-2)
