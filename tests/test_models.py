"""A conversion computes what the model computed, bit for bit, and shares what the model had."""

import copy
import pickle

import pytest
import torch
from cases import IDLE
from torch import Tensor, nn
from torchvision.models import SwinTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from zoo import ZOO, images, timm_model

from stnify import Dropout, WeightDecay, stnify
from stnify.testing import assert_state_roundtrip
from stnify.tunable import pass_inputs

DECAY = WeightDecay()


@pytest.fixture(params=ZOO, name="name")
def _name(request):
    torch.manual_seed(0)
    return request.param


def graph_of(stn):
    return stn.model._stnify.graph


def open_gates(stn):
    """Give every response a first-order effect."""
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_(0, 0.1)


@pytest.mark.parametrize("response", ["full", "gate"])
def test_eval_mode_graph_and_export_are_the_original_bit_for_bit(name, response):
    model = ZOO[name]().eval()
    stn = stnify(model, [DECAY], response=response)
    with torch.no_grad():
        for batch in (images(2), images(3)):
            expected = model(batch)
            assert torch.equal(stn.model(batch), expected)
            assert torch.equal(graph_of(stn)(batch), expected)
            assert torch.equal(stn.export()(batch), expected)
            response_input = torch.zeros(len(batch), 1)
            assert torch.equal(graph_of(stn)(batch, **pass_inputs(response_input)), expected)
            open_gates(stn)  # negative control: an open gate with an input changes the output
            changed = graph_of(stn)(batch, **pass_inputs(torch.ones(len(batch), 1)))
            assert not torch.allclose(changed, expected, atol=1e-4)
            assert torch.equal(stn.model(batch), expected)


@pytest.mark.parametrize("resizable", ["torchvision resnet18", "timm convnext_atto"])
def test_other_resolutions_are_exact_too(resizable):
    torch.manual_seed(0)
    model = ZOO[resizable]().eval()
    stn = stnify(model, [DECAY])
    with torch.no_grad():
        for size in (32, 48):
            assert torch.equal(graph_of(stn)(images(2, size)), model(images(2, size)))


def test_train_mode_is_the_original_bit_for_bit_with_its_buffers(name):
    model = ZOO[name]().train()
    twin = copy.deepcopy(model)
    stn = stnify(model, [DECAY])
    torch.manual_seed(1)
    expected = twin(images(4))
    torch.manual_seed(1)
    found = stn.model(images(4))
    assert torch.equal(found, expected)
    for (key, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    found.square().sum().backward()
    expected.square().sum().backward()
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key
    assert all(p.grad is None for p in stn.model.response_parameters().values())


def test_the_users_model_is_left_as_it_was(name):
    model = ZOO[name]()
    model.eval()
    next(iter(model.modules())).mark = "kept"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    stn = stnify(model, [DECAY])
    stn.model(images(2))
    assert dict(model.named_parameters()) == parameters
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert dict(model.named_modules()) == modules
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_shell_keeps_names_and_adds_its_own_under_one_prefix(name):
    model = ZOO[name]()
    stn = stnify(model, [DECAY])
    own = {key for key in stn.model.state_dict() if key.startswith("_stnify.")}
    assert set(stn.model.state_dict()) - own == set(model.state_dict())
    assert own
    shared = dict(stn.model.named_parameters())
    assert all(shared[key] is parameter for key, parameter in model.named_parameters())
    shell_modules = [k for k, _ in stn.model.named_modules() if not k.startswith("_stnify")]
    assert shell_modules == [key for key, _ in model.named_modules()]


def test_parameter_counts_follow_the_papers_formulas(name):
    model = ZOO[name]()
    hparams = [DECAY, IDLE]
    h = len(hparams)
    # Matrices and kernels; tokens and position embeddings have three dimensions in timm.
    weights = [p for p in model.parameters() if p.ndim in {2, 4}]
    biases = _biases_of_layers(model)
    # [DeltaSTN] 3.4: totals of out (2 in + h) and out (2 + h), less the general out in and out.
    full = sum(p.numel() + p.shape[0] * h for p in weights) + sum(b * (1 + h) for b in biases)
    gate = sum(p.shape[0] * h for p in weights) + sum(b * h for b in biases)
    for response, added in (("full", full), ("gate", gate)):
        stn = stnify(model, hparams, response=response)
        actual = sum(p.numel() for p in stn.model.response_parameters().values())
        assert stn.plan.response_parameters == actual == added
    general = {id(p) for p in stn.model.general_parameters().values()}
    responding = {id(p) for p in stn.model.response_parameters().values()}
    assert general == {id(p) for p in model.parameters()}
    assert not general & responding


def _biases_of_layers(model):
    biases = [
        module.bias.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None
    ]
    return [*biases, *(p.numel() for key, p in model.named_parameters() if key == "kernel_bias")]


def test_deepcopy_and_pickle_are_whole_and_independent(name):
    stn = stnify(ZOO[name](), [Dropout("noise", at="input"), DECAY], seed=3)
    stn.model.eval()
    batch = images(2)
    expected = stn.model(batch)
    for twin in (copy.deepcopy(stn.model), pickle.loads(pickle.dumps(stn.model))):
        assert torch.equal(twin(batch), expected)
        assert torch.equal(twin._stnify.graph(batch), expected)
        assert set(twin.state_dict()) == set(stn.model.state_dict())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert not torch.allclose(
            twin._stnify.graph(batch), expected
        )  # the graph sees its own tree
        assert torch.equal(twin._stnify.graph(batch), twin(batch))
        assert torch.equal(stn.model(batch), expected)
        twin.train()
        assert twin(batch).shape == expected.shape


class Tables(nn.Module):
    """Computes with buffers and a tensor of its own, apart from its input; counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 5)
        self.table = nn.Parameter(torch.randn(3))
        self.register_buffer("index", torch.tensor([[0, 1], [2, 0]]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls.add_(1)
        steps = self.index.view(-1).sum() * torch.arange(5.0)
        return self.linear(images.flatten(1)) + self.table[self.index.view(-1)].sum() * steps


SMALL = {"depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4)}
TABLED = {
    "own": Tables,
    "timm swin": timm_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, **SMALL),
    "timm swin v2": timm_model("swinv2_tiny_window8_256", img_size=32, window_size=4, **SMALL),
    "timm vit with relative positions": timm_model(
        "vit_relpos_small_patch16_224", img_size=32, depth=2
    ),
    "torchvision swin v2": lambda: SwinTransformer(
        [4, 4],
        24,
        [1, 2],
        [2, 4],
        [4, 4],
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
}
"""Models that compute with buffers alone."""


@pytest.fixture(params=TABLED, name="tabled")
def _tabled(request):
    torch.manual_seed(0)
    model = TABLED[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():  # blocks that start at nought would hide their tables
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


class Long(nn.Module):
    """Its graph has more nodes than Python nests calls."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(1500):
            x = x + 1e-3
        return self.layer(x)


@pytest.mark.parametrize("way", WAYS)
def test_graphs_of_any_length_can_be_copied(way):
    model, batch = stnify(Long(), [DECAY]).model, torch.randn(2, 6)
    twin = WAYS[way](model)
    assert torch.equal(twin(batch), model(batch))
    with torch.no_grad():
        twin.layer.weight.zero_()
    assert not torch.equal(twin(batch), model(batch))


@pytest.mark.parametrize("way", WAYS)
def test_copies_compute_with_their_buffers_as_they_are_then(tabled, way):
    model = stnify(tabled, [DECAY]).model.eval()
    twin, batch = WAYS[way](model), images(2)
    for (key, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert torch.equal(twin._stnify.graph(batch), model(batch))
    tables = [buffer for buffer in twin.buffers() if buffer.dtype is torch.long and buffer.ndim]
    for table in tables:
        table.zero_()
    changed = twin._stnify.graph(batch)
    assert torch.equal(changed, twin(batch))
    assert tables
    assert not torch.allclose(changed, model(batch), atol=1e-3)


def test_copies_run_what_changes_buffers_when_they_are_called_and_not_before():
    model = stnify(Tables(), [DECAY]).model
    for calls, copied in enumerate(WAYS.values()):
        twin = copied(model)
        assert twin.calls == calls
        twin(images(2))
        assert twin.calls == calls + 1
        model(images(2))


def test_the_state_of_a_swin_transformer_comes_back():
    torch.manual_seed(0)
    assert_state_roundtrip(TABLED["timm swin"](), images(2))


def test_timm_attributes_are_proxied():
    model = ZOO["timm vit_tiny"]()
    shell = stnify(model, [DECAY]).model
    assert shell.num_classes == 5
    assert shell.no_weight_decay() == model.no_weight_decay()
    assert shell.group_matcher() == model.group_matcher()
    assert shell.get_classifier() is model.get_classifier()
    assert shell.pretrained_cfg == model.pretrained_cfg
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = shell.no_such_thing


def test_a_sequential_can_still_be_indexed():
    model = ZOO["perceptron"]()
    shell = stnify(model, [DECAY]).model
    assert shell[1] is model[1]
    assert [type(module) for module in shell] == [type(module) for module in model]
    with pytest.raises(TypeError, match="not subscriptable"):
        _ = stnify(ZOO["functional"](), [DECAY]).model[0]


def test_moving_the_shell_moves_what_the_graph_uses():
    stn = stnify(ZOO["functional"](), [DECAY])
    stn.model.double().eval()
    found = graph_of(stn)(images(2).double(), **pass_inputs(torch.zeros(2, 1).double()))
    assert found.dtype is torch.float64
    assert torch.equal(found, stn.model(images(2).double()))


def test_response_parameters_live_where_their_layer_does():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    stn = stnify(model, [DECAY])
    assert {p.dtype for p in stn.model.response_parameters().values()} == {torch.bfloat16}
    assert stn.hyperparameters.unconstrained.dtype is torch.float32


def test_the_global_generator_is_untouched_by_a_conversion():
    model, batch = ZOO["functional"](), images(2)
    before = torch.get_rng_state()
    stnify(model, [Dropout(at="input"), DECAY], example_inputs=batch)
    assert torch.equal(torch.get_rng_state(), before)
