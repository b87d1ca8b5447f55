"""Training in rounds on four ranks: against averages made by hand, DDP, and itself after a resume."""

import numpy as np
import pytest
import torch
from torch import nn

from exchange_jobs import rounds
from exchange_jobs.launch import launch
from lightning_n2uq.distributed import LocalRounds
from lightning_n2uq.distributed.agreed_weights import AgreedWeights, LocalConfig


@pytest.fixture
def found(exchange_job):
    return [answer["local_rounds"] for answer in exchange_job]


def on_all(found, *path):
    values = found
    for key in path:
        values = [value[key] for value in values]
    return values


def assert_same_bits(values):
    assert np.isfinite(values[0]).all()
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


@pytest.mark.parametrize("name", rounds.BY_HAND)
def test_without_loss_rounds_are_the_outer_optimizer_on_the_mean_by_hand(found, name):
    values = on_all(found, "by hand", name)
    assert_same_bits([value["rounds"] for value in values])
    for value in values:
        if "nodes" in name:  # sums inside a node first
            np.testing.assert_allclose(value["rounds"], value["by hand"], rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(value["rounds"], value["by hand"])


def test_a_period_of_one_with_plain_averaging_is_ddp(found):
    for value in on_all(found, "as ddp"):
        np.testing.assert_allclose(value["rounds"], value["ddp"], rtol=0, atol=1e-6)  # rounding of 6 steps


@pytest.mark.parametrize("name", rounds.LOSSY)
def test_ranks_differ_inside_a_round_and_are_bit_identical_after_it(found, name):
    values = on_all(found, "lossy", name)
    for number in range(2):
        own = [value["own"][number] for value in values]
        assert not np.array_equal(own[0], own[1])
        assert_same_bits([value["after"][number] for value in values])
    assert [value["rounds"] for value in values] == [2] * 4


@pytest.mark.parametrize("name", rounds.LOSSY)
def test_statistics_are_averaged_and_other_buffers_are_the_first_rank_s(found, name):
    for value in on_all(found, "lossy", name):
        assert value["statistics differ"]
        assert value["mask"] == [0.0, float("-inf")]
        assert (value["count"], value["seen"]) == (6, True)


def test_bytes_are_those_of_one_round(found):
    (value,) = on_all(found[:1], "lossy", "4 bits")
    statistics, weights = 64, 4434
    assert value["coordinates"] == statistics + weights
    assert value["full"] == 8 * 3 / 4 * value["coordinates"]
    assert value["sent"] < value["full"] / 5


def test_only_what_is_trained_travels_and_what_is_unfrozen_begins_as_the_first_rank_has_it(found):
    values = on_all(found, "frozen")
    for value in values:
        assert value["kept"]
        alone, all_of_them = value["coordinates"]
        assert all_of_them == alone + 32 * 96 + 96
    assert_same_bits([value["values"] for value in values])


def test_a_resume_in_the_middle_of_a_round_is_exact(found):
    values = on_all(found, "resumed")
    for value in values:
        np.testing.assert_array_equal(value["resumed"], value["whole"])
    assert_same_bits([value["agreed"] for value in values])
    assert not np.array_equal(values[0]["whole"], values[1]["whole"])  # three steps after the second round


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("period", "rank 0 has 10, rank 2 has 5"),
        ("outer_lr", "rank 0 has 1.0, rank 2 has 0.5"),
        ("outer_momentum", "rank 0 has 0.0, rank 2 has 0.5"),
        ("bits", "rank 0 has 4, rank 2 has 3"),
        ("trained", "rank 0 has '2 parameters of 12 elements', rank 2 has '2 parameters of 16 elements'"),
    ],
)
def test_ranks_with_other_settings_stop_before_the_first_round(found, name, line):
    for message in on_all(found, "apart", name):
        assert message == f"ranks disagree on `{name}`: {line}"


@pytest.mark.integration
def test_a_rank_lost_between_rounds_is_named():
    for message, seconds in launch(rounds.lose_a_rank_between_rounds, 4, expected=[0, 1, 3]):
        assert "gradient exchange failed on rank" in message
        assert "in the exchange of round 1: rank 2 is gone" in message
        assert seconds < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, "period: got 0, allowed are integers from 1"),
        ({"period": 2.5}, "period: got 2.5, allowed are integers from 1"),
        ({"outer_lr": 0.0}, "outer_lr: got 0.0, allowed is above 0"),
        ({"outer_lr": float("nan")}, "outer_lr: got nan, allowed is above 0"),
        ({"outer_momentum": 1.0}, "outer_momentum: got 1.0, allowed is 0 or more and below 1"),
        ({"bits": 5}, "bits"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalRounds(nn.Linear(2, 2), **settings)
    with pytest.raises(TypeError, match="perid"):
        LocalRounds(nn.Linear(2, 2), perid=3)


def test_layers_that_wait_for_all_ranks_are_refused():
    with pytest.raises(ValueError, match="module: got 'SyncBatchNorm 0', allowed are networks without it"):
        LocalRounds(nn.Sequential(nn.SyncBatchNorm(2)))


def test_steps_before_the_start_are_an_error():
    with pytest.raises(RuntimeError, match="call start"):
        LocalRounds(nn.Linear(2, 2)).step()


def one_rank(**settings):
    net = nn.Linear(3, 2)
    local = LocalRounds(net, period=1, **settings)
    local.start(torch.device("cpu"))
    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1e-3
    after = [p.detach().clone() for p in net.parameters()]
    assert local.step()
    return before, after, list(net.parameters())


def test_one_rank_alone_averages_with_nobody_but_takes_outer_steps():
    before, after, values = one_rank()
    assert all(torch.equal(a, v) for a, v in zip(after, values, strict=True))
    before, after, values = one_rank(outer_lr=0.5)
    for b, a, v in zip(before, after, values, strict=True):
        torch.testing.assert_close(v, (a + b) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_agreed_weights_keep_what_the_dtype_of_the_parameters_would_lose(dtype):
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    agreed = AgreedWeights(LocalConfig(outer_lr=1e-4))
    agreed.follow({"w": parameter})
    for _ in range(1000):
        with torch.no_grad():
            parameter.sub_(0.5)
        agreed.advance(agreed.change())
    torch.testing.assert_close(parameter.float(), torch.full((4,), 1 - 1000 * 0.5e-4), rtol=4e-3, atol=0)
    state = agreed.state_dict()
    assert ("w" in state["agreed"]) == (dtype != torch.float64)


def test_momentum_is_that_of_torch_s_sgd():
    mine, its = nn.Parameter(torch.randn(5)), nn.Parameter(torch.empty(5))
    its.data.copy_(mine.detach())
    agreed = AgreedWeights(LocalConfig(outer_lr=0.7, outer_momentum=0.9))
    agreed.follow({"w": mine})
    outer = torch.optim.SGD([its], 0.7, 0.9, nesterov=True)
    for _ in range(5):
        change = torch.randn(5)
        with torch.no_grad():
            mine.sub_(change)
        mean = agreed.change().clone()
        its.grad = mean.clone()
        outer.step()
        agreed.advance(mean)
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_complex_parameters_are_refused_by_name():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"w: got 'torch\.complex64', allowed are real floating dtypes"):
        AgreedWeights(LocalConfig()).follow({"w": parameter})
