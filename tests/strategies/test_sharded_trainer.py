"""`nuqsgd_fsdp` under Lightning's own launcher, on two CPU processes of one job."""

import re

import pytest
import torch
from torch.testing import assert_close

from exchange_jobs.launch import run_script
from lightning_n2uq.strategies import ShardedNUQSGDStrategy
from shared_job import run_once

pytestmark = pytest.mark.integration

MODES = ("plain", "accumulate", "bf16-mixed")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What both ranks of one job saved."""
    make = lambda: run_script("sharded_script.py", tmp_path_factory.mktemp("sharded_trainer"), 900)  # noqa: E731
    return run_once(tmp_path_factory, "sharded_trainer", make)


@pytest.mark.parametrize("mode", MODES)
def test_without_loss_parameters_are_those_of_lightnings_strategy(ranks, mode):
    """With accumulation, too, where Lightning's reduces every micro-batch and this one the last."""
    for found in ranks:
        assert_close(found["modes"][mode]["without loss"], found["modes"][mode]["fsdp"], rtol=1e-5, atol=1e-6)
        assert found["modes"][mode]["steps"] == (2 if mode == "accumulate" else 4)  # reductions


def test_with_few_bits_parameters_are_near(ranks):
    for found in ranks:
        near, exact = found["modes"]["plain"]["4 bits"], found["modes"]["plain"]["fsdp"]
        assert 1e-5 < (near - exact).norm() / exact.norm() < 0.1


def test_parameters_in_bf16_keep_an_optimizer_in_fp32(ranks):
    for found in ranks:
        values, exact = found["modes"]["bf16"]["parameters"], found["modes"]["plain"]["fsdp"]
        assert values.dtype == torch.float32
        assert (values.bfloat16() != values).any()
        assert (values - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("quantizer", ["n2uq", "lsq"])
def test_the_guard_judges_shards_as_the_whole_network(ranks, quantizer):
    """It went along in training; here a weight and a scale have lost their range."""
    for found in ranks:
        weight, scale = found["classifier"][quantizer]["broken"]
        sharded, whole = found["classifier"][quantizer]["guard"]
        assert sharded == whole
        _, scales, weights = sharded
        assert [name.partition(" (")[0] for name in scales] == [scale]
        assert weights == [f"{weight} (all zero)"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_resumed_run_is_the_uninterrupted_one(ranks, kind):
    for found in ranks:
        straight, resumed = found["resume"][kind]["parameters"]
        assert_close(resumed, straight, rtol=0.0, atol=0.0)
        assert found["resume"][kind]["steps"] == 8
        assert found["resume"][kind]["folder"] == (kind == "folder")
        assert found["resume"]["entry"] == {"step": 4, "seed": 0}


def test_communication_monitor_counts_all_collectives(ranks):
    metrics = ranks[0]["monitored"]["metrics"]
    assert 2.5 < metrics["comm/ratio"] < 6.0
    assert 0.001 < metrics["comm/relative_error"] < 0.2
    assert metrics["comm/nonfinite_buckets"] == 0
    assert metrics["comm/sync_s"] > 0
    summary = ranks[0]["monitored"]["summary"]
    assert re.match(r"Gradient compression (paid off|did not pay off) on this network: ", summary)


@pytest.mark.parametrize("quantizer", ["n2uq", "lsq"])
def test_a_classifier_shards_itself_and_writes_ordinary_checkpoints(ranks, quantizer):
    losses = {found["classifier"][quantizer]["loss"] for found in ranks}
    assert len(losses) == 1
    assert 0.0 < losses.pop() < 10.0
    for found in ranks:
        assert found["classifier"][quantizer]["same"]
        assert found["classifier"][quantizer]["parts"] >= 1
        assert found["classifier"][quantizer]["weighed"]


def test_first_values_that_a_forward_pass_fits_survive_sharding(ranks):
    """Steps of LSQ begin at 1 and are fitted in the first forward pass, to the gathered parameters."""
    for found in ranks:
        steps = found["classifier"]["lsq"]["steps"]
        assert len(steps) > 10
        assert ((steps - 1.0).abs() > 1e-3).all()  # three steps of training move them less


def test_ranges_of_the_callback_and_of_the_quantizers_themselves(ranks):
    first, second = (found["quantized"] for found in ranks)
    for batches in (1, 0):
        assert_close(first[batches], second[batches], rtol=0.0, atol=0.0)
        assert (first[batches] - 1.0).abs().min() > 0.01  # where it would be unfitted
    assert_close(first[1], first[0], rtol=0.5, atol=0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not sharded", "module: got Small without a sharded part, allowed is a model after fully_shard"),
        ("ranks", "tensor_parallel_size: got 3, allowed are divisors of 2 ranks"),
        ("one copy", "shard_size: got 2, allowed with hsdp is less than the 2 data-parallel ranks"),
        ("wrong strategy", "which is sharded: use the strategy nuqsgd_fsdp"),
    ],
)
def test_wrong_use_is_one_line(ranks, name, message):
    for found in ranks:
        assert message in found["refused"][name], found["refused"][name]
        assert "\n" not in found["refused"][name]


def test_arguments_are_those_of_both_parts():
    strategy = ShardedNUQSGDStrategy(bits=3, param_bits=8, hsdp=True, shard_size=2, second_phase_bits=4)
    assert strategy.config.bits == 3
    assert strategy.options.shard_size == 2
    with pytest.raises(TypeError, match="bitz"):
        ShardedNUQSGDStrategy(bitz=3)
    with pytest.raises(
        ValueError, match=r"^second_phase_bits: got 4, allowed in sharded training with hsdp only"
    ):
        ShardedNUQSGDStrategy(second_phase_bits=4)
    with pytest.raises(ValueError, match=r"^error_feedback: got True, allowed in sharded training is false"):
        ShardedNUQSGDStrategy(error_feedback=True)
