import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.export import ExactNetwork, describe, run_numpy
from lightning_n2uq.export.verify.parity import compare, float_engine
from lightning_n2uq.layers import QuantConv2d, QuantSpec

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

from lightning_n2uq.export.runtime.engines import ENGINES


class Mixed(nn.Module):
    """Branches, gates, grouped and strided convolutions, several kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.same = nn.Conv2d(8, 8, (5, 3), padding="same", dilation=(1, 2))
        self.average = nn.AvgPool2d(2, padding=1)
        self.last = nn.Linear(16 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.act(self.norm(self.depthwise(x)))
        y = y * self.squeeze(y) + x
        y = torch.cat([nn.functional.leaky_relu(self.same(y), 0.1), y * 0.5], 1)
        return self.last(torch.flatten(self.average(y), 1))


def converted(weight, activation, bits):
    torch.manual_seed(0)
    model = Mixed().eval()
    nn.init.normal_(model.norm.weight)
    calibration = [torch.randn(8, 3, 16, 16)]
    policy = {"weight_quantizer": weight, "activation_quantizer": activation}
    quantize_model(model, {**policy, "weight_bits": bits, "activation_bits": bits}, calibration)
    return model.eval()


@pytest.mark.parametrize(
    ("weight", "activation", "bits"),
    [("n2uq", "n2uq", 2), ("n2uq", "n2uq", 4), ("lsq", "lsq_plus", 4), ("dorefa", "dorefa", 3)],
)
def test_a_converted_network_gives_the_same_bits_in_every_engine(weight, activation, bits):
    model = converted(weight, activation, bits)
    x = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    description = describe(model, (3, 16, 16))
    engines = {name: ENGINES[name](description) for name in ("torch", "numpy", "onnxruntime")}
    report = compare(engines, [(x, None)], float_engine(model))
    assert report.ok, report.table()
    assert all(tally.logits == 0 for tally in report.engines.values()), report.table()
    assert report.floating.logits < 0.05, report.table()
    assert len(description.quantizers()) == 3


def test_torchvision_networks_convert_and_export():
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    quantize_model(model, {"weight_bits": 2, "activation_bits": 2}, [x])
    description = describe(model, (3, 32, 32))
    logits = ExactNetwork(description)(x)
    np.testing.assert_array_equal(run_numpy(description, x.numpy())[description.output], logits.numpy())
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(x), rtol=1e-3, atol=1e-3)


class Odd(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


class Doubled(nn.Conv2d):
    """Does something else than the layer it is made of."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Odd(nn.SiLU()), "layer: SiLU has no deployed form"),
        (Odd(nn.AdaptiveAvgPool2d(3)), "layer: averaging to 3 has no deployed form"),
        (Odd(nn.Flatten(0)), "layer: only flattening"),
        (Odd(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), "padding_mode 'reflect'"),
        (Odd(nn.Conv2d(2, 4, 3)), r"layer: its input is \[3, 8, 8\], allowed is \[2, H, W\]"),
        (Odd(nn.BatchNorm2d(3, track_running_stats=False)), "without running statistics"),
        (nn.Sequential(Doubled(3, 4, 3)), "0: Doubled has no deployed form"),
        (
            Odd(nn.Sequential(nn.MaxPool2d((2, 1)), nn.AdaptiveAvgPool2d(4))),
            "averaging to 4 has no deployed form",
        ),
        (Branching(), "Branching cannot be traced"),
    ],
)
def test_what_cannot_be_deployed_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        describe(model, (3, 8, 8))


def test_an_activation_inside_a_norm_is_exported():
    norms = pytest.importorskip("timm.layers", reason="timm is not installed (extra 'timm')")
    norm = norms.BatchNormAct2d(4, act_layer=nn.ReLU)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    assert (expected == 0).any()
    torch.testing.assert_close(ExactNetwork(describe(model, (3, 8, 8)))(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_with_equal_weights_share_a_stored_constant(bits):
    spec = QuantSpec(bits, bits)
    layers = [QuantConv2d(2, 2, 3, bias=False, spec=spec) for _ in range(2)]
    layers[1].weight = layers[0].weight
    description = describe(nn.Sequential(*layers, nn.Flatten()).eval(), (2, 8, 8))
    engines = {name: ENGINES[name](description) for name in ("torch", "onnxruntime")}
    x = np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)
    report = compare(engines, [(x, None)])
    assert report.ok, report.table()
    assert report.engines["onnxruntime"].logits == 0


def test_quantizers_without_a_range_and_broken_numbers_are_named(small_network):
    model = Mixed()
    quantize_model(model, {"weight_bits": 2, "activation_bits": 2})
    with pytest.raises(ValueError, match=r"depthwise\.codes: its range was never fitted"):
        describe(model, (3, 16, 16))
    broken = small_network()
    with torch.no_grad():
        broken.layer1[0].conv1.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer1.0.conv1: weights are not finite"):
        describe(broken, (2, 16, 16))
    with pytest.raises(ValueError, match="has no integer levels"):
        describe(small_network(4, 4, "apot", "n2uq"), (2, 16, 16))
