"""Convolutions, ordinary and transposed, with a response for each output channel."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from stnify.layers.base import HyperLayer
from stnify.layers.response import BiasResponse, WeightResponse
from stnify.rows import trailing

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTransposeModule = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@final
class HyperConv(HyperLayer):
    """``F.conv*d`` or ``F.conv_transpose*d`` whose kernels respond to the hyperparameters.

    Args:
        weight_response: Response of the kernels, gated by output channel.
        bias_response: Response of the bias.
        convolve: ``(inputs, weight, bias, **geometry) -> outputs``, the original convolution.
        spatial_dims: 1, 2 or 3.

    Shapes: inputs ``(batch, channels, *space)`` or ``(channels, *space)``. Source: [DeltaSTN] E.1.
    """

    row_dims: ClassVar[tuple[int, ...]] = (0,)

    def __init__(
        self,
        weight_response: WeightResponse | None,
        bias_response: BiasResponse | None,
        convolve: Callable[..., Tensor],
        spatial_dims: int,
    ) -> None:
        super().__init__(weight_response, bias_response)
        self.convolve = convolve
        self.spatial_dims = spatial_dims

    def operate(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Convolve."""
        return self.convolve(inputs, weight, bias, **arguments)

    def broadcast(self, units: Tensor, outputs: Tensor) -> Tensor:
        """Spread channels over space."""
        if outputs.ndim == self.spatial_dims + 1:
            return trailing(units[0], outputs.ndim)
        return trailing(units, outputs.ndim)

    def is_single(self, inputs: Tensor) -> bool:
        """One example has channels first."""
        return inputs.ndim == self.spatial_dims + 1


@final
class Convolution:
    """What an ``nn.Conv*d`` computes, with the weight and bias as arguments.

    Padding modes other than zeros pad first, as the module does.
    """

    def __init__(self, module: ConvModule) -> None:
        self.function = getattr(F, f"conv{len(module.kernel_size)}d")
        self.mode = module.padding_mode
        self.pad = _pad_widths(module) if self.mode != "zeros" else ()
        padding: Any = module.padding if self.mode == "zeros" else 0
        self.arguments = (module.stride, padding, module.dilation, module.groups)

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of ``inputs``."""
        if self.pad:
            inputs = F.pad(inputs, self.pad, mode=self.mode)
        return self.function(inputs, weight, bias, *self.arguments)


@final
class TransposedConvolution:
    """What an ``nn.ConvTranspose*d`` computes, with the weight and bias as arguments."""

    def __init__(self, module: ConvTransposeModule) -> None:
        self.function = getattr(F, f"conv_transpose{len(module.kernel_size)}d")
        self.kernel_size = module.kernel_size
        self.stride, self.padding = module.stride, module.padding
        self.dilation, self.groups = module.dilation, module.groups
        self.output_padding = module.output_padding

    def __call__(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the transposed convolution of ``inputs``, of this spatial size if one is given."""
        padding = self._output_padding(inputs, output_size)
        arguments = (self.stride, self.padding, padding, self.groups, self.dilation)
        return self.function(inputs, weight, bias, *arguments)

    def _output_padding(self, inputs: Tensor, output_size: Sequence[int] | None) -> Sequence[int]:
        if output_size is None:
            return self.output_padding
        dims = len(self.kernel_size)
        return [
            wanted - ((size - 1) * stride - 2 * int(pad) + dilation * (kernel - 1) + 1)
            for wanted, size, stride, pad, dilation, kernel in zip(
                output_size[-dims:],
                inputs.shape[-dims:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]


def _pad_widths(module: ConvModule) -> tuple[int, ...]:
    """Return the widths for ``F.pad``: last dimension first, before and after."""
    before_after: list[tuple[int, int]] = []
    for dim, (kernel, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = dilation * (kernel - 1)
            before_after.append((total // 2, total - total // 2))
        elif module.padding == "valid":
            before_after.append((0, 0))
        else:
            width = int(module.padding[dim])
            before_after.append((width, width))
    return tuple(width for pair in reversed(before_after) for width in pair)
