import numpy as np
import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones.blocks import Bottleneck
from lightning_n2uq.backbones.mobilenet_v2 import InvertedResidual
from lightning_n2uq.export import ExactNetwork, describe, run_numpy
from lightning_n2uq.export.ir.steps import Codes, IntConv
from lightning_n2uq.export.runtime.engines import ENGINES, onnxruntime_engine, session
from lightning_n2uq.export.verify.parity import compare, float_engine
from lightning_n2uq.layers import QuantConv2d, QuantSpec

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

from lightning_n2uq.export.formats.onnx_file import to_onnx

FAST = ("torch", "numpy", "onnxruntime")


def images(count=5, channels=2, size=16):
    return np.random.default_rng(0).standard_normal((count, channels, size, size)).astype(np.float32)


def assert_parity(model, x, engines=FAST):
    description = describe(model, x.shape[1:])
    report = compare({name: ENGINES[name](description) for name in engines}, [(x, None)], float_engine(model))
    assert report.ok, report.table()
    assert all(tally.logits == 0 for tally in report.engines.values()), report.table()
    flips = sum(report.floating.codes.values()) / max(sum(report.floating.values.values()), 1)
    assert flips < 2e-3, report.table()
    return description


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_engines_agree_bitwise_at_every_bit_width(small_network, bits):
    description = assert_parity(small_network(weight_bits=bits, activation_bits=bits), images())
    assert all(step.levels == 2**bits - 1 for step in description.quantizers())


@pytest.mark.parametrize("quantize_downsample", [True, False])
@pytest.mark.parametrize("imagenet_stem", [True, False])
def test_engines_agree_for_both_stems_and_both_shortcuts(small_network, quantize_downsample, imagenet_stem):
    model = small_network(quantize_downsample=quantize_downsample, imagenet_stem=imagenet_stem)
    assert_parity(model, images(size=32))


@pytest.mark.parametrize("activation", ["lsq", "lsq_plus", "pact", "dorefa", "n2uq_fixed"])
@pytest.mark.parametrize("weight", ["lsq", "dorefa"])
def test_engines_agree_for_baseline_quantizers(small_network, weight, activation):
    model = small_network(4, 4, weight, activation)
    x = torch.from_numpy(images())
    description = describe(model, (2, 16, 16))
    logits = ExactNetwork(description)(x)
    for name in FAST[1:]:
        np.testing.assert_array_equal(ENGINES[name](description)(x.numpy()).logits, logits.numpy())


def test_baselines_are_written_as_quantize_and_dequantize_nodes(small_network):
    model = to_onnx(describe(small_network(4, 4, "dorefa", "pact"), (2, 16, 16)))
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert not kinds & {"MatMulInteger", "ConvInteger", "Greater"}


def test_only_standard_operators_are_used(small_network):
    model = to_onnx(describe(small_network(), (2, 16, 16)))
    assert {node.domain for node in model.graph.node} == {""}
    assert "MatMulInteger" in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_convolutions_can_be_written_as_conv_integer(small_network, bits):
    description = describe(small_network(bits, bits), (2, 16, 16))
    model = to_onnx(description, convolution="conv")
    assert "ConvInteger" in {node.op_type for node in model.graph.node}
    (logits,) = session(model.SerializeToString()).run(None, {"images": images()})
    np.testing.assert_array_equal(logits, ENGINES["torch"](description)(images()).logits)


def test_four_bit_storage_serves_readers_without_two_bit_types(small_network):
    description = describe(small_network(), (2, 16, 16))
    old, new = (to_onnx(description, opset=opset).SerializeToString() for opset in (21, 25))
    (first,), (second,) = (session(model).run(None, {"images": images()}) for model in (old, new))
    np.testing.assert_array_equal(first, second)


def test_the_cifar_network():
    torch.manual_seed(1)
    model = backbones.build("resnet20", num_classes=7, width=4).eval()
    assert_parity(model, images(2, 3, 32), ("torch", "onnxruntime"))


def test_inverted_residuals(perturb):
    torch.manual_seed(1)
    spec = QuantSpec(4, 4)
    blocks = [InvertedResidual(spec, 4, 4, 2, 1), InvertedResidual(spec, 4, 6, 3, 2)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    assert_parity(perturb(model), images())


def test_bottleneck_blocks(small_network):
    assert_parity(small_network(block=Bottleneck), images())


def test_slopes_of_both_signs_leave_operations_explicit_and_say_so(small_network):
    model = small_network(negative_slopes=True)
    description = assert_parity(model, images())
    left = [fold for fold in description.folds if fold.explicit]
    assert left
    assert all("not monotone" in fold.reason for fold in left)
    assert "left explicit" in description.summary()


def test_everything_in_front_of_an_inner_quantizer_folds_into_integer_thresholds(small_network):
    description = describe(small_network(), (2, 16, 16))
    inner = next(step for step in description.steps if step.name == "layer1.0.conv2.codes")
    assert isinstance(inner, Codes)
    assert inner.thresholds.dtype == np.int32
    assert inner.inputs == ("layer1.0.conv1",)
    assert inner.sign is None, "signs belong into the weights"
    assert any(fold.reversed_channels for fold in description.folds)


def test_results_do_not_depend_on_batch_size_threads_or_memory_layout(small_network):
    model = small_network(4, 4, width=16)
    network = ExactNetwork(describe(model, (2, 16, 16)))
    x = torch.from_numpy(images(9))
    expected = network(x)
    for part in (1, 2, 7):
        assert torch.equal(torch.cat([network(piece) for piece in x.split(part)]), expected)
    assert torch.equal(network(x.to(memory_format=torch.channels_last)), expected)
    torch.set_num_threads(2)
    try:
        assert torch.equal(network(x), expected)
    finally:
        torch.set_num_threads(1)
    engine = onnxruntime_engine(network.description, threads=2)
    np.testing.assert_array_equal(engine(x.numpy()).logits, expected.numpy())


def test_sums_that_float32_cannot_hold_run_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(QuantConv2d(600, 2, 3, bias=False, spec=QuantSpec(8, 8))).eval()
    description = describe(model, (600, 3, 3))
    layer = next(step for step in description.steps if isinstance(step, IntConv))
    assert layer.needs_float64
    x = np.full((1, 600, 3, 3), 9, np.float32)
    exact = ExactNetwork(description).run(torch.from_numpy(x))["0"].numpy()
    np.testing.assert_array_equal(exact, run_numpy(description, x)["0"])
    assert (exact.reshape(2, -1) == layer.weight.reshape(2, -1).sum(1, keepdims=True) * 255).all()


def test_images_of_another_shape_are_refused(small_network):
    network = ExactNetwork(describe(small_network(), (2, 16, 16)))
    with pytest.raises(ValueError, match=r"images: got .* allowed is float32 \[N, 2, 16, 16\]"):
        network(torch.zeros(1, 2, 8, 8))


def test_zero_images_give_finite_logits(small_network):
    network = ExactNetwork(describe(small_network(), (2, 16, 16)))
    assert network(torch.zeros(2, 2, 16, 16)).isfinite().all()
