import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed (extra 'export')")

from lightning_n2uq import backbones
from lightning_n2uq.export import describe
from lightning_n2uq.export.formats.onnx_file import to_onnx
from lightning_n2uq.export.ir.sizes import float_bytes, size_report


@pytest.mark.parametrize(("bits", "share"), [(2, 0.115), (4, 0.18)])
def test_resnet18_takes_its_share_of_the_float_file(bits, share):
    torch.manual_seed(0)
    model = backbones.build("resnet18", weight_bits=bits, activation_bits=bits)
    float_file = 4 * sum(p.numel() for p in model.parameters())
    description = describe(model, (3, 224, 224))
    size = len(to_onnx(description).SerializeToString())
    assert size <= share * 46_700_000
    assert float_bytes(description) == pytest.approx(float_file, rel=0.01)
    assert "integer weights, packed" in size_report(description, size)
