"""Networks on the fused training path: memory kept, bits, and the ways around it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from lightning_n2uq.backbones import resnet18, resnet20
from lightning_n2uq.layers import QuantConv2d, QuantSpec
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.quantizers import quantizer_parameters
from seen_operators import SeenOperators

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


@pytest.fixture
def small() -> nn.Module:
    return resnet20(width=8).train()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.70), (4, 0.72)])
def test_resnet18_keeps_less_than_the_float_network(bits: int, limit: float) -> None:
    x = torch.randn(1, 3, 96, 96)
    ours, theirs = kept_bytes(resnet18(bits, bits), x), kept_bytes(torchvision.models.resnet18(), x)
    assert ours < limit * theirs


def test_a_packed_convolution_has_the_bits_of_the_plain_one() -> None:
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
    fused = step(copy.deepcopy(small), images)
    with force("reference"):
        plain = step(copy.deepcopy(small), images)
    cosine = nn.functional.cosine_similarity
    for a, b in zip(fused, plain, strict=True):
        # A norm's last bits may push single values over a threshold: not equal, but the same step.
        if a.dim() > 1:
            assert cosine(a.flatten(), b.flatten(), 0) > 0.98
        elif a.dtype == torch.int64:
            assert torch.equal(a, b)


def test_evaluation_is_plain(small: nn.Module, images: Tensor) -> None:
    small.eval()
    with force("reference"):
        expected = small(images)
    assert torch.equal(small(images), expected)


def test_compiles_as_one_graph(small: nn.Module, images: Tensor) -> None:
    eager = copy.deepcopy(small)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(eager, images), step(small, images, compiled), strict=True):
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


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: [setattr(q, "ramp", 0.5) for q in m.modules() if hasattr(q, "ramp")],
        lambda m: m.layer1[0].bn1.eval(),
        lambda m: setattr(m.layer1[0].bn1, "momentum", None),
        lambda m: setattr(m.layer2[0], "bn1", nn.GroupNorm(4, 16)),
        lambda m: setattr(m.layer1[0].conv1, "padding_mode", "circular"),
    ],
    ids=["double", "ramp", "frozen norm", "cumulative norm", "group norm", "circular padding"],
)
def test_what_the_fused_path_cannot_do_is_left_to_the_plain_one(
    small: nn.Module, images: Tensor, change: Callable[[nn.Module], object]
) -> None:
    change(small)
    images = images.to(small.fc.weight.dtype)
    small.layer1[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    twin = copy.deepcopy(small)
    ours = step(small, images)
    with force("reference"):
        plain = step(twin, images)
    assert torch.nn.functional.cosine_similarity(ours[0].flatten(), plain[0].flatten(), 0) > 0.98


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "apot", "n2uq_fixed"])
def test_other_activation_quantizers(images: Tensor, method: str) -> None:
    model = resnet20(width=8, activation_quantizer=method).train()
    twin = copy.deepcopy(model)
    with SeenOperators() as seen:
        ours = step(model, images)
    with force("reference"), SeenOperators() as left:
        plain = step(twin, images)
    # Only learned thresholds, or fixed ones of their kind, are fused; a block's end is, whatever quantizes.
    assert {"packed_activation", "packed_conv2d"} & seen.names == (
        {"packed_activation", "packed_conv2d"} if method == "n2uq_fixed" else set()
    )
    assert "residual_activation" in seen.names
    assert not {"packed_activation", "residual_activation"} & left.names
    names = ["output", *(n for n, p in model.named_parameters() if p.requires_grad)]
    for name, a, b in zip(names, ours, plain, strict=False):  # a norm's last bits move single codes
        assert (a - b).norm() <= 0.25 * b.norm() + 1e-3, name
    learned = [p for _, p in quantizer_parameters(model)]
    assert all(p.grad.abs().sum() > 0 for p in learned)
    assert bool(learned) is (method != "dorefa")


def test_running_statistics_move_as_torch_moves_them(images: Tensor) -> None:
    model = resnet20(width=8).train()
    twin = copy.deepcopy(model)
    model(images)
    with force("reference"):
        twin(images)
    first, second = model.layer1[0].bn1, twin.layer1[0].bn1
    torch.testing.assert_close(first.running_mean, second.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, second.running_var, rtol=1e-4, atol=1e-5)
    assert first.num_batches_tracked == 1
