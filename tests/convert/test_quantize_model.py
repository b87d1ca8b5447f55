import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_n2uq.convert import CalibratedInput, Policy, QuantMultiheadAttention, calibrate, quantize_model
from lightning_n2uq.layers import QuantConv2d, QuantLinear


def small_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)


def small_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)


def torchvision_model(name, **arguments):
    def make():
        from torchvision import models

        return models.get_model(name, weights=None, num_classes=5, **arguments)

    return make


def timm_model(name, **arguments):
    def make():
        timm = pytest.importorskip("timm", reason="timm is an extra")
        return timm.create_model(name, num_classes=5, **arguments)

    return make


QUICK = {
    "convnext": small_convnext,
    "vit": small_vit,
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small"),
    "timm_resnet": timm_model("test_resnet"),
    "timm_vit": timm_model("test_vit", img_size=32),
}
FULL = {
    "resnet18": torchvision_model("resnet18"),
    "efficientnet_b0": torchvision_model("efficientnet_b0"),
    "convnext_tiny": torchvision_model("convnext_tiny"),
    "vit_b_16": torchvision_model("vit_b_16", image_size=32),
    "timm_mobilenetv3_small_100": timm_model("mobilenetv3_small_100"),
    "timm_convnext_atto": timm_model("convnext_atto"),
    "timm_vit_tiny": timm_model("vit_tiny_patch16_224", img_size=32),
}
NETWORKS = [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in FULL.items())]
COMPILED = [
    pytest.param(name, make, marks=() if name == "timm_resnet" else pytest.mark.slow)
    for name, make in {**QUICK, **FULL}.items()
    if "vit" not in name
]


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 16, 8), nn.Tanh(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize(("name", "make"), NETWORKS)
def test_networks_of_other_libraries_train_and_keep_their_keys(name, make, images):
    torch.manual_seed(0)
    model = make()
    keys, parameters = set(model.state_dict()), dict(model.named_parameters())
    report = quantize_model(model, {"weight_bits": 4, "activation_bits": 4}, [images])
    assert report.model is model
    assert len(report.quantized) >= 4
    assert len(report.excluded) == 2
    assert keys < set(model.state_dict())
    assert all(dict(model.named_parameters())[key] is parameter for key, parameter in parameters.items())
    assert all(line.input_range is not None for line in report.of("quantized"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(images), torch.arange(4))
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = make()
    quantize_model(again, {"weight_bits": 4, "activation_bits": 4})
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), again.eval()(images))


@pytest.mark.integration
@pytest.mark.parametrize(("name", "make"), COMPILED)
def test_convolutional_networks_compile_as_one_graph(name, make, images):
    model = make()
    quantize_model(model, calibration=[images])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), model.eval()(images))
    compiled.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", ["n2uq", "lsq", "lsq_plus", "dorefa", "apot"])
def test_many_bits_and_calibration_stay_close_to_the_float_network(method, images):
    model = tiny_network()
    expected = model(images[:, :, :8, :8])
    on_input = "pact" if method == "dorefa" else method
    policy = Policy(8, 8, "lsq" if method == "n2uq" else method, on_input)
    quantize_model(model, policy, [images[:, :, :8, :8]])
    error = (model.eval()(images[:, :, :8, :8]) - expected).norm() / expected.norm()
    assert 0 < error < {"apot": 0.2, "dorefa": 0.3}.get(method, 0.05)


def test_without_calibration_the_first_batch_fits_the_ranges(images):
    model = tiny_network()
    quantize_model(model, Policy(8, 8, "lsq", "n2uq"))
    inputs = images[:, :, :8, :8]
    quantizers = [m for m in model.modules() if isinstance(m, CalibratedInput)]
    model.eval()(inputs)  # fits on the fly and keeps nothing
    assert not any(q.initialized for q in quantizers)
    trained = model.train()(inputs)
    assert all(q.initialized for q in quantizers)
    torch.testing.assert_close(trained, tiny_network()(inputs), rtol=0, atol=0.1)
    torch.testing.assert_close(model(inputs), trained)


def test_report_names_every_layer_with_its_fate(images):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            return F.linear(x, self.inner.weight)

    class OwnConv1d(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)

    model = tiny_network()
    model.extend([Reader(), nn.Unflatten(1, (1, 5)), OwnConv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 2)])
    policy = {"rules": [{"type": "depthwise", "quantize": False}, {"name": "2", "weight_bits": 2}]}
    report = quantize_model(model, policy, [images[:, :, :8, :8]])
    assert report.quantized == ["2", "6", "8"]
    assert report.excluded == ["0", "4", "13"]
    assert report.unsupported == ["9.inner", "11"]
    reasons = {line.name: line.reason for line in report.layers}
    assert reasons["9.inner"] == "Reader reads its weight instead of calling it"
    assert reasons["4"] == "rule 0"
    assert model[2].weight_quantizer.bits == 2
    text = str(report)
    assert "3 quantized, 3 excluded, 2 unsupported" in text
    assert all(name in text for name in ("9.inner", "Conv1d", "n2uq 2"))


def test_layers_with_their_own_forward_are_named():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Twice(4, 4), nn.Linear(4, 4))
    model[0] = nn.utils.parametrizations.weight_norm(model[0])
    report = quantize_model(model, {"skip_first": False, "skip_last": False})
    assert report.quantized == ["2"]
    assert report.unsupported == ["0", "1"]
    assert quantize_model(model, {"skip_last": False}).unsupported == ["1", "2"]  # is quantized already


def test_layers_that_no_batch_reaches_are_named():
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
    model.forward = lambda x: model[0](model[1](model[3](x)))
    with pytest.warns(UserWarning, match="no calibration batch ran through"):
        report = quantize_model(model, calibration=[torch.randn(8, 4)])
    assert [line.reason for line in report.of("quantized")] == [
        "default",
        "default; no calibration batch reached it",
    ]


def test_shared_layers_stay_shared_and_layers_keep_their_form():
    shared = nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding="valid")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, shared, nn.Linear(4, 2, bias=False), nn.Linear(2, 2)
    ).double()
    quantize_model(model)
    assert model[1] is model[2]
    assert type(model[1]) is QuantConv2d
    assert type(model[3]) is QuantLinear
    assert model[3].bias is None
    assert model[1].weight is shared.weight
    assert (model[1].stride, model[1].dilation, model[1].padding) == ((2, 2), (2, 2), "valid")


def test_calibration_restores_modes_and_needs_data():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_model(model)
    model[0].eval()
    ranges = calibrate(model, [(torch.rand(16, 4), torch.zeros(16))])
    assert list(ranges) == ["1.activation_quantizer"]
    assert [module.training for module in model] == [False, True, True]
    with pytest.raises(ValueError, match="batches: got none"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, [torch.full((2, 4), float("nan"))])
    with pytest.raises(ValueError, match="single Linear"):
        quantize_model(nn.Linear(2, 2))


def test_only_max_batches_are_read():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    batches = iter([torch.rand(2, 4) for _ in range(5)])
    quantize_model(model, calibration=batches, max_batches=2)
    assert len(list(batches)) == 3


def test_copies_are_independent():
    model = tiny_network()
    quantize_model(model)
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 3, 8, 8))
    assert not model[2].activation_quantizer.initialized
    assert twin[2].activation_quantizer.initialized


@pytest.mark.parametrize("fused", [True, False])
def test_transformer_layers_do_not_bypass_their_quantizers_in_evaluation(fused):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    x = torch.randn(2, 5, 8)
    quantize_model(model, Policy(2, 2, "lsq", "lsq"), [x])
    assert isinstance(layer.self_attn, QuantMultiheadAttention)
    model.eval()
    with torch.set_grad_enabled(not fused):
        quantized = model(x)
    model.train()
    torch.testing.assert_close(quantized, model(x))


def test_a_transformer_encoder_with_padded_texts_evaluates_as_it_trains():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    assert model.use_nested_tensor
    x, padded = torch.randn(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    quantize_model(model, Policy(2, 2, "lsq", "lsq", skip_first=False, skip_last=False), [x])
    with torch.no_grad():
        quantized = model.eval()(x, src_key_padding_mask=padded)
        trained = model.train()(x, src_key_padding_mask=padded)
    torch.testing.assert_close(quantized[~padded], trained[~padded])


def test_attention_that_reads_weights_past_its_layers_is_named():
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=5)
    report = quantize_model(model, calibration=[torch.randn(1, 3, 32, 32)])
    blocks = ("features.1.0", "features.1.1")
    read = {f"{block}.attn.{name}" for block in blocks for name in ("qkv", "proj")}
    assert read <= set(report.unsupported)
    assert set(report.quantized) == {f"{block}.mlp.{i}" for block in blocks for i in (0, 3)}
