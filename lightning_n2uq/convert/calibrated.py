"""Quantizers fitted to a layer of an arbitrary network: any input range, weights of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.ranges import (
    best_range,
    best_symmetric_range,
    quantize_uniformly,
    sample_values,
)
from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers import (
    EWGS,
    LCQ,
    LSQ,
    PACT,
    APoT,
    DoReFa,
    LearnableThresholdQuantizer,
    LSQPlus,
    NuLSQ,
    Quantizer,
)
from lightning_n2uq.quantizers.base import (
    DataInitializedQuantizer,
    one_value_at_least,
    write_parameter,
)
from lightning_n2uq.quantizers.positions import level_position

_METHODS = ("LearnableThresholdQuantizer", "PACT", "APoT", "DoReFa", "LSQ", "NuLSQ", "LCQ", "EWGS")


class RangedInput(DataInitializedQuantizer):
    """A quantizer with a range from data: of `calibrate`, or else of the first batch in training.

    A subclass gives `range_of` and `set_range`, and `sample` where parts of its input have their own ranges.

    Attributes:
        parts: The number of ranges.
    """

    parts = 1

    def sample(self, x: Tensor) -> Tensor:
        """Returns values of `x` that tell its range; several are joined along the last axis."""
        return sample_values(x)

    def range_of(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lower and the upper end of the range that fits a sample."""
        raise NotImplementedError

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels go from about `low` to about `high`, which are as `range_of` returns them."""
        raise NotImplementedError

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the ends of the range, `low` and `high`, that fits the values `x`."""
        low, high = self.range_of(self.sample(x))
        return {"low": low, "high": high}

    def set_first_values(self, values: dict[str, Tensor]) -> None:
        """Sets the range."""
        self.set_range(values["low"], values["high"])


class CalibratedInput(RangedInput):
    """`scale * inner((x - offset) / scale) + offset`: an activation quantizer fitted to its layer's inputs.

    The methods expect inputs from 0 up; inputs of an arbitrary layer (behind a GELU, a layer norm) may be
    negative and of any size. The range comes from `calibrate`, or else from the first batch in training (in
    evaluation before that, a uniform quantizer is fitted on the fly). `offset` is learned, with the gradient
    `1 - inner'`; `scale` is for methods without one of their own and is fixed.

    Args:
        inner: The activation quantizer of a method.
    """

    scale: Tensor
    offset: nn.Parameter | None

    def __init__(self, inner: Quantizer) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping
        self.inner: Quantizer = inner
        own = isinstance(inner, LSQPlus) or is_signed(inner)
        self.offset = None if own else nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    @property
    def method(self) -> Quantizer:
        """The wrapped quantizer."""
        return self.inner

    def method_input(self, x: Tensor) -> Tensor:
        """Returns `(x - offset) / scale`."""
        return x if self.offset is None else (x - self.offset) / self.scale

    def shift(self, x: Tensor) -> Tensor | None:
        """Returns the offset once the range is known, None for methods that are scaled as well."""
        plain = not isinstance(self.inner, DoReFa) and not any("forward" in vars(m) for m in self.modules())
        return self.offset if plain and self.fits(x) else None

    @property  # type: ignore[override]  # a schedule may change the width of the wrapped one
    def bits(self) -> int:
        """The code width."""
        return self.inner.bits

    @bits.setter
    def bits(self, bits: int) -> None: ...

    @property  # type: ignore[override]
    def num_levels(self) -> int:
        """The number of levels."""
        return self.inner.num_levels

    @num_levels.setter
    def num_levels(self, number: int) -> None: ...

    def range_of(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ends of the range, 0-d."""
        return method_range(self.inner, sample)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels go from about `low` to about `high` (0-d, `low < high`)."""
        if self.offset is not None:
            set_parameter(self.offset, low)
        if isinstance(self.inner, DoReFa | EWGS):
            self.scale.fill_(high - low)
            low, high = torch.zeros_like(low), torch.ones_like(high)
        set_method_range(self.inner, low, high)
        self._note_fitted()

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating); same shape and dtype."""
        if not self.fits(x):
            if torch.compiler.is_exporting():
                raise ValueError(
                    "CalibratedInput: got no data yet, allowed is a calibrated or trained network"
                )
            low, high = self._range_of(x)
            y = quantize_uniformly(x.detach(), low, high, self.num_levels)
            return straight_through(x, y) + self._nothing() if self.training else y
        y = self.inner(self.method_input(x))
        if self.offset is not None:
            y = y * self.scale + self.offset
        return y.to(x.dtype)

    def _nothing(self) -> Tensor:
        """Returns 0 as a function of all parameters: data-parallel training waits for each of them."""
        return sum((0 * p.sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8, in the shape of `x`."""
        return level_position(self, x.detach()).round().to(torch.uint8) if not self.fitted else self._codes(x)

    @torch.no_grad()
    def _codes(self, x: Tensor) -> Tensor:
        return self.inner.codes(self.method_input(x.detach()))

    def _range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ends of the range that fits `x` itself, for a quantizer without one."""
        low, high = self.range_of(self.sample(one_value_at_least(x)))
        return low.to(x.dtype), high.to(x.dtype)


class RescaledWeight(Quantizer):
    """`scale * inner(weight)` for weight methods whose levels forget the weights' size (DoReFa, APoT).

    Their networks relearn it in the following normalisation; a trained layer without one would break. `scale`
    is fixed at conversion: least squares between the weights and their levels. The gradient is `inner`'s.

    Args:
        inner: The weight quantizer of a method.
        weight: The layer's weights, of any shape.
    """

    scale: Tensor

    def __init__(self, inner: Quantizer, weight: Tensor) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping
        self.inner: Quantizer = inner
        self.num_levels = inner.num_levels
        with torch.no_grad():
            levels = inner(weight.detach().cpu())
            size = levels.square().sum()
            fit = (levels * weight.detach().cpu()).sum() / torch.where(size == 0, torch.ones_like(size), size)
        self.register_buffer("scale", fit.reshape(1))

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` `[C, ...]`; same shape and dtype."""
        y: Tensor = self.inner(weight) * self.scale
        return y.to(weight.dtype)

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every weight, uint8."""
        return self.inner.codes(weight)


@level_position.register
def _(quantizer: CalibratedInput, x: Tensor) -> Tensor:
    if quantizer.fitted:
        return level_position(quantizer.inner, quantizer.method_input(x))
    low, high = quantizer._range_of(x)
    return (x.clamp(low, high) - low) / (high - low) * (quantizer.num_levels - 1)


@level_position.register
def _(quantizer: RescaledWeight, x: Tensor) -> Tensor:
    return level_position(quantizer.inner, x)


def is_signed(inner: nn.Module) -> bool:
    """Returns whether a method's levels lie on both sides of zero without an offset."""
    return isinstance(inner, LSQ) and inner.signed


def method_range(inner: Quantizer, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the range that fits a sample `[S]` by least squared error, 0-d ends."""
    if not is_signed(inner):
        return best_range(sample, inner.num_levels)
    return best_symmetric_range(sample, inner.num_levels)


@torch.no_grad()
def set_method_range(inner: Quantizer, low: Tensor, high: Tensor) -> None:
    """Makes a method's levels go over the range `high - low` (0-d); DoReFa's go from 0 to 1 always."""
    span = high - low
    if isinstance(inner, LearnableThresholdQuantizer):
        _fill(inner, "scale_in", 2.0 / span)
        _fill(inner, "scale_out", span / 2.0)
    elif isinstance(inner, PACT | APoT | LCQ):
        _fill(inner, "clip", span)
    elif isinstance(inner, EWGS):
        _fill(inner, "lower", torch.zeros(()))
        _fill(inner, "upper", torch.ones(()))
        inner._note_fitted()
    elif isinstance(inner, NuLSQ):
        _fill(inner, "steps", span / (inner.num_levels - 1))
        inner._note_fitted()
    elif isinstance(inner, LSQ):
        _fill(inner, "step", span / (inner.num_levels - 1))
        if isinstance(inner, LSQPlus):
            _fill(inner, "offset", low)
        inner._note_fitted()
    elif not isinstance(inner, DoReFa):
        raise ValueError(f"inner: got {type(inner).__name__}, allowed are {', '.join(_METHODS)}")


def _fill(inner: nn.Module, name: str, value: Tensor) -> None:
    set_parameter(inner.get_parameter(name), value)


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter for good: whole, gathered, or a shard; one number fills all of it."""
    write_parameter(parameter, value)
