"""Simulated ranks get what real ones get, to the last bit, and send as many bytes."""

import numpy as np
import pytest
import torch
from torch import nn

from exchange_jobs.simulated import MODES, RANKS, SMALL, STEPS, loss_of, make_net, update
from lightning_n2uq.compression import IdentityCodec
from lightning_n2uq.distributed.simulation import SimulatedExchange


def counters(exchange):
    return exchange.connect(torch.device("cpu"))


def gradients(net, rank, step):
    net.zero_grad()
    loss_of(net, rank, step).backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def simulate(settings, steps=range(STEPS), saved=None, net=None):
    net = net or make_net()
    exchange = SimulatedExchange(RANKS, net, **(SMALL | settings))
    if saved is not None:
        exchange.load_state_dict(saved)
    weights = []
    for step in steps:
        update(net.parameters(), exchange.average([gradients(net, rank, step) for rank in range(RANKS)]))
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]).numpy())
    return weights, exchange, net


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_real_ranks_and_so_are_bytes(exchange_job, mode):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every real rank has
    try:
        weights, exchange, _ = simulate(MODES[mode])
    finally:
        torch.set_num_threads(threads)
    for rank in range(RANKS):
        steps, sent = exchange_job[rank]["real_steps"][mode]
        for own, other in zip(weights, steps, strict=True):
            np.testing.assert_array_equal(own, other)
        if rank == 0:  # whose counters the simulation shows
            assert counters(exchange).last.sent_bytes == sent


def test_modes_differ_unless_they_write_the_same_codes_in_other_words():
    ends = {mode: simulate(settings)[0][-1].tobytes() for mode, settings in MODES.items()}
    assert ends.pop("Huffman") == ends["4 bits"]
    assert len(set(ends.values())) == len(ends)


@pytest.mark.parametrize("mode", ["residuals", "ALQ", "top-k"])
def test_a_simulation_goes_on_where_it_was_saved(mode):
    whole, _, _ = simulate(MODES[mode])
    _, exchange, net = simulate(MODES[mode], range(2))
    rest, _, _ = simulate(MODES[mode], range(2, STEPS), exchange.state_dict(), net)
    np.testing.assert_array_equal(rest[-1], whole[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_codec_that_loses_the_mean_is_exact(dtype):
    net = make_net().to(dtype)
    exchange = SimulatedExchange(3, net, codec=IdentityCodec())
    own = [[torch.randn_like(p) for p in net.parameters()] for _ in range(3)]
    for mean, *ranks in zip(exchange.average(own), *own, strict=True):
        torch.testing.assert_close(mean, torch.stack(ranks).mean(0))
    numel = sum(p.numel() for p in net.parameters())
    assert counters(exchange).last.sent_bytes == pytest.approx(2 * 2 / 3 * 4 * numel, rel=0.05)


def test_what_cannot_be_simulated_is_refused():
    net = make_net()
    with pytest.raises(ValueError, match="ranks: got 1, allowed are integers from 2"):
        SimulatedExchange(1, net)
    with pytest.raises(ValueError, match="ranks_per_node: got 3, allowed are divisors of the world size 4"):
        SimulatedExchange(4, net, hierarchical=True, ranks_per_node=3).connect(torch.device("cpu"))
    exchange = SimulatedExchange(2, net)
    with pytest.raises(ValueError, match="gradients: got 1 lists, allowed is one per rank, 2"):
        exchange.average([gradients(net, 0, 0)])
    with pytest.raises(ValueError, match="ranks: got 2, allowed is the checkpoint's number, 4"):
        exchange.load_state_dict(SimulatedExchange(4, net).state_dict())
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="got sparse ones, allowed are dense ones: set sparse=False"):
        SimulatedExchange(2, table).average([[table.weight.grad]] * 2)
