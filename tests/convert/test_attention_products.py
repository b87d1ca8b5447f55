"""Attention's two products on quantized operands, in torch's, timm's and Hugging Face's attention."""

import copy
import pickle
import re
import warnings

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lightning_n2uq.convert import Policy, calibrate, quantize_model
from lightning_n2uq.convert.attention_hosts import hosts
from lightning_n2uq.convert.attention_products import AttentionProducts
from lightning_n2uq.convert.first_batches import FirstBatches
from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.convert.record import Record, quantize, record_of, restore
from lightning_n2uq.quantizers import quantizer_parameters
from small_networks import small_swin

FLOATS = {
    "weight_quantizer": "float",
    "weight_bits": 32,
    "activation_quantizer": "float",
    "activation_bits": 32,
}
ONLY = {**FLOATS, "attention_bits": 8, "attention_quantizer": "lsq"}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 50}


def change(model, batch, before):
    """Returns the largest change of outputs relative to the largest output."""
    return float((run(model, batch) - before).abs().max() / before.abs().max())


def vit(**arguments):
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_classes=5, **arguments
    ).eval()


def text(kind, **config):
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **config)).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def tokens():
    torch.manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": mask}


@torch.no_grad()
def run(model, batch):
    if isinstance(batch, dict):
        return model(**batch).last_hidden_state
    return model(batch)


def images(size=16):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "timm vit": (vit, images),
    "timm swin": (small_swin, lambda: images(32)),
    "bert": (lambda: text("bert", **TEXT), tokens),
    "gpt2": (lambda: text("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=50), tokens),
    "llama": (lambda: text("llama", **TEXT, num_key_value_heads=2), tokens),
    "t5": (lambda: text("t5", **T5), lambda: {**tokens(), "decoder_input_ids": tokens()["input_ids"]}),
    "torch": (encoder, lambda: torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))),
}


def plain_products(heads=4, key_heads=4):
    """Products whose quantizers leave values as they are."""
    products = AttentionProducts(heads, key_heads, ProductsSpec(8, "lsq"))
    for name in ("query", "key", "probabilities", "value"):
        setattr(products, name, nn.Identity())
    return products


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive", "per head", "nothing left"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_without_quantizers_they_are_torchs_attention(mask, key_heads):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, key_heads, 6, 8, dtype=torch.float64)
    options = {"scale": 0.3, "enable_gqa": key_heads != 4}
    allowed = torch.rand(2, 1, 5, 6) > 0.3
    allowed[..., 0] = True
    if mask == "nothing left":
        allowed[:, :, 2] = False
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "per head":
        options["attn_mask"] = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    elif mask == "additive":
        options["attn_mask"] = torch.zeros(2, 1, 5, 6, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    elif mask != "none":
        options["attn_mask"] = allowed
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(plain_products()(query, key, value, **options)[0], expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_library_s_attention_gets_its_products_from_ours(name):
    build, batch = NETWORKS[name]
    model = build()
    before = run(model, batch())
    report = quantize_model(model, ONLY, calibration=[batch()])
    model.requires_grad_(False)
    found = [m for m in model.modules() if isinstance(m, AttentionProducts)]
    assert len(found) == len(report.quantized) == len(hosts(model)) > 0
    assert all(operand.fitted for products in found for operand in products.children())
    difference = change(model, batch(), before)
    assert 1e-6 < difference < 0.05
    with torch.no_grad():
        found[0].value.scale.mul_(3)  # the output follows
    assert change(model, batch(), before) > difference


def test_one_query_of_heads_that_share_keys_is_quantized_by_each_head_s_range():
    model = text("llama", **TEXT, num_key_value_heads=2)
    quantize_model(model, ONLY, calibration=[tokens()])
    products = model.layers[0].self_attn.products
    with torch.no_grad():
        products.query.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.randn(3, 4, 1, 8)
    packed = products.query(x.reshape(3, 2, 2, 8)).reshape(3, 4, 1, 8)
    assert torch.equal(packed, products.query(x))
    assert model(input_ids=torch.tensor([[3], [5]])).last_hidden_state.isfinite().all()


def test_what_is_masked_stays_zero_and_probabilities_have_no_offset():
    torch.manual_seed(0)
    products = AttentionProducts(2, 2, ProductsSpec(2, "n2uq"))
    query, key, value = torch.randn(3, 2, 2, 6, 4)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    _, probabilities = products(query, key, value, mask)
    _, probabilities = products(query, key, value, mask)  # fitted by now
    assert products.probabilities.offset is None
    assert not probabilities[..., ~mask].any()
    signed = AttentionProducts(2, 2, ProductsSpec(2, "lsq_signed"))
    assert (signed.query.method.low, signed.probabilities.method.low) == (-2, 0)
    assert signed.query.offset is None


def test_copies_pickles_and_state_dicts_hold_the_products():
    model = vit()
    record_before = quantize(model, {**ONLY, "attention_bits": 3}, calibration=[images()])
    x, wanted = images(), run(model, images())
    assert record_before.quantized == ["blocks.0.attn.products", "blocks.1.attn.products"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
        assert isinstance(other.blocks[0].attn, type(vit().blocks[0].attn))
        with torch.no_grad():
            other.blocks[0].attn.products.value.scale.mul_(3)
        assert not torch.equal(other(x), wanted)  # it computes by its own
    fresh = vit()
    restore(fresh, Record.from_mapping(record_of(model).to_mapping(), "checkpoint"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), wanted)
    older = {key: value for key, value in record_of(model).to_mapping().items() if key != "products"}
    assert Record.from_mapping(older, "checkpoint").products == {}
    with pytest.raises(ValueError, match=r"checkpoint: got quantized products 'blocks\.0\.attn\.products'"):
        restore(small_swin(), record_of(model))
    with pytest.raises(ValueError, match="which cannot be so here: they are quantized already"):
        restore(fresh, record_of(model))


@pytest.mark.integration
def test_a_network_compiles_into_one_graph():
    model, x = vit(), images()
    quantize_model(
        model, {"attention_bits": 4, "weight_quantizer": "lsq", "activation_quantizer": "lsq"}, [x]
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    model.train()
    compiled(x).sum().backward()
    assert model.blocks[1].attn.products.value.offset.grad is not None


def test_rules_choose_bits_and_method_for_each_attention():
    policy = {
        "attention_bits": 4,
        "rules": [
            {"name": "blocks.0.*", "type": "products", "attention_bits": 8, "attention_quantizer": "lsq"},
            {"name": "blocks.0.mlp.*", "quantize": False},
        ],
    }
    report = quantize_model(model := vit(), policy)
    operands = [(m.query.name, m.query.bits) for m in model.modules() if isinstance(m, AttentionProducts)]
    assert operands == [("lsq", 8), ("n2uq", 4)]
    lines = {line.name: (line.type, line.activation, line.reason) for line in report.layers}
    assert lines["blocks.0.attn.products"] == ("Attention", "lsq 8", "rule 0")
    assert lines["blocks.1.attn.products"] == ("Attention", "n2uq 4", "default")
    assert "blocks.0.attn.qkv" in report.quantized
    left = quantize_model(vit(), {"attention_bits": 4, "exclude": ["blocks.1"]})
    assert [n for n in left.quantized if "products" in n] == ["blocks.0.attn.products"]
    assert "blocks.1.attn.products" in left.excluded
    off = {
        "attention_bits": 4,
        "rules": [{"name": "blocks.0.*", "attention_quantizer": "float", "attention_bits": 32}],
    }
    assert [n for n in quantize_model(vit(), off).quantized if "products" in n] == ["blocks.1.attn.products"]
    assert not any("products" in line.name for line in quantize_model(vit(), {}).layers)
    assert Policy.from_mapping(Policy.from_mapping(policy).to_mapping()) == Policy.from_mapping(policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"attention_bits": 9}, "bits: got 9"),
        ({"attention_bits": 4, "attention_quantizer": "nothing"}, "activation_quantizer: got 'nothing'"),
        (
            {"attention_quantizer": "lsq"},
            "attention_quantizer: got 'lsq', allowed is none without attention_bits",
        ),
        (
            {"attention_bits": 4, **FLOATS},
            "activation_bits: got 4, allowed is 32 with activation_quantizer 'float'",
        ),
    ],
)
def test_policies_without_sense_are_refused(policy, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Policy.from_mapping(policy)


def test_what_a_network_cannot_give_is_said_in_one_line():
    with pytest.raises(ValueError, match="attention_bits: got 4, but ResNet has no attention"):
        quantize_model(timm.create_model("resnet10t"), {"attention_bits": 4})
    cosine = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, embed_dim=12, depths=(1, 1), num_heads=(2, 3)
    )
    with pytest.raises(
        ValueError, match="WindowAttention writes them out, allowed is scaled_dot_product_attention"
    ):
        quantize_model(cosine, {"attention_bits": 4})
    both = nn.Sequential(vit(), cosine)
    with pytest.warns(UserWarning, match=r"products of 1\.layers\.0\.\S+ \(WindowAttention writes them out"):
        report = quantize_model(both, {"attention_bits": 4})
    assert sum("products" in name for name in report.unsupported) == 2
    assert sum("products" in name for name in report.quantized) == 2


def test_hugging_face_s_eager_attention_is_refused():
    config = transformers.AutoConfig.for_model("bert", **TEXT)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation is 'eager', allowed is 'sdpa'"):
        quantize_model(model, ONLY)
    model = text("bert", **TEXT)
    quantize_model(model, ONLY)
    model.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match="attention_bits: got 8, but BertSelfAttention has written its products out"
    ):
        model(**tokens())


def test_frozen_attention_has_frozen_operands_and_others_learn():
    model = vit()
    model.blocks[0].requires_grad_(False)
    quantize_model(model, ONLY)
    learned = [name for name, _ in quantizer_parameters(model)]
    assert not any(name.startswith("blocks.0") for name in learned)
    assert "blocks.1.attn.products.query.scale" in learned


def test_first_batches_fit_as_calibration_does():
    one, other, x = vit(), vit(), images()
    for model in (one, other):
        quantize_model(model, {"attention_bits": 4})
    ranges = calibrate(one, [x])
    assert "blocks.0.attn.products.probabilities" in ranges
    first = FirstBatches(other)
    assert "blocks.0.attn.products.query" in first.unreached
    other.train()
    other(x)
    assert not first.unreached
    first.close()
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_an_unfitted_network_evaluates_by_ranges_of_its_input():
    model, x = vit(), images()
    before = run(model, x)
    quantize_model(model, ONLY)
    assert change(model, x, before) < 0.05
    assert not model.blocks[0].attn.products.query.fitted


def test_weights_of_attention_are_returned_quantized():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleList([layer])
    policy = {"attention_bits": 2, "skip_first": False, "skip_last": False}
    quantize_model(model, policy)
    x = torch.randn(3, 5, 8)
    model[0](x, x, x)
    _, weights = model[0](x, x, x, average_attn_weights=False)
    assert all(len(head.unique()) <= 4 for head in weights.transpose(0, 1))


def test_a_mobile_network_s_shared_key_head_has_one_range():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from timm.layers.attention2d import MultiQueryAttention2d

    torch.manual_seed(0)
    model = nn.Sequential(MultiQueryAttention2d(16, num_heads=4)).eval()
    x = torch.randn(2, 16, 4, 4)
    before = run(model, x)
    quantize_model(model, ONLY, calibration=[x])
    assert [model[0].products.query.parts, model[0].products.key.parts] == [4, 1]
    assert change(model, x, before) < 0.05
