"""Export by torch's own exporter: layers as integers, files run by onnxruntime, differences explained."""

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from lightning_n2uq.convert import Policy, Rule, quantize_model
from lightning_n2uq.export.program.deployed import deploy
from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.layers import DeployedAttention, DeployedConv, DeployedLinear
from lightning_n2uq.export.program.onnx_program import export_program
from lightning_n2uq.layers import QuantConv2d, QuantLinear, QuantSpec
from lightning_n2uq.quantizers import ACTIVATION_QUANTIZERS

METHODS = sorted(set(ACTIVATION_QUANTIZERS) - {"float"})


class Mixed(nn.Module):
    """What the form by steps refuses: SiLU, layer norm, attention, a permutation, a comparison."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.silu(self.body(F.silu(self.stem(x))))
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(x)
        return {"logits": self.head(x.mean(1)), "tokens": x.permute(1, 0, 2)}


def trained(model, *inputs, seed=0, **policy):
    """Converts, every layer if a policy is given, and fits the quantizers to one batch."""
    torch.manual_seed(seed)
    quantize_model(model, Policy(skip_first=False, skip_last=False, **policy) if policy else None)
    model.train()
    with torch.no_grad():
        model(*inputs)
    return model.eval()


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    model = trained(Mixed(), x)
    return model, x, export_program(model, x)


def outputs(file, *inputs):
    session = onnxruntime.InferenceSession(file.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": "same", "kernel_size": 4},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": (2, 1), "padding_mode": "circular"},
        {"padding": 2, "dilation": 2, "groups": 4},
        {"bias": False},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("bits", [2, 8])
def test_a_convolution_has_the_float_layers_value(settings, bits):
    torch.manual_seed(0)
    settings = {"kernel_size": 3, **settings}
    model = nn.Sequential(nn.Conv2d(4, 8, **settings))
    x = torch.randn(2, 4, 9, 9) - 0.3  # levels with an offset: what surrounds an image has none
    trained(model, x, weight_bits=bits, activation_bits=bits)
    deployed = deploy(model)
    assert deployed.integer == ["0"]
    assert isinstance(deployed.model[0], DeployedConv)
    assert deployed.model[0].weight.dtype == torch.int8
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(deployed.model(x), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    torch.testing.assert_close(deployed.model(x[0]), expected[0], rtol=0, atol=1e-5)


def test_a_trainer_with_its_data_is_not_copied():
    class NotCopied:
        def __deepcopy__(self, memo):
            raise AssertionError("the trainer is copied")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return self.net(x)

    torch.manual_seed(0)
    model = trained(Module(), torch.randn(20, 4))
    model._trainer = trainer = NotCopied()
    assert deploy(model).integer == ["net.1"]
    assert model._trainer is trainer


@pytest.mark.integration
def test_a_copy_is_deployed_and_the_model_left_alone(mixed):
    model, _, program = mixed
    assert isinstance(model.mlp[0], QuantLinear)
    assert isinstance(program.deployed.model.attention, DeployedAttention)
    assert isinstance(program.deployed.model.mlp[0], DeployedLinear)
    assert set(program.deployed.integer) >= {"body", "attention", "attention.out_proj", "mlp.0", "mlp.2"}
    assert not program.deployed.floating
    assert "integer arithmetic: " in program.deployed.summary()


class Conv1D(nn.Module):
    """As Hugging Face's: a linear layer with the weight `[in, out]`."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


@pytest.mark.parametrize("method", ["n2uq", "lsq", "dorefa"])
def test_a_linear_layer_with_a_turned_weight_is_deployed(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(5, 3, 4)
    trained(model, x, weight_quantizer=method)
    deployed = deploy(model)
    assert deployed.integer == ["0"]
    with torch.no_grad():
        torch.testing.assert_close(deployed.model(x), model(x))


def test_a_layer_that_is_called_from_two_places_is_replaced_in_both():
    torch.manual_seed(0)
    shared = QuantLinear(4, 4, spec=QuantSpec(4, 4, "lsq", "lsq"))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).train()
    shared(torch.rand(20, 4))
    deployed = deploy(model).model
    assert deployed["a"] is deployed["b"][0]
    assert isinstance(deployed["a"], DeployedLinear)


@pytest.mark.integration
def test_odd_weights_of_8_bits_are_two_sums_in_a_file_of_any_size():
    x = torch.randn(4, 1024)
    model = trained(nn.Sequential(nn.Linear(1024, 1024)), x, weight_bits=8)
    program = export_program(model, x)
    layer = program.deployed.model[0]
    assert isinstance(layer, DeployedLinear)
    assert layer.doubled
    assert explain_file(program).ok
    assert explain_modules(program, model).ok


@pytest.mark.integration
def test_what_stays_float_is_listed_and_has_its_quantized_value():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(8, 6)
    rules = (Rule("0", weight_quantizer="apot"), Rule(activation_quantizer="apot"))
    trained(model, x, rules=rules)
    deployed = deploy(model)
    assert deployed.integer == []
    assert set(deployed.floating) == {"0", "2"}
    assert "not evenly spaced" in deployed.floating["2"]
    torch.testing.assert_close(deployed.model(x), model(x))
    program = export_program(model, x)
    assert explain_file(program).ok


@pytest.mark.integration
def test_the_file_holds_standard_operators_and_integers(mixed):
    _, _, program = mixed
    assert {node.domain for node in program.model.graph.node} == {""}
    assert {entry.domain for entry in program.model.opset_import} == {""}
    kinds = [node.op_type for node in program.model.graph.node]
    assert kinds.count("MatMulInteger") == 3 + 1 + 2  # queries, keys, values; projection; two layers
    assert kinds.count("ConvInteger") == 1
    bytes_ = [t for t in program.model.graph.initializer if t.data_type == 2 and len(t.dims) > 1]
    assert len(bytes_) == 3 + 1 + 2 + 1
    assert [o.name for o in program.model.graph.output] == ["output", "output1"]
    assert [i.name for i in program.model.graph.input] == ["x"]


@pytest.mark.integration
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_file_takes_any_batch(mixed, batch):
    _, _, program = mixed
    assert program.dynamic
    torch.manual_seed(batch)
    x = torch.randn(batch, 3, 8, 8)
    logits, tokens = outputs(program.model, x)
    with torch.no_grad():
        expected = program.deployed.model(x)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    np.testing.assert_allclose(tokens, expected["tokens"], atol=1e-4)


class Several(nn.Module):
    """A list of images and two tensors by name, whose batch sizes are compared while the network runs."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, images, shift=None, mask=None):
        x = torch.stack(images).flatten(1) + shift
        x = self.layer(F.gelu(self.first(x)))
        return self.last(x).reshape(mask.shape[0], 2) * mask.reshape(x.shape[0], 1)


@pytest.mark.integration
def test_inputs_by_name_and_in_lists_keep_their_names_and_an_open_batch():
    torch.manual_seed(0)
    images, keywords = list(torch.rand(2, 2, 2)), {"mask": torch.rand(2, 1), "shift": torch.rand(2, 4)}
    model = Several()
    quantize_model(model)
    model.train()(images, **keywords)
    program = export_program(model.eval(), images, keywords=keywords)
    assert [i.name for i in program.model.graph.input] == ["images_0", "images_1", "mask", "shift"]
    assert explain_file(program).ok
    alone = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.rand(3, 4)
    assert [i.name for i in export_program(trained(alone, x), x).model.graph.input] == ["input"]


@pytest.mark.integration
def test_differences_are_explained(mixed):
    model, _, program = mixed
    for found in (explain_file(program), explain_modules(program, model)):
        assert found.ok, found.table()
        names = [layer.name for layer in found.layers]
        assert {"body", "attention", "mlp.0"} <= set(names)
        assert "difference: codes at thresholds and roundings alone" in found.table()


def test_a_moved_code_moves_the_output_and_is_explained(mixed):
    """A network whose values differ a little, as by another order of additions."""
    model, x, program = mixed
    shaken = trained(Mixed(), x)
    shaken.load_state_dict(model.state_dict())
    with torch.no_grad():
        shaken.stem.bias.add_(5e-5)
    found = explain_modules(program, shaken)
    assert sum(layer.moved for layer in found.layers) > 0
    assert found.free > found.forced
    assert found.ok, found.table()


@pytest.mark.parametrize("part", ["thresholds", "weight", "float"])
def test_a_wrong_file_is_not_explained(mixed, part):
    _, _, program = mixed
    file = program.watched
    kept = file.SerializeToString()
    try:
        for tensor in file.graph.initializer:
            array = numpy_helper.to_array(tensor).copy()
            if part == "weight" and array.dtype == np.uint8 and array.ndim == 2:
                array.flat[0] ^= 64
            elif part == "thresholds" and tensor.name.startswith("n2uq_deploy") and array.dtype == np.float32:
                array = array + np.float32(0.1)
            elif part == "float" and tensor.name.endswith("norm.weight"):
                array = array * np.float32(1.01)
            else:
                continue
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            break
        found = explain_file(program)
        assert not found.ok
        assert "NOT EXPLAINED" in found.table()
    finally:
        file.ParseFromString(kept)


def test_what_cannot_be_exported_is_named_in_a_line(capfd):
    with pytest.raises(ValueError, match="model: Linear has no quantized layer"):
        export_program(nn.Linear(3, 3), torch.randn(2, 3))

    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else self.other(x)

    x = torch.rand(4, 4)
    model = trained(Deciding(), x, weight_bits=4)
    model.train()
    model(-x)
    with pytest.raises(ValueError, match="model: cannot be traced by torch") as caught:
        export_program(model.eval(), x)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # torch prints the graph so far


@pytest.mark.integration
def test_a_quantized_convolution_of_this_package_is_deployed_too():
    torch.manual_seed(0)
    layer = QuantConv2d(3, 4, 3, spec=QuantSpec(8, 2)).train()
    x = torch.rand(2, 3, 6, 6) * 2
    layer(x)
    model = nn.Sequential(layer).eval()
    deployed = deploy(model).model[0]
    assert deployed.doubled  # odd levels up to 255
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(deployed(x), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    assert explain_file(export_program(model, x)).ok
