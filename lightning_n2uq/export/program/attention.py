"""Attention's two products as they are deployed: integer sums of two operands' codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.attention_products import AttentionProducts, repeated
from lightning_n2uq.convert.head_input import HeadInput
from lightning_n2uq.export.program import operators
from lightning_n2uq.export.program.layers import DeployedQuantizer
from lightning_n2uq.export.program.staircases import staircase


class DeployedOperand(nn.Module):
    """One operand: a staircase for all heads, scale and offset of each.

    Args:
        operand: The trained quantizer.
        name: The operand's name in the network.

    Raises:
        ValueError: It was never given data, or has no staircase.
    """

    def __init__(self, operand: HeadInput, name: str) -> None:
        super().__init__()
        if not bool(operand.initialized):
            raise ValueError(f"{name}: its range was never fitted; calibrate or train the network first")
        self.quantizer = DeployedQuantizer(staircase(operand.method, name), f"{name}.levels")
        self.operand = operand

    @property
    def uniform(self) -> bool:
        """Whether levels are evenly spaced."""
        return self.quantizer.stairs.uniform

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes of `x` `[..., H, L, E]`, uint8."""
        return self.quantizer.codes(self.operand.method_input(x))

    def step_and_offset(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the distance of two levels and the value of code 0 for each head of `x`; None for 0."""
        scale, offset = self.operand.constants(x)
        stairs = self.quantizer.stairs
        low = scale * stairs.offset if stairs.offset else None
        return scale * stairs.step, low if offset is None else offset if low is None else low + offset

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x`; same shape and dtype."""
        scale, offset = self.operand.constants(x)
        y = self.quantizer(self.operand.method_input(x)) * scale
        return (y if offset is None else y + offset).to(x.dtype)


class DeployedProducts(AttentionProducts):
    """Attention whose operands are codes; sums of two codes' products are integers.

    Args:
        products: The trained form.
        name: Its name in the network.

    Raises:
        ValueError: An operand was never given data, or has no staircase.
    """

    def __init__(self, products: AttentionProducts, name: str) -> None:
        nn.Module.__init__(self)
        for part, operand in products.named_children():
            assert isinstance(operand, HeadInput)
            self.add_module(part, DeployedOperand(operand, f"{name}.{part}"))

    @property
    def uniform(self) -> bool:
        """Whether all operands have evenly spaced levels."""
        return all(child.uniform for child in self.children())

    def scores(self, query: Tensor, key: Tensor, times: int) -> Tensor:
        """Returns the product of queries and keys."""
        if not self.uniform:
            return super().scores(query, key, times)
        return self._product("query", query, "key", key, times, transposed=True)[0]

    def output(
        self, probabilities: Tensor, value: Tensor, dropout_p: float, times: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the product of probabilities and values, and the quantized probabilities."""
        if not self.uniform:
            return super().output(probabilities, value, dropout_p, times)
        return self._product("probabilities", probabilities, "value", value, times)

    def _product(
        self, left: str, x: Tensor, right: str, y: Tensor, times: int, transposed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns `(a c + b) (d e + f)` and its left side, of codes `c` and `e`.

        The product is the integer sums of `c e`, and with the offsets the sums of either side.
        """
        on_x, on_y = self.get_submodule(left), self.get_submodule(right)
        assert isinstance(on_x, DeployedOperand)
        assert isinstance(on_y, DeployedOperand)
        a, b = on_x.step_and_offset(x)
        d, f = on_y.step_and_offset(y)
        d, f = _repeated(d, times), None if f is None else _repeated(f, times)
        codes, others = on_x.codes(x), repeated(on_y.codes(y), times)
        others = others.transpose(-1, -2) if transposed else others
        total = operators.integer_matmul(codes, others).to(torch.float32) * (a * d)
        if f is not None:
            total = total + codes.to(torch.float32).sum(-1, keepdim=True) * (a * f)
        if b is not None:
            total = total + others.to(torch.float32).sum(-2, keepdim=True) * (b * d)
        if b is not None and f is not None:
            total = total + x.shape[-1] * (b * f)
        levels = codes.to(torch.float32) * a
        return total.to(x.dtype), (levels if b is None else levels + b).to(x.dtype)


def _repeated(values: Tensor, times: int) -> Tensor:
    return values if times == 1 else values.repeat_interleave(times, 0)
