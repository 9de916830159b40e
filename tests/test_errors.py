"""Every refusal says the rule, what was found, and the way out; and leaves everything as it was."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    FEATURES,
    IDLE,
    BranchingNetwork,
    batches,
    convert,
    convolutional_network,
    perceptron,
    train,
)
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from stnify import (
    DeclarationError,
    Dropout,
    Hyperparameter,
    ShapeError,
    StnifyError,
    TraceError,
    UnsupportedModuleError,
    UsageError,
    WeightDecay,
    stnify,
)
from stnify.errors import nearest


def first_batch(size=8):
    return next(iter(batches(batch_size=size)))


def state(stn):
    return {name: value.clone() for name, value in stn.model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_each_error_is_also_the_builtin_a_reader_expects():
    assert issubclass(DeclarationError, ValueError)
    assert issubclass(ShapeError, ValueError)
    assert issubclass(UnsupportedModuleError, TypeError)
    assert issubclass(TraceError, RuntimeError)
    assert issubclass(UsageError, RuntimeError)
    for error in (DeclarationError, ShapeError, UnsupportedModuleError, TraceError, UsageError):
        assert issubclass(error, StnifyError)


def test_nearest_names_close_choices_else_the_first_few():
    assert nearest("layer1", ["layer2", "stem", "layer10"], 2) == "'layer10', 'layer2'"
    assert nearest("xyz", ["stem", "head"], 1) == "'stem'"
    assert nearest("xyz", []) == "nothing"


# Declarations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [0.0, 0.95, -0.1, 1.0, math.nan, math.inf])
def test_a_start_must_lie_strictly_inside_the_range(init):
    with pytest.raises(
        DeclarationError,
        match=rf"`low < init < high` must hold for 'dropout', but got init={init} with "
        r"range=\(0.0, 0.95\)\. The ends lie at infinity.*start strictly inside",
    ):
        Dropout(init=init)
    Dropout(init=0.5)


@pytest.mark.parametrize("init", [0.0, -1e-9, math.inf, math.nan])
def test_a_weight_decay_must_be_positive_and_finite(init):
    with pytest.raises(DeclarationError, match="'weight_decay'"):
        WeightDecay(init=init)


def test_an_unbounded_start_must_be_finite():
    with pytest.raises(DeclarationError, match="`low < init < high` must hold for 'free'"):
        Hyperparameter("free", math.inf)
    with pytest.raises(DeclarationError, match="`low < init < high` must hold for 'free'"):
        Hyperparameter("free", math.nan)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5), (math.nan, 1.0), (0.0, math.nan)])
def test_a_range_must_be_an_interval(bounds):
    with pytest.raises(DeclarationError, match="`low < high` must hold for the range of 'dropout'"):
        Dropout(range=bounds)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(DeclarationError, match=f"`0 < scale < inf` .*'dropout', .*scale={scale}"):
        Dropout(scale=scale)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_must_be_a_word(name):
    with pytest.raises(DeclarationError, match="`name` must be a non-empty string, but got"):
        Dropout(name=name)


def test_a_free_hyperparameter_needs_a_start():
    with pytest.raises(DeclarationError, match="`init` must be given for Hyperparameter 'mine'"):
        Hyperparameter("mine")


def test_a_site_is_at_or_after():
    with pytest.raises(DeclarationError, match=r"either `at` or `after`.*Declare it twice"):
        Dropout(at="a", after="b")


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ([], "at least one hyperparameter must be declared, but got none"),
        ({}, "at least one hyperparameter must be declared, but got none"),
        ([Dropout(), WeightDecay("dropout")], r"must be unique, but \['dropout'\] .*Pass `name=`"),
        ({"dropuot": 0.1}, r"'dropuot' is no .*known are .*nearest 'dropout'"),
        ({"weight_decay": "much"}, "`init` of 'weight_decay' must be a number, but got 'much'"),
        (["dropout"], "must be declarations such as .*, but got 'dropout' of type str"),
        ([Dropout], "must be declarations such as"),
        ("dropout", "must be declarations such as"),
        (0.5, "a list of declarations or a dict, but got 0.5 of type float"),
    ],
)
def test_declarations_are_refused(hparams, message):
    with pytest.raises(DeclarationError, match=message):
        convert(perceptron(0.1), hparams)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (Dropout(at="layer*"), r"`at` of 'dropout' must .*, but 'layer\*' matches none.*'2'"),
        (Dropout(after="7"), r"`after` of 'dropout' must match .* Nearest: '[0-3]'"),
        (Dropout(after=nn.Conv2d), "`after` of 'dropout' must match .*Conv2d.* matches none"),
        (Dropout(exclude="**"), "`at` of 'dropout' less `exclude` must match"),
        (WeightDecay(at="3.wieght"), "`at` of 'weight_decay' .*Nearest: '3.weight'"),
        (WeightDecay(exclude=nn.Linear), "`at` of 'weight_decay' less `exclude` must match"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(declaration, message):
    with pytest.raises(DeclarationError, match=message):
        convert(perceptron(0.1), [declaration])


def test_a_kind_without_modules_to_take_over_says_how_to_insert_some():
    with pytest.raises(
        DeclarationError,
        match=r"existing modules \(Dropout.*Sequential calls none.*`after=PATTERN`",
    ):
        convert(perceptron(), [Dropout()])


def test_a_place_has_one_hyperparameter_of_a_kind():
    with pytest.raises(DeclarationError, match=r"'2' is claimed by \['dropout', 'other'\].*Narrow"):
        convert(perceptron(0.1), [Dropout(), Dropout("other", at="2")])
    with pytest.raises(
        DeclarationError, match=r"'0.weight' is claimed by \['weight_decay', 'other'\]"
    ):
        convert(perceptron(), [WeightDecay(), WeightDecay("other", at="0.weight")])


def test_names_made_for_each_layer_must_be_free():
    with pytest.raises(DeclarationError, match=r"must be unique, but \['decay.0'\]"):
        convert(
            perceptron(),
            [
                WeightDecay("decay", per_layer=True, at="0.weight"),
                Hyperparameter("decay.0", 0.5, (0.0, 1.0)),
            ],
        )


def test_a_penalty_needs_a_criterion_rather_than_forward_loss():
    message = r"'idle' acts in `stn.criterion`.*which `forward_loss`"
    with pytest.raises(DeclarationError, match=message):
        convert(perceptron(), [IDLE], forward_loss=lambda model, batch: torch.zeros(()))


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, F.relu, nn.Linear])
def test_a_model_must_be_a_module(model):
    with pytest.raises(UnsupportedModuleError, match=r"`model` must be an nn.Module, but got"):
        stnify(model, [WeightDecay()])


def test_a_model_without_a_layer_to_rewrite_is_refused():
    with pytest.raises(
        UnsupportedModuleError, match=r"Sequential must hold .*Linear.*there is none to rewrite"
    ):
        stnify(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), [Dropout(at="input")])


def test_a_frozen_model_names_the_layers_and_why():
    model = perceptron().requires_grad_(False)
    with pytest.raises(
        UnsupportedModuleError, match=r"none to rewrite: 0: frozen \(requires_grad=False\); 2: "
    ):
        stnify(model, [Dropout(at="input")])


def test_a_converted_model_is_refused():
    stn = convert(perceptron(), [WeightDecay()])
    with pytest.raises(UsageError, match=r"converted already\. Convert `stn.export\(\)`"):
        stnify(stn.model, [WeightDecay()])
    assert stnify(stn.export(), [WeightDecay()]).values() == stn.values()


def test_a_model_with_a_converted_part_is_refused():
    stn = convert(perceptron(), [WeightDecay()])
    with pytest.raises(UsageError, match=r"'0' of `model` was converted already"):
        stnify(nn.Sequential(stn.model, nn.Linear(3, 2)), [WeightDecay()])


def test_lazy_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 3), nn.LazyLinear(2))
    with pytest.raises(UnsupportedModuleError, match=r"'1.weight' is lazy. Run one batch through"):
        stnify(model, [WeightDecay()])


def test_meta_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(UnsupportedModuleError, match=r"'1.weight' is on the meta device.*to_empty"):
        stnify(model, [WeightDecay()])


def test_meta_buffers_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False, device="meta"))
    with pytest.raises(UnsupportedModuleError, match=r"'1.running_mean' is on the meta device"):
        stnify(model, [WeightDecay()])


def test_a_forward_that_cannot_be_traced_has_no_place_for_insertions():
    with pytest.raises(
        DeclarationError, match=r'`at="input"` needs a model .* can be traced: cann'
    ):
        convert(BranchingNetwork(), [Dropout(at="input")])
    convert(BranchingNetwork(), [Dropout()])


def test_a_graph_that_differs_from_the_model_is_refused_before_anything_moves():
    factor = [1.0]

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, 3)

        def forward(self, inputs):
            return factor[0] * self.linear(inputs)

    stn = convert(Moody(), [WeightDecay()])
    before = state(stn)
    factor[0] = 2.0
    with pytest.raises(TraceError, match=r"what Moody computes in eval mode.*`leaves=`"):
        train(*stn, 1)
    assert same(state(stn), before)


def test_an_optional_argument_keeps_its_default():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, 3)

        def forward(self, inputs, factor=1.0):
            return factor * self.linear(inputs)

    stn = convert(Optional(), [WeightDecay()])
    inputs = torch.randn(4, FEATURES)
    with pytest.raises(UsageError, match=r"'factor' of Optional.forward must keep its default 1.0"):
        stn.model(inputs, factor=2.0)
    assert torch.equal(stn.model(inputs, factor=1.0), stn.model(inputs))
    assert torch.equal(stn.model.eval()(inputs, factor=2.0), 2 * stn.model(inputs))


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dleta"}, r"`method` must be one of \[.*, but got 'dleta'; nearest: 'delta'"),
        ({"response": "half"}, "`response` must be 'full' or 'gate', but got 'half'"),
        (
            {"jitter": "gaussian"},
            "`schedule` and `jitter` need method=\"fixed\", but got .*'delta'",
        ),
        ({"method": "fixed", "jitter": "wild"}, "`jitter` must be one of .* but got 'wild'"),
        ({"criterion": None}, "`criterion` must be given with an optimizer"),
        ({"criterion": 3}, "`criterion` must be callable, but got int"),
        ({"forward_loss": 3}, "`forward_loss` must be callable, but got int"),
        ({"hyper_optimizer": 0.1}, "`hyper_optimizer` must be a function from .*, but got float"),
        ({"scale": 0.0}, "`0 < scale < inf` must hold, but got scale=0.0"),
        ({"scale": math.nan}, "`0 < scale < inf` must hold, but got scale=nan"),
        ({"response_lr": -1.0}, "`0 < response_lr < inf` must hold, but got response_lr=-1.0"),
        ({"train_steps": 2.5}, "`train_steps` must be an integer, but got 2.5"),
        ({"valid_steps": 1.5}, "`valid_steps` must be an integer, but got 1.5"),
        ({"response_every": "3"}, "`response_every` must be an integer, but got '3'"),
        ({"antithetic": "no"}, "`antithetic` must be a bool or None, but got 'no'"),
        ({"scale": "a"}, "`0 < scale < inf` must hold, but got scale='a'"),
        ({"total_steps": "20"}, "`total_steps` must be an integer of at least 1, but got '20'"),
        ({"total_steps": math.inf}, "`total_steps` must be an integer of at least 1, but got inf"),
        ({"epochs": 0}, "`epochs` must be an integer of at least 1, but got 0"),
        ({"epochs": 1, "total_steps": 5}, "give either `epochs` or `total_steps`.*epochs=1"),
        ({"epochs": 1, "train_loader": None}, "`epochs` needs a `train_loader` whose length"),
        ({"total_steps": 8, "warmup_steps": 8}, "`warmup_steps < total_steps` must hold, or noth"),
        ({"train_steps": 0}, "`train_steps >= 1` must hold, but got .*train_steps=0"),
        ({"valid_steps": 0}, "`valid_steps >= 1` must hold, but got .*valid_steps=0"),
        ({"warmup_steps": -1}, "`warmup_steps >= 0` must hold, but got .*warmup_steps=-1"),
        ({"response_every": 0}, "`response_every >= 1` must hold"),
        ({"response_fraction": 0.0}, "`0 < response_fraction <= 1` must hold"),
        ({"response_fraction": 1.1}, "`0 < response_fraction <= 1` must hold"),
        ({"response_fraction": math.nan}, "`0 < response_fraction <= 1` must hold"),
        ({"entropy_weight": -0.1}, "`0 <= entropy_weight < inf` must hold"),
        ({"entropy_weight": math.inf}, "`0 <= entropy_weight < inf` must hold"),
    ],
)
def test_arguments_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        convert(perceptron(), [WeightDecay()], **options)


def test_a_step_size_that_does_not_train_the_right_tensors_is_refused():
    stranger = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UsageError, match=r"must return a torch.optim.Optimizer of the tensors it"):
        convert(perceptron(), [WeightDecay()], hyper_optimizer=lambda _: Adam([stranger]))
    with pytest.raises(UsageError, match=r"must return a torch.optim.Optimizer of the tensors it"):
        convert(perceptron(), [WeightDecay()], hyper_optimizer=lambda parameters: parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: "sgd", r"must be a torch.optim.Optimizer, but got str"),
        (lambda model: LBFGS(model.parameters()), "LBFGS evaluates the loss again.*first-order"),
        (
            lambda model: SGD([nn.Parameter(torch.zeros(1))]),
            r"must hold all 4 trainable parameters of the model, but 4 are missing, "
            r"first '0.weight'.*model.parameters\(\)",
        ),
        (
            lambda model: SGD(model[0].parameters(), weight_decay=0.1),
            r"must hold all 4 .*, but 2 are missing, first '2.weight'.*requires_grad_\(False\)",
        ),
        (lambda model: convert(model, [WeightDecay()]).optimizer, "an STNOptimizer already"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(make, message):
    model = perceptron()
    optimizer = make(model)
    before = copy.deepcopy([dict(group) for group in getattr(optimizer, "param_groups", [])])
    with pytest.raises(UsageError, match=message):
        convert(model, [WeightDecay()], optimizer)
    after = [dict(group) for group in getattr(optimizer, "param_groups", [])]
    assert [list(group) for group in after] == [list(group) for group in before]
    assert [g["weight_decay"] for g in after if "weight_decay" in g] == [
        g["weight_decay"] for g in before if "weight_decay" in g
    ]


def test_an_optimizer_around_another_is_refused():
    class Lookahead(SGD):
        def __init__(self, base):
            super().__init__(base.param_groups)
            self.inner = base

    model = perceptron()
    with pytest.raises(UsageError, match=r"Lookahead wraps another \(inner\)"):
        convert(model, [WeightDecay()], Lookahead(SGD(model.parameters())))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_the_optimizer_cannot_be_copied(copied):
    with pytest.raises(UsageError, match=r"cannot be copied or pickled.*`stn.state_dict\(\)`"):
        copied(convert(perceptron(), [WeightDecay()]).optimizer)


# Loaders and batches ------------------------------------------------------------------------------


def empty_loader():
    return DataLoader(TensorDataset(torch.zeros(3, FEATURES)), batch_size=8, drop_last=True)


@pytest.mark.parametrize("which", ["train_loader", "valid_loader"])
def test_an_empty_loader_is_refused(which):
    with pytest.raises(
        UsageError, match=rf"`{which}` must yield at least one batch.*batch_size and drop_last"
    ):
        convert(perceptron(), [WeightDecay()], **{which: empty_loader()})
    with pytest.raises(UsageError, match=f"`{which}` must be iterable, but got int"):
        convert(perceptron(), [WeightDecay()], **{which: 3})


def test_an_iterator_cannot_be_the_validation_loader():
    with pytest.raises(UsageError, match=r"again and again, but got an iterator.*the DataLoader"):
        convert(perceptron(), [WeightDecay()], valid_loader=iter(batches()))


def test_an_exhausted_train_loader_is_refused_when_it_is_iterated_again():
    stn = convert(perceptron(), [WeightDecay()], train_loader=iter(batches(count=8)))
    train(*stn, 1)
    with pytest.raises(UsageError, match=r"train_loader must yield .*generator can be used once"):
        train(*stn, 1)


class Once:
    """An iterable that does not look like an iterator and ends for good."""

    def __init__(self, loader):
        self.batches = iter(loader)

    def __iter__(self):
        return self.batches


def test_an_exhausted_validation_loader_moves_nothing():
    stn = convert(perceptron(), [WeightDecay()], valid_loader=Once(batches(count=8)))
    train(*stn, 1)
    values = stn.values()
    with pytest.raises(UsageError, match=r"valid_loader must yield .*empty or exhausted"):
        train(*stn, 1)
    assert stn.values() == values


def test_a_step_needs_an_observed_batch_and_loses_nothing():
    stn = convert(perceptron(), [WeightDecay()])
    inputs, target = first_batch()
    F.cross_entropy(stn.model(inputs), target).backward()
    before = state(stn)
    message = r"none was observed\. Iterate over the train_loader.*stn.observe\(batch\)"
    with pytest.raises(UsageError, match=message):
        stn.optimizer.step()
    assert same(state(stn), before)
    assert stn.counters.training_steps == 0
    stn.observe((inputs, target))
    stn.optimizer.step()
    assert not same(state(stn), before)
    with pytest.raises(UsageError, match="none was observed"):
        stn.optimizer.step()  # each step needs a batch of its own


@pytest.mark.parametrize("penalty", [None, IDLE.penalty])
def test_a_declared_hyperparameter_that_the_loss_never_reads_is_refused(penalty):
    stn = convert(perceptron(), [Hyperparameter("mine", 0.5, (0.0, 1.0), penalty=penalty)])
    before = state(stn)
    with pytest.raises(UsageError, match=r"'mine' was declared but .*never used.*stn.criterion"):
        train(*stn, 1)
    assert same(state(stn), before)


def test_a_penalty_needs_the_batch():
    stn = convert(perceptron(), [IDLE])
    inputs, target = first_batch()
    with pytest.raises(
        UsageError, match=r"penalty of 'idle' needs the batch.*stn.observe\(batch\)"
    ):
        stn.criterion(stn.model(inputs), target)


def test_calls_that_need_what_was_not_given_say_so():
    bare = stnify(perceptron(), [WeightDecay()])
    with pytest.raises(UsageError, match="a step needs `optimizer=`"):
        bare.step(first_batch())
    with pytest.raises(UsageError, match=r"`stn\.criterion` needs `criterion=`"):
        bare.criterion(*first_batch())
    with pytest.raises(UsageError, match=r"`stn\.validation_step` needs `criterion=`"):
        bare.validation_step(first_batch())
    fixed = convert(perceptron(), [WeightDecay()], method="fixed")
    with pytest.raises(UsageError, match=r'method="fixed" does not tune'):
        fixed.validation_step(first_batch())
    stn = convert(perceptron(), [WeightDecay()])
    stn.model.eval()
    with pytest.raises(UsageError, match=r"the model is in eval mode: model.train\(\)"):
        stn.step(first_batch())


@pytest.mark.parametrize(
    ("criterion", "got"),
    [
        (
            lambda prediction, target: F.cross_entropy(prediction, target, reduction="none"),
            r"\(8,\)",
        ),
        (lambda prediction, target: 1.5, "float"),
        (lambda prediction, target: None, "NoneType"),
    ],
)
def test_a_criterion_must_return_one_number(criterion, got):
    stn = convert(perceptron(), [WeightDecay()], criterion=criterion)
    before = state(stn)
    message = rf"`criterion` must return one number, but got {got}. Use reduction='mean'"
    with pytest.raises(ShapeError, match=message):
        stn.step(first_batch())
    assert same(state(stn), before)
    with pytest.raises(ShapeError, match=message):
        train(*stn, 1)  # the loop's own loss is a number, stnify's is not
    assert same(state(stn), before)
    assert stn.counters.training_steps == 0
    with pytest.raises(ShapeError, match=message):
        stn.validation_step(first_batch())
    assert same(state(stn), before)


def test_a_forward_loss_must_return_one_number():
    stn = convert(
        perceptron(),
        [WeightDecay()],
        criterion=None,
        forward_loss=lambda model, batch: model(batch[0]),
    )
    with pytest.raises(
        ShapeError, match=r"`forward_loss` must return one number, but got \(8, 3\)"
    ):
        stn.step(first_batch())


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"x": torch.zeros(8, FEATURES)}, "dict"),
        ([torch.zeros(8, FEATURES)], "list of length 1"),
        ((torch.zeros(8, FEATURES), torch.zeros(8), torch.zeros(8)), "tuple of length 3"),
        (torch.zeros(2, FEATURES), "Tensor"),
    ],
)
def test_a_batch_of_another_kind_needs_forward_loss(batch, got):
    stn = convert(perceptron(), [WeightDecay()])
    before = state(stn)
    message = rf"\(inputs, target\) pairs, but got {got}\. Pass `forward_loss=fn"
    with pytest.raises(ShapeError, match=message):
        stn.step(batch)
    inputs, target = first_batch()
    stn._tuner.observed.clear()
    stn.model._stnify.remembered_inputs()  # or the batch would be refused for not being the model's
    stn.observe(batch)
    F.cross_entropy(stn.model(inputs), target).backward()
    with pytest.raises(ShapeError, match=message):
        stn.optimizer.step()
    assert same(state(stn), before)


def test_a_refused_batch_does_not_spoil_the_next_step():
    torch.manual_seed(0)
    model = perceptron(0.2)
    stn, other = (convert(copy.deepcopy(model), [Dropout()]) for _ in range(2))
    with pytest.raises(ShapeError, match="pairs"):
        stn.step([torch.zeros(8, FEATURES)])
    for batch in itertools.islice(batches(), 3):
        stn.step(batch)
        other.step(batch)
    assert same(state(stn), state(other))
    stn.step(first_batch())
    assert not same(state(stn), state(other))


def test_an_error_in_the_first_response_step_moves_nothing():
    calls = []

    def criterion(prediction, target):
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("mine")
        return F.cross_entropy(prediction, target)

    stn = convert(perceptron(0.3), [Dropout()], criterion=criterion)
    before = state(stn)
    stream = stn._tuner.stream.state_dict()
    inputs, target = first_batch()
    random_state = torch.get_rng_state()
    stn.observe((inputs, target))
    loss = F.cross_entropy(stn.model.eval()(inputs), target)
    stn.model.train()
    loss.backward()
    with pytest.raises(ZeroDivisionError, match="mine"):
        stn.optimizer.step()
    assert same(state(stn), before)
    assert same(stn._tuner.stream.state_dict(), stream)
    assert torch.equal(torch.get_rng_state(), random_state)
    stn.optimizer.step()  # the batch is still there
    assert not same(state(stn), before)
    assert stn.counters.training_steps == 1


def test_an_error_in_a_validation_step_leaves_the_hyperparameters_and_the_modes():
    stn = convert(convolutional_network(), [Dropout(after="3")])
    train(*stn, 2)
    before = state(stn)
    inputs, _ = first_batch()
    with pytest.raises(ValueError, match="batch_size"):
        stn.validation_step((inputs, torch.zeros(3, dtype=torch.long)))
    assert same(state(stn), before)
    assert all(module.training for module in stn.model.modules())
    assert stn.hyperparameters.active is None
    stn.validation_step(first_batch())
    assert not same(state(stn), before)


# Batches of one -----------------------------------------------------------------------------------


def parameters(stn):
    return {name: value.detach().clone() for name, value in stn.model.named_parameters()}


def normalised():
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("method", ["delta", "centered", "stn", "fixed"])
def test_a_batch_of_one_names_the_batch_norm(method):
    stn = convert(normalised(), [Dropout(after="0")], method=method)
    before = parameters(stn)
    with pytest.raises(
        ShapeError,
        match=r"BatchNorm '1.0' needs more than one value .*\[1, 4\].*larger.*drop_last=True",
    ):
        stn.step(first_batch(1))
    assert same(parameters(stn), before)
    assert stn.step(first_batch(2)) > 0
    assert not same(parameters(stn), before)
    assert stn.model.eval()(first_batch(1)[0]).shape == (1, 3)


def test_a_batch_norm_inside_an_untraced_forward_is_named_too():
    stn = convert(BranchingNetwork(), [Dropout()])
    with pytest.raises(ShapeError, match=r"BatchNorm 'norm' needs more than one value .*\[1, 8\]"):
        stn.step(first_batch(1))
    assert stn.step(first_batch(2)) > 0


def test_a_batch_of_one_in_the_response_step_names_the_batch_norm():
    stn = convert(normalised(), [Dropout(after="0")], verify=False)
    stn.observe(first_batch(1))
    inputs, target = first_batch()
    F.cross_entropy(stn.model(inputs), target).backward()
    with pytest.raises(ShapeError, match=r"BatchNorm '1.0' needs more than one value.*\(1, 4\)"):
        stn.optimizer.step()


def test_a_batch_of_one_image_has_enough_values():
    stn = convert(convolutional_network(), [Dropout(after="3")])
    assert stn.step(first_batch(1)) > 0


def test_other_errors_of_the_model_come_through_as_they_are():
    stn = convert(perceptron(), [WeightDecay()])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        stn.model(torch.zeros(2, FEATURES + 1))
    with pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(stn.model(torch.zeros(2, FEATURES)), torch.zeros(3, dtype=torch.long))


def test_a_response_step_that_fails_leaves_no_gradients_behind():
    def two_of_them(model, batch):
        return F.cross_entropy(model(batch[0].repeat(2, 1)), batch[1].repeat(2))

    stn = convert(perceptron(), [WeightDecay()], criterion=None, forward_loss=two_of_them)
    stn.observe(first_batch())
    with pytest.raises(ShapeError, match="one perturbation each"):
        stn.optimizer.step()
    assert all(p.grad is None for p in stn.model.response_parameters().values())


def test_a_validation_step_that_fails_forgets_nothing_of_what_the_loss_read():
    hparams = [
        Hyperparameter("idle", 0.5, (0.0, 1.0), penalty=lambda model, batch, value: 0.0 * value)
    ]
    stn = convert(perceptron(), hparams)
    stn.step(first_batch())
    with pytest.raises(ShapeError, match=r"\(inputs, target\) pairs"):
        stn.validation_step([first_batch()[0]])
    assert stn.hyperparameters.read == {"idle"}


class Centring(nn.Module):
    """Changes its input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return self.inner(inputs.sub_(inputs.mean(0)))


def test_a_batch_that_is_changed_in_place_is_refused_before_anything_moves():
    model = Centring()
    stn = convert(model, [WeightDecay()], verify=False)
    before = {name: p.detach().clone() for name, p in stn.model.named_parameters()}
    with pytest.raises(
        UsageError, match=r"a batch must stay .* changed it in place.*inplace=False"
    ):
        train(stn.model, stn.optimizer, stn.train_loader, 1)
    assert all(torch.equal(p, before[name]) for name, p in stn.model.named_parameters())


class Opaque:
    """Holds a tensor where nobody looks."""

    def __init__(self, value):
        self.value = value


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs):
        return Opaque(self.inner(inputs))


def test_a_prediction_without_tensors_is_refused():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).value, batch[1])

    stn = convert(Hiding(), [WeightDecay()], criterion=None, forward_loss=loss)
    with pytest.raises(ShapeError, match=r"must return tensors, .* returned Opaque"):
        stn.step(next(iter(batches())))


class Fails(nn.Module):
    """Works on whole batches of eight only."""

    def __init__(self, error):
        super().__init__()
        self.linear, self.error = nn.Linear(FEATURES, CLASSES), error

    def forward(self, x):
        if len(x) != 8:
            raise self.error
        return self.linear(x)


def test_memory_that_runs_out_while_rows_are_measured_is_told():
    """It says nothing about whose rows they are; what cannot be cut does, and is taken whole."""
    inputs = first_batch()[0]
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        convert(Fails(torch.OutOfMemoryError("no more")), [IDLE], example_inputs=inputs)
    stn = convert(Fails(IndexError("cut")), [IDLE], example_inputs=inputs)
    assert [use.layout for use in stn.plan.weights] == ["batch"]
