"""Which channels `QLinearConv` computes exactly, judged by onnxruntime's."""

import numpy as np
import pytest

from benchmarks.requantization import channels, fits
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes


def thresholds(distance, offset, codes):
    """The last sums in front of the steps of `round((sum - offset) / distance)`."""
    return np.floor((codes + 0.5) * distance + offset).astype(np.int64)


@pytest.mark.parametrize(
    ("offset", "largest", "expected"),
    [(3.0, 1, 1), (3.4, 1, None), (3.4, 42, 5), (0.5, 2, 2), (np.pi, 6, None)],
)
def test_steps_move_by_whole_sums_or_by_parts_of_multiplied_ones(offset, largest, expected):
    codes = np.arange(-127, 127)
    found = fits(thresholds(np.sqrt(13.7), offset, codes), codes, range(1, largest + 1))
    assert found == expected


def test_what_is_exact_is_so_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    from onnx import TensorProto, helper, numpy_helper

    codes, factor, distance, bias = np.arange(-127, 127), 5, 1.7, -4  # a fifth of a sum is a unit
    last = np.floor((codes + 0.5) * distance - bias / factor).astype(np.int64)
    assert fits(last, codes, range(1, 6)) is not None
    arrays = {
        "one": np.float32(1),
        "weight": np.full((1, 1, 1, 1), factor, np.int8),
        "scale": np.array([1 / (factor * distance)], np.float32),
        "zero": np.uint8(128),
        "none": np.zeros(1, np.int8),
        "bias": np.array([bias], np.int32),
    }
    inputs = ["x", "one", "zero", "weight", "scale", "none", "one", "zero", "bias"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1, 1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 256)
    (found,) = session.run(None, {"x": x})
    sums = x.astype(int).ravel() - 128
    expected = codes[0] + (sums[:, None] > last).sum(1)
    np.testing.assert_array_equal(found.ravel().astype(int) - 128, expected)


def test_a_layer_counts_its_channels():
    """One as it is, one if its weights are multiplied by three, one not at all: they fill a byte already."""
    codes = np.arange(-60, 60)
    table = np.stack([thresholds(2.6, offset, codes) for offset in (0.0, 0.4)]).astype(np.int32)
    for largest, expected in ((1, (1, 2, 2)), (127, (1, 1, 2))):
        layer = s.IntConv("conv", ("x",), np.full((2, 3, 1, 1), largest, np.int16), 8, False, 255)
        assert channels(layer, GridCodes("y", ("conv",), table, None, -60)) == expected
