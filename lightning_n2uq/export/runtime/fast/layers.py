"""Layers with weights as the fast engine runs them: integer convolutions, and exact sums of split floats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime import torch_engine
from lightning_n2uq.export.runtime.fast import image_loops
from lightning_n2uq.export.runtime.fast.program import products
from lightning_n2uq.export.runtime.fast.split_conv import SplitConvolution, sample_scales
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.ops.formats.integer import IntegerRange
from lightning_n2uq.ops.integer import IntegerGeometry, integer_obstacle
from lightning_n2uq.ops.integer_weight import IntegerWeight


def dense(x: Tensor) -> Tensor:
    """Returns a map in channels-last order, features as they are; both contiguous."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


class TorchStep:
    """A step as `torch_engine` runs it.

    Args:
        step: Any step.
        accumulators: By input, whether it has integers as float32, which the step wants as int32.
    """

    def __init__(self, step: s.Step, accumulators: tuple[bool, ...] = ()) -> None:
        self.step, self.accumulators = step, accumulators
        self.arrays = torch_engine.tensors(step)
        self.wide = isinstance(step, s.IntConv) and step.needs_float64

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the step's output."""
        given = [x.to(torch.int32) if a else x for x, a in zip(inputs, self.accumulators, strict=True)]
        return dense(torch_engine.run_step(self.step, self.arrays, self.wide, *given))


class IntegerSums:
    """An integer layer whose sums float32 holds exactly, and which are float32 therefore.

    Args:
        step: The layer; not one that `needs_float64`.
        signed: Whether its input is int8, which fast operators do not take.
    """

    def __init__(self, step: s.IntConv, signed: bool = False) -> None:
        top, left, bottom, right = step.window.pads
        self._pads = None if (top, left) == (bottom, right) else (left, right, top, bottom)
        padding = (top, left) if self._pads is None else (0, 0)
        self._window = IntegerGeometry(step.window.stride, padding, step.window.dilation, step.window.groups)
        self._linear = step.weight.ndim == 2
        self._packed = None if signed else self._pack(step)
        unpacked = step.weight if self._packed is None else step.weight[:0]
        self._weight = dense(torch.from_numpy(unpacked.astype(np.float32)))

    def __call__(self, codes: Tensor) -> Tensor:
        """Returns the sums of a map or of features."""
        if self._pads is not None:
            codes = dense(F.pad(codes, self._pads))
        if self._packed is not None:
            return dense(self._packed.linear(codes) if self._linear else self._packed.conv2d(codes))
        if self._linear:
            return F.linear(codes.float(), self._weight)
        return dense(F.conv2d(codes.float(), self._weight, None, *self._window))

    def _pack(self, step: s.IntConv) -> IntegerWeight | None:
        """Returns the packed weight where bytes hold it and there is a fast operator that is exact."""
        largest, terms = int(np.abs(step.weight).max(initial=1)), int(step.weight[0].size)
        if largest > 127 or integer_obstacle(IntegerRange(step.levels, largest, terms), torch.device("cpu")):
            return None
        levels, ones = torch.from_numpy(step.weight.astype(np.int8)), torch.ones(len(step.weight))
        geometry = None if self._linear else self._window
        return IntegerWeight(levels, ones, None, geometry, step.levels, max(largest, 1))


class SplitSums:
    """The convolutions of a `SplitConv` in float32: the input's high parts with all weights, its low ones.

    What runs where `SplitConvolution` does not.

    Where the kernel steps by two or more and there are few channels, blocks of pixels become channels first,
    which convolutions are quicker with.

    Args:
        step: The layer.
    """

    def __init__(self, step: s.SplitConv) -> None:
        self.step = step
        stride, kernel = step.window.stride, step.high.shape[2:]
        foldable = step.window.groups == 1 and step.window.dilation == (1, 1) and stride[0] == stride[1]
        self._fold = stride[0] if foldable and step.high.shape[1] <= 4 and min(kernel) > 1 else 1
        both = np.concatenate([step.high, step.low]) if step.window.groups == 1 else None
        self._both = None if both is None else self._folded(both)
        self._high, self._low = self._folded(step.high), self._folded(step.low)
        top, left, _, _ = step.window.pads
        self._pads = np.array([top, left])
        folded = replace(step.window, stride=(1, 1)) if self._fold > 1 else step.window
        self._window = (folded.stride, (0, 0), folded.dilation, folded.groups)

    def scales(self, x: Tensor) -> Tensor:
        """Returns the numbers by which samples are divided."""
        return sample_scales(x, self.step.high_bits)

    def products(self, x: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Returns the products by their operands' names, for images `[N, C, H, W]` whose scales are finite.

        The first has sums of the input's high parts with high weights and, behind them, with low weights; the
        second sums of its low parts with high weights.
        """
        high, low = self._parts(x, scales)
        if self._both is not None:
            both = F.conv2d(high, self._both, None, *self._window)
        else:
            weights = self._high, self._low
            both = torch.cat([F.conv2d(high, weight, None, *self._window) for weight in weights], 1)
        sums = both, F.conv2d(low, self._high, None, *self._window)
        return dict(zip(products(self.step.name), map(dense, sums), strict=True))

    def _folded(self, weight: s.Array) -> Tensor:
        """Returns weights `[O, I, kh, kw]` for images whose blocks of pixels are channels."""
        fold, (height, width) = self._fold, weight.shape[2:]
        padded = np.pad(weight, ((0, 0), (0, 0), (0, -height % fold), (0, -width % fold)))
        outputs, inputs, rows, columns = padded.shape
        blocks = padded.reshape(outputs, inputs, rows // fold, fold, columns // fold, fold)
        blocks = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(outputs, -1, rows // fold, columns // fold)
        return dense(torch.from_numpy(np.ascontiguousarray(blocks, np.float32)))

    def _parts(self, x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Returns high and low parts, padded and in blocks."""
        images, fold = x.contiguous(), self._fold
        _, channels, height, width = images.shape
        rows, columns = self._size(height, width)
        shape = (len(images), fold * fold * channels, rows, columns)
        high, low = (torch.empty(shape, memory_format=torch.channels_last) for _ in range(2))
        views = [array(part.permute(0, 2, 3, 1)) for part in (high, low)]
        numbers = array(scales.reshape(-1)), self.step.low_bits, fold, self._pads
        run_chunks(image_loops.split_image, len(images) * rows, 8, array(images), *numbers, *views)
        return high, low

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of the parts."""
        if self._fold == 1:
            top, left, bottom, right = self.step.window.pads
            return height + top + bottom, width + left + right
        output = self.step.window.output_size((height, width), self.step.high.shape[2:])
        rows, columns = (o + k - 1 for o, k in zip(output, self._high.shape[2:], strict=True))
        return rows, columns


class SplitMap:
    """A `SplitConv` on its own, in one pass.

    Args:
        step: The layer, one that `takes` lets pass.
    """

    takes = SplitConvolution.takes

    def __init__(self, step: s.SplitConv) -> None:
        self._convolution, self._plain = SplitConvolution(step), TorchStep(step, (False,))

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the map; infinities and NaN in it are those of the plain engine."""
        scales = self._convolution.scales(x)
        return self._convolution(x, scales) if bool(torch.isfinite(scales).all()) else self._plain(x)


class FixedSums:
    """A `FixedLinear` on a map: a matrix product of its pixels."""

    def __init__(self, step: s.FixedLinear) -> None:
        self._step = step
        self._weight = torch.from_numpy(step.weight.T.astype(np.float64))

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the map `[N, O, H', W']`."""
        largest = x.abs().amax(dim=(1, 2, 3), keepdim=True)
        scale = largest.clamp_min(s.TINY) * 2.0**-self._step.bits
        rows, columns = self._step.stride
        pixels = torch.round(x[:, :, ::rows, ::columns] / scale).permute(0, 2, 3, 1).contiguous()
        sums = pixels.reshape(-1, x.shape[1]).double() @ self._weight
        y = sums.float().reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
        return dense(y * scale)
