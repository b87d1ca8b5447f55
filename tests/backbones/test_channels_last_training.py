"""Training steps of whole networks on channels-last maps, in single precision and under autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.blocks import BasicBlock
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.layers import QuantSpec, fused, integer
from small_networks import resnet8

pytest.importorskip("numba")
CHANNELS_LAST = torch.channels_last
ENDS = ("residual_activation", "norm_relu_pool")
CONVOLUTIONS = {"integers": ("quantized_conv2d",), "floats": ("packed_activation", "packed_conv2d")}


def step(network: nn.Module, x: Tensor, *, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = nn.functional.cross_entropy(network(x), torch.arange(len(x)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def imagenet_network() -> nn.Module:
    """Stem, shortcuts and blocks of ResNet-18: four stages of one block, a quarter of the channels."""
    return ResNet(QuantSpec(2, 2), BasicBlock, (1, 1, 1, 1), 16, 10, 3, True, True).train()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Name and map of everything that goes into a fused operator and comes out of it, and its gradients."""
    maps: list[tuple[str, Tensor]] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *arguments: Any) -> Any:
            first = x[0] if isinstance(x, tuple) else x
            maps.append((f"{name}, input", first.detach()))
            result = function(x, *arguments)
            y = result[0] if isinstance(result, tuple) else result
            maps.append((f"{name}, output", y.detach()))
            y.register_hook(lambda grad: maps.append((f"{name}, gradient", grad)))
            return result

        return call

    for name in (*ENDS, *CONVOLUTIONS["integers"], *CONVOLUTIONS["floats"]):
        monkeypatch.setattr(fused, name, watched(name, getattr(fused, name)))
    return maps


def test_channels_last_is_another_order_of_the_same_step() -> None:
    torch.manual_seed(3)
    network, x = resnet8(weight_bits=3, activation_bits=3, width=8).train(), torch.randn(4, 3, 16, 16)
    twin = resnet8(weight_bits=3, activation_bits=3, width=8).train().to(memory_format=CHANNELS_LAST)
    twin.load_state_dict(network.state_dict())
    (loss, grads), (other_loss, other_grads) = (
        step(network, x),
        step(twin, x.contiguous(memory_format=CHANNELS_LAST)),
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-4, atol=1e-4)
    # Convolutions sum in another order, which pushes single values over a threshold.
    total = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        assert (grad - other_grads[name]).norm() < 0.02 * grad.norm() + 1e-3 * total, name
    for (name, ours), theirs in zip(network.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=["bf16", "fp32"]
)
@pytest.mark.parametrize("arithmetic", CONVOLUTIONS)
def test_maps_keep_dtype_and_order_between_layers(
    seen: list[tuple[str, Tensor]],
    arithmetic: str,
    autocast: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(integer, "FEWEST", 0)  # these convolutions are small
    backend = fused.integer_backend
    monkeypatch.setattr(
        fused, "integer_backend", lambda *a: backend(*a) if arithmetic == "integers" else "reference"
    )
    operators = (*ENDS, *CONVOLUTIONS[arithmetic])
    network = imagenet_network().to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=CHANNELS_LAST)
    step(network, x, autocast=autocast)
    assert {name for name, _ in seen} >= {
        f"{name}, {kind}" for name in operators for kind in ("input", "output", "gradient")
    }
    for name, value in seen:
        assert value.dtype == dtype, name
        if value.shape[2] > 2:  # the last block's gradient comes from the average pooling
            assert value.is_contiguous(memory_format=CHANNELS_LAST), name


def test_contiguous_maps_stay_contiguous(seen: list[tuple[str, Tensor]]) -> None:
    step(imagenet_network(), torch.randn(2, 3, 64, 64))
    assert all(value.is_contiguous() for name, value in seen if "gradient" not in name)
