"""Architectures every conversion is tried on, each as a function that builds it afresh."""

from collections import Counter
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.structures import BLOCKS, signature


class FunctionalNetwork(nn.Module):
    """Calls functions on its own parameters, as BEiT and EVA do."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)
        self.kernel_bias = nn.Parameter(torch.randn(4))
        self.fourier = nn.Conv2d(4, 6, 1, bias=False)
        self.weight = nn.Parameter(torch.randn(5, 6) / 3)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, images: Tensor) -> Tensor:
        features = F.conv2d(images, self.kernel, self.kernel_bias, stride=2, padding=1)
        features = F.conv2d(features.relu(), self.fourier.weight, padding="same")
        return F.linear(features.tanh().mean((2, 3)), self.weight) + self.shift


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.GELU(), nn.Linear(16, 5))


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = timm.create_model(name, num_classes=5, **options)
        shake(model)
        return model

    return build


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = torchvision.models.get_model(name, num_classes=5)
        shake(model)
        return model

    return build


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Give statistics and scales that start at nought or one values of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 and "norm" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))


def shorten(model: nn.Module) -> None:
    """Keep two blocks of a kind in every sequence, which leaves the model's structure as it is.

    Blocks are modules with modules inside; those with parameters of the same sizes are of one kind.
    """
    before = signature(model)
    for sequence in (module for module in model.modules() if type(module) is nn.Sequential):
        kinds: Counter[object] = Counter()
        for name, block in list(sequence.named_children()):
            kind = type(block), *((key, t.shape) for key, t in block.state_dict().items())
            kinds[kind] += 1
            if next(block.children(), None) is not None and kinds[kind] > BLOCKS:
                del sequence._modules[name]
    assert signature(model) == before


ZOO: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "functional": FunctionalNetwork,
    "torchvision resnet18": torchvision_model("resnet18"),
    "timm resnet18": timm_model("resnet18"),
    "timm resnet26d": timm_model("resnet26d", channels=(16, 32, 64, 128)),
    "timm vit_tiny": timm_model("vit_tiny_patch16_224", img_size=32, depth=4, drop_rate=0.1),
    "timm convnext_atto": timm_model("convnext_atto"),
}
"""Every model takes ``(batch, 3, 32, 32)`` and returns ``(batch, 5)``."""


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
