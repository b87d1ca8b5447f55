"""Long runs, many buckets, counters, agreement and resuming, on four ranks of one job."""

import numpy as np
import pytest

from exchange_jobs import workers
from exchange_jobs.launch import launch


def on_all(job, check):
    return [found[check] for found in job]


def assert_same_bits(values):
    """Every rank's array is the first one's, bit by bit, and finite."""
    assert np.isfinite(values[0]).all()
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


RUNS = [f"{scheme}, accumulate {times}" for scheme in ("two_phase", "all_gather") for times in (1, 2)]


@pytest.mark.parametrize("name", RUNS)
def test_replicas_are_bit_identical_after_20_steps(exchange_job, name):
    runs = [found[name] for found in on_all(exchange_job, "replicas")]
    assert [run["steps"] for run in runs] == [20] * len(runs)
    assert_same_bits([run["parameters"] for run in runs])


@pytest.mark.slow
def test_replicas_are_bit_identical_after_200_steps():
    ranks = launch(workers.long_replicas, 4, limit=900.0)
    for name in RUNS:
        assert [found[name]["steps"] for found in ranks] == [200] * len(ranks)
        assert_same_bits([found[name]["parameters"] for found in ranks])


@pytest.mark.parametrize(
    "name", ["two_phase", "all_gather", "huffman", "hierarchical", "warm-up", "second", "powersgd"]
)
def test_many_buckets_on_uneven_ranks(exchange_job, name):
    assert_same_bits([found[name] for found in on_all(exchange_job, "many_buckets")])


def test_one_rank_alone_trains_like_plain_ddp(exchange_job):
    for found in on_all(exchange_job, "alone"):
        np.testing.assert_array_equal(found["exchange"], found["ddp"])
        assert not found["connected"]


def test_counters(exchange_job):
    for found in on_all(exchange_job, "counters"):
        before, after = found["places"]
        assert before == after  # buffers are reused
        assert 4.0 < found["ratio"] < 8.0  # the 1-D parameters travel in full precision
        assert 0.02 < found["error"] < 0.125
        assert found["seconds"] > 0.0
        assert found["coordinates"] == 10_218
        assert found["step"] == 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bits", "4 3"),
        ("bucket_size", "256 512"),
        ("scheme", "two_phase all_gather"),
        ("levels", "exponential uniform"),
    ],
)
def test_disagreement_names_the_two_values(exchange_job, name, values):
    first, second = values.split()
    messages = [found[name] for found in on_all(exchange_job, "disagreement")]
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]
    assert "rank 0 has" in messages[0]
    assert "rank 2 has" in messages[0]
    assert first in messages[0]
    assert second in messages[0]


def test_nan_of_one_rank_reaches_all(exchange_job):
    for found in on_all(exchange_job, "nonfinite"):
        assert np.isnan(found["gradient"]).all()
        assert found["bad buckets"] == 16
        np.testing.assert_array_equal(*found["parameters"])  # the loss scaler skipped the step
        assert found["scale"] == 2.0
        assert np.isfinite(found["residual"]).all()
        assert found["residual"].any()


def test_state_survives_pickling_and_new_buckets(exchange_job):
    for found in on_all(exchange_job, "saved_state"):
        for before, after in found["residuals"]:
            np.testing.assert_array_equal(before, after)
        assert found["steps"] == (3, 5)
        assert found["names"] == sorted(name for name, _ in workers.make_net().named_parameters())


@pytest.mark.parametrize(
    "name",
    [
        "without feedback",
        "two_phase",
        "all_gather",
        "hierarchical",
        "adapted levels",
        "rotated",
        "saved one step after a resume",
    ],
)
def test_a_resumed_run_exchanges_the_same_bits(exchange_job, name):
    for found in on_all(exchange_job, "resumed"):
        whole, resumed = found[name]
        np.testing.assert_array_equal(resumed, whole)


def test_a_run_resumed_with_other_settings_keeps_replicas_equal(exchange_job):
    assert_same_bits([found["other settings"] for found in on_all(exchange_job, "resumed")])


def test_a_lost_rank_is_named():
    for message, seconds in launch(workers.lose_a_rank, 3, expected=(0, 1)):
        assert "rank 2 is gone" in message
        assert seconds < 30.0
