"""What Triton makes of the kernels, run without a GPU by an emulator against the reference."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

import test_nuq_kernels
import triton_cases
import triton_chain_cases

from lightning_n2uq.backbones import resnet18
from lightning_n2uq.ops.dispatch import force
from ptx_emulator.device import emulated_gpu

pytestmark = pytest.mark.compiled


def test_compiled_quantizers_equal_the_reference() -> None:
    with emulated_gpu() as gpu:
        triton_cases.check_all()
    assert set(gpu.launches) == {
        "_forward_kernel",
        "_backward_kernel",
        "_tables_kernel",
        "_gradients_kernel",
        "_gradient_kernel",
        "_kernel",
    }


def test_the_compiled_chain_equals_the_reference() -> None:
    with emulated_gpu() as gpu:
        triton_chain_cases.check_all("cpu")
    assert {"_sums_kernel", "_input_kernel", "_rebuild_kernel", "_channels_kernel"} < set(gpu.launches)


def test_the_compiled_codec_gives_the_references_bytes() -> None:
    with emulated_gpu() as gpu:
        test_nuq_kernels.check_triton()
    assert set(gpu.launches) == {"_encode_kernel", "_decode_kernel"}


@pytest.mark.parametrize("bits", [2, 4])
def test_a_compiled_training_step_equals_that_of_the_cpu_kernels(bits: int) -> None:
    pytest.importorskip("numba")
    network = resnet18(bits, bits, num_classes=10).to(memory_format=torch.channels_last)
    network.layer3 = network.layer4 = nn.Identity()  # a last bit of their few statistics can move everything
    network.fc = nn.Linear(128, 10)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    expected = _step(network, x, "numba")
    with emulated_gpu() as gpu:
        found = _step(network, x, "triton")
    assert sum(gpu.launches.values()) > 100
    assert len(gpu.kernels) <= 30  # each takes a fifth of a second to compile
    assert abs(expected[0] - found[0]) < 1e-6
    for one, other in zip(expected[1], found[1], strict=True):  # some are sums of terms that cancel
        assert float((one - other).norm()) < 1e-4 * float(one.norm()) + 1e-5


def _step(
    network: nn.Module,
    x: Tensor,
    kernels: str,
    prepare: Callable[[nn.Module], Callable] = lambda model: model,
) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients of all parameters."""
    model = copy.deepcopy(network)
    with force(kernels):
        loss = nn.functional.cross_entropy(prepare(model)(x), torch.arange(len(x)))
        loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def test_a_network_that_torch_compiles_runs_the_kernels() -> None:
    network = resnet18(2, 2, num_classes=10).to(memory_format=torch.channels_last)
    network.layer2 = network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(64, 10)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with emulated_gpu() as gpu:
        plain = _step(network, x, "triton")
        number = sum(gpu.launches.values())
        compiled = _step(
            network, x, "triton", lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
        )
    assert sum(gpu.launches.values()) == 2 * number
    assert plain[0] == compiled[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], compiled[1], strict=True))


def test_operators_launch_nothing_but_their_kernels() -> None:
    """Beside them only convolutions, and what brings a map into channels-last order: small kernels add up."""
    network = resnet18(2, 2, num_classes=10).to(memory_format=torch.channels_last)
    network.layer2 = network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(64, 10)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with emulated_gpu(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        _step(network, x, "triton")
    inside = {event.name for event in profiler.events() if OPERATORS & set(_outer(event))}
    assert {"aten::convolution_backward", "aten::empty"} < inside
    assert inside <= FREE, inside - FREE


OPERATORS = {"packed_activation", "packed_conv2d", "quantize_weight", "residual_activation", "norm_relu_pool"}
FREE = {
    "detach",
    *(f"aten::{name}" for name in ("detach", "empty", "empty_like", "empty_strided", "new_empty", "resize_")),
    *(f"aten::{name}" for name in ("as_strided", "as_strided_", "slice", "view", "reshape", "to")),
    *(f"aten::{name}" for name in ("conv2d", "convolution_backward", "contiguous")),
}


def _outer(event: FunctionEvent) -> Iterator[str]:
    """Names of what the event is part of, up to a convolution or a copy, which may do what they like."""
    while (event := event.cpu_parent) is not None and not event.name.startswith("aten::con"):
        yield event.name.removesuffix("Backward")
