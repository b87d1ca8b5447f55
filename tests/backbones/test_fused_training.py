"""Networks on the fused training path: memory kept, bits, and the ways around it."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from lightning_n2uq.backbones import resnet18, resnet20
from lightning_n2uq.layers import QuantConv2d, QuantSpec, fused, integer
from lightning_n2uq.ops.dispatch import force, select
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.fused_conv import packed_conv2d
from lightning_n2uq.ops.quantized_conv import quantized_conv2d
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.quantizers import quantizer_parameters
from seen_operators import SeenOperators
from small_networks import resnet8

pytest.importorskip("numba")


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass, parameters excluded, every storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.train()(x)
    del y
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, gradients, buffers of one training step."""
    model.zero_grad()
    y = (model if call is None else call)(x)
    y.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def relative_error(ours: Tensor, plain: Tensor) -> float:
    """The norm of the difference, in parts of the plain value's."""
    difference = ours.detach().double() - plain.detach().double()
    return float(difference.norm() / plain.detach().double().norm())


KINDS = {"weight", "bias", "bias_in", "slope", "bias_out", "start", "widths", "scale_in", "scale_out"}
"""Last names of the parameters of a ResNet."""


@pytest.fixture(params=["integers", "floats"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every convolution on integers, or none, whatever its size."""
    monkeypatch.setattr(integer, "FEWEST", 0 if request.param == "integers" else 2**62)
    if request.param == "integers" and select("integer", torch.device("cpu")) == "reference":
        pytest.skip("no integer kernels on this processor")
    return request.param


@pytest.fixture
def small(arithmetic: str) -> nn.Module:
    return resnet20(width=8).train()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.70), (4, 0.72)])
def test_resnet18_keeps_less_than_the_float_network(bits: int, limit: float, arithmetic: str) -> None:
    x = torch.randn(1, 3, 96, 96)
    ours, theirs = kept_bytes(resnet18(bits, bits), x), kept_bytes(torchvision.models.resnet18(), x)
    assert ours < limit * theirs


@pytest.mark.parametrize("arithmetic", ["floats"], indirect=True)
def test_a_packed_convolution_has_the_bits_of_the_plain_one(arithmetic: str) -> None:
    conv = QuantConv2d(6, 8, 3, padding=1, spec=QuantSpec(2, 3))
    results = []
    for kernels in ("auto", "reference"):
        x = torch.randn(2, 6, 10, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with force(kernels):
            grads = step(conv, x)[:-1]
        results.append([grads[0], x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()])
        quantizer_grads = [p.grad.clone() for p in conv.activation_quantizer.parameters()]
        results[-1].append(torch.cat([g.flatten() for g in quantizer_grads]))
    for packed, plain in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.equal(packed, plain)
    torch.testing.assert_close(results[0][4], results[1][4], rtol=1e-6, atol=1e-6)


def test_the_network_trains_as_the_plain_one(small: nn.Module, images: Tensor) -> None:
    """Every gradient: weights, norms, biases and slopes, thresholds and scales of the quantizers."""
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.3  # else no norm would notice the scale of the convolution before it
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name.endswith((".bias", ".bias_in", ".bias_out")):
                parameter.normal_(0, 0.2)
            elif name.endswith(".start"):
                parameter.fill_(-0.6)  # negative inputs get codes, too, and slopes gradients
    twin = copy.deepcopy(small)
    step(small, images)
    with force("reference"):
        step(twin, images)
    assert {name.rsplit(".", 1)[-1] for name, _ in small.named_parameters()} == KINDS
    for (name, ours), plain in zip(small.named_parameters(), twin.parameters(), strict=True):
        # A norm's last bits may push single values over a threshold: not equal, but the same step.
        assert relative_error(ours.grad, plain.grad) < 0.01, name
        assert plain.grad.norm() > 1e-4, name
    for (name, ours), plain in zip(small.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_is_plain(small: nn.Module, images: Tensor) -> None:
    small.eval()
    with force("reference"):
        expected = small(images)
    assert torch.equal(small(images), expected)


@pytest.mark.integration
@pytest.mark.usefixtures("arithmetic")
def test_compiles_as_one_graph(images: Tensor) -> None:
    model = resnet8(width=8).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(eager, images), step(model, images, compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(small: nn.Module, images: Tensor, reentrant: bool) -> None:
    twin = copy.deepcopy(small)

    def call(x: Tensor) -> Tensor:
        return checkpoint(twin, x.clone().requires_grad_(), use_reentrant=reentrant)

    parameters = len(list(small.parameters()))
    once, twice = step(small, images), step(twin, images, call)
    assert all(
        torch.equal(a, b) for a, b in zip(once[: parameters + 1], twice[: parameters + 1], strict=True)
    )


def test_distributed_data_parallel(small: nn.Module, images: Tensor) -> None:
    twin = copy.deepcopy(small)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(twin)
        for a, b in zip(step(small, images), step(twin, images, parallel), strict=True):
            assert torch.equal(a, b)
    finally:
        distributed.destroy_process_group()


def test_autocast_keeps_maps_in_its_dtype(small: nn.Module, images: Tensor) -> None:
    full = kept_bytes(copy.deepcopy(small), images)
    with torch.autocast("cpu", torch.bfloat16):
        half = kept_bytes(copy.deepcopy(small), images)
        y = small(images)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in small.parameters())
    assert half < 0.65 * full


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_inner_modules_run(small: nn.Module, images: Tensor, hook: str) -> None:
    called: list[str] = []
    for name, module in small.named_modules():
        if name.startswith("layer1.0.") and not list(module.children()):
            getattr(module, f"register_{hook}_hook")(lambda *_, name=name: called.append(name))
    step(small, images)
    expected = {"act1", "act2", "bn1", "bn2", "conv1.activation_quantizer", "conv1.weight_quantizer"}
    assert {f"layer1.0.{name}" for name in expected} <= set(called)


@pytest.fixture
def fused_parts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what layers hand to fused operators from now on."""
    counts: Counter[str] = Counter()

    def activation(x: Tensor, norm: object, act: object, *rest: object) -> object:
        counts.update(activations=1, norms=norm is not None, prelus=act is not None)
        return packed_activation(x, norm, act, *rest)

    def convolution(*arguments: object) -> object:
        counts.update(convolutions=1)
        return packed_conv2d(*arguments)

    def residual(x: Tensor, norm: object, other: Tensor, other_norm: object, act: object) -> object:
        counts.update(sums=1, norms=1 + (other_norm is not None))
        return residual_activation(x, norm, other, other_norm, act)

    def both(x: Tensor, norm: object, act: object, *rest: object) -> object:
        counts.update(activations=1, norms=norm is not None, prelus=act is not None, convolutions=1)
        return quantized_conv2d(x, norm, act, *rest)

    monkeypatch.setattr(fused, "quantized_conv2d", both)
    monkeypatch.setattr(fused, "packed_activation", activation)
    monkeypatch.setattr(fused, "packed_conv2d", convolution)
    monkeypatch.setattr(fused, "residual_activation", residual)
    return counts


ALL = {"activations": 20, "convolutions": 20, "prelus": 18, "sums": 9, "norms": 20}  # of ResNet-20
CONVOLUTION = {"activations": 1, "convolutions": 1, "prelus": 1}
SUM = {"sums": 1, "norms": 1}


class OwnConv2d(QuantConv2d):
    """A layer that does something else, here the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.activation_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def pad_in_circles(conv: QuantConv2d) -> None:
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES = {
    "nothing": (lambda m: None, {}),
    "double precision": (lambda m: m.double(), ALL),
    "evaluation": (lambda m: m.eval(), ALL),
    "ramp": (
        lambda m: [setattr(q, "ramp", 0.5) for q in m.modules() if hasattr(q, "ramp")],
        ALL | {"sums": 0, "norms": 9},
    ),
    "ties upwards": (
        lambda m: setattr(m.layer1[0].conv1.activation_quantizer, "comparison", ">="),
        CONVOLUTION,
    ),
    "own forward": (lambda m: setattr(m.layer1[0].conv1, "__class__", OwnConv2d), CONVOLUTION),
    "circular padding": (lambda m: pad_in_circles(m.layer1[0].conv1), CONVOLUTION),
    "padding by name": (lambda m: setattr(m.layer1[0].conv1, "padding", "same"), CONVOLUTION),
    "hooked quantizer": (lambda m: hook(m.layer1[0].conv1.activation_quantizer), CONVOLUTION),
    "hooked activation": (lambda m: hook(m.layer1[0].act1), {"prelus": 1}),
    "hooked norm": (lambda m: hook(m.layer1[0].bn1), {"norms": 1}),
    "frozen norm": (lambda m: m.layer1[0].bn1.eval(), {"norms": 1}),
    "cumulative norm": (lambda m: setattr(m.layer1[0].bn1, "momentum", None), {"norms": 1}),
    "group norm": (lambda m: setattr(m.layer2[0], "bn1", nn.GroupNorm(4, 16)), {"norms": 1}),
    "frozen last norm": (lambda m: m.layer1[0].bn2.eval(), SUM),
    "frozen norm of a shortcut": (lambda m: m.layer2[0].downsample[1].eval(), {"sums": 1, "norms": 2}),
    "hooked last activation": (lambda m: hook(m.layer1[0].act_out), SUM),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_fused_path_cannot_do_is_left_to_the_plain_one(
    small: nn.Module, images: Tensor, fused_parts: Counter[str], change: str
) -> None:
    function, lost = CHANGES[change]
    function(small)
    images = images.to(small.fc.weight.dtype)
    twin = copy.deepcopy(small)
    ours = small(images)
    assert {name: fused_parts[name] + lost.get(name, 0) for name in ALL} == ALL
    fused_parts.clear()
    with force("reference"):
        plain = twin(images)
    assert not fused_parts
    assert relative_error(ours, plain) < 0.01


METHODS = {
    "lsq": "lsq",
    "lsq_plus": "lsq_plus",
    "pact": "dorefa",
    "dorefa": "dorefa",
    "apot": "apot",
    "n2uq_fixed": "n2uq",
}


@pytest.mark.parametrize("method", METHODS)
def test_other_quantizers(images: Tensor, method: str, arithmetic: str) -> None:
    model = resnet20(width=8, activation_quantizer=method, weight_quantizer=METHODS[method]).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".bias_in", ".bias_out")):
                parameter.normal_(0, 0.2)  # else many values lie at an end of a clipping range
    model(images)  # LSQ finds its steps
    twin = copy.deepcopy(model)
    with SeenOperators() as seen:
        ours = step(model, images)
    with force("reference"), SeenOperators() as left:
        plain = step(twin, images)
    # Integers serve whatever is uniform, floats only thresholds; a block's end is fused, whatever quantizes.
    thresholds = method == "n2uq_fixed"
    assert ("quantized_conv2d" in seen.names) == (arithmetic == "integers" and method != "apot")
    assert ("packed_conv2d" in seen.names) == (arithmetic == "floats" and thresholds)
    assert "residual_activation" in seen.names
    assert not {"packed_activation", "quantized_conv2d", "residual_activation"} & left.names
    names = ["output", *(n for n, p in model.named_parameters() if p.requires_grad)]
    for name, a, b in zip(names, ours, plain, strict=False):  # a norm's last bits move single codes
        assert (a - b).norm() <= 0.25 * b.norm() + 1e-3, name
    learned = [p for n, p in quantizer_parameters(model) if not n.endswith("offset")]  # nothing lies outside
    assert all(p.grad.abs().sum() > 0 for p in learned)
    assert bool(learned) is (method != "dorefa")


def test_running_statistics_move_as_torch_moves_them(images: Tensor, arithmetic: str) -> None:
    model = resnet20(width=8).train()
    twin = copy.deepcopy(model)
    model(images)
    with force("reference"):
        twin(images)
    first, second = model.layer1[0].bn1, twin.layer1[0].bn1
    torch.testing.assert_close(first.running_mean, second.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, second.running_var, rtol=1e-4, atol=1e-5)
    assert first.num_batches_tracked == 1
