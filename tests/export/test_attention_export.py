"""Attention's two products in exported files: sums of two operands' codes, or floats with the reason."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_n2uq.convert import calibrate, quantize_model
from lightning_n2uq.export.program import operators
from lightning_n2uq.export.program.deployed import deploy
from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.onnx_program import export_program
from small_networks import small_swin

POLICY = {"weight_quantizer": "lsq", "activation_quantizer": "lsq", "attention_bits": 3}


class Shared(nn.Module):
    """Four heads of queries on two of keys and values, with a causal mask."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.stem, self.q, self.kv, self.head = (nn.Linear(16, n) for n in (16, 16, 16, 5))

    def forward(self, x):
        x = F.silu(self.stem(x))
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(y.transpose(1, 2).flatten(2))


class Whole(nn.Module):
    """Torch's attention layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Told(Whole):
    """Torch's attention layer, whose weights go on."""

    def forward(self, x):
        x = self.stem(x)
        out, weights = self.attention(x, x, x, average_attn_weights=False)
        return self.head(x + out).sum(-1), weights


def converted(kind, method):
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    x = torch.randn(3, 6, 16) + 0.3
    quantize_model(model, {**POLICY, "attention_quantizer": method})
    calibrate(model, [x])
    return model.eval(), x


@pytest.mark.integration
@pytest.mark.parametrize("kind", [Shared, Whole])
@pytest.mark.parametrize("method", ["n2uq", "lsq_signed", "lsq_plus"])
def test_products_are_sums_of_integers_and_differences_are_explained(kind, method):
    model, x = converted(kind, method)
    program = export_program(model, x)
    name = "0.products" if kind is Shared else "0.attention.products"
    assert name in program.deployed.integer
    assert not program.deployed.floating
    kinds = [node.op_type for node in program.model.graph.node]
    assert kinds.count("MatMulInteger") == (2 + 2 if kind is Shared else 2 + 4)
    for found in (explain_file(program), explain_modules(program, model)):
        assert found.ok, found.table()
        operands = [row.name for row in found.layers if ".products." in row.name]
        assert len(operands) == 4
    with torch.no_grad():
        assert torch.allclose(program.deployed.model(x), model(x), atol=1e-4)
    session = onnxruntime.InferenceSession(program.model.SerializeToString())
    more = torch.randn(7, 6, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, program.deployed.model(more).numpy(), atol=2e-4)


@pytest.mark.parametrize("method", ["n2uq", "lsq_plus"])
def test_weights_of_attention_are_exported_quantized(method):
    model, x = converted(Told, method)
    deployed = deploy(model).model
    with torch.no_grad():
        (_, wanted), (_, found) = model(x), deployed(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert all(len(head.unique()) <= 8 for head in found.transpose(0, 1))


@pytest.mark.integration
def test_attention_in_shifted_windows_is_exported_as_sums_of_integers():
    model = small_swin()
    x = torch.randn(3, 3, 32, 32)
    quantize_model(model, POLICY, calibration=[x])
    program = export_program(model, x)
    assert not program.deployed.floating
    assert sum("products" in name for name in program.deployed.integer) == 3
    for found in (explain_file(program), explain_modules(program, model)):
        assert found.ok, found.table()


@pytest.mark.integration
def test_uneven_levels_stay_floats_with_the_reason():
    model, x = converted(Shared, "apot")
    program = export_program(model, x)
    assert program.deployed.floating == {"0.products": "levels of its operands are not evenly spaced"}
    assert "float: 0.products (levels of its operands" in program.deployed.summary()
    assert explain_file(program).ok
    assert explain_modules(program, model).ok


def test_operands_that_were_never_fitted_are_refused():
    model = nn.Sequential(Shared())
    quantize_model(model, POLICY)
    with pytest.raises(ValueError, match=r"0\.products\.query: its range was never fitted"):
        deploy(model)


def test_the_product_of_codes_is_exact():
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8), torch.randint(0, 256, (2, 1, 5, 6)).byte()
    wanted = (x.long()[..., None] * y.long()[..., None, :, :]).sum(-2)
    assert torch.equal(operators.integer_matmul(x, y).long(), wanted)
    torch.library.opcheck(operators.integer_matmul, (x, y))
