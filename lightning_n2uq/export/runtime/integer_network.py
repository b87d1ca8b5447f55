"""The deployed network as a module that a compiler can fuse: integer convolutions and loops between them.

It computes what `ExactNetwork` computes, in every bit. Integer convolutions read uint8 codes and int8 weights
(oneDNN) where no processor's kernels can saturate, and their sums stay float32 numbers that hold integers.
Thresholds are rows of per-channel numbers. So a compiler turns everything between two
convolutions into one vectorized loop. Uncompiled it is slower than `ExactNetwork`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntMaxPool
from lightning_n2uq.export.ir.steps import channelwise
from lightning_n2uq.export.runtime import torch_engine
from lightning_n2uq.export.runtime.torch_engine import Arrays
from lightning_n2uq.utils import processor
from lightning_n2uq.utils.compat import integer_operators

PAIR_LIMIT = 2**15 - 1
"""x86 kernels without VNNI add two products of unsigned and signed bytes in 16 bits, and saturate."""

HALVED_FROM = 7
"""With more thresholds, one comparison first chooses the half that is then compared one by one."""

_LAYOUT = torch.channels_last


class IntegerNetwork(nn.Module):
    """Executes a `Description` on a CPU; for `torch.export`, no branch depends on data.

    Args:
        description: The network to execute.
        code_outputs: Whether the codes of every quantizer follow the logits, for comparison.
    """

    def __init__(self, description: Description, code_outputs: bool = False) -> None:
        super().__init__()
        self.description = description
        self.outputs = [description.output]
        if code_outputs:
            self.outputs += [step.name for step in description.quantizers()]
        self.thinned = {} if code_outputs else _thinned(description)
        signed = {step.name for step in description.steps if isinstance(step, GridCodes) and step.low}
        for index, step in enumerate(description.steps):
            # The byte kernels take unsigned codes only.
            plain = isinstance(step, s.IntConv) and step.inputs[0] in signed
            ready = torch_engine.tensors if plain else prepare
            for name, array in ready(step).items():
                self.register_buffer(f"step{index}_{name}", array, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits `[N, classes]` of images `[N, C, H, W]`, and the codes if asked for."""
        values = {self.description.input.name: images}
        for index, step in enumerate(self.description.steps[1:], 1):
            prefix = f"step{index}_"
            arrays = {k.removeprefix(prefix): v for k, v in self.named_buffers() if k.startswith(prefix)}
            values[step.name] = self._run(step, arrays, [values[name] for name in step.inputs])
        return tuple(values[name] for name in self.outputs)

    def _run(self, step: s.Step, arrays: Arrays, inputs: list[Tensor]) -> Tensor:
        if step.name in self.thinned:
            down, across = self.thinned[step.name]
            inputs = [x[:, :, ::down, ::across].contiguous(memory_format=_LAYOUT) for x in inputs]
        if isinstance(step, s.IntConv) and step.inputs[0] in self.thinned:
            step = replace(step, window=replace(step.window, stride=(1, 1)))
        return run_step(step, arrays, *inputs)


def _thinned(description: Description) -> dict[str, tuple[int, int]]:
    """Returns, with the strides, the quantizers that only a strided 1x1 convolution reads: in places."""
    readers: dict[str, list[s.Step]] = {step.name: [] for step in description.steps}
    for step in description.steps:
        for name in step.inputs:
            readers[name].append(step)
    found = {}
    for step in description.quantizers():
        match readers[step.name]:
            case [s.IntConv(weight=weight, window=window)]:
                if weight.shape[2:] == (1, 1) and not any(window.pads) and window.stride != (1, 1):
                    found[step.name] = window.stride
    return found


def takes_bytes(step: s.IntConv) -> bool:
    """Returns whether torch has byte kernels that sum the layer exactly on every x86 processor."""
    if integer_operators() is None or not processor.has_vectors():
        return False
    largest = int(np.abs(step.weight).max(initial=0))
    fits = largest <= 127 and 2 * step.levels * largest <= PAIR_LIMIT and not step.needs_float64
    top, left, bottom, right = step.window.pads
    return fits and step.weight.ndim == 4 and (top, left) == (bottom, right)


def prepare(step: s.Step) -> Arrays:
    """Returns the step's arrays as `run_step` takes them."""
    if isinstance(step, s.Codes) and not isinstance(step, GridCodes):
        arrays = {"thresholds": torch.from_numpy(_float_thresholds(step).T.copy())}
        return arrays if step.sign is None else {**arrays, "sign": torch.from_numpy(step.sign.astype("f4"))}
    if isinstance(step, s.IntConv) and takes_bytes(step):
        channels = len(step.weight)
        return {
            "weight": torch.from_numpy(step.weight.astype(np.int8)),
            "scale": torch.ones(channels),
            "zero": torch.zeros(channels, dtype=torch.int32),
        }
    return torch_engine.tensors(step)


def _float_thresholds(step: s.Codes) -> np.ndarray:
    """Thresholds as float32; one that every sum passes becomes minus infinity."""
    values = step.thresholds
    if values.dtype == np.float32:
        return values
    wide = values.astype(np.float64)
    return np.where(wide < -s.EXACT_FLOAT32, -np.inf, wide).astype(np.float32)


@singledispatch
def run_step(step: s.Step, arrays: Arrays, *inputs: Tensor) -> Tensor:
    """Returns the output of one step."""
    return torch_engine.run_step(step, arrays, False, *inputs)


@run_step.register(GridCodes)
@run_step.register(IntMaxPool)
def _(step: s.Step, arrays: Arrays, x: Tensor) -> Tensor:
    return torch_engine.run_step(step, arrays, False, x)


@run_step.register
def _(step: s.Codes, arrays: Arrays, x: Tensor) -> Tensor:
    if step.sign is not None:
        x = x * channelwise(arrays["sign"], x)
    # [n, 1, C, 1, 1] against [N, C, H, W]; counted in float32, as bytes would be converted in every vector.
    rows = arrays["thresholds"].reshape(step.levels, 1, -1, *(1,) * (x.dim() - 2))
    middle, rest = divmod(step.levels, 2)
    if step.levels <= HALVED_FROM or not rest:
        return (x > rows).float().sum(0).to(torch.uint8)
    passed = x > rows[middle]
    half = torch.where(passed, rows[middle + 1 :], rows[:middle])
    return (passed.float() * (middle + 1) + (x > half).float().sum(0)).to(torch.uint8)


@run_step.register
def _(step: s.IntConv, arrays: Arrays, x: Tensor) -> Tensor:
    if "scale" not in arrays:
        return torch_engine.run_step(step, arrays, step.needs_float64, x)
    window = step.window
    geometry = (list(window.stride), list(window.pads[:2]), list(window.dilation), window.groups)
    x = x.contiguous(memory_format=_LAYOUT)
    return byte_convolution(x, arrays["weight"], arrays["scale"], arrays["zero"], *geometry)


def byte_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Returns the exact sums as float32; the weight is packed when the graph is compiled."""
    operators = integer_operators()
    assert operators is not None  # `takes_bytes` has made sure
    geometry = (stride, padding, dilation, groups)
    packed = operators.pack_conv(weight, scale, 1.0, 0, *geometry)
    unscaled = (1.0, 0, torch.float32)
    return operators.conv(x, 1.0, 0, packed, scale, zero, None, *geometry, *unscaled, "none", [], "")


@run_step.register
def _(step: s.MaxPool, arrays: Arrays, x: Tensor) -> Tensor:
    top, left, bottom, right = step.window.pads
    inside = 2 * top <= step.kernel[0] and 2 * left <= step.kernel[1]
    if (top, left) != (bottom, right) or not inside:
        return torch_engine.run_step(step, arrays, False, x)
    return F.max_pool2d(x, step.kernel, step.window.stride, (top, left), step.window.dilation)
