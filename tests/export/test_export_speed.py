import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

import onnx

from benchmarks import __main__ as benchmarks
from benchmarks import export_engines, export_speed
from lightning_n2uq.export import describe
from lightning_n2uq.export.formats.onnx_file import to_onnx

pytestmark = pytest.mark.integration


def test_networks_take_turns_and_their_tables_render(small_network, capsys):
    networks = {
        name: describe(small_network(bits, bits, in_channels=3), (3, 16, 16))
        for name, bits in ((export_speed.BASE, 2), ("W4A4", 4))
    }
    files = {name: to_onnx(network).SerializeToString() for name, network in networks.items()}
    openers = {name: export_engines.onnxruntime_opener(file) for name, file in files.items()}
    openers["fast"] = export_engines.fast_opener(networks["W4A4"])
    result = export_speed.measure(openers, files, 0.01, 16, threads=(1, 2), batches=(2,), rounds=4)
    torch.set_num_threads(1)
    printed = capsys.readouterr().out
    assert "2 x 16x16, threads: 2" in printed
    assert "milliseconds by operator" in printed
    assert result["threads 1, batch 2"][export_speed.BASE]["ratio"] == 1
    assert (
        result["threads 2, batch 2"]["W4A4"]["rounds"] == result["threads 2, batch 2"]["fast"]["rounds"] == 4
    )
    profiles = result["profile_ms"]
    assert profiles["W4A4"]["MatMulInteger"] > 0
    assert profiles["W4A4"]["GatherElements"] > 0
    assert "GatherElements" not in profiles[export_speed.BASE]
    total = sum(value for kind, value in profiles["W4A4"].items() if kind != "all")
    assert profiles["W4A4"]["all"] == pytest.approx(total, abs=0.02)
    json.dumps(result)


def test_static_quantization_is_calibrated_and_run_by_onnxruntime_and_openvino():
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    files = export_speed.others(64, images)
    model = onnx.ModelProto.FromString(files["static int8"])
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.INT8 in weights.values()
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    assert len(files["static int8"]) < 0.3 * len(files[export_speed.BASE])
    run = export_engines.onnxruntime_opener(files["static int8"])(1, images)
    (expected,) = run()
    assert expected.shape == (2, 1000)
    result = export_engines.openvino_opener(files["static int8"])(1, images)()
    np.testing.assert_allclose(result[0], expected, atol=0.1 * np.abs(expected).max())


def test_export_is_a_topic_with_small_inputs():
    assert benchmarks.TOPICS["export"] is export_speed.run
    assert benchmarks.QUICK["export"]["size"] == 64
