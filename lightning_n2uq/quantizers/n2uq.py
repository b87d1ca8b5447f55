"""N2UQ: learned nonuniform thresholds for activations, entropy-preserving levels for weights.

Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022, arXiv 2111.14826.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.ops import quantize_weight, reference, threshold_codes, threshold_quantize
from lightning_n2uq.ops.plain_weight import largest_weight, plain_quantize_weight, plain_weight_codes
from lightning_n2uq.ops.staircase import ramp_quantize
from lightning_n2uq.ops.ste import next_above
from lightning_n2uq.ops.tables import (
    QuantizerParameters,
    ThresholdTables,
    compute_dtype,
    output_step,
    threshold_tables,
)
from lightning_n2uq.ops.weight import GRADIENTS
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.utils.validation import check_choice

_PLAIN_SCALE = "plain_scale"


class LearnableThresholdQuantizer(Quantizer):
    """Activation quantizer with learned thresholds and uniform levels `beta * D * q`, `q = 0 .. 2^b - 1`.

    Value and gradients are those of `lightning_n2uq.ops.threshold_quantize`.

    Attributes:
        start: `s` `[1]`, where the first segment begins; it starts at 0.
        widths: The segments' widths `a_k` `[2^b - 1]`; they start at `D = 2 / (2^b - 1)`.
        scale_in: `alpha` `[1]`, which multiplies the input; it starts at 1.
        scale_out: `beta` `[1]`, which multiplies the levels; it starts at 1.
        ramp: The ramp width `u` of the forward pass in training (0 the staircase, 1 the surrogate), which
            threshold annealing moves. Evaluation always uses the staircase.
        ramp_gradient: Whether the gradient follows the ramp while `ramp` is above 0, instead of G-STE's.
        comparison: `>` (default, the published code's) or `>=`, where an input at a threshold gets the upper
            code. Neither changes the state dict.
    """

    name = "n2uq"

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)
        n = self.num_levels - 1
        self.start = nn.Parameter(torch.zeros(1))
        self.widths = nn.Parameter(torch.full((n,), output_step(n)))
        self.scale_in = nn.Parameter(torch.ones(1))
        self.scale_out = nn.Parameter(torch.ones(1))
        self.ramp = 0.0
        self.ramp_gradient = False
        self.comparison = ">"

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating); same shape and dtype."""
        ramp = self.ramp if self.training else 0.0
        if ramp > 0 and self.ramp_gradient:
            return ramp_quantize(x, self.start, self.widths, self.scale_in, self.scale_out, ramp)
        if self.comparison == ">=":
            raised = next_above(x.to(compute_dtype(x.dtype)) * self.scale_in)
            one = torch.ones_like(self.scale_in)
            return threshold_quantize(raised, self.start, self.widths, one, self.scale_out, ramp).to(x.dtype)
        return threshold_quantize(x, self.start, self.widths, self.scale_in, self.scale_out, ramp)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes `q` in `0 .. 2^b - 1`, uint8, shape of `x`; NaN raises `ValueError`."""
        if self.comparison == ">=":
            raised = next_above(x.detach().to(compute_dtype(x.dtype)) * self.scale_in.detach())
            return threshold_codes(raised, self.start, self.widths, torch.ones_like(self.scale_in))
        return threshold_codes(x, self.start, self.widths, self.scale_in)

    def grid(self, x: Tensor) -> QuantizerParameters | None:
        """Returns the parameters, None above ramp 0 in training and with the comparison `>=`."""
        if (self.training and self.ramp > 0) or self.comparison != ">":
            return None
        return QuantizerParameters(self.start, self.widths, self.scale_in, self.scale_out)

    def thresholds(self) -> Tensor:
        """Returns `T_1 .. T_n` `[n]`, which `scale_in * x` has to exceed, in the parameters' dtype."""
        thresholds = self._tables().thresholds
        return thresholds if self.comparison == ">" else -next_above(-thresholds)

    def levels(self) -> Tensor:
        """Returns the output levels `beta * D * q` `[2^b]` in the parameters' dtype."""
        return self._tables().outputs

    def _tables(self) -> ThresholdTables:
        return threshold_tables(self.start, self.widths, self.scale_in, self.scale_out, self.widths.dtype)


class FixedThresholdQuantizer(LearnableThresholdQuantizer):
    """N2UQ without its learned thresholds: the ablation. Start and widths stay uniform, scales learn."""

    name = "n2uq_fixed"

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)
        self.start.requires_grad_(False)
        self.widths.requires_grad_(False)


class EntropyPreservingWeightQuantizer(Quantizer):
    """Weight quantizer of N2UQ: per output channel, odd multiples of `S / (2^b - 1)`; nothing is learned.

    Value and gradient are those of `lightning_n2uq.ops.quantize_weight`.

    Args:
        bits: The code width, 2 to 8.
        gradient: The weight's gradient, `scaled` (the published code's `1 / S`, unclipped) or
            `straight_through`.

    Attributes:
        rescale: Whether `S` is the entropy-preserving scale; if not, it is `max |W|` per channel. Switched
            by `EntropyRegularizer`. A checkpoint of a layer without it says so in an extra key,
            `plain_scale`, and switches the layer that it is loaded into.
    """

    name = "n2uq"

    def __init__(self, bits: int = 2, gradient: str = "scaled") -> None:
        super().__init__(bits)
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        self.rescale = True

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` `[C, ...]`; same shape and dtype."""
        if not self.rescale:
            return plain_quantize_weight(weight, self.bits, self.gradient == "straight_through")
        return quantize_weight(weight, self.bits, self.gradient)

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index `0 .. 2^b - 1`, uint8; the odd integer is `2 * code - (2^b - 1)`."""
        integers = reference.weight_codes if self.rescale else plain_weight_codes
        return ((integers(weight, self.bits) + (self.num_levels - 1)) / 2).to(torch.uint8)

    @property
    def largest_level(self) -> int:
        """`2^b - 1`; 0 at 8 bits, whose integers need 9."""
        return self.num_levels - 1 if self.bits <= 7 else 0

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns odd integers and `S / n` `[C]`; None at 8 bits, whose integers need 9."""
        if self.bits > 7:
            return None
        integers = reference.weight_codes if self.rescale else plain_weight_codes
        return integers(weight, self.bits).to(torch.int8), self.scale(weight).flatten()

    def scale(self, weight: Tensor) -> Tensor:
        """Returns `S / n` `[C, 1, ..]`, the number whose odd multiples the quantized weights are."""
        scale = reference.weight_scale(weight, self.bits) if self.rescale else largest_weight(weight)
        return scale / (self.num_levels - 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.rescale:
            destination[prefix + _PLAIN_SCALE] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        self.rescale = state_dict.pop(prefix + _PLAIN_SCALE, None) is None
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
