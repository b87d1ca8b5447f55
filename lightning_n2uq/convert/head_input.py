"""A quantizer of what one operand of attention's products is: a staircase for all heads, a range for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.method_ranges import is_signed, set_method_range
from lightning_n2uq.convert.ranged_input import RangedInput
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import write_parameter
from lightning_n2uq.quantizers.ranges import SAMPLE, sample_rows


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
        super().__init__(inner)
        self.levels = Levels(inner)
        self.parts = heads
        self.scale = nn.Parameter(torch.ones(heads))
        self.offset = nn.Parameter(torch.zeros(heads)) if shifted and not is_signed(inner) else None

    @property
    def method(self) -> Quantizer:
        """The wrapped quantizer."""
        return self.levels.activation_quantizer

    def method_input(self, x: Tensor) -> Tensor:
        """Returns `(x - offset) / scale`, in float32 or wider."""
        scale, offset = self.constants(x)
        x = x.to(torch.promote_types(x.dtype, scale.dtype))
        return x / scale if offset is None else (x - offset) / scale

    def constants(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns scale and offset in a shape that goes with `x`."""
        offset = None if self.offset is None else self.spread(self.offset, x)
        return self.spread(self.bounded("scale"), x), offset

    def sample(self, x: Tensor) -> Tensor:
        """Returns values of every head, `[heads, S]`, from `x` `[..., heads, L, E]`."""
        x = x.detach().flatten(-3, -2).unsqueeze(-2) if self._packed(x) else x.detach()
        per_head = x.movedim(-3, 0).reshape(self.parts, x.numel() // self.parts)
        return sample_rows(per_head, max(1, SAMPLE // self.parts))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels of every head go from about `low` to about `high`, `[heads]` each."""
        write_parameter(self.scale, high - low)
        if self.offset is not None:
            write_parameter(self.offset, low)
        zero, one = low.new_zeros(()), low.new_ones(())
        set_method_range(self.method, *((-one / 2, one / 2) if is_signed(self.method) else (zero, one)))
        self._note_fitted()

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` `[..., heads, L, E]`; same shape and dtype."""
        if not self.fits(x):
            return self.unfitted(x)
        scale, offset = self.constants(x)
        y = self.levels(self.method_input(x)) * scale
        return (y if offset is None else y + offset).to(x.dtype)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Returns a number per head in a shape that goes with `x`."""
        if self._packed(x):
            return values.view(x.shape[-3], x.shape[-2], 1)
        times = x.shape[-3] // self.parts
        return (values if times == 1 else values.repeat_interleave(times)).view(-1, 1, 1)

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
