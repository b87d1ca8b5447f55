"""Quantized recurrent layers and cells: weights, inputs and hidden states; gates and cell states stay float.

They run step by step in Python on every device, since the hidden state is quantized before every product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.convert.fitted import quantizers_for
from lightning_n2uq.layers import QuantSpec

State = tuple[Tensor, ...]


def _lstm(inputs: Tensor, hidden: Tensor, state: State) -> State:
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(inputs: Tensor, hidden: Tensor, state: State) -> State:
    (ir, iz, new), (hr, hz, hn) = inputs.chunk(3, -1), hidden.chunk(3, -1)
    update = torch.sigmoid(iz + hz)
    candidate = torch.tanh(new + torch.sigmoid(ir + hr) * hn)
    return (candidate + update * (state[0] - candidate),)


def _tanh(inputs: Tensor, hidden: Tensor, state: State) -> State:
    return (torch.tanh(inputs + hidden),)


def _relu(inputs: Tensor, hidden: Tensor, state: State) -> State:
    return (torch.relu(inputs + hidden),)


_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
}


class QuantRecurrent(nn.Module):
    """What the quantized forms of `LSTM`, `GRU` and `RNN` share; arguments and results are those of torch.

    Attributes:
        activation_quantizer: The quantizer of the first layer's input.
        inner_quantizers: Those of the inputs of the layers above.
        hidden_quantizers: One per layer and direction, for its hidden state.
        weight_quantizers: One per weight, by its name.
    """

    activation_quantizer: nn.Module
    inner_quantizers: nn.ModuleList
    hidden_quantizers: nn.ModuleList
    weight_quantizers: nn.ModuleDict

    def forward(self: Any, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # noqa: ANN401
        """Returns the outputs and the last states, in the shapes of torch's layer."""
        x, lengths = _padded(self, input)
        one = x.dim() == 2
        x = x.unsqueeze(1) if one else x
        states = self._first_states(x, hx, getattr(input, "sorted_indices", None))
        x, last = self._layers(x, states, lengths, hx is None)
        tensors = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        tensors = tuple(part.squeeze(1) for part in tensors) if one else tensors
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                tensors = tuple(part.index_select(1, input.unsorted_indices) for part in tensors)
            result: Any = _packed_like(x, input)
        else:
            result = x.squeeze(1) if one else (x.transpose(0, 1) if self.batch_first else x)
        return result, tensors if self.mode == "LSTM" else tensors[0]

    def _first_states(self: Any, x: Tensor, hx: Any, order: Tensor | None) -> list[State]:  # noqa: ANN401
        count = self.num_layers * (2 if self.bidirectional else 1)
        parts = 2 if self.mode == "LSTM" else 1
        if hx is None:
            zero = x.new_zeros(x.shape[1], self.hidden_size)
            return [(zero,) * parts] * count
        given = [part if part.dim() == 3 else part.unsqueeze(1) for part in (hx if parts == 2 else (hx,))]
        given = given if order is None else [part.index_select(1, order) for part in given]
        return [tuple(part[i] for part in given) for i in range(count)]

    def _layers(
        self: Any, x: Tensor, states: list[State], lengths: Tensor | None, zero: bool
    ) -> tuple[Tensor, list[State]]:
        last: list[State] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            quantizer = self.activation_quantizer if layer == 0 else self.inner_quantizers[layer - 1]
            source, outputs = quantizer(x), []
            for direction in range(directions):
                index = layer * directions + direction
                suffix = f"l{layer}" + ("_reverse" if direction else "")
                output, state = self._direction(source, states[index], index, suffix, lengths, zero)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, last

    def _direction(
        self: Any, x: Tensor, state: State, index: int, suffix: str, lengths: Tensor | None, zero: bool
    ) -> tuple[Tensor, State]:
        weights = {part: self._weight(f"weight_{part}_{suffix}") for part in ("ih", "hh")}
        biases = {part: getattr(self, f"bias_{part}_{suffix}", None) for part in ("ih", "hh")}
        inputs = F.linear(x, weights["ih"], biases["ih"])
        backward, quantize, step = (
            suffix.endswith("reverse"),
            self.hidden_quantizers[index],
            _STEPS[self.mode],
        )
        outputs: list[Tensor] = []
        for time in _times(len(x), backward):
            # A state that starts at zero is zero on every grid that the quantizer may have.
            hidden = state[0] if zero and not outputs else quantize(state[0])
            new = step(inputs[time], F.linear(hidden, weights["hh"], biases["hh"]), state)
            if lengths is not None:
                running = (lengths > time).unsqueeze(1)
                new = tuple(torch.where(running, a, b) for a, b in zip(new, state, strict=True))
            state = new
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backward else outputs), state

    def _weight(self: Any, name: str) -> Tensor:
        quantized: Tensor = self.weight_quantizers[name](getattr(self, name))
        return quantized


class QuantLSTM(QuantRecurrent, nn.LSTM):
    """`torch.nn.LSTM` with quantized weights, inputs and hidden states (no projections)."""


class QuantGRU(QuantRecurrent, nn.GRU):
    """`torch.nn.GRU` with quantized weights, inputs and hidden states."""


class QuantRNN(QuantRecurrent, nn.RNN):
    """`torch.nn.RNN` with quantized weights, inputs and hidden states."""


class QuantRecurrentCell(nn.Module):
    """What the quantized forms of `LSTMCell`, `GRUCell` and `RNNCell` share.

    Attributes:
        activation_quantizer: The quantizer of the input.
        hidden_quantizers: The one of the hidden state.
        weight_quantizers: One per weight, by its name.
    """

    mode: ClassVar[str] = "LSTM"
    activation_quantizer: nn.Module
    hidden_quantizers: nn.ModuleList
    weight_quantizers: nn.ModuleDict

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:  # noqa: ANN401
        """Returns the next state, as torch's cell does."""
        lstm = self.mode == "LSTM"
        one = input.dim() == 1
        x = input.unsqueeze(0) if one else input
        zero = hx is None
        given = (hx if lstm else (hx,)) if not zero else (x.new_zeros(len(x), self.hidden_size),) * (1 + lstm)
        state = tuple(part.unsqueeze(0) if part.dim() == 1 else part for part in given)
        weight = {
            name: self.weight_quantizers[name](getattr(self, name)) for name in ("weight_ih", "weight_hh")
        }
        inputs = F.linear(self.activation_quantizer(x), weight["weight_ih"], self.bias_ih)
        hidden = state[0] if zero else self.hidden_quantizers[0](state[0])
        mode = f"RNN_{self.nonlinearity.upper()}" if hasattr(self, "nonlinearity") else self.mode
        new = _STEPS[mode](inputs, F.linear(hidden, weight["weight_hh"], self.bias_hh), state)
        new = tuple(part.squeeze(0) for part in new) if one else new
        return new if lstm else new[0]


class QuantLSTMCell(QuantRecurrentCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with quantized weights, input and hidden state."""


class QuantGRUCell(QuantRecurrentCell, nn.GRUCell):
    """`torch.nn.GRUCell` with quantized weights, input and hidden state."""

    mode = "GRU"


class QuantRNNCell(QuantRecurrentCell, nn.RNNCell):
    """`torch.nn.RNNCell` with quantized weights, input and hidden state."""

    mode = "RNN"


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: QuantLSTM, nn.GRU: QuantGRU, nn.RNN: QuantRNN}
CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: QuantLSTMCell,
    nn.GRUCell: QuantGRUCell,
    nn.RNNCell: QuantRNNCell,
}


def make_recurrent(new: Any, spec: QuantSpec) -> nn.Module:  # noqa: ANN401 -- a layer or a cell
    """Gives a quantized layer or cell, which has its parameters, its quantizers; returns it."""
    names = [name for name, _ in new.named_parameters(recurse=False) if name.startswith("weight_")]
    pairs = {name: quantizers_for(getattr(new, name), spec) for name in names}
    new.weight_quantizers = nn.ModuleDict({name: on_weight for name, (on_weight, _) in pairs.items()})
    inputs = [pairs[name][1] for name in names if "_ih" in name and not name.endswith("_reverse")]
    new.activation_quantizer = inputs[0]
    if isinstance(new, QuantRecurrent):
        new.inner_quantizers = nn.ModuleList(inputs[1:])
    new.hidden_quantizers = nn.ModuleList(pairs[name][1] for name in names if "_hh" in name)
    if "relu" not in str(getattr(new, "nonlinearity", "")):
        for quantizer in new.hidden_quantizers:
            _cover_tanh(quantizer)
    return new  # type: ignore[no-any-return]


def _cover_tanh(quantizer: nn.Module) -> None:
    """Fits a quantizer to -1 .. 1, between which these hidden states lie."""
    if isinstance(quantizer, CalibratedInput):
        one = torch.ones((), device=quantizer.scale.device)
        quantizer.set_range(-one, one)


def _padded(layer: Any, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """Returns the input `[T, N, F]` (`[T, F]` without a batch), and the lengths of packed sequences."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        return padded, lengths.to(padded.device)
    return (x.transpose(0, 1) if layer.batch_first and x.dim() == 3 else x), None


def _packed_like(x: Tensor, packed: PackedSequence) -> PackedSequence:
    data = torch.cat([x[time, :size] for time, size in enumerate(packed.batch_sizes.tolist())])
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _times(length: int, backward: bool) -> Iterator[int]:
    return iter(range(length - 1, -1, -1) if backward else range(length))
