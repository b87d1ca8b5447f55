"""Attention's two products with quantized operands, in place of `scaled_dot_product_attention`.

Li et al., "Q-ViT: Accurate and Fully Quantized Low-bit Vision Transformer", NeurIPS 2022, arXiv 2210.06707,
and Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), ICML 2023, arXiv
2302.02210, quantize the same four operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_n2uq.convert.head_input import HeadInput
from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.quantizers import Quantizer


class AttentionProducts(nn.Module):
    """`softmax(q(query) q(key)^T / sqrt(E))`, quantized, times `q(value)`; dropout as in torch.

    Each operand has a quantizer with a range per head (`HeadInput`). Probabilities have levels from 0 up, so
    that what is masked stays 0; softmax and masks are computed in floats.

    Args:
        heads: The number of heads of queries.
        key_heads: The number of heads of keys and values.
        spec: Bits and method.
    """

    def __init__(self, heads: int, key_heads: int, spec: ProductsSpec) -> None:
        super().__init__()
        self.query = _operand(spec, heads)
        self.key = _operand(spec, key_heads)
        self.probabilities = _operand(spec, heads, probabilities=True)
        self.value = _operand(spec, key_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns the output `[..., H, L, Ev]` and the quantized probabilities `[..., H, L, S]`.

        Arguments are those of `torch.nn.functional.scaled_dot_product_attention`.
        """
        times = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        scores = self.scores(query, key, times) * (query.shape[-1] ** -0.5 if scale is None else scale)
        probabilities = _softmax(scores, _mask(attn_mask, is_causal, scores))
        return self.output(probabilities, value, dropout_p, times)

    def scores(self, query: Tensor, key: Tensor, times: int) -> Tensor:
        """Returns the product of quantized queries and keys; each head of keys serves `times` heads."""
        quantized: Tensor = self.key(key)
        product: Tensor = self.query(query) @ repeated(quantized, times).transpose(-1, -2)
        return product

    def output(
        self, probabilities: Tensor, value: Tensor, dropout_p: float, times: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the product of quantized probabilities and values, and those probabilities."""
        quantized = F.dropout(self.probabilities(probabilities), dropout_p)
        return quantized @ repeated(self.value(value), times), quantized


class Redirection(TorchFunctionMode):
    """While it is open, `scaled_dot_product_attention` is computed by something else.

    Attributes:
        calls: How often that happened.
    """

    def __init__(self, products: Callable[..., Any]) -> None:
        super().__init__()
        self.products = products
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 -- whatever the function returns
        """Calls `func`, or the products in its place."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self.products(*args, **kwargs)[0]


def repeated(x: Tensor, times: int) -> Tensor:
    """Returns `x` `[..., H, L, E]` with each head `times` times, one behind the other."""
    return x if times == 1 else x.repeat_interleave(times, -3)


def _operand(spec: ProductsSpec, heads: int, probabilities: bool = False) -> HeadInput:
    inner = spec.build(probabilities)
    assert isinstance(inner, Quantizer)
    return HeadInput(inner, heads, shifted=not probabilities)


def _mask(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """Returns what is added to scores, or None."""
    if mask is None and is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Returns probabilities; a query whose keys are all masked has none, as in torch."""
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores + mask
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
