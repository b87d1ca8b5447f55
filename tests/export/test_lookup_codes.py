import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

from onnx import TensorProto

from lightning_n2uq.export import describe
from lightning_n2uq.export.formats.onnx_file import to_onnx
from lightning_n2uq.export.formats.onnx_graph import GraphWriter
from lightning_n2uq.export.formats.onnx_lookup import find_buckets, write_lookup
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Codes, Input
from lightning_n2uq.export.runtime.engines import session


def around(thresholds):
    """`[C, k]`: every threshold, its neighbours, numbers far away, and no number at all."""
    if thresholds.dtype == np.int32:
        far = np.array([-(2**24) - 1, 0, 2**24 + 1], np.int32)
        parts = [thresholds - 1, thresholds, thresholds + 1]
    else:
        far = np.array([-np.inf, -3e38, 0, 3e38, np.inf, np.nan], np.float32)
        parts = [np.nextafter(thresholds, np.float32(end)) for end in (-np.inf, np.inf)] + [thresholds]
    return np.concatenate([*parts, np.tile(far, (len(thresholds), 1))], 1)


def count(thresholds, x):
    return (x[:, :, None] > thresholds[:, None, :]).sum(-1)


@given(st.lists(st.integers(1, 400), min_size=15, max_size=15), st.integers(-5000, 5000))
def test_integer_buckets_hold_one_threshold_each_and_settle_the_code(gaps, start):
    thresholds = (start + np.cumsum([gaps, gaps[::-1]], 1)).astype(np.int32)
    buckets = find_buckets(thresholds)
    if buckets is None:
        return
    x = around(thresholds)
    z = (x.astype(np.float32) - buckets.low[:, None]) * buckets.scale[:, None]
    z = z.clip(0, buckets.count - 1)
    number = np.floor(z)
    steps = (number[..., None] + 1 - buckets.edges[:, None]).clip(0, 1).sum(-1) - number
    np.testing.assert_array_equal(np.floor(z + steps), count(thresholds, x))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(
    "thresholds",
    [[[1, 1, 2]], [[0, 1, 10**6]], [[0, 1, 2], [3, 3, 3]]],
    ids=["equal", "uneven", "one channel"],
)
def test_thresholds_that_share_a_bucket_are_compared_instead(thresholds, dtype):
    assert find_buckets(np.array(thresholds, dtype)) is None


def test_infinite_and_never_passed_float_thresholds_are_compared_instead():
    for extreme in (-np.inf, np.finfo(np.float32).max):
        values = np.sort(np.append(np.arange(14), extreme)).astype(np.float32)
        assert find_buckets(values[None]) is None


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("channels", [3, 600])
@pytest.mark.parametrize("levels", [15, 31])
def test_the_written_nodes_count_thresholds_at_every_neighbour(channels, levels, dtype):
    rng = np.random.default_rng(levels)
    gaps = rng.uniform(50, 300, (channels, levels))
    thresholds = (np.cumsum(gaps, 1) - rng.normal(900, 400, (channels, 1))).astype(dtype)
    buckets = find_buckets(thresholds)
    assert buckets is not None
    x = around(thresholds)
    image = Input("x", (), (channels, x.shape[1], 1), np.dtype(dtype).name)
    codes = Codes("codes", ("x",), thresholds)
    writer = GraphWriter(Description((image, codes)), "NHWC", 21)
    writer.layouts["x"] = "NCHW"
    write_lookup("codes", writer.in_layout("x", "NHWC"), thresholds, buckets, writer)
    writer.layouts["codes"] = "NHWC"
    model = writer.file({"codes": TensorProto.UINT8}, {"": 21}).SerializeToString()
    (answer,) = session(model).run(None, {"x": x[None, :, :, None]})
    np.testing.assert_array_equal(answer[0, :, 0].T, count(thresholds, x))


def test_four_bit_networks_use_the_lookup(small_network):
    kinds = {node.op_type for node in to_onnx(describe(small_network(4, 4), (2, 16, 16))).graph.node}
    assert "GatherElements" in kinds
