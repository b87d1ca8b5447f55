"""The strategies under Lightning's own launcher, on two CPU processes of one job."""

import re

import pytest
from torch.testing import assert_close

from exchange_jobs.launch import run_script
from lightning_n2uq.callbacks.communication_monitor import verdict
from lightning_n2uq.distributed.stats import StepStats
from shared_job import run_once

pytestmark = pytest.mark.integration

MODES = ("automatic", "manual", "bf16-mixed", "accumulate", "arguments")
SUMMARY = re.compile(
    r"Gradient compression (?P<outcome>paid off|did not pay off) on this network: (?P<sent>\S+) MB and "
    r"(?P<ours>\S+) s per step, against (?P<full>\S+) MB and (?P<theirs>\S+) s in fp32 "
    r"\((?P<ratio>\S+) times as long, at (?P<rate>\S+) Mbit/s\); (?P<bad>\d+) non-finite "
    r"buckets in (?P<steps>\d+) steps"
)


def same_bits(values, expected):
    assert_close(values, expected, rtol=0.0, atol=0.0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What both ranks of one job saved."""
    make = lambda: run_script("trainer_script.py", tmp_path_factory.mktemp("trainer"), 240)  # noqa: E731
    return run_once(tmp_path_factory, "trainer", make)


@pytest.mark.parametrize("mode", MODES)
def test_without_loss_parameters_are_those_of_ddp(ranks, mode):
    """On two ranks bit by bit: two numbers have one sum."""
    for found in ranks:
        assert found["modes"][mode]["steps"] == (4 if mode == "accumulate" else 8)
        same_bits(found["modes"][mode]["without loss"], found["modes"][mode]["ddp"])


@pytest.mark.parametrize("mode", MODES)
def test_with_4_bits_replicas_are_equal_and_near_ddp(ranks, mode):
    first, second = (found["modes"][mode] for found in ranks)
    same_bits(first["4 bits"], second["4 bits"])
    moved = (first["4 bits"] - first["ddp"]).norm() / first["ddp"].norm()
    assert 1e-5 < moved < 0.1


def test_powersgd_keeps_replicas_equal(ranks):
    first, second = (found["modes"]["powersgd"]["parameters"] for found in ranks)
    same_bits(first, second)


def test_resume_restores_the_rank_s_residuals(ranks):
    for found in ranks:
        own, kept = found["resume"]["own residual"]
        same_bits(own, kept)
        assert own.any()
        mean, shared = found["resume"]["own chunk"]
        mine = mean != 0
        same_bits(mean[mine], shared[mine])
        assert 0 < mine.sum() < len(mean)
        assert found["resume"]["steps"] == [4, 8]
    same_bits(*(found["resume"]["parameters"] for found in ranks))


def test_a_checkpoint_amid_accumulated_batches_keeps_each_ranks_gradients(ranks):
    first, second = (found["amid accumulation"] for found in ranks)
    assert (first["gradient"] != second["gradient"]).any()
    for found in (first, second):
        same_bits(found["resumed"], found["whole"])


def test_communication_monitor(ranks):
    metrics = ranks[0]["monitored"]["metrics"]
    assert 5.0 < metrics["comm/ratio"] < 8.0
    assert metrics["comm/sent_bytes"] == 1456  # 1-D parameters in fp32, the rest in 4 bits, aligned
    assert 0.01 < metrics["comm/relative_error"] < 0.2
    assert metrics["comm/nonfinite_buckets"] == 0
    summary = SUMMARY.fullmatch(ranks[0]["monitored"]["summary"])
    assert summary, ranks[0]["monitored"]["summary"]
    assert summary["sent"] == f"{1456e-6:.3g}"
    assert summary["full"] == f"{1456e-6 * metrics['comm/ratio']:.3g}"
    ours, theirs = float(summary["ours"]), float(summary["theirs"])
    if ours != theirs:  # three digits of each
        assert summary["outcome"] == ("paid off" if ours < theirs else "did not pay off")
    assert (summary["bad"], summary["steps"]) == ("0", "8")


@pytest.mark.parametrize(
    ("seconds", "outcome", "ratio"), [(4.0, "paid off", "2"), (1.0, "did not pay off", "0.5")]
)
def test_verdict_compares_the_times_of_a_step(seconds, outcome, ratio):
    total = StepStats(sent_bytes=4_000_000, full_bytes=32_000_000.0, sync_s=4.0, nonfinite=3)
    summary = SUMMARY.fullmatch(verdict(total, 2, seconds))
    assert summary["outcome"] == outcome
    assert [summary[key] for key in ("sent", "ours", "full")] == ["2", "2", "16"]
    assert [summary[key] for key in ("ratio", "bad", "steps")] == [ratio, "3", "2"]
    assert float(summary["rate"]) == 128 / seconds
