"""Awkward modules convert exactly, perturb rightly, and are left as they were."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from awkward import AWKWARD, WIDTH, Call, Case, DataDependent, double_precision, tensors
from torch import Tensor, nn
from torch.func import functional_call

from stnify import STN, Hyperparameter, UnsupportedModuleError, UsageError, WeightDecay, stnify
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.rows import RowLayout, batch_size

pytestmark = [
    # PyTorch says so whenever a reentrant checkpoint is evaluated.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

HPARAMS = [WeightDecay(init=1e-3), Hyperparameter("free", 0.5, (0.0, 1.0))]


def wrapped(case: Case) -> Case:
    """The same inside a module that cannot be traced, so that it is swapped as a whole."""
    build = case.build
    options = {"inside": "inner.", "computed": case.parametrized}
    return replace(case, build=lambda: DataDependent(build()), **options)


CASES = {
    **AWKWARD,
    **{f"{name} inside": wrapped(case) for name, case in AWKWARD.items() if not case.lost},
}


def each(chosen: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Run a test on every case, as it is and inside another, that is ``chosen``."""
    cases = [pytest.param(case, id=name) for name, case in CASES.items() if chosen(case)]
    return pytest.mark.parametrize("case", cases)


def build(case: Case) -> nn.Module:
    """The same module with the same weights each time; not every module can be copied."""
    torch.manual_seed(0)
    return case.build()


def converted(case: Case, model: nn.Module) -> STN:
    """Convert without inputs, unless the case needs them."""
    return convert(model, case.inputs(3, case.sizes[0]) if case.optional else None)


def convert(model: nn.Module, call: Call | None = None, **options: Any) -> STN:
    """Convert, and verify on the inputs of ``call``."""
    example = None if call is None else as_example(call)
    return stnify(model, HPARAMS, seed=0, example_inputs=example, **options)


def as_example(call: Call) -> Any:
    """Positional inputs as a tuple, named ones as a dict; both have their first one named."""
    args, kwargs = call
    return {"inputs": args[0], **kwargs} if args and kwargs else args or kwargs


def all_calls(case: Case) -> list[Call]:
    return [case.inputs(examples, size) for examples in (2, 3) for size in case.sizes]


def run(model: nn.Module, call: Call) -> Any:
    """Call with copies, which the module may write to."""
    args, kwargs = copy.deepcopy(call)
    return model(*args, **kwargs)


def same(found: Any, expected: Any) -> bool:
    """Whether two outputs have one form and the same bits."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    alike = type(found) is type(expected) and bool(pairs)
    return alike and all(
        one.dtype is other.dtype and torch.equal(one, other) for one, other in pairs
    )


def loss_of(outputs: Any) -> Tensor:
    return torch.stack([part.float().square().mean() for part in tensors(outputs)]).sum()


def open_gates(stn: STN, layouts: tuple[RowLayout, ...] = tuple(RowLayout)) -> None:
    """Give the responses a first-order effect, where rows have one of these layouts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in stn.model.hyper_layers.values():
            if layer.layout in layouts:
                for parameter in layer.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def perturbation(response_input: Tensor) -> Perturbation:
    return Perturbation(response_input, torch.full_like(response_input, 0.5))


def perturbed(stn: STN, call: Call, response_input: Tensor) -> list[Tensor]:
    args, kwargs = call
    return tensors(
        perturbed_forward(stn.model._stnify.graph, args, kwargs, perturbation(response_input))
    )


def linearized(stn: STN, call: Call, response_input: Tensor) -> list[Tensor]:
    args, kwargs = call
    return tensors(
        linearized_forward(stn.model._stnify.graph, args, kwargs, perturbation(response_input))
    )


def rows_of(call: Call) -> int:
    return batch_size(call)


@each()
@pytest.mark.parametrize("runs", ["model", "graph"])
def test_eval_mode_is_the_original(case, runs):
    model, twin = build(case).eval(), build(case).eval()
    stn = converted(case, model)
    runner = stn.model if runs == "model" else stn.model._stnify.graph
    for call in all_calls(case):
        found, expected = run(runner, call), run(twin, call)
        assert same(found, expected)
    with torch.no_grad():  # negative control
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not same(found, run(twin, call))


@each()
def test_verification_passes_and_export_is_the_original(case):
    model, twin = build(case).eval(), build(case).eval()
    call = case.inputs(3, case.sizes[0])
    stn = convert(model, call)
    assert not any("assumed" in site.layout for site in stn.plan.weights)
    exported = stn.export()
    assert type(exported) is type(twin)
    assert same(exported(*call[0], **call[1]), twin(*call[0], **call[1]))


@each()
def test_train_mode_is_the_original_with_its_gradients_and_state(case):
    model, twin = build(case).train(), build(case).train()
    stn = converted(case, model)
    for call in all_calls(case):
        outputs = []
        for module in (stn.model, twin):
            torch.manual_seed(1)
            outputs.append(run(module, call))
            loss_of(outputs[-1]).backward()
        assert same(*outputs)
        assert gradients(model) == gradients(twin)
        assert state(model) == state(twin)
    assert all(parameter.grad is None for parameter in stn.model.response_parameters().values())
    assert any(found is not None and found.tensor.any() for found in gradients(model).values())


@each()
def test_what_changes_later_is_seen(case):
    """Schedules change buffers, optimizers and loads change everything."""
    model, twin = build(case).train(), build(case).train()
    stn, call = converted(case, model), case.inputs(3, case.sizes[0])
    before = run(twin, call)
    assert same(run(stn.model, call), before)
    for module in (model, twin):
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.5).add_(0.1)
    found, expected = run(stn.model, call), run(twin, call)
    assert same(found, expected)
    assert not same(found, before)


class Bits:
    """A tensor that equals another with the same bits."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and torch.equal(self.tensor, other.tensor)

    __hash__ = None


def gradients(model: nn.Module) -> dict[str, Bits | None]:
    return {
        name: None if parameter.grad is None else Bits(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def state(model: nn.Module) -> dict[str, Any]:
    """Buffers, and everything that hangs on the modules beside their children."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        registries = {"_parameters", "_buffers", "_modules"}
        for key, value in {**module._buffers, **vars(module)}.items():
            if key not in registries:
                found[f"{name}.{key}"] = (
                    Bits(value) if isinstance(value, Tensor) else repr_of(value)
                )
    return found


def repr_of(value: Any) -> Any:
    """What tells a value from another one, for values that do not hold modules or functions."""
    return value if isinstance(value, bool | int | float | str | None) else type(value)


@pytest.mark.parametrize(
    "name", ["MovingAverages", "ReplacedBuffer", "CountsItsCalls", "LeavesALossOnItself"]
)
def test_what_a_call_changes_would_be_seen(name):
    model = build(AWKWARD[name]).train()
    before = state(model)
    run(model, AWKWARD[name].inputs(2, WIDTH))
    assert state(model) != before


@each()
def test_the_module_is_left_as_it_was(case):
    model = build(case)
    modes = [module.training for module in model.modules()]
    before, weights = state(model), {n: Bits(p) for n, p in model.named_parameters()}
    attributes = [list(vars(module)) for module in model.modules()]
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    random = torch.get_rng_state()
    convert(model, case.inputs(2, case.sizes[0]))
    assert torch.equal(torch.get_rng_state(), random)
    assert state(model) == before
    assert {n: Bits(p) for n, p in model.named_parameters()} == weights
    assert [module.training for module in model.modules()] == modes
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert hooks == [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


@each(lambda case: not case.inside)
def test_every_matrix_responds_or_is_refused_with_a_reason(case):
    model = build(case)
    stn = convert(model)
    assert bool(stn.model.computed_weights()) == case.computed
    plan = stn.plan
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    responding = {site.weight for site in plan.weights if site.weight_responds}
    assert matrices - responding == case.left
    refused = {refusal.name: refusal.reason for refusal in plan.refusals}
    served = {site.weight.rpartition(".")[0] for site in plan.weights}
    for name in case.left:
        owners = {name[:end] for end in range(len(name) + 1)} | {"(root)"}
        assert owners & refused.keys() or name.rpartition(".")[0] in served
        assert all(refused[owner] for owner in owners & refused.keys())


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


@each()
def test_the_response_pass_is_finite_and_changes_nothing(case):
    model = build(case).train()
    stn = converted(case, model)
    open_gates(stn)
    call = case.inputs(3, case.sizes[0])
    before, identities = state(model), {key: id(p) for key, p in named(stn.model).items()}
    outputs = linearized(stn, call, torch.randn(rows_of(call), len(HPARAMS)))
    assert all(output.isfinite().all() for output in outputs)
    loss_of(outputs).backward()
    responses = stn.model.response_parameters()
    found = [p.grad for p in responses.values() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in found)
    assert any(gradient.any() for gradient in found)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert state(model) == before
    assert {key: id(parameter) for key, parameter in named(stn.model).items()} == identities


@each(lambda case: case.smooth)
def test_tangents_are_central_differences(case):
    with double_precision():
        stn, call = (
            converted(case, build(case).train()),
            case.inputs(3, case.sizes[0]),
        )
        open_gates(stn)
        epsilon, step = torch.randn(rows_of(call), len(HPARAMS)), 1e-5
        with torch.no_grad():
            centre = perturbed(stn, call, 0 * epsilon)
            ahead, behind = (perturbed(stn, call, side * step * epsilon) for side in (1, -1))
            found = linearized(stn, call, epsilon)
    changes = 0.0
    for total, middle, plus, minus in zip(found, centre, ahead, behind, strict=True):
        if total.is_floating_point():
            expected = (plus - minus) / (2 * step)
            assert torch.allclose(total - middle, expected, rtol=1e-6, atol=1e-7)
            changes += float(expected.abs().sum())
    assert changes > 1e-3


@each(lambda case: not case.computed and not (case.views and case.inside))
def test_the_perturbed_pass_is_the_original_with_other_weights(case):
    with double_precision():
        model, twin = build(case).eval(), build(case).eval()
        stn, call = converted(case, model), case.inputs(3, case.sizes[0])
        assert not stn.model.computed_weights()
        open_gates(stn)
        epsilon = torch.randn(len(HPARAMS))
        changed = weights_at(stn, epsilon)
        with torch.no_grad():
            found = perturbed(stn, call, epsilon.expand(rows_of(call), -1))
            expected = tensors(functional_call(twin, changed, *call))
            plain = tensors(twin(*call[0], **call[1]))
    found = found[: len(found) - case.blind]
    expected, plain = expected[: len(found)], plain[: len(found)]
    close = [
        torch.allclose(*pair, rtol=1e-9, atol=1e-11) for pair in zip(found, expected, strict=True)
    ]
    assert all(close)
    assert not all(torch.allclose(*pair) for pair in zip(found, plain, strict=True))


def weights_at(stn: STN, epsilon: Tensor) -> dict[str, Tensor]:
    """Weights and biases at one perturbation, the slow way."""
    general = stn.model.general_parameters()
    changed = {
        name: general[name] + response.materialise(general[name], epsilon)
        for name, response in stn.model.weight_responses().items()
    }
    for name, response in stn.model.bias_responses().items():
        changed[name] = general[name] + response(general[name], epsilon[None])[0]
    return {name: tensor.detach() for name, tensor in changed.items()}


@each()
def test_each_example_has_its_own_perturbation(case):
    call = case.inputs(3, case.sizes[0])
    stn = convert(build(case).eval(), call)
    shared = {site.name for site in stn.plan.weights if site.layout.startswith("shared")}
    uncalled = {f"{case.inside}{name}" for name in case.uncalled}
    assert shared - uncalled == {f"{case.inside}{name}" for name in case.shared}
    if not case.independent:
        return
    open_gates(stn, tuple(layout for layout in RowLayout if layout is not RowLayout.SHARED))
    block = rows_of(call) // 3
    response_input = torch.randn(3 * block, len(HPARAMS))
    changed = response_input.clone()
    changed[block : 2 * block] += 1.0
    with torch.no_grad():
        before, after = perturbed(stn, call, response_input)[0], perturbed(stn, call, changed)[0]
    assert len(before) == 3
    assert not torch.allclose(before[1], after[1], atol=1e-4)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


def batch_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Read the second hyperparameter, to no effect, and return the loss."""
    unused = model.hyperparameters["free"].mean() if model.training else 0.0
    return loss_of(model(*batch["args"], **batch["kwargs"])) + 0.0 * unused


@each()
def test_all_kinds_of_step_run(case):
    model = build(case).train()
    args, kwargs = case.inputs(3, case.sizes[0])
    batch = {"args": args, "kwargs": kwargs, "target": torch.zeros(3)}
    stn = stnify(
        model,
        HPARAMS,
        optimizer=torch.optim.SGD(model.parameters(), 0.05),
        forward_loss=batch_loss,
        valid_loader=[batch],
        train_steps=1,
        warmup_steps=0,
        example_inputs=as_example((args, kwargs)) if case.optional else None,
        verify=False,
        seed=0,
    )
    start = stn.values()
    losses = [stn.step(copy.deepcopy(batch)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert stn.counters.skipped == stn.counters.skipped_responses == 0
    # A decay acts on parameters: in weights that are all computed from them nothing feels it, and
    # without any effect opposite perturbations leave no gradient at all.
    felt = bool(stn.model.weight_responses()) or not stn.model.computed_weights()
    assert all((stn.values()[name] != value) is felt for name, value in start.items())


def test_an_optional_argument_that_no_example_shows_is_refused_in_training():
    case = AWKWARD["OptionalMask"]
    stn = convert(build(case).train())
    with pytest.raises(UsageError, match=r"(?s)argument 'mask'.*Give it in `example_inputs=`"):
        run(stn.model, case.inputs(3, 4))


@pytest.mark.parametrize("name", [name for name, case in AWKWARD.items() if case.lost])
def test_a_model_without_any_weight_to_recognise_is_refused(name):
    with pytest.raises(
        UnsupportedModuleError, match=r"there is none to rewrite: .*cannot be traced"
    ):
        convert(DataDependent(AWKWARD[name].build()))


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 1)])
def test_lazy_layers_are_refused(lazy):
    with pytest.raises(UnsupportedModuleError, match=r"'1\.weight' is lazy\. Run one batch"):
        convert(nn.Sequential(nn.Linear(WIDTH, 4), lazy))
