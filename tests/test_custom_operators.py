"""Operators of other libraries keep tangents, or are refused: they lose them without an error."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import ops

from stnify import UnsupportedModuleError, WeightDecay, stnify, testing

BOXES = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 2.0, 6.0, 7.0]])


class Around(nn.Module):
    """Looks at boxes in what a convolution returns; the same ones in every picture."""

    def __init__(self, function, channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        found = self.function(features, [BOXES.to(features)] * len(features))
        return found.reshape(len(images), -1)


LINEAR = {
    "roi_align": lambda features, boxes: ops.roi_align(features, boxes, 2, aligned=True),
    "ps_roi_align": lambda features, boxes: ops.ps_roi_align(features, boxes, 2),
    "ps_roi_pool": lambda features, boxes: ops.ps_roi_pool(features, boxes, 2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_boxes_of_feature_maps_keep_the_tangent(name):
    torch.manual_seed(0)
    model, images = Around(LINEAR[name]), torch.randn(3, 3, 8, 8)
    testing.assert_tangent_matches_differences(model, images)
    testing.assert_linear_in_perturbation(model, images)
    testing.assert_rows_independent(model, images)


@torch.library.custom_op("stnify_tests::doubled", mutates_args=())
def doubled(values: Tensor) -> Tensor:
    return 2 * values


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda context, gradient: 2 * gradient)


@torch.library.custom_op("stnify_tests::largest", mutates_args=())
def largest(values: Tensor) -> Tensor:
    return values.argmax(1)


largest.register_fake(lambda values: values.new_empty(values[:, 0].shape, dtype=torch.long))


@torch.library.custom_op("stnify_tests::tripled_", mutates_args=("values",))
def tripled_(values: Tensor) -> None:
    values.mul_(3)


def tripled(values: Tensor) -> Tensor:
    copied = values.clone()
    tripled_(copied)
    return copied


LOSING = {
    "torchvision::roi_pool": lambda features, boxes: ops.roi_pool(features, boxes, 2),
    "torchvision::deform_conv2d": lambda features, boxes: ops.deform_conv2d(
        features, torch.zeros(len(features), 18, 6, 6).to(features), torch.ones(2, 4, 3, 3)
    ),
    "stnify_tests::doubled": lambda features, boxes: doubled(features),
    "stnify_tests::tripled_": lambda features, boxes: tripled(features),
}


@pytest.mark.parametrize("name", LOSING)
def test_what_would_lose_a_tangent_is_refused_at_the_conversion(name):
    images = torch.randn(3, 3, 8, 8)
    with pytest.raises(UnsupportedModuleError, match=f"'{name}' has none.*method=\"centered\""):
        stnify(Around(LOSING[name]), [WeightDecay()], example_inputs=images)
    stn = stnify(Around(LOSING[name]), [WeightDecay()], example_inputs=images, method="centered")
    assert [site.layout for site in stn.plan.weights] == ["batch"]


def test_an_operator_that_returns_no_real_numbers_has_nothing_to_lose():
    model = Around(lambda features, boxes: features * (1 + largest(features)[:, None]))
    testing.assert_tangent_matches_differences(model, torch.randn(3, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_boxes_keep_the_tangent_in_compiled_passes():
    """One conversion by eager code comes first, in which operators are met."""
    torch.manual_seed(0)
    model, images = Around(LINEAR["roi_align"]), torch.randn(3, 3, 8, 8)
    testing.assert_tangent_matches_differences(model, images)
    testing.assert_compiles(model, images, backend="eager")
