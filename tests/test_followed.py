"""What was added follows the user's modules: their modes, their calls, their outputs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import batches, convert, perceptron
from torch import nn

from stnify import (
    CutMix,
    DeclarationError,
    DropConnect,
    Dropout,
    DropPath,
    GaussianNoise,
    Hyperparameter,
    JacobianPenalty,
    LabelSmoothing,
    Rotate,
    ShapeError,
    WeightDecay,
    stnify,
)


class Backbone(nn.Module):
    """A part that drops by a module, and by a function of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs):
        return F.dropout(self.drop(self.first(inputs)), 0.5, self.training)


@pytest.mark.parametrize(
    "declared",
    [
        [Dropout()],
        [Dropout(at="0.drop")],
        [Dropout(at="0.drop", init=0.01), DropConnect(at="0.**", init=0.5)],
        [Dropout(init=0.01), GaussianNoise(after="0.first", init=0.5)],
    ],
)
def test_a_part_in_eval_mode_is_without_noise(declared):
    model = stnify(nn.Sequential(Backbone(), nn.Linear(8, 3)), declared, seed=0).model.train()
    inputs = torch.randn(16, 6)
    assert not torch.equal(model(inputs), model(inputs))
    model.get_submodule("0").eval()
    assert torch.equal(model(inputs), model(inputs))
    model.train()
    assert not torch.equal(model(inputs), model(inputs))


def test_dropout_that_is_always_off_stays_off():
    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 3)

        def forward(self, inputs):
            return self.last(F.dropout(inputs, 0.5, False))

    with pytest.raises(DeclarationError, match="calls none where they can be replaced"):
        stnify(Off(), [Dropout()])


def test_noise_that_is_never_called_is_told_of():
    class Reading(nn.Module):
        """Uses the rate of a module it does not call, and cannot be traced."""

        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.3), nn.Linear(6, 3)

        def forward(self, inputs):
            inputs = inputs if inputs.sum() > 0 else -inputs
            return self.last(F.dropout(inputs, self.drop.p, self.training))

    with pytest.warns(UserWarning, match=r"tuned noise at \['drop'\] has no effect"):
        stnify(Reading(), [Dropout()], example_inputs=torch.randn(4, 6))


def test_depth_keeps_the_ratios_of_the_models_own_rates():
    model = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.2)
    own = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    plan = stnify(model, [DropPath(by_depth=True)]).plan
    start = plan.columns[0].init
    assert [site.factor * start for site in plan.noises] == pytest.approx(own)


@pytest.mark.parametrize("declaration", [WeightDecay, DropConnect])
@pytest.mark.parametrize("patterns", [{"exclude": "typo*"}, {"at": ["0", "typo*"]}])
def test_every_pattern_of_weights_must_match(declaration, patterns):
    with pytest.raises(DeclarationError, match=r"'typo\*' matches none"):
        stnify(perceptron(), [declaration(**patterns)])


@pytest.mark.parametrize("name", ["LR", "max_lr", "head-lr", "Momentum"])
def test_learning_rates_have_many_names(name):
    with pytest.raises(DeclarationError, match="must change the training loss"):
        stnify(perceptron(), [Hyperparameter(name, 0.1, (0, 1))])


class Two(nn.Module):
    """A classifier with an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.body(inputs).tanh()
        return self.head(hidden), self.aux(hidden)


def test_loss_terms_reach_models_of_several_outputs():
    """`forward_loss` calls `stn.criterion` with the part it is about."""

    def loss(model, batch):
        main, aux = model(batch[0])
        return stn.criterion(main, batch[1]) + 0.3 * F.cross_entropy(aux, batch[1])

    stn = convert(Two(), [LabelSmoothing(init=0.2)], forward_loss=loss)
    before = stn.values()
    for batch in batches():
        stn.step(batch)
    assert stn.values() != before
    with pytest.raises(ShapeError, match=r"must return one tensor for.*Pass `forward_loss=` as we"):
        convert(Two(), [LabelSmoothing()]).step(next(iter(batches())))
    with pytest.raises(DeclarationError, match="needs `criterion=` beside"):
        stnify(Two(), [LabelSmoothing()], forward_loss=loss)


@pytest.mark.parametrize("kind", [CutMix, Rotate])
def test_targets_for_each_pixel_do_not_move(kind):
    model = nn.Conv2d(3, 4, 1)
    stn = stnify(model, [kind()], criterion=F.cross_entropy)
    prediction = stn.model.train()(torch.rand(2, 3, 5, 5))
    with pytest.raises(ShapeError, match="targets for each pixel must go where the pixels go"):
        stn.criterion(prediction, torch.zeros(2, 5, 5, dtype=torch.long))


def test_a_jacobian_needs_real_inputs():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(12, 3))
    stn = convert(model, [JacobianPenalty()])
    batch = torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ShapeError, match="needs inputs to differentiate in"):
        stn.step(batch)
