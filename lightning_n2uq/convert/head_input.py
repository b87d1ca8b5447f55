"""A quantizer of what one operand of attention's products is: a staircase for all heads, a range for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import (
    RangedInput,
    is_signed,
    method_range,
    set_method_range,
    set_parameter,
)
from lightning_n2uq.convert.ranges import SAMPLE, quantize_uniformly, sample_values
from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import one_value_at_least
from lightning_n2uq.quantizers.positions import level_position


class Levels(nn.Module):
    """What quantizes an operand whose heads are brought to one range; callbacks see it as a layer.

    Args:
        inner: The activation quantizer of a method.
    """

    def __init__(self, inner: Quantizer) -> None:
        super().__init__()
        self.activation_quantizer = inner

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes values in about `0 .. 1`, any shape."""
        return self.activation_quantizer(x)  # type: ignore[no-any-return]


class HeadInput(RangedInput):
    """`scale_h * inner((x - offset_h) / scale_h) + offset_h` for each head `h`.

    Scales per head are those of Li et al., "Q-ViT", 2022, arXiv 2201.07703; offsets let methods whose levels
    go from 0 up take signed values. Both are learned: the gradient of `scale` is `inner(u) - inner'(u) u`, as
    LSQ's, that of `offset` is `1 - inner'(u)`, as LSQ+'s, `u = (x - offset) / scale`. The method's own
    parameters are shared by all heads. Ranges come from data as those of `CalibratedInput` do.

    Args:
        inner: The activation quantizer of a method.
        heads: The number of heads; several neighbouring ones share a range where there are more in the input.
        shifted: Whether there is an offset; probabilities, and methods with negative levels, have none.

    Attributes:
        scale: `[heads]`, at least `STEP_FLOOR`.
        offset: `[heads]`, or None.
    """

    positive = ("scale",)

    def __init__(self, inner: Quantizer, heads: int, shifted: bool = True) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping
        self.levels = Levels(inner)
        self.parts = heads
        self.scale = nn.Parameter(torch.ones(heads))
        self.offset = nn.Parameter(torch.zeros(heads)) if shifted and not is_signed(inner) else None

    @property
    def inner(self) -> Quantizer:
        """The method's quantizer."""
        return self.levels.activation_quantizer

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

    def sample(self, x: Tensor) -> Tensor:
        """Returns values of every head, `[heads, S]`, from `x` `[..., heads, L, E]`."""
        x = x.detach().flatten(-3, -2).unsqueeze(-2) if self._packed(x) else x.detach()
        per_head = x.movedim(-3, 0).reshape(self.parts, -1)
        size = max(1, SAMPLE // self.parts)
        return torch.stack([sample_values(one_value_at_least(row), size) for row in per_head])

    def range_of(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ends of the range of every head, `[heads]` each."""
        low, high = zip(*(method_range(self.inner, row) for row in sample), strict=True)
        return torch.stack(low), torch.stack(high)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels of every head go from about `low` to about `high`, `[heads]` each."""
        set_parameter(self.scale, high - low)
        if self.offset is not None:
            set_parameter(self.offset, low)
        zero, one = low.new_zeros(()), low.new_ones(())
        set_method_range(self.inner, *((-one / 2, one / 2) if is_signed(self.inner) else (zero, one)))
        self._note_fitted()

    def normalized(self, x: Tensor) -> Tensor:
        """Returns `(x - offset) / scale`, in float32 or wider: what the method quantizes."""
        scale, offset = self.constants(x)
        x = x.to(torch.promote_types(x.dtype, scale.dtype))
        return x / scale if offset is None else (x - offset) / scale

    def constants(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns scale and offset in a shape that goes with `x`."""
        return self._spread(self.bounded("scale"), x), None if self.offset is None else self._spread(
            self.offset, x
        )

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` `[..., heads, L, E]`; same shape and dtype."""
        if not self.fits(x):
            if torch.compiler.is_exporting():
                raise ValueError("HeadInput: got no data yet, allowed is a calibrated or trained network")
            low, high = (self._spread(end, x) for end in self.range_of(self.sample(x)))
            y = quantize_uniformly(x.detach(), low, high, self.num_levels).to(x.dtype)
            return straight_through(x, y) + self._nothing() if self.training else y
        scale, offset = self.constants(x)
        y = self.levels(self.normalized(x)) * scale
        return (y if offset is None else y + offset).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8, in the shape of `x`."""
        with torch.no_grad():
            return self.inner.codes(self.normalized(x.detach()))

    def _nothing(self) -> Tensor:
        """Returns 0 as a function of all parameters: data-parallel training waits for each of them."""
        return sum((0 * p.sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))

    def _packed(self, x: Tensor) -> bool:
        """Returns whether heads are at -3 and -2: one query each of all heads that share a key."""
        if x.dim() >= 3 and x.shape[-3] % self.parts == 0:
            return False
        if x.dim() >= 3 and x.shape[-3] * x.shape[-2] == self.parts:
            return True
        raise ValueError(
            f"HeadInput: got an operand {list(x.shape)}, allowed are [..., {self.parts}, L, E] for its "
            f"{self.parts} heads"
        )

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Returns a number per head in a shape that goes with `x`."""
        if self._packed(x):
            return values.view(x.shape[-3], x.shape[-2], 1)
        times = x.shape[-3] // self.parts
        return (values if times == 1 else values.repeat_interleave(times)).view(-1, 1, 1)


@level_position.register
def _(quantizer: HeadInput, x: Tensor) -> Tensor:
    return level_position(quantizer.inner, quantizer.normalized(x))
