"""The property-test kit with models and inputs that are not the usual ones."""

import pytest
import torch
from kit import ASSERTIONS, every_assertion, normal
from torch import Tensor, nn
from torch.nn.utils import prune

from stnify import UsageError, stnify, testing

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Optional arguments -------------------------------------------------------------------------------


class Masked(nn.Module):
    """Multiplies by a mask if one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        outputs = self.layer(inputs).tanh()
        return outputs if mask is None else outputs * mask


GIVEN = {
    "by position": (normal(3, 4), normal(3, 6)),
    "by name": {"inputs": normal(3, 4), "mask": normal(3, 6)},
    "left out": (normal(3, 4),),
    "none": (normal(3, 4), None),
}


@every_assertion
@pytest.mark.parametrize("how", ["by position", "by name"])
def test_an_optional_argument_may_be_given(name, how):
    ASSERTIONS[name](Masked(), GIVEN[how])


@pytest.mark.parametrize("how", GIVEN)
def test_a_model_with_an_optional_argument_converts_and_compiles(how):
    assert testing.converts_or_refuses(Masked(), GIVEN[how]) is None
    testing.assert_compiles(Masked(), GIVEN[how], backend="eager")


@every_assertion
def test_a_model_may_be_in_eval_mode(name):
    ASSERTIONS[name](Masked().eval(), GIVEN["by name"])


# Padding ------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


PADDED = {
    "src": normal(2, 3, 4),
    "src_key_padding_mask": torch.tensor([[False, False, True], [False, False, False]]),
}


@every_assertion
def test_outputs_of_padding_may_be_what_a_fused_kernel_writes_there(name):
    ASSERTIONS[name](encoder(), PADDED)


def test_the_fused_kernel_is_as_it_was_afterwards():
    with torch.no_grad():
        before = encoder().eval()(**PADDED)
        assert not before[0, 2].any(), "the fused kernel writes zeros"
    testing.assert_identity(encoder(), PADDED)
    assert torch.backends.mha.get_fastpath_enabled()


class Shifted(nn.Module):
    """Adds something to a tensor of several lengths, which only its own kernels can read."""

    def forward(self, inputs: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor(list(inputs.unbind()))
        return torch.nested.to_padded_tensor(nested + nested, 0.0)


def test_a_mistake_beside_tensors_of_several_lengths_is_named():
    stn = stnify(nn.Sequential(nn.Linear(4, 3), Shifted(), nn.Linear(3, 2)), {"weight_decay": 1e-3})
    testing.assert_identity(stn, normal(5, 2, 4))
    layer = stn.model.hyper_layers["2"]
    layer.operate = lambda inputs, weight, bias: nn.functional.linear(inputs, weight, bias) + 1e-3
    with pytest.raises(AssertionError, match=r"first to differ is module '2'.*by 0\.001"):
        testing.assert_identity(stn, normal(5, 2, 4))


# Inputs without examples --------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, scale: Tensor) -> Tensor:
        return self.layer(torch.ones(4) * scale)


@every_assertion
@pytest.mark.parametrize(
    "inputs", [torch.tensor(2.0), torch.ones(0, 4), (), {"scale": 2.0}], ids=repr
)
def test_inputs_without_examples_are_refused(name, inputs):
    with pytest.raises(UsageError, match="must hold a tensor whose first dimension counts example"):
        ASSERTIONS[name](Scaled(), inputs)


def test_inputs_without_examples_are_a_mistake_of_the_caller_not_a_refusal_of_the_model():
    with pytest.raises(UsageError, match="must hold a tensor whose first dimension counts example"):
        testing.converts_or_refuses(Scaled(), torch.tensor(2.0))


# Tensors that forward code left on modules --------------------------------------------------------


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


@every_assertion
@pytest.mark.parametrize("build", [pruned, weight_normed])
def test_models_that_keep_computed_tensors_pass(name, build):
    ASSERTIONS[name](build(), normal(5, 4))


@pytest.mark.parametrize("build", [pruned, weight_normed])
def test_models_that_keep_computed_tensors_convert(build):
    assert testing.converts_or_refuses(build(), normal(5, 4)) is None
