import numpy as np
import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.export import describe, load_safetensors, save_safetensors, with_normalization
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.lower.preprocessing import normalization
from lightning_n2uq.export.runtime.engines import ENGINES
from lightning_n2uq.export.verify.parity import compare, float_engine

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture
def trained(perturb):
    """An integer-only network with numbers as training leaves them, and how it was built."""

    def build(name="resnet20", size=32, **arguments):
        torch.manual_seed(0)
        small = {"width": 8} if name == "resnet20" else {}
        options = {"residual_bits": 8, "first_last_bits": 8, "num_classes": 10, **small, **arguments}
        model = backbones.build(name, **options).train()
        x = torch.randn(4, 3, size, size)
        model(x)
        perturb(model).train()(x)
        return model.eval()

    return build


def pixels(count=3, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size)).astype(np.uint8)


def assert_exact(model, x, engines, normalize=None, description=None):
    description = describe(model, x.shape[1:]) if description is None else description
    found = {name: ENGINES[name](description) for name in engines}
    report = compare(found, [(x, None)], float_engine(model, normalize))
    assert report.ok, report.table()
    compared = report.floating.codes
    assert {step.name for step in description.quantizers() if step.name.endswith(".codes")} <= compared.keys()
    assert not any(compared.values()), report.table()
    assert report.floating.logits < 1e-6
    return description


@pytest.mark.parametrize(
    ("name", "size", "engines"),
    [
        ("resnet20", 32, ("torch", "numpy", "onnxruntime")),
        ("resnet18", 32, ("torch", "numpy")),
        pytest.param("resnet50", 32, ("torch",), marks=pytest.mark.integration),
        ("mobilenet_v2", 32, ("torch",)),
    ],
)
def test_every_map_is_an_integer_and_the_codes_are_those_of_the_module(trained, name, size, engines):
    images = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    description = assert_exact(trained(name, size), images, engines)
    assert description.float_maps() == []
    assert "integer-only: every tensor" in description.summary()
    values = ENGINES["torch"](description)(images).codes
    assert all(codes.dtype in (np.int8, np.uint8) for codes in values.values())


@pytest.mark.parametrize(("weight", "activation"), [("lsq", "lsq"), ("dorefa", "pact")])
def test_the_uniform_quantizers_are_thresholds_of_integers_too(trained, weight, activation):
    model = trained(
        weight_quantizer=weight, activation_quantizer=activation, weight_bits=4, activation_bits=4
    )
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    assert assert_exact(model, images, ("torch", "numpy")).float_maps() == []


def test_pixels_and_their_normalization_go_into_thresholds(trained):
    model = trained()
    description = with_normalization(describe(model, (3, 32, 32)), MEAN, STD)
    assert description.float_maps() == []
    normalize = normalization("images", (), MEAN, STD, 255.0)
    assert_exact(model, pixels(), ("torch", "numpy", "onnxruntime"), normalize, description)
    kinds = {type(step) for step in description.steps}
    assert {GridCodes, IntAdd, SumPool} <= kinds


def test_max_pooling_runs_on_codes(trained):
    description = describe(trained("resnet18", 32), (3, 32, 32))
    assert any(isinstance(step, IntMaxPool) for step in description.steps)


def test_a_network_that_is_integer_only_in_part_says_so(trained):
    description = describe(trained(first_last_bits=None), (3, 32, 32))
    assert description.float_maps()
    assert "integer-only" not in description.summary()


def test_safetensors_files_hold_the_network(trained, tmp_path):
    description = describe(trained(), (3, 32, 32))
    save_safetensors(description, tmp_path / "net.safetensors")
    again = load_safetensors(tmp_path / "net.safetensors")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    first, second = (ENGINES["numpy"](network)(images).logits for network in (description, again))
    np.testing.assert_array_equal(first, second)


def test_a_grid_without_data_is_refused():
    model = backbones.build("resnet20", width=4, residual_bits=8, first_last_bits=8).eval()
    with pytest.raises(ValueError, match=r"conv1\.codes: its grid was never initialised; train the network"):
        describe(model, (3, 32, 32))


def test_not_a_number_passes_no_threshold_in_any_engine(trained):
    description = describe(trained(), (3, 32, 32))
    images = np.full((1, 3, 32, 32), np.nan, np.float32)
    first, second = (ENGINES[name](description)(images).codes["conv1.codes"] for name in ("torch", "numpy"))
    np.testing.assert_array_equal(first, second)


def test_qonnx_runs_the_same_integers_with_the_datatypes_that_finn_wants(trained):
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes

    from lightning_n2uq.export import to_qonnx

    model = trained()
    description = with_normalization(describe(model, (3, 32, 32)), MEAN, STD)
    normalize = normalization("images", (), MEAN, STD, 255.0)
    assert_exact(model, pixels(2), ("torch", "qonnx"), normalize, description)
    wrapper = ModelWrapper(to_qonnx(description, 1)).transform(InferShapes()).transform(InferDataTypes())
    kind = wrapper.get_tensor_datatype
    adds = [node for node in wrapper.graph.node if node.op_type == "Add" and "add" in node.output[0]]
    assert len(adds) == 9
    assert all({str(kind(name)) for name in node.input} == {"INT8"} for node in adds)
    thresholds = [node for node in wrapper.graph.node if node.op_type == "MultiThreshold"]
    assert len(thresholds) == len(description.quantizers())
    assert all(kind(name).is_integer() for node in thresholds for name in (node.input[0], node.output[0])[1:])
    assert str(kind(wrapper.graph.input[0].name)) == "UINT8"


@pytest.mark.parametrize("convolution", ["matmul", "conv"])
def test_every_map_of_the_onnx_file_is_an_integer(trained, convolution):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra 'export')")
    from lightning_n2uq.export import to_onnx
    from lightning_n2uq.export.runtime.engines import session

    description = with_normalization(describe(trained(), (3, 32, 32)), MEAN, STD)
    model = to_onnx(description, convolution)
    (logits,) = session(model.SerializeToString()).run(None, {"pixels": pixels()})
    np.testing.assert_array_equal(logits, ENGINES["numpy"](description)(pixels()).logits)
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    layers = [step.name for step in description.steps[1:-1]]
    integers = {onnx.TensorProto.UINT8, onnx.TensorProto.INT32}
    assert {kinds[name] for name in layers} <= integers


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_network_that_a_compiler_fuses_gives_the_same_codes(trained, name):
    from lightning_n2uq.export.runtime.integer_network import IntegerNetwork

    description = describe(trained(name, 32), (3, 32, 32))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = ENGINES["numpy"](description)(images)
    network = IntegerNetwork(description, code_outputs=True)
    logits, *codes = network(torch.from_numpy(images))
    np.testing.assert_array_equal(logits.numpy(), expected.logits)
    for name, found in zip(network.outputs[1:], codes, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.codes[name])


def test_in_the_onnx_file_no_map_is_gathered_value_by_value():
    """`Gather` takes four times as long as `GatherElements`, and few comparisons less still."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    from lightning_n2uq.export.formats.onnx_file import to_onnx

    rng = np.random.default_rng(0)
    bytes_, floats = s.Input("x", (), (3, 16, 17), "uint8"), s.Input("x", (), (3, 16, 17))
    many = np.sort(rng.integers(-1, 256, (3, 254)), 1).astype(np.int32)
    even = np.linspace(-2, 2, 254, dtype=np.float32)[None]
    sign = np.array([-1, 1, -1], np.int32)
    cases = [
        (bytes_, GridCodes("y", ("x",), many), {"GatherElements"}),
        (bytes_, GridCodes("y", ("x",), -many[:, ::-1], sign), {"GatherElements"}),
        (bytes_, s.Codes("y", ("x",), many[:, 60:200:50]), {"Greater"}),
        (bytes_, s.Codes("y", ("x",), many[:1, 100:101]), {"Greater"}),
        (floats, GridCodes("y", ("x",), even), {"GatherElements", "Greater"}),
    ]
    lookups = {"Gather", "GatherElements", "Greater"}
    for first, step, expected in cases:
        description = Description((first, step))
        kinds = {node.op_type for node in to_onnx(description, code_outputs=["y"]).graph.node}
        assert kinds & lookups == expected
        x = pixels(2, 17)[:, :, 1:]
        x = x if first is bytes_ else rng.standard_normal(x.shape).astype(np.float32)
        found, wanted = (ENGINES[name](description)(x).codes["y"] for name in ("onnxruntime", "numpy"))
        np.testing.assert_array_equal(found, wanted)
