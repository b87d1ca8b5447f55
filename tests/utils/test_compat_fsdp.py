"""One test for every private name of FSDP2: what it does today, and in which releases."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_n2uq.utils import compat, compat_fsdp


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_pair(mesh):
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    net[0].bias.requires_grad_(False)
    return fully_shard(net, mesh=mesh)


def test_parameters_in_flight_are_those_of_the_reduction(mesh):  # torch 2.14
    """One rank: no reduce-scatter or all-gather takes place, but the hook behind it does."""
    net, seen = sharded_pair(mesh), []
    net.set_all_reduce_hook(
        lambda reduced: seen.append((compat_fsdp.parameters_in_flight(), reduced.numel()))
    )
    net(torch.randn(4, 3)).sum().backward()
    ((parameters, numel),) = seen
    assert [(p.module, p.name, p.numel) for p in parameters] == [
        (net[0], "weight", 15),
        (net[1], "weight", 10),
    ]
    assert [p.parameter for p in parameters] == [net[0].weight, net[1].weight]
    assert numel == 25


def test_parameters_in_flight_are_unknown_outside_of_fsdp2():
    assert compat_fsdp.parameters_in_flight() is None


def test_a_release_whose_functions_changed_is_one_line(mesh, monkeypatch):
    monkeypatch.setattr(compat_fsdp, "_FLAT_SIZES", {})
    net = sharded_pair(mesh)
    net.set_all_reduce_hook(lambda _: compat_fsdp.parameters_in_flight())
    with pytest.raises(compat.IncompatibleReleaseError, match=r"^torch: got 2.*; allowed is torch>="):
        net(torch.randn(4, 3)).sum().backward()


def test_end_and_number_of_a_backward_pass(mesh):  # torch 2.14
    net, seen = sharded_pair(mesh), []

    def note(_):
        seen.append(compat_fsdp.backward_number())
        compat_fsdp.at_end_of_backward(lambda: seen.append(net[0].weight.grad is not None))

    net.set_all_reduce_hook(note)
    net(torch.randn(4, 3)).sum().backward()
    assert seen[0] >= 0
    assert seen[1:] == [True]
    assert compat_fsdp.backward_number() == -1


def test_sharded_twin_of_a_gathered_parameter(mesh):  # torch 2.14
    net, seen = sharded_pair(mesh), []
    sharded = net[0].weight

    class Look(nn.Module):
        def forward(self, x):
            seen.append((net[0].weight, compat_fsdp.sharded_twin(net[0].weight)))
            return x

    net.append(Look())
    net(torch.randn(4, 3))
    ((gathered, twin),) = seen
    assert twin is sharded
    assert gathered is not sharded
    assert compat_fsdp.sharded_twin(nn.Parameter(torch.zeros(1))) is None
