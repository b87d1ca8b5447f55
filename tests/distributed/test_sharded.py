"""Compressed collectives of FSDP2, on four gloo ranks of one job."""

import pytest

from exchange_jobs import sharded
from exchange_jobs.launch import launch
from lightning_n2uq.distributed.sharded import ShardedState
from lightning_n2uq.distributed.sharded.options import MeshShape, ShardingOptions
from shared_job import run_once

pytestmark = pytest.mark.integration

NETWORKS = list(sharded.NETWORKS)


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """What every rank returned, by check."""
    return run_once(tmp_path_factory, "sharded", lambda: launch(sharded.all_sharded_checks, 4, limit=600.0))


@pytest.mark.parametrize(
    "name", [f"{net}, {way}" for net in NETWORKS for way in (*sharded.OF_RESNET, "replicas")]
)
def test_without_loss_parameters_are_those_of_fsdp2(job, name):
    """Up to the order of sums: gloo adds in another one."""
    for found in job:
        assert found["without_loss"][name] < 1e-5


@pytest.mark.parametrize("way", ["bf16", "warm-up"])
def test_mixed_precision_and_warm_up_are_those_of_fsdp2(job, way):
    for found in job:
        assert found["without_loss"][f"transformer, {way}"] < 1e-5


@pytest.mark.parametrize("name", ["transformer, shards", "resnet, shards", "transformer, replicas"])
def test_4_bit_gradients_are_unbiased(job, name):
    """The squared distance of the mean of 50 draws is its variance, within 4 standard errors."""
    for rank in job:
        found = rank["unbiased"][name]
        assert abs(found["bias"]) < 4.0
        assert 0.001 < found["error"] < (0.25 if "replicas" in name else 0.125)  # two roundings, or one
        assert found["1-D"] < 1e-5  # in full precision


def test_rotated_gradients(job):
    """Four messages in 2 bits are averaged, each with a relative squared error of 0.13."""
    for rank in job:
        assert 0.01 < rank["unbiased"]["rotated"] < 0.15


def test_8_bit_parameters_are_unbiased_and_the_same_everywhere(job):
    for rank in job:
        found = rank["gathered"]
        assert found["calls"] == {2}
        assert found["forward and backward"]
        assert found["ranks"]
        assert found["evaluation"]  # in full precision
        assert abs(found["bias"]) < 4.0
        assert 1e-6 < found["error"] < 3e-4


@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize(
    ("way", "share"),
    [("4 bits", 0.75), ("4 bits, parameters 8", 0.27), ("replicas", 0.8), ("replicas, parameters 8", 0.6)],
)
def test_bytes_of_a_step(job, net, way, share):
    """`full` is what was counted in the collectives of FSDP2 alone; `sent` is within the promise."""
    for rank in job:
        found = rank["sent"][f"{net}, {way}"]
        assert found["full"] == pytest.approx(sum(found["plain"].values()))
        assert found["plain"]["all_gather"] > found["plain"]["reduce_scatter"] > 0
        assert (found["plain"]["all_reduce"] > 0) == ("replicas" in way)
        assert 0.1 < found["sent"] / found["full"] <= share
        assert found["step"] == 1
        assert found["seconds"] > 0.0


def test_unused_and_frozen_parameters(job):
    """Gradients are there where FSDP2 has them; 1-D and skipped parameters are exact, the others are not."""
    for rank in job:
        first, second = rank["partly_used"]
        assert first.keys() == {f"layers.{i}.{name}" for i in (0, 4) for name in ("weight", "bias")}
        assert second.keys() == {f"layers.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")}
        for key, distance in (first | second).items():
            if key.endswith("bias") or key == "layers.4.weight":
                assert distance < 1e-5, key
            else:
                assert distance > 1e-3, key


@pytest.mark.parametrize("way", ["shards", "replicas"])
def test_a_resumed_run_is_the_uninterrupted_one(job, way):
    for rank in job:
        assert rank["resumed_sharded"][way] == (True, 4)


def test_nan_of_one_rank_reaches_all_shards(job):
    for rank in job:
        assert rank["nan_of_one_rank"]["nan"]
        assert rank["nan_of_one_rank"]["bad"] > 0


def test_replicas_begin_and_stay_equal(job):
    assert all(rank["different_replicas"] for rank in job)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unsharded", "module: got Transformer without a sharded part, allowed is a model after fully_shard"),
        (
            "replicas in the mesh",
            "on a mesh with replicas, which FSDP2 averages in full precision; allowed is",
        ),
        ("too few replicas", "replicas: got 1 for shards over 2 ranks, allowed is 2 with 4 ranks"),
        ("pattern", "skip_patterns: got 'nothing*', which matches no parameter"),
        ("second phase", "second_phase_bits: got 8, allowed in sharded training with hsdp only"),
        ("divide factor", "allowed are AVG and SUM: call set_force_sum_reduction_for_comms(True)"),
        ("disagreement", "ranks disagree on `bits`: rank 0 has 4, rank 2 has 3"),
    ],
)
def test_wrong_use_is_one_line(job, name, message):
    for rank in job:
        assert message in rank["refused"][name]
        assert "\n" not in rank["refused"][name]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"error_feedback": True},
            "error_feedback: got True, allowed in sharded training is false: every rank",
        ),
        ({"coding": "huffman"}, "coding: got 'huffman', allowed in sharded training is 'packed'"),
        ({"hierarchical": True}, "hierarchical: got True, allowed in sharded training is false: use hsdp"),
        ({"unit_numel": 5}, "unit_numel: got 5, allowed in sharded training is 1048576"),
        ({"param_bits": 4}, "param_bits: got 4, allowed is 8, or null for full precision"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        ShardedState(**setting)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 8, 1)),
        ({"tensor_parallel_size": 2}, (1, 4, 2)),
        ({"tensor_parallel_size": "auto", "data_parallel_size": 2}, (1, 2, 4)),
        ({"hsdp": True}, (2, 4, 1)),
        ({"hsdp": True, "shard_size": 2}, (4, 2, 1)),
        ({"hsdp": True, "tensor_parallel_size": 2}, (2, 2, 2)),
    ],
)
def test_mesh_of_two_nodes_with_four_ranks(options, shape):
    assert ShardingOptions(**options).mesh_shape(8, 4) == MeshShape(*shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: got 3, allowed are divisors of 8 ranks"),
        ({"data_parallel_size": 3}, "data_parallel_size: got 3, allowed is 8 with 8 ranks"),
        ({"hsdp": True, "shard_size": 3}, "shard_size: got 3, allowed are divisors of 8 ranks"),
        ({"hsdp": True, "shard_size": 8}, "shard_size: got 8, allowed with hsdp is less than the 8"),
        ({"shard_size": 4}, "shard_size: got 4, allowed with hsdp only"),
        ({"param_dtype": "float16"}, "param_dtype: got 'float16', allowed are bfloat16 and null"),
        ({"data_parallel_size": 0}, "data_parallel_size: got 0, allowed are integers from 1"),
    ],
)
def test_a_mesh_that_cannot_hold_the_ranks_is_one_line(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ShardingOptions(**options).mesh_shape(8, 4)


def test_a_lost_rank_is_named():
    for message, seconds in launch(sharded.lose_a_rank_of_shards, 3, expected=(0, 1)):
        assert "rank 2 is gone" in message
        assert seconds < 30.0


@pytest.mark.slow
@pytest.mark.parametrize("net", NETWORKS)
def test_loss_after_200_steps_is_within_2_percent_of_fsdp2(tmp_path_factory, net):
    make = lambda: launch(sharded.long_runs, 4, limit=1800.0)  # noqa: E731
    found = run_once(tmp_path_factory, "long_sharded", make)[0]
    plain = found[f"{net}, plain"]
    for name, loss in found.items():
        if name.startswith(net) and "other" not in name:
            assert abs(loss - plain) <= 0.02 * plain, (name, loss, plain)
