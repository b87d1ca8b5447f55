"""Multi-head attention whose projections are quantized, and its two products of activations where asked."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.convert.attention_products import AttentionProducts


class QuantMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with quantizers before and in its projections; same call, same keys.

    Vaswani et al., 2017, arXiv 1706.03762. Queries, keys and values pass through one activation quantizer,
    and the stacked projection weight `[3 E, E]` through one weight quantizer. Softmax and the two products
    of activations are computed in full precision, unless `products` quantizes their operands.

    Args:
        embed_dim: The width `E` of the inputs.
        num_heads: The number of heads, a divisor of `E`.
        dropout: The dropout of the attention weights in training.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are `[N, L, E]` instead of `[L, N, E]`.
        weight_quantizer: The quantizer of `in_proj_weight`.
        activation_quantizer: The quantizer of queries, keys and values.
        out_proj: The output projection, with quantizers of its own.

    Attributes:
        products: What computes the two products on quantized operands, or None.
    """

    products: AttentionProducts | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        batch_first: bool,
        weight_quantizer: nn.Module,
        activation_quantizer: nn.Module,
        out_proj: nn.Module,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, bias=bias, batch_first=batch_first)
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer
        self.out_proj = out_proj  # type: ignore[assignment]
        self.register_module("products", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends as `torch.nn.MultiheadAttention`; `is_causal` is a hint and needs `attn_mask` beside it."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: got None, is_causal=True needs the mask as well")
        batched = query.dim() == 3
        q, k, v = (self._heads(part, batched) for part in self._project(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q, batched)
        out, weights = self._attend(q, k, v, mask, need_weights)
        out = out.transpose(1, 2).flatten(2)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self.out_proj(out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weight = self.weight_quantizer(self.in_proj_weight)
        quantize = self.activation_quantizer
        if query is key and key is value:
            return list(F.linear(quantize(query), weight, self.in_proj_bias).chunk(3, -1))
        weights = weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(quantize(x), w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Turns `[N, L, E]` (or `[L, N, E]`, or `[L, E]`) into `[N, heads, L, E / heads]`."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, batched: bool
    ) -> Tensor | None:
        """Returns one additive mask that broadcasts over `[N, heads, L, S]`."""
        total = None if attn_mask is None else _additive(attn_mask, query.dtype)
        if total is not None and total.dim() == 3:  # [N heads, L, S]
            total = total.reshape(-1, self.num_heads, *total.shape[1:])
        if padding is not None:
            padding = padding if batched else padding.unsqueeze(0)
            added = _additive(padding, query.dtype)[:, None, None, :]
            total = added if total is None else total + added
        return total

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if self.products is not None:
            out, weights = self.products(query, key, value, mask, dropout)
            return out, weights if need_weights else None
        if not need_weights:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout), None
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout)
        return weights @ value, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
