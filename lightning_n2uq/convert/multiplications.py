"""How many multiplications a layer does in a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_n2uq.convert.attention_products import AttentionProducts
from lightning_n2uq.convert.replace import layer_types


def multiplications(module: nn.Module, weights: int, inputs: tuple[Tensor, ...], output: Any) -> int:  # noqa: ANN401
    """Returns the multiply-accumulates of one call, over the whole batch.

    Args:
        module: A convertible layer, quantized or not, or attention's products.
        weights: The number of its weights.
        inputs: The positional arguments of the call.
        output: What it returned.
    """
    if isinstance(module, AttentionProducts):
        query, _, value = inputs[:3]
        return output[1].numel() * (query.shape[-1] + value.shape[-1])  # type: ignore[no-any-return]
    if isinstance(module, nn.MultiheadAttention):  # query, key, value and the output, each `E x E`
        return sum(x.numel() for x in (*inputs[:3], output[0])) * module.embed_dim
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        data = getattr(inputs[0], "data", inputs[0])  # of packed sequences
        return weights * (data.numel() // data.shape[-1])
    if "transposed" in layer_types(module):
        return inputs[0].numel() * module.weight[0].numel()  # type: ignore[index, union-attr, operator]
    if "conv" in layer_types(module):
        return int(output.numel() * module.weight[0].numel())  # type: ignore[index, union-attr, operator]
    return inputs[0].numel() * weights // inputs[0].shape[-1]
