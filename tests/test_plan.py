"""Plans: what is found, what is refused and why, where noise goes, whose rows are whose."""

import copy
import operator
import pickle
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from zoo import ZOO, images

from stnify import DeclarationError, Dropout, ShapeError, UsageError, WeightDecay, stnify
from stnify.patterns import matches
from stnify.planning import make_plan
from stnify.planning.functions import COMPOSITE_FUNCTIONS, DIRECT_FUNCTIONS
from stnify.planning.modules import MODULE_WEIGHTS, WEIGHT_MODULES, own_weights
from stnify.trace import trace
from stnify.tunable import pass_inputs

DECAY = WeightDecay()


def plan_of(model, *declared, **options):
    return make_plan(model, trace(model), declared or (DECAY,), **options)


def reasons(plan):
    return {refusal.name: refusal.reason for refusal in plan.refusals}


# Patterns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("layer*.*", "layer1.0", True),
        ("layer*.*", "layer1.0.conv1", False),
        ("layer1.**", "layer1.0.conv1", True),
        ("layer1.**", "layer1", True),
        ("**.conv1", "conv1", True),
        ("**.conv1", "layer1.0.conv1", True),
        ("**.conv1", "layer1.0.conv10", False),
        ("fc", "fc", True),
        ("fc", "fc.weight", False),
        ("[ab].?", "b.7", True),
        ("**", "anything.at.all", True),
    ],
)
def test_globs_stay_within_a_dotted_part_unless_doubled(pattern, name, fits):
    assert matches(pattern, name) is fits


# What is found ------------------------------------------------------------------------------------


def test_tables_of_planning_and_layers_agree():
    from stnify.calls import WEIGHT_CALLS
    from stnify.layers import HYPER_MODULES, HYPER_OPERATORS
    from stnify.products import MULTIPLICATIONS

    assert set(WEIGHT_MODULES) == set(HYPER_MODULES)
    assert set(WEIGHT_MODULES) < set(MODULE_WEIGHTS)
    functions = {*DIRECT_FUNCTIONS, *COMPOSITE_FUNCTIONS, *MULTIPLICATIONS}
    assert functions - {operator.matmul} <= set(WEIGHT_CALLS)
    composites = {
        kind for _, weights in COMPOSITE_FUNCTIONS.values() for kind, _ in weights.values()
    }
    kinds = {*WEIGHT_MODULES.values(), *DIRECT_FUNCTIONS.values(), *composites}
    assert kinds | {"Parameter"} == set(HYPER_OPERATORS)
    assert own_weights(nn.GRUCell(2, 3, bias=False))[1] == ("Linear", "weight_hh", None)


def test_a_resnet_has_a_site_for_each_convolution_and_its_head():
    model = ZOO["torchvision resnet18"]()
    plan = plan_of(model, Dropout(after="layer*.*"))
    assert {site.name for site in plan.weights} == {
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    assert [site.name for site in plan.noises] == [
        f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)
    ]
    assert reasons(plan) == {}


def test_function_calls_on_parameters_are_sites():
    plan = plan_of(ZOO["functional"]())
    found = {(site.weight, site.kind, site.way, site.bias) for site in plan.weights}
    assert found == {
        ("kernel", "Conv2d", "function", "kernel_bias"),
        ("fourier.weight", "Conv2d", "function", None),
        ("weight", "Linear", "function", None),
    }


def test_a_plan_prints_every_site_and_refusal():
    model = ZOO["timm vit_tiny"]()
    plan = plan_of(model, Dropout(at="blocks.*.mlp.drop1", per_layer=True), DECAY)
    text = str(plan)
    for site in plan.weights:
        assert site.name in text
    assert "unchanged: pos_embed: is not the weight of a known layer" in text
    assert "dropout.blocks.3.mlp.drop1 = 0.05 in (0.0, 0.95): replace blocks.3.mlp.drop1" in text
    assert f"add {plan.response_parameters:,} parameters" in text


def test_planning_changes_nothing():
    model = ZOO["timm convnext_atto"]().eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    first, second = plan_of(model), plan_of(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert first == second
    assert not any(module.training for module in model.modules())


# What is refused, and why -------------------------------------------------------------------------


def test_refusals_carry_names_and_reasons():
    model = nn.Sequential()
    model.good = nn.Linear(4, 4)
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    model.sparse = Sparse()
    model.complex = nn.Linear(4, 4, dtype=torch.complex64)
    model.left = nn.Linear(4, 2)
    plan = plan_of(model, exclude="left")
    assert {site.name for site in plan.weights} == {"good"}
    found = reasons(plan)
    assert found["frozen"] == "frozen (requires_grad=False)"
    assert found["complex"] == "has complex weights"
    assert found["sparse.table"] == "is an embedding with sparse gradients or max_norm"
    assert found["sparse.mixing"] == "is not the weight of a known layer"
    assert found["left"] == "excluded by `exclude=`"


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4, sparse=True)
        self.mixing = nn.Parameter(torch.eye(4))

    def forward(self, inputs):
        return inputs + self.table(inputs.long().clamp(0, 3))[:, 0] * self.mixing[0]


class UsedTwice(nn.Module):
    """Applies a weight and a bias once as a layer's and once otherwise; reads a shape as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs):
        hidden = self.first(inputs) + self.first.bias
        hidden = torch.tensordot(self.second(hidden), self.second.weight, 1)
        return self.third(hidden) * self.third.weight.shape[0]


def test_a_use_in_which_a_weight_does_not_respond_is_told():
    found = reasons(plan_of(UsedTwice()))
    assert found == {
        "first.bias": "responds in its layer, but not in 'add'",
        "second.weight": "responds in its layer, but not in 'tensordot'",
    }
    assert not reasons(plan_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))


def test_hooks_and_parametrisations_are_traced_through():
    model = nn.Sequential()
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model.hooked = nn.Linear(4, 4)
    model.hooked.register_forward_hook(lambda module, inputs, output: output.tanh())
    stn = stnify(model.eval(), [DECAY], example_inputs=torch.randn(3, 4))
    sites = {site.label: (site.way, site.computed) for site in stn.plan.weights}
    assert sites == {
        "normed.parametrizations.weight.original1": ("function", (4, 4)),
        "hooked": ("function", None),
    }
    batch = torch.randn(3, 4)
    assert torch.equal(stn.model._stnify.graph(batch), model(batch))
    assert stn.model._stnify.graph(batch).abs().max() < 1


def test_excluding_a_module_excludes_what_is_inside():
    plan = plan_of(ZOO["torchvision resnet18"](), exclude=["layer1", nn.Linear])
    names = {site.name for site in plan.weights}
    assert "layer2.0.conv1" in names
    assert not any(name.startswith("layer1") or name == "fc" for name in names)


def test_a_frozen_weight_with_a_trainable_bias_responds_by_its_bias():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight.requires_grad_(False)
    (site,) = plan_of(model, Dropout(at="input")).weights
    assert (site.weight_responds, site.bias_responds, site.response_parameters) == (False, True, 8)


class Branching(nn.Module):
    """Chooses its path by its data, so that it cannot be traced through."""

    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, inputs):
        return self.inner(inputs) if inputs.isfinite().all() else inputs


def test_a_module_that_cannot_be_traced_is_rewritten_from_the_inside():
    model = nn.Sequential(nn.Linear(4, 4), Branching(), nn.Linear(4, 2)).eval()
    stn = stnify(model, [DECAY], example_inputs=torch.randn(3, 4))
    ways = {site.name: (site.way, site.layout) for site in stn.plan.weights}
    assert ways == {
        n: (w, "batch") for n, w in (("0", "module"), ("1.inner", "swap"), ("2", "module"))
    }
    batch = torch.randn(3, 4)
    assert torch.equal(stn.model._stnify.graph(batch), model(batch))
    perturbed_alone_equals_perturbed_together(stn, torch.randn(3, 4).abs())


def perturbed_alone_equals_perturbed_together(stn, batch):
    """Rows are independent, and the swapped layer responds."""
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_()
        response_input = torch.randn(len(batch), len(stn.values()))
        together = stn.model._stnify.graph(batch, **pass_inputs(response_input))
        alone = [
            stn.model._stnify.graph(batch[i : i + 1], **pass_inputs(response_input[i : i + 1]))
            for i in range(len(batch))
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)  # float32
        plain = stn.model._stnify.graph(batch)
        assert not torch.allclose(together, plain, atol=1e-3)
        for name, parameter in stn.model.response_parameters().items():
            if name.endswith("gate") and "inner" not in name:
                parameter.zero_()
        assert not torch.allclose(
            stn.model._stnify.graph(batch, **pass_inputs(response_input)), plain
        )


class Counting(nn.Module):
    """Keeps state in a plain attribute and a buffer, drops, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 400)
        self.drop = nn.Dropout(0.3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        self.seen = self.seen + len(inputs)
        if inputs.sum() > 1e6:
            return inputs
        return self.drop(self.inner(inputs))


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda module: module])
def test_a_swapped_module_keeps_its_state_its_mode_and_its_noise(wrap):
    model = wrap(Counting())
    counting = next(module for module in model.modules() if isinstance(module, Counting))
    stn = stnify(model, [Dropout(init=0.9), DECAY])
    assert stn.plan.noises[0].place == "swap"
    inputs = torch.randn(5, 4)
    dropped = (stn.model(inputs) == 0).float().mean().item()
    assert dropped == pytest.approx(0.9, abs=0.05)  # 2000 draws
    assert (counting.calls, counting.seen.item()) == (1, 5.0)
    stn.model(inputs).sum().backward()
    assert counting.inner.weight.grad is not None
    stn.model.eval()
    assert torch.equal(stn.model._stnify.graph(inputs), model(inputs))
    assert isinstance(counting.inner, nn.Linear)
    assert isinstance(counting.drop, nn.Dropout)
    assert [key for key in stn.model.state_dict() if "swapped" in key] == []
    for twin in (copy.deepcopy(stn.model), pickle.loads(pickle.dumps(stn.model))):
        assert torch.equal(twin._stnify.graph(inputs), model(inputs))
        with torch.no_grad():
            for name, parameter in twin.general_parameters().items():
                parameter.add_(1.0 if name.endswith("inner.weight") else 0.0)
        assert not torch.equal(twin._stnify.graph(inputs), model(inputs))
        assert torch.equal(twin._stnify.graph(inputs), twin(inputs))


def test_a_model_that_cannot_be_traced_at_all_is_swapped_and_trains():
    model = Branching()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stn = stnify(
        model,
        [DECAY],
        optimizer=optimizer,
        criterion=F.mse_loss,
        train_steps=1,
        warmup_steps=0,
        valid_loader=[(torch.ones(3, 4), torch.zeros(3, 4))],
    )
    before = stn.values()
    weight = model.inner.weight.detach().clone()
    for _ in range(3):
        stn.step((torch.ones(3, 4), torch.zeros(3, 4)))
    assert not torch.equal(model.inner.weight, weight)
    assert stn.values() != before
    assert stn.plan.weights[0].inside == ""
    with pytest.raises(DeclarationError, match=r'`at="input"` needs a model .* can be traced'):
        stnify(model, [Dropout(at="input")])


def test_pytorchs_own_composites_are_watched_from_the_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    plan = plan_of(model)
    inside = {site.label for site in plan.weights if site.inside == "1"}
    attention = {"1.self_attn.in_proj_weight", "1.self_attn.out_proj"}
    assert inside == {*attention, "1.linear1", "1.linear2"}
    assert {site.label for site in plan.weights} - inside == {"0"}
    assert reasons(plan) == {}


def crop_to_even(images):
    return images[:, : images.shape[1] // 2 * 2] if images.shape[1] % 2 else images


def project(inputs, weight):
    return F.linear(inputs, weight) if inputs.sum() > 0 else inputs @ weight.t()


class Cropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)

    def forward(self, inputs):
        return crop_to_even(self.first(inputs)) * len(inputs)


def test_a_free_function_that_cannot_be_traced_becomes_one_node():
    scope = dict(vars(sys.modules[__name__]))
    model = Cropping().eval()
    stn = stnify(model, [DECAY])
    assert {site.name for site in stn.plan.weights} == {"first"}
    assert reasons(stn.plan) == {}
    for rows in (2, 3):  # the branch and the length are taken anew for each input
        batch = torch.randn(rows, 4)
        assert torch.equal(stn.model._stnify.graph(batch), model(batch))
    whole = [module.function for module in stn.model._stnify.functions.values()]
    assert whole == [crop_to_even, len]
    assert vars(sys.modules[__name__]) == scope  # nothing of the tracer stays behind
    twin = pickle.loads(pickle.dumps(stn.model))
    assert torch.equal(twin._stnify.graph(batch), model(batch))


class Projecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs):
        return project(inputs, self.weight)


def test_a_function_that_receives_a_weight_is_not_left_whole():
    """Its node would hide the weight; the module that calls it is the leaf, and says so."""
    plan = plan_of(nn.Sequential(nn.Linear(4, 4), Projecting()))
    assert "cannot be traced through" in reasons(plan)["1"]
    assert {site.name for site in plan.weights} == {"0"}


def test_a_failing_module_takes_only_itself_out():
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    model.norm = nn.Sequential(model.norm, Branching(model.embed_dim))
    stn = stnify(model, [DECAY])
    assert list(reasons(stn.plan)) == ["cls_token", "pos_embed"]
    assert [site.name for site in stn.plan.weights if site.way == "swap"] == ["norm.1.inner"]
    assert torch.equal(stn.model._stnify.graph(images(2)), model(images(2)))


def test_leaves_are_not_traced_through():
    model = ZOO["torchvision resnet18"]()
    plan = stnify(model, [DECAY], leaves=["layer4"]).plan
    ways = {site.name: (site.way, site.inside) for site in plan.weights}
    assert ways["layer3.0.conv1"] == ("module", None)
    assert ways["layer4.0.conv1"] == ("swap", "layer4")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, inputs, mask=None, scale=2.0):
        outputs = self.linear(inputs) * scale
        return outputs if mask is None else outputs * mask


def test_optional_arguments_keep_their_defaults_or_say_so():
    model = Masked()
    stn = stnify(model, [DECAY])
    inputs, mask = torch.randn(3, 4), torch.zeros(3, 1)
    assert torch.equal(stn.model(inputs), model(inputs))
    assert torch.equal(stn.model(inputs, mask=None), model(inputs))
    assert torch.equal(stn.model(inputs=inputs), model(inputs))
    with pytest.raises(UsageError, match=r"'mask' of Masked\.forward must keep its default None"):
        stn.model(inputs, mask=mask)
    with pytest.raises(UsageError, match=r"'scale' of Masked\.forward must keep its default 2.0"):
        stn.model(inputs, None, 3.0)
    stn.model.eval()  # eval mode is the user's own forward
    assert torch.equal(stn.model(inputs, mask=mask), model(inputs, mask=mask))


# Sharing ------------------------------------------------------------------------------------------


class Recurring(nn.Module):
    """Uses one module twice, and ties its decoder to its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.mix(self.mix(self.embedding(tokens)).tanh()).tanh()
        return self.decoder(hidden)


def test_shared_weights_get_one_response_used_twice():
    model = Recurring()
    stn = stnify(model, [DECAY, Dropout(after="mix")])
    h = 2
    table = 7 * 4 + 4 * h  # gated along the width of the embedding, also in the decoder
    mix = 4 * 4 + 4 * h + 4 + 4 * h
    decoder_bias = 7 + 7 * h
    assert stn.plan.response_parameters == table + mix + decoder_bias
    assert len(stn.plan.weights) == 4
    assert len(list(stn.model._stnify.layers)) == 3
    assert len(stn.plan.noises) == 2
    layers = stn.model.hyper_layers
    assert layers["embedding"].weight_response is layers["decoder"].weight_response


def test_tied_weights_move_as_one_weight():
    """A perturbed pass equals the original with the one table replaced."""
    torch.manual_seed(0)
    model = Recurring().double().eval()
    stn = stnify(model, [DECAY])
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_()
    response_input = torch.randn(1, 1, dtype=torch.float64)
    tokens = torch.randint(0, 7, (1, 5))
    found = stn.model._stnify.graph(tokens, **pass_inputs(response_input))
    slow = stn.export()
    parameters = dict(slow.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, response in stn.model.weight_responses().items():
            general = stn.model.general_parameters()[name]
            parameters[name].add_(response.materialise(general, response_input[0]))
        for name, response in stn.model.bias_responses().items():
            parameters[name].add_(response(parameters[name], response_input)[0])
    assert slow.decoder.weight is slow.embedding.weight
    torch.testing.assert_close(found, slow(tokens))  # float64, default tolerance 1e-7
    assert not torch.allclose(found, model(tokens))


# Computed weights ---------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, inputs):
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(inputs, kernel / kernel.std(), self.bias, self.stride, self.padding)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, inputs):
        return F.linear(inputs, self.experts[0] * inputs.mean() + self.experts[1])


def test_a_computed_kernel_responds_itself():
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 4, 3), nn.Tanh()).double().eval()
    stn = stnify(model, [DECAY], example_inputs=images(3, 8).double())
    (site,) = stn.plan.weights
    assert (site.weight, site.computed) == ("0.weight", (4, 3, 3, 3))
    assert site.response_parameters == 4 * 27 + 4 + 4 + 4
    with torch.no_grad():
        for parameter in stn.model.response_parameters().values():
            parameter.normal_()
    response_input, batch = torch.randn(1, 1).double(), images(1, 8).double()
    layer = stn.model.hyper_layers["0"]
    kernel = model[0].weight - model[0].weight.mean((1, 2, 3), keepdim=True)
    kernel = kernel / kernel.std()
    kernel = kernel + layer.weight_response.materialise(kernel, response_input[0])
    bias = model[0].bias + layer.bias_response(model[0].bias, response_input)[0]
    found = stn.model._stnify.graph(batch, **pass_inputs(response_input))
    torch.testing.assert_close(found, F.conv2d(batch, kernel, bias).tanh())  # float64
    assert not torch.allclose(found, model(batch))
    # The parameter itself does not respond, so neither does its decay.
    assert stn.model.weight_responses() == {}


def test_computed_kernels_cannot_be_folded():
    model = nn.Sequential(Standardised(3, 4, 3))
    with pytest.warns(UserWarning, match=r"export\(\) will be refused: .*'0\.weight'"):
        stn = stnify(model, [DECAY], method="stn")
    with pytest.raises(UsageError, match=r"'0.weight' and 0 more are computed.*method=\"delta\""):
        stn.export()


def test_a_weight_computed_from_the_input_is_refused():
    plan = plan_of(nn.Sequential(nn.Linear(4, 4), Routed()))
    assert reasons(plan) == {"1.experts": "is not the weight of a known layer"}


def test_standardised_convolutions_of_timm_are_covered():
    model = timm.create_model("test_nfnet", num_classes=3).eval()
    stn = stnify(model, [DECAY], example_inputs=images(2))
    kernels = {name for name, p in model.named_parameters() if name.endswith("weight")}
    assert {site.weight for site in stn.plan.weights} == kernels
    assert torch.equal(stn.model._stnify.graph(images(3)), model(images(3)))


# Noise --------------------------------------------------------------------------------------------


def test_existing_rates_are_the_start_and_per_layer_names_are_readable():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Linear(3, 3), nn.Dropout(0.4))
    assert stnify(model, [Dropout()]).values() == pytest.approx({"dropout": 0.3})
    separate = stnify(model, [Dropout(per_layer=True)]).values()
    assert separate == pytest.approx({"dropout.1": 0.2, "dropout.3": 0.4})
    assert stnify(model, [Dropout(at="3")]).values() == pytest.approx({"dropout": 0.4})
    assert stnify(model, [Dropout(at=nn.Dropout, exclude="1")]).values() == pytest.approx(
        {"dropout": 0.4}
    )
    assert stnify(model, [Dropout(init=0.7)]).values() == pytest.approx({"dropout": 0.7})


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 400)

    def forward(self, inputs):
        return F.dropout(self.linear(inputs), 0.5, training=self.training)


def test_functional_dropout_is_a_site_or_follows_the_mode():
    inputs = torch.ones(8, 4)
    tuned = stnify(Functional(), [Dropout(init=0.9)])
    assert [site.name for site in tuned.plan.noises] == ["dropout"]
    share = (tuned.model(inputs) == 0).float().mean().item()
    assert share == pytest.approx(0.9, abs=0.03)  # 3200 draws: standard error 0.005
    untouched = stnify(Functional(), [DECAY])
    assert (untouched.model(inputs) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    with torch.no_grad():
        assert torch.equal(
            untouched.model.eval()._stnify.graph(inputs), untouched.model._stnify.original(inputs)
        )


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, inputs):
        query, key, value = self.qkv(inputs).chunk(3, -1)
        rate = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=rate)


def test_attention_dropout_follows_the_mode():
    model = Attending().eval()
    stn = stnify(model, [DECAY])
    inputs = torch.randn(2, 3, 4)
    assert torch.equal(stn.model._stnify.graph(inputs), model(inputs))
    stn.model.train()
    torch.manual_seed(0)
    first, second = stn.model(inputs), stn.model(inputs)
    assert not torch.equal(first, second)


def test_inserted_noise_acts_once_behind_the_module_and_nowhere_else():
    model = nn.Sequential(nn.Linear(4, 300, bias=False), nn.Identity(), nn.Identity())
    stn = stnify(model, [Dropout(after="0", init=0.5)])
    inputs = torch.randn(6, 4)
    found, plain = stn.model(inputs), model(inputs)
    kept = found != 0
    torch.testing.assert_close(found[kept], 2 * plain[kept])
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)  # 1800 draws


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, inputs):
        return inputs + self.branch(inputs)


def test_noise_after_a_block_spares_the_skip_connection_inside_it():
    model = nn.Sequential(Residual(), Residual())
    stn = stnify(model, [Dropout(after="*.branch", init=0.949)], seed=1)
    inputs = torch.randn(2, 4)
    # Where the branch was dropped the skip connection is all there is.
    inner = stnify(model[0], [Dropout(after="branch", init=0.949)], seed=1)
    found = inner.model(inputs)
    assert (found == inputs).float().mean() > 0.5
    assert len(stn.plan.noises) == 2


# Rows ---------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Folds two windows of each example into the batch, as Swin does, and reads a table."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.table = nn.Linear(2, 1)
        self.register_buffer("coordinates", torch.randn(10, 2))

    def forward(self, inputs):
        windows = self.inner(inputs.reshape(-1, 3)).reshape(len(inputs), -1)
        return windows + self.table(self.coordinates).mean()


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, inputs):
        return self.inner(inputs.transpose(0, 1)).mean(0)


def layouts(model, inputs):
    stn = stnify(model, [DECAY], example_inputs=inputs)
    return {site.name: site.layout for site in stn.plan.weights}


def test_rows_are_measured_on_example_inputs():
    assert layouts(Windows(), torch.randn(3, 6)) == {
        "inner": "batch x 2",
        "table": "shared (independent of the input)",
    }
    assert layouts(TimeMajor(), torch.randn(3, 5, 3)) == {"inner": "second dimension"}
    assert layouts(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3)) == {"0": "batch"}


def test_rows_are_assumed_until_they_are_measured_on_the_first_batch():
    model = Windows()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stn = stnify(model, [DECAY], optimizer=optimizer, criterion=F.mse_loss)
    assert {site.layout for site in stn.plan.weights} == {"batch (assumed)"}
    stn.step((torch.randn(3, 6), torch.randn(3, 8)))
    assert stn.plan.weights[0].layout == "batch x 2"
    assert "one perturbation for the whole batch at: layers.table" in stn.report()


def test_swin_windows_are_batch_major():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=3,
    )
    found = layouts(model, images(2))
    assert found["layers.0.blocks.0.attn.qkv"] == "batch x 4"
    assert found["head.fc"] == "batch"


class Moody(nn.Module):
    """Computes something else in eval mode, as models with auxiliary heads do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        outputs = self.linear(inputs)
        return (outputs, 2 * outputs) if self.training else outputs


class Skipping(nn.Module):
    """Draws, in its own code, whether to skip a layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        skip = self.training and torch.rand(()).item() < 0.5
        return inputs if skip else self.linear(inputs)


@pytest.mark.parametrize("leaf", [Moody, Skipping])
def test_what_a_trace_would_fix_for_ever_is_rewritten_from_the_inside(leaf):
    before = torch.get_rng_state()
    model = leaf()
    torch.set_rng_state(before)
    stn = stnify(model, [DECAY], example_inputs=torch.randn(3, 4))
    (site,) = stn.plan.weights
    assert site.way == "swap"
    batch = torch.randn(3, 4)
    assert torch.equal(stn.model.eval()(batch), model.eval()(batch))
    stn.model.train()
    found = [stn.model(batch) for _ in range(30)]
    if leaf is Moody:
        assert torch.equal(found[0][1], 2 * found[0][0])
    else:
        skipped = sum(torch.equal(outputs, batch) for outputs in found)
        assert 0 < skipped < 30  # one of the two has a probability of 2e-9


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.1)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0)),
    ],
)
def test_attention_of_pytorch_passes_through_the_response_step(build):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stn = stnify(
        model,
        [DECAY],
        optimizer=optimizer,
        criterion=F.mse_loss,
        verify=False,
        train_steps=1,
        warmup_steps=0,
        valid_loader=[(torch.randn(3, 5, 4), torch.randn(3, 5, 4))],
    )
    before = stn.values()
    for _ in range(2):
        stn.step((torch.randn(3, 5, 4), torch.randn(3, 5, 4)))
    assert stn.values() != before
    assert stn.counters.skipped == stn.counters.skipped_responses == 0


def test_transposed_kernels_take_a_size_also_when_swapped():
    class Upsampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

        def forward(self, inputs):
            size = [2 * int(n) + 2 for n in inputs.shape[-2:]]
            return self.up(inputs, output_size=size)

    model = Upsampling().eval()
    stn = stnify(model, [DECAY], example_inputs=images(2, 9))
    assert stn.plan.weights[0].way == "swap"
    for size in (8, 9):
        assert torch.equal(stn.model._stnify.graph(images(2, size)), model(images(2, size)))


@pytest.mark.parametrize("option", [{"exclude": ["0", "nothing.**"]}, {"leaves": ["nothing"]}])
def test_every_pattern_must_match(option):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(DeclarationError, match="must match at least one module, but 'nothing"):
        stnify(model, [DECAY], **option)


def test_a_converted_model_keeps_its_modules():
    shell = stnify(nn.Sequential(nn.Linear(4, 4)), [DECAY]).model
    with pytest.raises(UsageError, match=r"'head' would be set. Change the model before"):
        shell.head = nn.Linear(4, 2)
    shell.note = "free"
    assert shell.note == "free"


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.temperature = 2.0
        self.register_buffer("floor", torch.zeros(()))

    def forward(self, inputs):
        return self.inner(inputs) / self.temperature + self.floor


def test_a_number_that_changes_after_the_conversion_is_refused_and_a_buffer_is_not():
    model = Tempered()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stn = stnify(model, [DECAY], optimizer=optimizer, criterion=F.mse_loss)
    batch = torch.randn(3, 4), torch.zeros(3, 3)
    stn.step(batch)
    stn.model.floor.fill_(5.0)
    assert stn.model(batch[0]).mean() > 3
    stn.step(batch)
    stn.model.temperature = 1.0
    assert model.temperature == 1.0  # the user's own, so that eval mode sees it
    with pytest.raises(UsageError, match=r"'temperature' of 'the model' must stay .*2\.0.*buffer"):
        stn.step(batch)


class Reordering(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.one(inputs.flip(0)).flip(0) + self.other(inputs) + self.other(inputs.flip(0))


def test_rows_in_another_order_are_no_examples_rows():
    found = layouts(Reordering(), torch.randn(6, 4))
    assert found == {"one": "shared (rows of other examples)", "other": "shared (mixed)"}


@pytest.mark.parametrize(
    ("model", "declared", "inputs", "message"),
    [
        (nn.LSTM(4, 3), Dropout(after="0"), torch.ones(2, 3, 4), "at '0' there is tuple"),
        (nn.Embedding(5, 3), Dropout(at="input"), torch.ones(2).long(), "'input' there is torch"),
    ],
)
def test_dropout_on_anything_but_numbers_names_the_place(model, declared, inputs, message):
    stn = stnify(nn.Sequential(model), [declared])
    with pytest.raises(ShapeError, match=message):
        stn.model(inputs)


def test_a_tuned_decay_starts_at_the_mean_of_what_the_optimizer_has_for_its_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def starts(declared):
        groups = [
            {"params": list(layer.parameters()), "weight_decay": decay}
            for layer, decay in ((model[0], 0.1), (model[2], 0.3))
        ]
        optimizer = torch.optim.SGD(groups, 0.1)
        return stnify(model, [declared], optimizer=optimizer, criterion=F.mse_loss).values()

    assert starts(DECAY) == pytest.approx({"weight_decay": 0.2})
    apart = starts(WeightDecay(per_layer=True))
    assert apart == pytest.approx({"weight_decay.0": 0.1, "weight_decay.2": 0.3})
    given = starts(WeightDecay(at="2.weight", init=0.05))
    assert given == pytest.approx({"weight_decay": 0.05})
