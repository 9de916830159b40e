"""Packed sequences, by indexing: the kernels have no forward-mode derivative."""

import torch
from torch import Tensor


def pack(inputs: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Return what ``torch._pack_padded_sequence`` returns: the data, and the size of each step.

    Args:
        inputs: ``(batch, time, ...)``, or time first.
        lengths: Of each example, from long to short, on the CPU.
        batch_first: Which of the two the inputs are.
    """
    used = torch.arange(int(lengths[0]))[:, None] < lengths
    time, example = (index.to(inputs.device) for index in used.nonzero(as_tuple=True))
    return inputs[(example, time) if batch_first else (time, example)], used.sum(1)


def pad(
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float = 0.0,
    total_length: int = -1,
) -> tuple[Tensor, Tensor]:
    """Return what ``torch._pad_packed_sequence`` returns: padded data, and the lengths.

    Args:
        data: ``(sum of lengths, ...)``, step by step.
        batch_sizes: How many examples each step has, on the CPU.
        batch_first: Whether the result is ``(batch, time, ...)``.
        padding_value: What fills the ends.
        total_length: Steps of the result, if more than the longest example has.
    """
    steps = max(len(batch_sizes), total_length)
    examples = torch.arange(int(batch_sizes[0]))
    used = examples < torch.nn.functional.pad(batch_sizes, (0, steps - len(batch_sizes)))[:, None]
    places = (used.flatten().cumsum(0) - 1).clamp_min(0).view(used.shape)
    lengths = used.sum(0)
    if batch_first:
        used, places = used.t(), places.t()
    padded = data[places.to(data.device)]
    unused = ~used.to(data.device).view(*used.shape, *([1] * (data.ndim - 1)))
    return padded.masked_fill(unused, padding_value), lengths
