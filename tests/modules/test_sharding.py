"""The blocks into which a network is sharded, and what cannot be sharded."""

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn

from lightning_n2uq.backbones import resnet20
from lightning_n2uq.modules.sharding import SMALLEST_UNIT, blocks, shard


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def parts(network):
    return [name for name, part in network.named_modules() if type(part).__name__.startswith("FSDP")]


def test_blocks_are_the_large_members_of_the_outermost_lists():
    with torch.device("meta"):
        network = torchvision.models.resnet18()
        nested = nn.Sequential(nn.Sequential(nn.Linear(300, 300), nn.Linear(2, 2)), nn.Linear(300, 300))
    names = {part: name for name, part in network.named_modules()}
    assert [names[block] for block in blocks(network)] == [
        f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)
    ]
    assert list(blocks(nested)) == [nested[0][0], nested[1]]
    assert sum(p.numel() for p in nested[1].parameters()) >= SMALLEST_UNIT


def test_a_network_of_the_package_is_sharded_once_and_trains(mesh):
    network = resnet20()
    shard(network, mesh)
    found = parts(network)
    assert found[0] == ""
    assert len(found) > 2
    shard(network, mesh)
    assert parts(network) == found
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_weights_in_channels_last_are_refused(mesh):
    network = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"^memory_format: got 0.weight in channels_last, allowed is contig"):
        shard(network, mesh)
