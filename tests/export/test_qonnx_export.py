import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")

from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes

from lightning_n2uq.export import describe
from lightning_n2uq.export.formats.qonnx_file import to_qonnx
from lightning_n2uq.export.ir.thresholds import at_least
from lightning_n2uq.export.runtime.engines import numpy_engine, qonnx_engine
from lightning_n2uq.export.verify.sweep import SWEPT, sweep, sweep_values
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear, QuantSpec


def tiny(weight_bits=2, activation_bits=2, weight="n2uq", activation="n2uq"):
    spec = QuantSpec(weight_bits, activation_bits, weight, activation)
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantConv2d(2, 4, 3, padding=1, bias=False, spec=spec),
        nn.BatchNorm2d(4),
        BiasedPReLU(4),
        QuantConv2d(4, 4, 3, stride=2, padding=1, groups=2, spec=spec),
        nn.Flatten(),
        QuantLinear(64, 3, spec=spec),
    )
    nn.init.normal_(model[1].weight)
    if "lsq" in activation + weight:
        model(torch.randn(4, 2, 8, 8))
    return model.eval()


@pytest.mark.parametrize(
    ("bits", "weight", "activation"),
    [(2, "n2uq", "n2uq"), (4, "n2uq", "n2uq"), (8, "n2uq", "n2uq"), (3, "lsq", "lsq"), (4, "dorefa", "pact")],
)
def test_qonnx_executes_the_network_to_the_same_bits(bits, weight, activation):
    description = describe(tiny(bits, bits, weight, activation), (2, 8, 8))
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 8)).astype(np.float32)
    expected, actual = numpy_engine(description)(x), qonnx_engine(description)(x)
    for name, codes in expected.codes.items():
        np.testing.assert_array_equal(actual.codes[name], codes)
    np.testing.assert_array_equal(actual.logits, expected.logits)


def test_tensors_carry_the_datatypes_that_finn_reads():
    description = describe(tiny(2, 3), (2, 8, 8))
    wrapper = ModelWrapper(to_qonnx(description, 1)).transform(InferShapes()).transform(InferDataTypes())
    conv = next(node for node in wrapper.graph.node if node.op_type == "Conv")
    assert str(wrapper.get_tensor_datatype(conv.input[1])) == "INT3"  # the odd integers -3 .. 3
    assert set(np.unique(wrapper.get_initializer(conv.input[1]))) <= {-3, -1, 1, 3}
    thresholds = [node for node in wrapper.graph.node if node.op_type == "MultiThreshold"]
    assert len(thresholds) == 3
    for node in thresholds:
        assert node.domain == "qonnx.custom_op.general"
        assert str(wrapper.get_tensor_datatype(node.output[0])) == "UINT3"
        assert (np.diff(wrapper.get_initializer(node.input[1]), axis=1) >= 0).all()


def test_strict_comparisons_become_the_next_number():
    smallest, largest = np.float32(1e-45), np.finfo(np.float32).max
    table = np.array([[-np.inf, 0, 1, largest]], np.float32)
    expected = [-largest, smallest, np.nextafter(np.float32(1), np.float32(2)), np.inf]
    np.testing.assert_array_equal(at_least(table)[0], np.array(expected, np.float32))
    assert at_least(np.array([[-3, 7]], np.int32)).tolist() == [[-2, 8]]


@pytest.mark.integration
@pytest.mark.parametrize("bits", [2, 4])
def test_a_million_values_per_quantizer_give_the_same_codes_in_every_swept_engine(bits):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    for step in describe(tiny(bits, bits), (2, 8, 8)).quantizers():
        counts = sweep(step, 1_000_000)
        assert counts.pop("values") >= 1_000_000
        assert counts == dict.fromkeys(SWEPT, 0), step.name


def test_a_sweep_holds_every_threshold_its_neighbours_and_infinities():
    step = describe(tiny(), (2, 8, 8)).quantizers()[0]
    values = set(sweep_values(step, 100).reshape(-1).tolist())
    for threshold in step.thresholds.reshape(-1):
        beside = {float(np.nextafter(threshold, np.float32(end))) for end in (-np.inf, np.inf)}
        assert beside | {float(threshold), np.inf, -np.inf} <= values


def test_sums_beyond_float32_are_refused():
    model = nn.Sequential(QuantConv2d(600, 2, 3, bias=False, spec=QuantSpec(8, 8))).eval()
    with pytest.raises(ValueError, match=r"0: its sums can pass 2\^24"):
        to_qonnx(describe(model, (600, 3, 3)))
