"""Converted networks under `fully_shard` on the CPU: N2UQ's kernels run, first ranges are kept."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.convert.first_batches import FirstBatches


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("first", [True, False], ids=["first batch", "calibrated"])
def test_a_sharded_network_trains_and_keeps_its_ranges(mesh, first):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(32, 8)
    quantize_model(net, {"weight_bits": 2, "activation_bits": 2}, None if first else [x])
    fully_shard(net, mesh=mesh)
    fitting = FirstBatches(net) if first else None
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fitting is None or fitting.ranges == 1
    assert float(net[2].activation_quantizer.offset.full_tensor()) == pytest.approx(-0.11, abs=0.02)
