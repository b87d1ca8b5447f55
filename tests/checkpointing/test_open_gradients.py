"""Gradients kept by a checkpoint between accumulated batches: whole ones, and for shards a warning."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_n2uq.checkpointing import open_gradients


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_network_gets_back_what_was_kept_and_nothing_else():
    net, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    net.weight.grad = torch.randn(2, 3)
    kept = open_gradients.capture(net)
    assert kept.keys() == {"weight"}
    open_gradients.restore(twin, kept)
    assert torch.equal(twin.weight.grad, net.weight.grad)
    assert twin.bias.grad is None


def test_a_sharded_network_is_said_to_keep_none(mesh):
    """Also while FSDP2 accumulates without reducing, when no parameter has a gradient."""
    net = fully_shard(nn.Linear(3, 2), mesh=mesh)
    net.set_requires_gradient_sync(False)
    net(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match="does not keep the gradients of a sharded network"):
        assert open_gradients.capture(net) == {}
