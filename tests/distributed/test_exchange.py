import pytest

from exchange_jobs import workers
from exchange_jobs.launch import launch

WORLD = 4


@pytest.fixture(scope="module")
def ranks():
    """One job for many checks: starting processes costs more than most of them."""
    return launch(workers.all_checks, WORLD, limit=240.0)


def on_all(ranks, check):
    for found in ranks:
        yield {key: value for key, value in found[check].items() if key != "seconds taken"}


def test_replicas_are_bit_identical_after_200_steps(ranks):
    for found in on_all(ranks, "replicas"):
        assert len(found) == 4
        assert all(found.values()), found


def test_identity_codec_reproduces_plain_ddp(ranks):
    for found in on_all(ranks, "plain_ddp"):
        assert found.pop("four") < 1e-6  # another order of summation
        assert found == {"two_phase": True, "all_gather": True}


@pytest.mark.parametrize(
    "name", ["two_phase", "all_gather", "huffman", "hierarchical", "warm-up", "second", "powersgd"]
)
def test_many_buckets_on_uneven_ranks(ranks, name):
    assert [found[name] for found in on_all(ranks, "many_buckets")] == [True] * WORLD


@pytest.mark.parametrize(
    "name",
    [
        "find_unused_parameters",
        "static_graph",
        "gradient_as_bucket_view",
        "torch.bfloat16",
        "torch.float16",
        "compiled",
        "alone",
    ],
)
def test_ddp_modes(ranks, name):
    assert [found[name] for found in on_all(ranks, "ddp_modes")] == [True] * WORLD


def test_counters(ranks):
    for found in on_all(ranks, "counters"):
        assert found["reused"]
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
def test_disagreement_names_the_two_values(ranks, name, values):
    first, second = values.split()
    messages = [found[name] for found in on_all(ranks, "disagreement")]
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]
    assert "rank 0 has" in messages[0]
    assert "rank 2 has" in messages[0]
    assert first in messages[0]
    assert second in messages[0]


def test_nan_of_one_rank_reaches_all(ranks):
    for found in on_all(ranks, "nonfinite"):
        assert found == {"nan": True, "skipped": True, "residual": True}


def test_state_survives_pickling_and_new_buckets(ranks):
    for found in on_all(ranks, "saved_state"):
        assert found["same"]
        assert found["steps"] == (3, 5)
        assert found["names"] == sorted(name for name, _ in workers.make_net().named_parameters())


def test_a_resumed_run_exchanges_the_same_bits(ranks):
    cases = ("without feedback", "two_phase", "all_gather", "hierarchical", "other settings")
    for found in on_all(ranks, "resumed"):
        assert found == dict.fromkeys(cases, True)


def test_a_lost_rank_is_named():
    for message, seconds in launch(workers.lose_a_rank, 3, expected=(0, 1)):
        assert "rank 2 is gone" in message
        assert seconds < 30.0
