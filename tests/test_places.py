"""Where hyperparameters act: groups that share one, order at one place, residual branches."""

import warnings

import pytest
import timm
import torch
from cases import convert, perceptron
from torch import nn

from stnify import (
    DeclarationError,
    DropConnect,
    Dropout,
    DropPath,
    GaussianNoise,
    TemporalActivationPenalty,
    WeightDecay,
    stnify,
)
from stnify.tunable import pass_inputs

# Groups -------------------------------------------------------------------------------------------


def deep():
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)], nn.Linear(6, 3))


def columns(declaration):
    return [column.name for column in stnify(deep(), [declaration]).plan.columns]


def test_groups_share_a_hyperparameter():
    early_and_late = {"early": ("0", "1"), "late": "3"}
    found = columns(Dropout(after="[0123]", tie=early_and_late))
    assert found == ["dropout.early", "dropout", "dropout.late"]
    plan = stnify(deep(), [Dropout(after="[0123]", tie=early_and_late)]).plan
    assert {site.name: site.column for site in plan.noises} == {
        "0": "dropout.early",
        "1": "dropout.early",
        "2": "dropout",
        "3": "dropout.late",
    }


def test_what_is_in_no_group_goes_by_per_layer():
    found = columns(WeightDecay(tie={"early": ("0", "1")}, per_layer=True))
    assert found == ["weight_decay.early"] + [f"weight_decay.{i}" for i in (2, 3, 4)]


def test_groups_of_weights_go_by_their_names_too():
    found = columns(DropConnect(tie={"last": "4.weight"}))
    assert found == ["drop_connect", "drop_connect.last"]


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        ({"none": "nowhere"}, r"group of `tie` must match.*'none' \('nowhere'\) matches none"),
        ({"one": "0", "two": "[01]"}, r"one group of `tie`, but '0' is in 'one' and 'two'"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tie, message):
    with pytest.raises(DeclarationError, match=message):
        columns(Dropout(after="[01]", tie=tie))


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_at_one_place_noise_acts_in_the_order_it_is_declared_in(reverse):
    noises = [Dropout(after="0", init=0.5), GaussianNoise(after="0", init=0.5)]
    stn = stnify(perceptron(), noises[::-1] if reverse else noises)
    graph = stn.model._stnify.graph
    calls = [str(node.target) for node in graph._stnify_graph.nodes if "noises" in str(node)]
    kinds = [type(graph.get_submodule(target)).__name__ for target in calls]
    expected = ["TunedDropout", "TunedGaussianNoise"]
    assert kinds == (expected[::-1] if reverse else expected)
    hidden = []
    stn.model.get_submodule("1").register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    stn.model.train()(torch.randn(64, 6))
    # Noise that is added last leaves no exact zeros.
    assert ((hidden[0] == 0).float().mean() > 0.3) == reverse


def test_steps_may_come_first():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs):
            return self.head(self.rnn(inputs.expand(5, -1, -1).cumsum(0))[0][-1])

    stn = convert(Reader(), [TemporalActivationPenalty(after="rnn", time=0)])
    for batch in stn.train_loader:
        stn.step(batch)
    assert str(stn.model._stnify.recorders[0].layout) == "second"


# Residual branches --------------------------------------------------------------------------------

BLOCKS = {
    "resnet50": 16,
    "convnext_tiny": 18,
    "vit_tiny_patch16_224": 24,
    "swin_tiny_patch4_window7_224": 24,
    "efficientnet_b0": 9,
}
SMALL = {
    "resnet50": {"zero_init_last": False},  # else its branches add nothing
    "convnext_tiny": {"ls_init_value": 1.0},  # likewise
    "vit_tiny_patch16_224": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "drop_path_rate": 0.0},
    "efficientnet_b0": {},
}


@pytest.fixture(scope="module", params=BLOCKS)
def dropping(request):
    """A model built with rate nought, and what it converts to."""
    name = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        model = timm.create_model(name, num_classes=5, **SMALL[name])
    size = SMALL[name].get("img_size", 32)
    return name, model, stnify(model, [DropPath(init=0.3)], seed=0), torch.randn(2, 3, size, size)


def run(stn, images, rate):
    """Run the graph in train mode at one rate, and leave buffers and draws as they were."""
    state = stn.model._stnify.stream.state_dict()
    with torch.no_grad(), stn.model._stnify.buffers_restored(), stn.model._stnify.stream.active():
        found = stn.model.train()._stnify.graph(
            images, **pass_inputs(constrained=torch.tensor([rate]))
        )
    stn.model._stnify.stream.load_state_dict(state)
    return found


def test_every_residual_block_has_its_drop_path(dropping):
    name, _, stn, _ = dropping
    assert len(stn.plan.noises) == BLOCKS[name]
    assert all(site.place == "operand" for site in stn.plan.noises)


def test_at_nought_it_is_the_model(dropping):
    _, model, stn, images = dropping
    model.train()
    with torch.no_grad(), stn.model._stnify.buffers_restored():
        torch.manual_seed(0)
        expected = model(images)
    assert torch.equal(run(stn, images, 0.0), expected)
    assert not torch.equal(run(stn, images, 0.9), expected)


def test_near_one_the_branches_are_gone(dropping):
    """The output is that of the model whose every branch is multiplied by nought."""
    _, _, stn, images = dropping
    gone = run(stn, images, 1 - 1e-7)
    hooks = [
        site.register_forward_hook(lambda module, args, output: 0.0 * args[0])
        for site in stn.model._stnify.noises.values()
    ]
    assert torch.equal(gone, run(stn, images, 0.0))
    for hook in hooks:
        hook.remove()
    assert not torch.equal(gone, run(stn, images, 0.0))


def test_the_rate_may_grow_with_depth():
    model = timm.create_model("resnet18", num_classes=5)
    factors = [site.factor for site in stnify(model, [DropPath(by_depth=True)]).plan.noises]
    assert factors == [pytest.approx(i / 7) for i in range(8)]
    assert {site.factor for site in stnify(model, [DropPath()]).plan.noises} == {1.0}


def test_existing_drop_path_is_taken_over_rather_than_doubled():
    model = timm.create_model("convnext_atto", num_classes=5, drop_path_rate=0.2)
    plan = stnify(model, [DropPath()]).plan
    assert {site.place for site in plan.noises} == {"replace"}
    names = [n for n, m in model.named_modules() if type(m).__name__ == "DropPath"]
    assert [site.name for site in plan.noises] == names
    assert plan.columns[0].init == pytest.approx(
        sum(model.get_submodule(name).drop_prob for name in names) / len(names)
    )


def test_drop_path_needs_a_branch():
    with pytest.raises(DeclarationError, match="acts on residual branches, but no addition"):
        stnify(perceptron(), [DropPath()])
