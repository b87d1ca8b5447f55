"""The deployed network in PyTorch: integer-exact evaluation.

Convolutions run over integers in float32 where no partial sum can pass 2^24, in float64 otherwise, so that
the order in which a backend adds does not matter: results do not change with threads, memory layout or batch
size.
"""

from __future__ import annotations

from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.ir.steps import channelwise

Arrays = dict[str, Tensor]


class ExactNetwork(nn.Module):
    """Executes a `Description`; its steps' arrays are buffers, nothing is trainable.

    On a GPU every convolution runs in float64, since float32 kernels may use reduced-precision products or
    transforms there.

    Args:
        description: The network to execute.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self._wide = set(description.wide_layers())
        for index, step in enumerate(description.steps):
            for name, array in tensors(step).items():
                self.register_buffer(f"step{index}_{name}", array, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits `[N, classes]` of images `[N, C, H, W]`."""
        return self.run(images)[self.description.output]

    @torch.no_grad()
    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the outputs of all steps by name.

        Raises:
            ValueError: The images do not fit the network.
        """
        self.description.check_input(str(images.dtype).removeprefix("torch."), images.shape)
        values = {self.description.input.name: images}
        for index, step in enumerate(self.description.steps[1:], 1):
            arrays = {name: getattr(self, f"step{index}_{name}") for name in step.arrays()}
            wide = step.name in self._wide or images.is_cuda
            values[step.name] = run_step(step, arrays, wide, *(values[name] for name in step.inputs))
        return values


def tensors(step: s.Step) -> Arrays:
    """Returns the step's arrays as tensors, weights in the dtype in which they are used."""
    arrays = {name: torch.from_numpy(array.copy()) for name, array in step.arrays().items()}
    if isinstance(step, s.IntConv):
        arrays["weight"] = arrays["weight"].to(torch.float64 if step.needs_float64 else torch.float32)
    if isinstance(step, s.FixedLinear):
        arrays["weight"] = arrays["weight"].double()
    return arrays


@singledispatch
def run_step(step: s.Step, arrays: Arrays, wide: bool, *inputs: Tensor) -> Tensor:
    """Returns the output of one step; `wide` asks for float64 sums."""
    raise ValueError(f"step: {step.op!r} is unknown to this version")


@run_step.register
def _(step: s.Normalize, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    return (x.float() - channelwise(arrays["offset"], x)) / channelwise(arrays["divisor"], x)


@run_step.register
def _(step: s.Codes, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    if step.sign is not None:
        x = x * channelwise(arrays["sign"], x)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in arrays["thresholds"].T:
        codes += x > channelwise(threshold, x)
    return codes


@run_step.register
def _(step: s.UniformCodes, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    if step.offset:
        x = x - torch.tensor(step.offset, dtype=torch.float32, device=x.device)
    # A tensor, not a number: dividing by a number multiplies by its reciprocal on some devices.
    divisor = torch.tensor(step.step, dtype=torch.float32, device=x.device)
    return torch.round(x / divisor).nan_to_num(nan=0.0).clamp(0, step.levels).to(torch.uint8)


def convolve(x: Tensor, weight: Tensor, window: s.Window, wide: bool) -> Tensor:
    """Returns the convolution in the dtype of the weight, or in float64 if `wide`."""
    dtype = torch.float64 if wide else weight.dtype
    top, left, bottom, right = window.pads
    x = x.to(dtype)
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight.to(dtype), None, window.stride, padding, window.dilation, window.groups)


@run_step.register
def _(step: s.IntConv, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    return convolve(x, arrays["weight"], step.window, wide).to(torch.int32)


@run_step.register
def _(step: s.IntLinear, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    weight = arrays["weight"].double() if wide else arrays["weight"]
    return F.linear(x.to(weight.dtype), weight).to(torch.int32)


@run_step.register
def _(step: s.BorderSums, arrays: Arrays, wide: bool) -> Tensor:
    ones = torch.ones(1, 1, *step.size, device=arrays["weight"].device)
    return convolve(ones, arrays["weight"], step.window, wide).float()


def sample_scale(x: Tensor, bits: int) -> Tensor:
    """Returns `max(max|x|, TINY) * 2^-bits` of every sample, with as many axes as `x`."""
    largest = x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
    return largest.clamp_min(s.TINY) * 2.0**-bits


@run_step.register
def _(step: s.FixedLinear, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    scale = sample_scale(x, step.bits)
    integers = torch.round(x / scale).double()
    if x.dim() == 4:
        total = F.conv2d(integers, arrays["weight"][:, :, None, None], stride=step.stride)
    else:
        total = F.linear(integers, arrays["weight"])
    return total.float() * scale


@run_step.register
def _(step: s.SplitConv, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    scale = sample_scale(x, step.high_bits)
    unit = x / scale
    high = torch.round(unit)
    low = torch.round((unit - high) * 2.0**step.low_bits) * 2.0**-step.low_bits
    pairs = ((high, "high"), (high, "low"), (low, "high"))
    main, high_low, low_high = (
        convolve(part, arrays[weight], step.window, wide).float() * scale for part, weight in pairs
    )
    return main + (high_low + low_high)


@run_step.register
def _(step: s.MeanPool, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    scale = sample_scale(x, step.bits)
    total = torch.round(x / scale).double().sum(dim=(2, 3), keepdim=True)
    count = torch.tensor(x.shape[2] * x.shape[3], dtype=torch.float64, device=x.device)
    return (total / count).float() * scale


@run_step.register
def _(step: s.Affine, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    x = x.float()
    if step.scale is not None:
        x = x * channelwise(arrays["scale"], x)
    return x if step.shift is None else x + channelwise(arrays["shift"], x)


@run_step.register
def _(step: s.PReLU, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * channelwise(arrays["slope"], x))


@run_step.register
def _(step: s.MaxPool, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    top, left, bottom, right = step.window.pads
    x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    return F.max_pool2d(x, step.kernel, step.window.stride, 0, step.window.dilation)


@run_step.register
def _(step: GridCodes, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    thresholds = arrays["thresholds"]
    x = x.to(thresholds.dtype)
    if step.sign is not None:
        x = x * channelwise(arrays["sign"], x)
    rows = x.transpose(0, 1).reshape(len(thresholds), -1) if len(thresholds) > 1 else x.reshape(1, -1)
    counts = torch.searchsorted(thresholds, rows.contiguous(), out_int32=True).masked_fill(rows.isnan(), 0)
    flipped = (x.shape[1], x.shape[0], *x.shape[2:])
    counts = counts.reshape(flipped).transpose(0, 1) if len(thresholds) > 1 else counts.reshape(x.shape)
    return (counts + step.low).to(getattr(torch, step.dtype))


@run_step.register
def _(step: IntMaxPool, arrays: Arrays, wide: bool, x: Tensor) -> Tensor:
    top, left, bottom, right = step.window.pads
    padded = F.pad(x.float(), (left, right, top, bottom))
    return F.max_pool2d(padded, step.kernel, step.window.stride, 0, step.window.dilation).to(x.dtype)


run_step.register(IntAdd, lambda step, arrays, wide, left, right: left.int() + right.int())
run_step.register(SumPool, lambda step, arrays, wide, x: x.sum(dim=(2, 3), keepdim=True, dtype=torch.int32))
run_step.register(s.Clamp, lambda step, arrays, wide, x: x.clamp(step.low, step.high))
run_step.register(s.Add, lambda step, arrays, wide, left, right: left + right)
run_step.register(s.Mul, lambda step, arrays, wide, left, right: left * right)
run_step.register(s.Concat, lambda step, arrays, wide, *inputs: torch.cat(inputs, 1))
run_step.register(s.Flatten, lambda step, arrays, wide, x: x.flatten(1))
