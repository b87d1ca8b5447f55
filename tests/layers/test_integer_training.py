"""Layers that train on integers: the float path's values to float accuracy, its gradients, NaN, fallbacks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear, QuantSpec, integer
from lightning_n2uq.layers.fused import norm_act_conv
from lightning_n2uq.ops.dispatch import force, select
from lightning_n2uq.utils import processor
from seen_operators import SeenOperators

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    select("integer", torch.device("cpu")) == "reference", reason="no integer kernels on this processor"
)
METHODS = {"n2uq": "n2uq", "lsq": "lsq", "lsq_plus": "lsq_plus", "pact": "dorefa", "dorefa": "dorefa"}
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 8},
]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "FEWEST", 0)


def layer(method: str = "n2uq", bits: int = 3, weight_bits: int = 3, **geometry) -> QuantConv2d:
    spec = QuantSpec(weight_bits, bits, METHODS[method], method)
    conv = QuantConv2d(8, 8, **({"kernel_size": 3, "padding": 1} | geometry), spec=spec).train()
    conv(torch.randn(2, 8, 9, 7))  # first values of quantizers
    with torch.no_grad():
        for name, p in conv.activation_quantizer.named_parameters():
            p.add_(0.013 if name != "widths" else 0.1 * torch.rand_like(p))
    return conv


def results(
    conv: nn.Module, x: Tensor, kernels: str | None, call=None
) -> tuple[Tensor, dict[str, Tensor], set]:
    """Value, gradients, operators of one step."""
    conv, x = copy.deepcopy(conv), x.clone(memory_format=torch.preserve_format).requires_grad_()
    with force(kernels):
        with SeenOperators() as seen, torch.no_grad():
            (call or nn.Module.__call__)(conv, x)
        out = (call or nn.Module.__call__)(conv, x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        parameters = dict(conv.named_parameters())
        wanted = {n: p for n, p in parameters.items() if p.requires_grad}
        grads = torch.autograd.grad(out, [x, *wanted.values()], grad)
    return out.detach(), dict(zip(["x", *wanted], grads, strict=True)), seen.names


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ("statsq", 3),
        ("least_error", 4),
        ("seq", 2),
        ("seq_ternary", 2),
        ("ternary", 2),
        ("binary", 1),
        ("ewgs", 3),
    ],
)
def test_every_method_with_integer_weights_trains_on_integers(weights: str, bits: int) -> None:
    torch.manual_seed(0)
    conv = QuantConv2d(8, 8, 3, padding=1, spec=QuantSpec(bits, 3, weights, "lsq")).train()
    x = torch.randn(3, 8, 11, 10)
    conv(x)
    ours, our_grads, seen = results(conv, x, None)
    plain, plain_grads, left = results(conv, x, "reference")
    assert "quantized_conv2d" in seen
    assert "quantized_conv2d" not in left
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_scaled_gradients_and_uneven_levels_say_why_they_train_in_floats() -> None:
    spec = [QuantSpec(2, 2, "n2uq", name) for name in ("ewgs", "nulsq")]
    network = nn.Sequential(*(QuantConv2d(8, 8, 3, spec=one) for one in spec))
    reasons = dict(integer.float_layers(network))
    assert reasons == {
        "0": "activations of ewgs have scaled gradients",
        "1": "activations of nulsq are not uniform",
    }


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_float_step(method: str, geometry: dict, form: torch.memory_format) -> None:
    conv = layer(method, **geometry)
    x = (torch.randn(3, 8, 11, 10) * 1.5).contiguous(memory_format=form)
    ours, our_grads, seen = results(conv, x, None)
    plain, plain_grads, left = results(conv, x, "reference")
    assert "quantized_conv2d" in seen
    assert "quantized_conv2d" not in left
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    if method == "n2uq":
        _, float_grads, _ = results(conv, x, "numba")
        for name, grad in float_grads.items():
            assert torch.equal(our_grads[name], grad), name
    for name, grad in plain_grads.items():
        torch.testing.assert_close(
            our_grads[name], grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
@pytest.mark.parametrize("method", ["n2uq", "lsq"])
def test_values_are_nearer_to_float64_than_the_float_layers(method: str, bits: int) -> None:
    conv = layer(method, bits, bits)
    x = torch.randn(2, 8, 12, 12)
    ours, _, seen = results(conv, x, None)
    plain, _, _ = results(conv, x, "reference")
    assert "quantized_conv2d" in seen
    y, weight = conv.activation_quantizer(x).double(), conv.weight_quantizer(conv.weight).double()
    exact = nn.functional.conv2d(y, weight, conv.bias.double(), padding=1)
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()
    assert (ours - exact).norm() <= 2e-7 * exact.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_map_with_nan_is_convolved_in_floats(method: str) -> None:
    conv, x = layer(method), torch.randn(2, 8, 9, 9)
    x[1, 3, 4, 4] = torch.nan
    ours, grads, _ = results(conv, x, None)
    plain, _, _ = results(conv, x, "reference")
    assert torch.equal(ours.isnan(), plain.isnan())
    assert 0 < ours.isnan().sum() < ours.numel()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert grads["weight"].isnan().any()


def test_floats_without_integers_have_the_very_bits() -> None:
    conv, x = layer(), torch.randn(2, 8, 9, 9)
    off, _, seen = results(conv, x, "numba")
    plain, _, _ = results(conv, x, "reference")
    assert "packed_conv2d" in seen
    assert torch.equal(off, plain)


def test_what_could_saturate_takes_the_float_path_and_equals_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset())
    conv, x = layer("n2uq", 8, 7), torch.randn(2, 8, 9, 9)
    ours, grads, seen = results(conv, x, None)
    plain, plain_grads, _ = results(conv, x, "reference")
    assert "packed_conv2d" in seen
    assert torch.equal(ours, plain)
    assert torch.equal(grads["weight"], plain_grads["weight"])


@pytest.mark.parametrize("method", ["n2uq", "lsq", "dorefa"])
@pytest.mark.parametrize("zeros", ["channel", "all"])
def test_channels_of_zeros(method: str, zeros: str) -> None:
    conv = layer(method, bias=False)
    with torch.no_grad():
        conv.weight[0 if zeros == "channel" else slice(None)] = 0.0
    x = torch.randn(2, 8, 9, 9)
    ours, _, _ = results(conv, x, None)
    plain, _, _ = results(conv, x, "reference")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert method != "n2uq" or (ours[:, 0] == 0).all()


@pytest.mark.parametrize("gradient", ["paper", "published"])
def test_both_gradients_of_pact(gradient: str) -> None:
    conv = layer("pact")
    conv.activation_quantizer.gradient = gradient
    x = torch.randn(2, 8, 9, 9) * 2
    _, ours, seen = results(conv, x, None)
    _, plain, _ = results(conv, x, "reference")
    assert "quantized_conv2d" in seen
    torch.testing.assert_close(
        ours["activation_quantizer.clip"], plain["activation_quantizer.clip"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_behind_norm_and_activation(method: str) -> None:
    conv, norm, act = layer(method), nn.BatchNorm2d(8), BiasedPReLU(8)
    with torch.no_grad():
        act.bias_out.fill_(0.4)
    parts = nn.ModuleList([norm, act, conv])
    x = torch.randn(4, 8, 12, 12)
    call = lambda parts, x: norm_act_conv(x, *parts)  # noqa: E731
    ours, our_grads, seen = results(parts, x, None, call)
    plain, plain_grads, _ = results(parts, x, "reference", call)
    assert "quantized_conv2d" in seen
    assert ((ours - plain).abs() > 1e-4).float().mean() < 0.02  # a norm's last bits may move single codes
    for name in our_grads:
        difference = (our_grads[name] - plain_grads[name]).norm()
        assert difference <= 0.05 * plain_grads[name].norm() + 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["n2uq", "lsq_plus"])
def test_autocast_rounds_the_exact_result(method: str, dtype: torch.dtype) -> None:
    conv, x = layer(method), torch.randn(2, 8, 9, 9)
    full, _, _ = results(conv, x, None)
    with torch.autocast("cpu", dtype):
        half = conv(x)
    assert half.dtype == dtype
    bias = conv.bias.to(dtype).float()[:, None, None]
    expected = full - conv.bias.detach()[:, None, None] + bias
    torch.testing.assert_close(
        half.float(), expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-3
    )


def test_weights_without_the_entropy_preserving_scale() -> None:
    conv = layer()
    conv.weight_quantizer.rescale = False
    x = torch.randn(2, 8, 9, 9)
    ours, grads, seen = results(conv, x, None)
    plain, plain_grads, _ = results(conv, x, "reference")
    assert "quantized_conv2d" in seen
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(grads["weight"], plain_grads["weight"])


def test_empty_batches() -> None:
    y = layer()(torch.randn(0, 8, 9, 9))
    assert y.shape == (0, 8, 9, 9)


def test_float64_stays_float64() -> None:
    conv, x = layer().double(), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    ours, _, seen = results(conv, x, None)
    assert not {"quantized_conv2d", "packed_conv2d"} & seen
    assert ours.dtype == torch.float64


@pytest.mark.integration
def test_compiled_and_eager_layers_agree() -> None:
    conv, x = layer(), torch.randn(2, 8, 9, 9)
    plain, grads, _ = results(conv, x, None)
    twin = copy.deepcopy(conv)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, plain)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(grad)
    assert torch.equal(twin.weight.grad, grads["weight"])


@pytest.mark.parametrize("change", ["step", "forward"])
def test_a_quantizer_that_does_not_fit_is_left_alone(change: str) -> None:
    conv = layer("lsq")
    quantizer = conv.activation_quantizer
    if change == "step":
        with torch.no_grad():
            quantizer.step.fill_(-0.5)
    else:

        class Doubled(type(quantizer)):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        quantizer.__class__ = Doubled
    x = torch.randn(2, 8, 9, 9)
    ours, _, seen = results(conv, x, None)
    assert "quantized_conv2d" not in seen
    assert torch.equal(ours, results(conv, x, "reference")[0])


def test_layers_that_train_in_floats_are_named_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset())
    network = nn.Sequential()
    network.add_module("integers", layer())
    network.add_module("wide", layer("n2uq", 8, 7))
    network.add_module("weights", layer("n2uq", 4, 8))
    network.add_module("apot", QuantConv2d(8, 8, 3, spec=QuantSpec(3, 3, "n2uq", "apot")))
    network.add_module("named", QuantConv2d(8, 8, 3, padding="same"))
    network.add_module("wide_floats", QuantConv2d(8, 8, 3).double())
    network.add_module("linear", QuantLinear(8, 8))
    network.add_module("compared", layer())
    network.compared.activation_quantizer.comparison = ">="
    network.add_module("unquantized", nn.Conv2d(8, 8, 3))
    reasons = dict(integer.float_layers(network))
    assert set(reasons) == {"wide", "weights", "apot", "named", "wide_floats", "linear", "compared"}
    assert "16 bits" in reasons["wide"]
    assert "not integers of 8 bits" in reasons["weights"]
    assert "not uniform" in reasons["apot"]
    assert "same" in reasons["named"]
    assert ">=" in reasons["compared"]
    with force("numba"):
        assert "no integer arithmetic" in dict(integer.float_layers(network))["integers"]
