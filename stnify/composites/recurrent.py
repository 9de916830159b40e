"""Recurrent networks and their cells, step by step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stnify.composites.packing import pack, pad

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
State = tuple[Tensor, ...]
"""Hidden state, and the cell state of an LSTM; ``(batch, width)`` each."""

Step = Callable[[Tensor, Tensor, State], State]
"""``(input's share of the gates, hidden state's share, state) -> state``."""


def _lstm_step(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    enter, forget, new, leave = (of_input + of_hidden).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru_step(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    reset_in, update_in, new_in = of_input.chunk(3, -1)
    reset_hidden, update_hidden, new_hidden = of_hidden.chunk(3, -1)
    reset, update = (reset_in + reset_hidden).sigmoid(), (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    return (new + update * (state[0] - new),)


def _tanh_step(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).tanh(),)


def _relu_step(of_input: Tensor, of_hidden: Tensor, state: State) -> State:
    return ((of_input + of_hidden).relu(),)


class _Weights(NamedTuple):
    """Parameters of one layer in one direction."""

    of_input: Tensor
    of_hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None


def recurrent_network(
    step: Step, linear: Linear, *args: Any, order: Tensor | None = None, **named: Any
) -> tuple[Tensor, ...]:
    """Return what ``torch.lstm``, ``torch.gru`` or ``torch.rnn_*`` returns: outputs, then states.

    Args:
        step: One step of the kind of network.
        linear: In place of ``F.linear``.
        args: Of the operator: a padded batch's ``(input, state, parameters, has_biases, layers,
            dropout, training, bidirectional, batch_first)``, or a packed one's ``(data,
            batch_sizes, state, parameters, ...)`` in the order of its lengths.
        order: Which example comes where in a packed batch. ``linear`` sees examples in their own
            order; it is needed only where that matters.
        named: The last of the arguments, in their order.
    """
    args = (*args, *named.values())
    if not isinstance(args[3], bool):
        return _packed_network(step, linear, order, *args)
    inputs, state, parameters, biases, layers, dropout, training, bidirectional, first = args
    inputs = inputs if first else inputs.transpose(0, 1)
    weights = _by_layer(parameters, biases, layers * (2 if bidirectional else 1))
    outputs, states = _run(
        step, linear, inputs, _states(state), weights, dropout if training else 0.0, bidirectional
    )
    return (outputs if first else outputs.transpose(0, 1), *states)


def _packed_network(
    step: Step,
    linear: Linear,
    order: Tensor | None,
    data: Tensor,
    batch_sizes: Tensor,
    state: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    inputs, lengths = pad(data, batch_sizes, batch_first=True)
    weights = _by_layer(parameters, biases, layers * (2 if bidirectional else 1))
    order = torch.arange(len(lengths)) if order is None else order
    own, here = order.argsort(), order.to(data.device)
    outputs, states = _run(
        step,
        linear,
        inputs[here.argsort()],
        tuple(part[:, here.argsort()] for part in _states(state)),
        weights,
        dropout if training else 0.0,
        bidirectional,
        lengths[own.cpu()].to(data.device),
    )
    packed, _ = pack(outputs[here], lengths, batch_first=True)
    return (packed, *(part[:, here] for part in states))


def recurrent_cell(
    step: Step,
    linear: Linear,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Return what ``torch.lstm_cell``, ``torch.gru_cell`` or ``torch.rnn_*_cell`` returns."""
    states = _states(hx)
    of_input = linear(input, w_ih, b_ih)
    found = step(of_input, linear(states[0], w_hh, b_hh), states)
    return found if len(found) > 1 else found[0]


def _run(
    step: Step,
    linear: Linear,
    inputs: Tensor,
    states: State,
    weights: Sequence[_Weights],
    dropout: float,
    bidirectional: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run all layers over ``(batch, time, width)``; return outputs and last states, stacked."""
    directions = 2 if bidirectional else 1
    last: list[State] = []
    for layer in range(0, len(weights), directions):
        if layer and dropout:
            inputs = F.dropout(inputs, dropout)
        sides = []
        for i in range(layer, layer + directions):
            start = tuple(state[i] for state in states)
            outputs, state = _scan(
                step, linear, inputs, start, weights[i], backwards=i > layer, lengths=lengths
            )
            sides.append(outputs)
            last.append(state)
        inputs = torch.cat(sides, -1) if bidirectional else sides[0]
    return inputs, [torch.stack(kind) for kind in zip(*last, strict=True)]


def _scan(
    step: Step,
    linear: Linear,
    inputs: Tensor,
    state: State,
    weights: _Weights,
    *,
    backwards: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Run one layer in one direction; states stand still beyond an example's length."""
    of_input = linear(inputs, weights.of_input, weights.input_bias)
    times = range(inputs.shape[1])
    outputs: dict[int, Tensor] = {}
    for time in reversed(times) if backwards else times:
        of_hidden = linear(state[0], weights.of_hidden, weights.hidden_bias)
        new = step(of_input[:, time], of_hidden, state)
        if weights.projection is not None:
            new = (linear(new[0], weights.projection, None), *new[1:])
        if lengths is not None:
            going = (time < lengths)[:, None]
            new = tuple(torch.where(going, n, old) for n, old in zip(new, state, strict=True))
        outputs[time], state = new[0], new
    return torch.stack([outputs[time] for time in times], 1), state


def _states(state: Tensor | Sequence[Tensor]) -> State:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _by_layer(parameters: Sequence[Tensor], biases: bool, runs: int) -> list[_Weights]:
    """Group an operator's flat list: weights, then biases, then the LSTM's projection."""
    size = len(parameters) // runs
    found = []
    for start in range(0, len(parameters), size):
        of_input, of_hidden, *rest = parameters[start : start + size]
        input_bias, hidden_bias = rest[:2] if biases else (None, None)
        projection = rest[-1] if size % 2 else None
        found.append(_Weights(of_input, of_hidden, input_bias, hidden_bias, projection))
    return found


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _tanh_step,
    "rnn_relu": _relu_step,
}

RECURRENT_NETWORKS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, name): partial(recurrent_network, step) for name, step in _STEPS.items()
}
"""Operator to the same in terms of a linear map."""

RECURRENT_CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, f"{name}_cell"): partial(recurrent_cell, step) for name, step in _STEPS.items()
}
"""Operator of one step to the same in terms of a linear map."""
