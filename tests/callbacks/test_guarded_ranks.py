import json

import pytest
from guarded_training import STEP_KINDS, train_ranks
from torch.multiprocessing import ProcessRaisedException

from lightning_n2uq.strategies import NUQSGDStrategy

# Forked workers start in a fraction of the time that fresh interpreters need.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:NonFiniteGuard"),  # rank 0 warns of what is skipped
]

BREAKS = {(1, 2): "input"}  # the second rank alone, at its third batch


def strategy(name):
    if name == "ddp":
        return "ddp_fork"
    return NUQSGDStrategy(bits=4, min_numel=1, bucket_size=16, start_method="fork")


def outcomes(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "nuqsgd"])
@pytest.mark.parametrize("kind", ["input", "constant_batch"])
def test_what_one_rank_finds_is_skipped_on_both(tmp_path, name, kind):
    train_ranks(tmp_path, {(1, 2): kind}, strategy(name), "skip")
    one, two = outcomes(tmp_path)
    assert one == two  # parameters, running statistics, counts, steps
    assert one["counts"][kind] == 1
    assert one["counts"]["skipped_steps"] == 1
    assert one["finite"]
    assert one["step"] == 6


@pytest.mark.parametrize("name", ["ddp", "nuqsgd"])
def test_what_one_rank_finds_stops_both_at_the_same_step(tmp_path, name):
    with pytest.raises(ProcessRaisedException, match="NonFiniteError"):
        train_ranks(tmp_path, BREAKS, strategy(name), "stop")
    one, two = outcomes(tmp_path)
    assert one["parameters"] == two["parameters"]  # and finite: the step was not taken
    assert one["finite"]
    assert two["finite"]
    for row in (one, two):
        assert row["step"] == 2
        assert "step 2: NaN or inf in the input batch" in row["error"]


def test_without_the_guard_the_nan_reaches_every_rank(tmp_path):
    train_ranks(tmp_path, BREAKS, "ddp_fork", "off")
    assert not any(row["finite"] for row in outcomes(tmp_path))


def test_every_kind_is_skipped_together(tmp_path):
    train_ranks(
        tmp_path, {(index % 2, index + 1): kind for index, kind in enumerate(STEP_KINDS)}, "ddp_fork", "skip"
    )
    one, two = outcomes(tmp_path)
    assert one == two
    assert one["counts"]["skipped_steps"] == 4
    assert one["finite"]
