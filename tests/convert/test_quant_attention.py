import pytest
import torch
from torch import nn

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.replace import obstacle, quantized
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers import FullPrecision, Quantizer

FLOAT = QuantSpec(32, 32, "float", "float")


def pair(**arguments):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, **arguments).double()
    return plain, quantized(plain, FLOAT)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["no", "padding", "additive", "per_head", "both"])
def test_without_quantizers_it_is_torchs_attention(batch_first, need_weights, masked):
    plain, ours = pair(batch_first=batch_first)
    query = torch.randn(3, 5, 8, dtype=torch.float64)
    memory = torch.randn(3, 6, 8, dtype=torch.float64)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    masks = {}
    if masked in ("padding", "both"):
        masks["key_padding_mask"] = torch.arange(6).repeat(3, 1) >= torch.tensor([[6], [4], [1]])
    if masked in ("additive", "both"):
        masks["attn_mask"] = torch.ones(5, 6, dtype=torch.bool).triu(2)
    if masked == "per_head":
        masks["attn_mask"] = torch.randn(6, 5, 6, dtype=torch.float64)
    expected, expected_weights = plain(query, memory, memory, need_weights=need_weights, **masks)
    out, weights = ours(query, memory, memory, need_weights=need_weights, **masks)
    torch.testing.assert_close(out, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    else:
        assert weights is None


def test_self_attention_without_a_batch_and_with_every_heads_weights():
    plain, ours = pair(bias=False)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = plain(x, x, x, average_attn_weights=False)
    for value, wanted in zip(ours(x, x, x, average_attn_weights=False), expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_causal_hint_needs_its_mask():
    plain, ours = pair()
    x = torch.randn(5, 1, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    expected = plain(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)
    with pytest.raises(ValueError, match="attn_mask: got None"):
        ours(x, x, x, is_causal=True)


def test_all_projections_are_quantized_and_keys_stay():
    plain = nn.MultiheadAttention(8, 2)
    keys = set(plain.state_dict())
    ours = quantized(plain, QuantSpec(2, 3, "lsq", "lsq"))
    assert isinstance(ours, QuantMultiheadAttention)
    assert keys < set(ours.state_dict())
    assert ours.in_proj_weight is plain.in_proj_weight
    x = torch.randn(4, 2, 8)
    ours(x, x, x)[0].sum().backward()
    for weight, quantizer in (
        (ours.in_proj_weight, ours.weight_quantizer),
        (ours.out_proj.weight, ours.out_proj.weight_quantizer),
    ):
        assert isinstance(quantizer, Quantizer)
        assert len(quantizer(weight).unique()) <= 4
        assert float(weight.grad.abs().sum()) > 0
    assert not isinstance(ours.activation_quantizer, FullPrecision)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kdim": 4, "vdim": 4}, "another width"),
        ({"add_bias_kv": True}, "adds a bias"),
        ({"add_zero_attn": True}, "adds"),
    ],
)
def test_unusual_attention_is_refused_in_words(arguments, words):
    assert words in obstacle(nn.MultiheadAttention(8, 2, **arguments), "attention", nn.Module())
