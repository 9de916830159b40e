"""What a model's code keeps from pass to pass is kept in train mode as its own code would."""

import copy
import random
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from cases import IDLE, convert
from torch import is_autocast_enabled, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from stnify import (
    DropConnect,
    Dropout,
    TraceError,
    UnsupportedModuleError,
    UsageError,
    WeightDecay,
)


class Module(nn.Module):
    """Two layers, and something that is kept."""

    def __init__(self, kept=None):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.kept = kept


class Buffer(Module):
    def __init__(self):
        super().__init__()
        del self.kept
        self.register_buffer("kept", torch.zeros(6))

    def forward(self, x):
        y = self.first(x)
        self.kept = 0.9 * self.kept + 0.1 * y.detach().mean(0)
        return self.head(y - self.kept)


class Counter(Buffer):
    def forward(self, x):
        self.kept += 1
        return self.head(self.first(x)) * torch.rsqrt(self.kept)


class OfAChild(Module):
    def forward(self, x):
        y = self.first(x)
        self.head.last = getattr(self.head, "last", 0.0) + y.detach().mean(0)
        return self.head(y - self.head.last)


class InAList(Module):
    def __init__(self):
        super().__init__([torch.zeros(6)])

    def forward(self, x):
        y = self.first(x)
        self.kept[0].mul_(0.9).add_(y.detach().mean(0))
        return self.head(y - self.kept[0])


class InAnObject(Module):
    def __init__(self):
        super().__init__(SimpleNamespace(inner=SimpleNamespace(mean=torch.zeros(6))))

    def forward(self, x):
        y = self.first(x)
        self.kept.inner.mean = 0.9 * self.kept.inner.mean + y.detach().mean(0)
        return self.head(y - self.kept.inner.mean)


class Accumulated(Module):
    """Adds up in a tensor that is new in each pass."""

    def forward(self, x):
        total = torch.zeros(6)
        for layer in (self.first, self.head):
            total += layer(x).mean(0)
        return self.head(x) + total


class Filled(Module):
    def forward(self, x):
        total = torch.zeros(6)
        total[:3] = self.first(x).mean(0)[:3]
        return self.head(x) + total


class Drawn(Module):
    """Leaves a layer out, drawn from a generator of its own."""

    def __init__(self, generator, draw):
        super().__init__(generator)
        self.draw = draw

    def forward(self, x):
        y = self.first(x)
        return self.head(y) if self.draw(self.kept) < 0.5 else y


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.plain, self.inner = nn.Linear(6, 6), inner

    def forward(self, x):
        return self.inner(self.plain(x))


GENERATORS = {
    "random": lambda: Drawn(random.Random(0), random.Random.random),
    "numpy": lambda: Drawn(np.random.RandomState(0), np.random.RandomState.random_sample),
    "new numpy": lambda: Drawn(np.random.default_rng(0), np.random.Generator.random),
    "torch": lambda: Drawn(
        torch.Generator().manual_seed(0), lambda g: float(torch.rand((), generator=g))
    ),
}
KEEPING = {
    **{kind.__name__: kind for kind in (Buffer, Counter, OfAChild, InAList, InAnObject)},
    **{kind.__name__: kind for kind in (Accumulated, Filled)},
    **GENERATORS,
}


@pytest.mark.parametrize("around", [lambda model: model, Inside], ids=["root", "inside"])
@pytest.mark.parametrize("kind", KEEPING)
def test_passes_in_a_row_are_those_of_the_original(kind, around):
    torch.manual_seed(0)
    model = around(KEEPING[kind]())
    x, twin = torch.randn(4, 6), copy.deepcopy(model)
    stn = convert(model, [IDLE], example_inputs=x)
    outputs = [twin(x) for _ in range(6)]
    assert all(torch.equal(stn.model(x), output) for output in outputs)
    assert not all(torch.equal(outputs[0], o) for o in outputs) or kind in {"Accumulated", "Filled"}
    assert "" not in stn.plan.traced.opaque or around is not Inside, "only what keeps is a leaf"


PASSES = 0


class CountsInAGlobal(Module):
    def forward(self, x):
        global PASSES
        PASSES += 1
        return self.head(self.first(x)) / PASSES

    def passes(self):
        return PASSES


class CountsInItsClass(Module):
    number = 0

    def forward(self, x):
        type(self).number += 1
        return self.head(self.first(x)) / self.number

    def passes(self):
        return self.number


class ListsInItsClass(Module):
    seen: ClassVar[list[int]] = []

    def forward(self, x):
        self.seen.append(0)
        return self.head(self.first(x)) / len(self.seen)

    def passes(self):
        return len(self.seen)


@pytest.mark.parametrize("kind", [CountsInAGlobal, CountsInItsClass, ListsInItsClass])
def test_what_a_class_and_its_globals_keep_counts_passes_of_the_loop_alone(kind, monkeypatch):
    monkeypatch.setitem(globals(), "PASSES", 0)
    monkeypatch.setattr(CountsInItsClass, "number", 0)
    ListsInItsClass.seen.clear()
    model = Inside(kind())
    batch = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    options = {"valid_loader": [batch], "warmup_steps": 0, "train_steps": 1, "response_every": 1}
    stn = convert(model, [WeightDecay()], example_inputs=batch[0], **options)
    assert "changes its attribute" in stn.plan.traced.opaque["inner"]
    assert model.inner.passes() == 0
    for _ in range(3):
        stn.step(batch)
    assert model.inner.passes() == 3
    expected = model.inner.head(model.inner.first(model.plain(batch[0]))) / 4
    assert torch.equal(stn.model.train()(batch[0]), expected)


def test_a_generator_without_a_state_is_let_be():
    model = Module(random.SystemRandom())
    model.forward = lambda x: model.head(model.first(x))
    assert len(convert(model, [IDLE], example_inputs=torch.randn(4, 6)).plan.weights) == 2


def test_a_conversion_moves_no_generator():
    torch.manual_seed(0)
    model = Drawn(None, lambda _: np.random.random())
    before = np.random.get_state()[1].copy()
    convert(model, [IDLE], example_inputs=torch.randn(4, 6))
    assert (np.random.get_state()[1] == before).all()
    model(torch.randn(4, 6))


def test_a_shared_object_gets_what_each_pass_leaves_in_it():
    class Auxiliary(Module):
        def forward(self, x):
            y = self.first(x)
            self.kept.loss = y.square().mean()
            return self.head(y)

    context = SimpleNamespace(loss=None)
    stn = convert(Inside(Auxiliary(context)), [IDLE], example_inputs=torch.randn(4, 6))
    assert context.loss is None
    losses = []
    for _ in range(2):
        stn.model(torch.randn(4, 6))
        losses.append(context.loss)
    assert losses[0] is not losses[1]
    assert losses[1].requires_grad


class Temperature(Module):
    """Computes with a tensor of its own, apart from its inputs."""

    def __init__(self, read):
        super().__init__()
        self.register_buffer("buffer", torch.tensor(1.0))
        self.plain = torch.tensor(1.0)
        self.table = [torch.ones(6)]
        self.read = read

    def forward(self, x):
        return self.head(self.first(x)) / (self.read(self) + 1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.plain,
        lambda model: float(model.plain),
        lambda model: dict(model.named_buffers())["buffer"],
        lambda model: model._buffers["buffer"].item(),
        lambda model: 2 * model.table[0],
    ],
    ids=["tensor", "number", "named buffer", "number of a buffer", "list"],
)
def test_tensors_are_read_anew_in_every_pass(read):
    model, x = Temperature(read), torch.randn(4, 6)
    stn = convert(model, [IDLE], example_inputs=x)
    before = stn.model(x)
    for tensor in (model.buffer, model.plain, model.table[0]):
        tensor.fill_(5.0)
    assert torch.equal(stn.model(x), model(x))
    assert not torch.allclose(stn.model(x), before)


def test_code_that_asks_for_its_context_runs_in_each():
    class Careful(Module):
        def forward(self, x):
            y = self.first(x)
            if torch.is_autocast_enabled("cpu"):
                y = y / 4
            return self.head(y if torch.is_grad_enabled() else y.relu()).float()

    model, x = Careful(), torch.randn(4, 6)
    stn = convert(model, [IDLE], example_inputs=x)
    assert torch.equal(stn.model(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = stn.model(x), model(x)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, model(x), rtol=0.1)
    assert torch.is_autocast_enabled.__name__ == "is_autocast_enabled"
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_save_memory_in_training_too(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6)) for _ in range(3)
            )
            self.head = nn.Linear(6, 6)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model(torch.randn(512, 6, requires_grad=True))
        return sum(sizes)

    model = Checkpointed()
    plain = kept(nn.Sequential(*model.blocks, model.head))
    stn = convert(model, [IDLE], example_inputs=torch.randn(4, 6))
    assert kept(stn.model) == kept(model) < plain / 4
    for _ in range(2):
        stn.step((torch.randn(4, 6), torch.zeros(4, dtype=torch.long)))
    assert stn.counters.skipped_responses == 0


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("around", [nn.utils.weight_norm, pruned])
def test_weights_that_hooks_make_respond(around):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(around(nn.Linear(6, 8)), nn.ReLU(), around(nn.Linear(8, 3)))

    model, twin, x = build(), build(), torch.randn(4, 6)
    stn = convert(model, [IDLE], example_inputs=x)
    assert len(stn.plan.weights) == 2
    assert stn.plan.traced.opaque == {}
    for _ in range(2):
        for each in (twin, stn.model):
            each.zero_grad()
            F.cross_entropy(each(x), torch.zeros(4, dtype=torch.long)).backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
        assert torch.equal(stn.model.eval()(x), twin.eval()(x))
        assert torch.equal(stn.model.train()(x), twin.train()(x))
    stn.step((x, torch.zeros(4, dtype=torch.long)))
    assert any(p.grad is None or p.any() for p in stn.model._stnify.response_parameters().values())


def test_the_old_spectral_norm_names_the_new_one():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3))
    reasons = convert(model, [IDLE]).plan.traced.opaque
    assert "use torch.nn.utils.parametrizations.spectral_norm" in reasons["0"]
    model[0] = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    assert convert(model, [IDLE]).plan.traced.opaque == {}


class AsksWhatItGets(Module):
    def forward(self, x):
        return self.head(self.first(x)) if type(x) is torch.Tensor else self.head(x)


def test_a_graph_that_proves_wrong_gives_way_to_the_models_own_code():
    model, x = AsksWhatItGets(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match=r"its output differs.*the model's own code runs"):
        stn = convert(model, [IDLE], example_inputs=x)
    assert torch.equal(stn.model(x), model(x))
    assert {site.way for site in stn.plan.weights} == {"swap"}
    assert stn.plan.traced.opaque.keys() == {""}


def test_a_loss_that_passes_the_converted_model_by_is_refused():
    class WithLoss(Module):
        def forward(self, x):
            return self.head(self.first(x))

        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    batch = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)

    def around(model, batch):
        return F.cross_entropy(model.head(model.first(batch[0])), batch[1])

    def by_method(model, batch):
        return model.loss(batch)

    def through(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    options = {"criterion": None, "valid_loader": [batch]}
    for loss in (through, by_method):
        convert(WithLoss(), [WeightDecay()], forward_loss=loss, **options).step(batch)
    with pytest.raises(UsageError, match="must predict by calling the model it is given"):
        convert(WithLoss(), [WeightDecay()], forward_loss=around, **options).step(batch)


def test_what_is_compiled_inside_is_refused():
    inner = Module()
    inner.first.compile(backend="eager")
    with pytest.raises(UnsupportedModuleError, match=r"'first' \(Linear\) is compiled"):
        convert(inner, [IDLE])
    function = Module(torch.compile(torch.tanh, backend="eager"))
    with pytest.raises(UnsupportedModuleError, match="calls a function that is"):
        convert(function, [IDLE])


def test_complex_weights_are_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.cfloat))
    with pytest.raises(
        UnsupportedModuleError, match=r"'1\.weight' is torch\.complex64.*view_as_real"
    ):
        convert(model, [IDLE])


@pytest.mark.parametrize(
    "lengths", [[7, 6, 5, 4, 3], [7, 7, 7, 5, 2], [7] * 5, [3, 7, 2, 5, 6], [3, 2, 5, 7, 6]]
)
def test_lengths_of_packed_sequences_may_be_equal_or_in_any_order(lengths):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.recurrent = nn.Embedding(30, 8), nn.LSTM(8, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, words, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embed(words), lengths, batch_first=True, enforce_sorted=False
            )
            states, _ = nn.utils.rnn.pad_packed_sequence(
                self.recurrent(packed)[0], batch_first=True, total_length=words.shape[1]
            )
            return self.head(states)

    inputs = torch.randint(30, (5, 7)), torch.tensor(lengths)
    stn = convert(Tagger(), [IDLE], example_inputs=inputs)
    assert {site.layout.split()[0] for site in stn.plan.weights} == {"batch"}


class Ambiguous:
    """Has attributes, and no truth value, as tables of numbers have none."""

    def __init__(self) -> None:
        self.calls = 0

    def __bool__(self) -> bool:
        raise ValueError("the truth value is ambiguous")


def test_an_object_without_a_truth_value_may_be_kept():
    class Keeping(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.table = Ambiguous()

        def forward(self, inputs):
            self.table.calls += 1
            return super().forward(inputs)

    model, inputs = Keeping(), torch.randn(3, 4)
    stn = convert(model, [WeightDecay()], example_inputs=inputs)
    assert model.table.calls == 0
    stn.model.train()(inputs)
    assert model.table.calls == 1


# What is kept elsewhere ---------------------------------------------------------------------------

AUXILIARY: list[float] = []
OWN_RANDOM = random.Random(0)


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Meter:
    """Can be called, and counts how often it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, hidden):
        self.count += 1
        return hidden / self.count


def mean(hidden):
    return float(hidden.detach().mean())


def stored(hidden, store):
    if hidden.sum() > 1e9:  # cannot be traced, so that the function might be left whole
        return hidden
    store.append(mean(hidden))
    return hidden


PLACES = {
    "a queue": (lambda: deque(maxlen=2), lambda kept, h: kept.append(h.detach().mean()), len),
    "an array": (lambda: np.zeros(1), lambda kept, h: kept.__iadd__(1), lambda kept: kept[0]),
    "a tuple of lists": (lambda: ([],), lambda kept, h: kept[0].append(1), lambda kept: kept[0]),
    "slots": (Slotted, lambda kept, h: setattr(kept, "count", kept.count + 1), lambda k: k.count),
    "what can be called": (Meter, lambda kept, h: kept(h), lambda kept: kept.count),
    "a function's argument": (list, lambda kept, h: stored(h, kept), len),
    "a global": (lambda: None, lambda kept, h: AUXILIARY.append(1), lambda kept: len(AUXILIARY)),
}
"""What is kept, what a forward does to it, and what to look at afterwards."""


class Keeping(Module):
    def __init__(self, place, parametric):
        super().__init__(PLACES[place][0]())
        self.change = PLACES[place][1]
        if not parametric:
            self.first = self.head = nn.Identity()

    def forward(self, inputs):
        AUXILIARY  # noqa: B018 - named here, changed by a function of the table
        hidden = self.first(inputs)
        changed = self.change(self.kept, hidden)
        return self.head(changed if isinstance(changed, torch.Tensor) else hidden)


@pytest.mark.parametrize("parametric", [True, False], ids=["with weights", "without"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_kept_changes_once_in_each_step(place, parametric):
    """Neither the conversion nor response and validation steps change it."""
    look, inputs = PLACES[place][2], torch.randn(3, 6)
    AUXILIARY.clear()
    plain = Keeping(place, parametric)
    for _ in range(3):
        plain(inputs)
    expected = look(plain.kept)
    AUXILIARY.clear()
    kept = Keeping(place, parametric)
    model = nn.Sequential(nn.Linear(6, 6), kept, nn.Linear(6, 3))
    batch = (inputs, torch.arange(3))
    stn = convert(model, IDLE, example_inputs=inputs, train_loader=[batch], valid_loader=[batch])
    assert look(kept.kept) == look(Keeping(place, parametric).kept)
    for _ in range(3):
        stn.step(batch)
    assert stn.counters.validation_steps > 0
    assert look(kept.kept) == expected


# Code that is told apart only in some calls -------------------------------------------------------


class FrozenDict(OrderedDict):
    """Cannot be changed, as configurations of some libraries."""

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    def clear(self):
        raise TypeError("frozen")


def test_what_cannot_be_changed_is_not_put_back():
    model = Module(FrozenDict([("width", 6)]))
    model.forward = lambda inputs: model.head(model.first(inputs))
    convert(model, [IDLE], example_inputs=torch.randn(3, 6))
    assert dict(model.kept) == {"width": 6}


class Cached(Module):
    """Stays in eval mode, and keeps what it saw."""

    def train(self, mode=True):
        return super().train(False)

    def forward(self, inputs):
        self.kept["seen"] = self.head(self.first(inputs))
        return self.kept["seen"]


def test_what_stays_in_eval_mode_keeps_things_too():
    model = nn.Sequential(Cached({}), nn.Linear(6, 3))
    stn = convert(model, [IDLE], example_inputs=torch.randn(3, 6))
    stn.model.train()
    seen: ClassVar[list[int]] = []
    for _ in range(2):
        stn.model(torch.randn(3, 6))
        seen.append(model[0].kept["seen"])
    assert not torch.equal(*seen)


class Island(Module):
    """Computes a difference that half precision cannot hold."""

    def forward(self, inputs):
        hidden = self.first(inputs)
        with torch.autocast("cpu", enabled=False):
            return self.head(hidden.float() + 100) - self.head(
                torch.full_like(hidden, 100.0).float()
            )


class Asking(Module):
    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.head(hidden / 4 if is_autocast_enabled("cpu") else hidden)


@pytest.mark.parametrize("kind", [Island, Asking])
def test_code_under_autocast_runs_as_it_is_written(kind):
    torch.manual_seed(0)
    model, inputs = kind(), torch.randn(3, 6)
    stn = convert(model, [IDLE], example_inputs=inputs)
    stn.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(inputs), stn.model(inputs)
    assert torch.equal(found, expected)
    assert not torch.allclose(model(inputs), expected.float(), rtol=1e-4)


def test_inputs_that_a_model_writes_to_are_refused_and_stay_as_they_are():
    class Normalising(Module):
        def forward(self, inputs):
            inputs -= 0.5
            return self.head(self.first(inputs))

    inputs = torch.randn(3, 6)
    before = inputs.clone()
    with pytest.raises(UnsupportedModuleError, match=r"must leave its inputs.*`x = x - mean`"):
        convert(Normalising(), [IDLE], example_inputs=inputs)
    assert torch.equal(inputs, before)


def test_the_grad_mode_is_put_back():
    class Switching(Module):
        def forward(self, inputs):
            torch.set_grad_enabled(self.training)
            return self.head(self.first(inputs))

    convert(Switching(), [IDLE], example_inputs=torch.randn(3, 6))
    assert torch.is_grad_enabled()


class Parts(Module):
    """Does what fails with what it is traced for, which is not a tensor yet."""

    def forward(self, inputs):
        if type(inputs) is not torch.Tensor:
            inputs = inputs.narrow(0, 0, 1000)
        return self.head(self.first(inputs))


def test_a_graph_that_raises_gives_way_to_the_models_own_code():
    with pytest.warns(UserWarning, match="Until then the model's own code runs"):
        stn = convert(Parts(), [IDLE], example_inputs=torch.randn(3, 6))
    assert [site.way for site in stn.plan.weights] == ["swap", "swap"]


def test_where_noise_needs_a_graph_the_error_says_what_is_wrong_with_that():
    inputs = torch.randn(3, 6)
    with pytest.raises(TraceError, match=r"its output differs.*name the module that does so in `l"):
        convert(Parts(), [Dropout(after="first")], example_inputs=inputs)


# Checkpoints --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.enter, self.first, self.head = (nn.Linear(6, 6) for _ in range(3))
        self.drop, self.reentrant = nn.Dropout(0.5), reentrant

    def body(self, hidden):
        return self.head(self.drop(self.first(hidden)).tanh())

    def forward(self, inputs):
        hidden = self.enter(inputs)
        if self.reentrant is None:
            return self.body(hidden)
        return checkpoint(self.body, hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("declared", [Dropout(init=0.5), DropConnect(at="first", init=0.5)])
def test_tuned_noise_inside_a_checkpoint_has_the_gradients_of_its_own_pass(declared, reentrant):
    """What backward would compute again lies outside the pass that knows the hyperparameters."""
    found = []
    for checkpoints in (None, reentrant):
        torch.manual_seed(0)
        stn = convert(Checkpointed(checkpoints), [declared], leaves=[""])
        stn.model.train()(torch.ones(3, 6)).square().mean().backward()
        found.append({n: p.grad for n, p in stn.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {"first.weight", "enter.weight"}
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_checkpoints_of_timm_hide_no_weights(name):
    sizes = (
        {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2}
        if name.startswith("vit")
        else {"channels": (8, 8, 8, 8)}
    )
    found = []
    for checkpoints in (False, True):
        model = timm.create_model(name, num_classes=5, **sizes)
        model.set_grad_checkpointing(checkpoints)
        stn = convert(model, [IDLE], example_inputs=torch.randn(3, 3, 32, 32))
        found.append({site.weight for site in stn.plan.weights})
    assert found[0] == found[1]
