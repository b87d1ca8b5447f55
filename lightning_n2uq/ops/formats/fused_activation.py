"""Parameters and gradients of the fused operators by name, and as the flat lists that torch registers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor


class NormParameters(NamedTuple):
    """A batch norm's `gamma` and `beta`, `[C]` each, and what it adds to the variance."""

    gamma: Tensor
    beta: Tensor
    eps: float


class PReLUParameters(NamedTuple):
    """Bias, PReLU's slope, bias: `[C]` each."""

    bias_in: Tensor
    slope: Tensor
    bias_out: Tensor


class Window(NamedTuple):
    """A square pooling window: kernel (up to 15), stride, padding (at most half the kernel)."""

    kernel: int
    stride: int
    padding: int

    def pooled(self, size: Iterable[int]) -> list[int]:
        """Returns the height and width of the pooled map of a map of that size."""
        return [(length + 2 * self.padding - self.kernel) // self.stride + 1 for length in size]


class ChannelGradients(NamedTuple):
    """Gradients of a norm's and of a PReLU's parameters, None for those that there are not."""

    gamma: Tensor | None
    beta: Tensor | None
    bias_in: Tensor | None
    slope: Tensor | None
    bias_out: Tensor | None


class ActivationGradients(NamedTuple):
    """Gradients of `packed_activation`, None for parameters that there are not."""

    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    bias_in: Tensor | None
    slope: Tensor | None
    bias_out: Tensor | None
    start: Tensor
    widths: Tensor
    scale_in: Tensor
    scale_out: Tensor


class ConvGradients(NamedTuple):
    """Gradients of `packed_conv2d`, None for those that nobody needs."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class ResidualGradients(NamedTuple):
    """Gradients of `residual_activation`, the last two None without a norm on the shortcut."""

    x: Tensor
    other: Tensor
    gamma: Tensor
    beta: Tensor
    bias_in: Tensor
    slope: Tensor
    bias_out: Tensor
    other_gamma: Tensor | None
    other_beta: Tensor | None


class PoolGradients(NamedTuple):
    """Gradients of `norm_relu_pool`."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


def norm_parameters(values: Iterable[Tensor | None], eps: float) -> NormParameters | None:
    """Returns `gamma` and `beta` by name, or None where there is no norm."""
    given = present(values)
    return NormParameters(given[0], given[1], eps) if given else None


def prelu_parameters(values: Iterable[Tensor | None]) -> PReLUParameters | None:
    """Returns bias, slope, bias by name, or None where there is no PReLU."""
    given = present(values)
    return PReLUParameters(*given) if given else None


def present(values: Iterable[Tensor | None]) -> list[Tensor]:
    """Returns those tensors that there are: operators return lists without None."""
    return [value for value in values if value is not None]


def restored(values: Sequence[Tensor], known: Iterable[bool]) -> list[Tensor | None]:
    """Undoes `present`; `known` says of every place whether there is a tensor."""
    found = iter(values)
    return [next(found) if there else None for there in known]
