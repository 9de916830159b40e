"""Residual branches are found where libraries place their own stochastic depth."""

import pytest
import timm
import torch

from stnify.planning.residual import residual_branches
from stnify.trace import trace

COUNTS = {
    "convnext_tiny": 18,
    "densenet121": 0,
    "efficientnet_b0": 9,
    "inception_v3": 0,
    "mixer_s32_224": 16,
    "mobilenetv3_small_100": 6,
    "regnetx_002": 13,
    "resnet10t": 4,
    "resnet18": 8,
    "resnet50": 16,
    "swin_tiny_patch4_window7_224": 24,
    "vgg11": 0,
    "vit_tiny_patch16_224": 24,
}
"""Branches of models of timm, counted in their papers: two in a transformer's block, else one."""


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_as_many_branches_as_its_paper_says(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    branches = residual_branches(model, trace(model))
    assert len({branch.name for branch in branches}) == len(branches) == COUNTS[name]
