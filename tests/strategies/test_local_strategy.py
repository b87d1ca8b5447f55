"""`nuqsgd_local` under Lightning's own launcher, on two CPU processes of one job."""

import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.testing import assert_close

from exchange_jobs.launch import run_script
from exchange_jobs.local_script import MODES, WithNorm
from lightning_n2uq.callbacks import OscillationControl
from lightning_n2uq.callbacks.communication_monitor import verdict
from lightning_n2uq.distributed.stats import StepStats
from lightning_n2uq.strategies import LocalNUQSGDStrategy, rank_states
from shared_job import run_once

pytestmark = pytest.mark.integration


def same_bits(values, expected):
    assert_close(values, expected, rtol=0.0, atol=0.0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What both ranks of one job saved."""
    make = lambda: run_script("local_script.py", tmp_path_factory.mktemp("local"), 600)  # noqa: E731
    return run_once(tmp_path_factory, "local", make)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_train_alone_and_end_with_the_same_bits(ranks, mode):
    first, second = (found["modes"][mode] for found in ranks)
    same_bits(first["parameters"], second["parameters"])
    agree = [bool((a == b).all()) for a, b in zip(first["batches"], second["batches"], strict=True)]
    assert agree == [steps == 0 for steps in first["open"]]
    assert agree[-1]


@pytest.mark.parametrize("mode", MODES)
def test_rounds_end_by_period_before_validations_and_with_training(ranks, mode):
    """Four batches of two epochs: rounds of three steps, and of one before each validation."""
    first, second = (found["modes"][mode] for found in ranks)
    expected = [0, 1, 1, 0] if mode == "accumulate" else [1, 2, 0, 0]
    assert first["open"] == second["open"] == expected * 2
    assert first["rounds"] == (2 if mode == "accumulate" else 4)
    assert len(first["validations"]) == 2
    for one, other in zip(first["validations"], second["validations"], strict=True):
        same_bits(one, other)
    same_bits(first["validations"][-1].float(), first["batches"][-1])


def test_the_learning_rate_s_schedule_is_untouched(ranks):
    for found in ranks:
        assert found["modes"]["automatic"]["lr"] == pytest.approx([0.01] * 3 + [0.005] * 4 + [0.0025])


def test_the_trainer_keeps_no_callback_of_the_strategy(ranks):
    for found in ranks:
        assert "RoundEnds" not in found["modes"]["automatic"]["callbacks"]


def test_without_loss_a_round_ends_with_the_mean_of_the_weights(ranks):
    """Though training ends within the period."""
    first, second = (found["mean"] for found in ranks)
    assert (first["own"] != second["own"]).any()
    same_bits(first["start"], second["start"])
    changes = (first["start"] - first["own"]) + (second["start"] - second["own"])
    for found in (first, second):
        same_bits(found["end"], found["start"] - changes / 2)


@pytest.mark.parametrize("step", [4, 6, 7])
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(ranks, step):
    """Inside a round, between two, and at the end of an epoch; with Adam, momentum and error feedback."""
    for found in ranks:
        same_bits(found["resume"]["resumed"][step], found["resume"]["whole"])
    same_bits(*(found["resume"]["agreed"][step] for found in ranks))


def test_checkpoints_hold_weights_all_agreed_on_and_what_ranks_have_of_their_own(ranks):
    saved = ranks[0]["resume"]["saved"]
    assert {step: steps for step, (steps, _) in saved.items()} == {4: 1, 6: 0, 7: 1}
    for _, parts in saved.values():
        assert parts[0] == ["buffers", "parameters"]  # the optimizer's is where Lightning puts it
        assert parts[1] == ["buffers", "optimizer_states", "parameters"]
    assert ranks[0]["resume"]["small"] == []


def test_the_monitor_counts_rounds(ranks):
    metrics, summary = (ranks[0]["monitored"][key] for key in ("metrics", "summary"))
    assert metrics["comm/sent_bytes"] == 1456  # of a round: those of a gradient
    assert 0.0 < metrics["comm/relative_error"] < 0.2
    assert re.match(r"Gradient compression (paid off|did not pay off) on this network: 0.000485 MB", summary)
    assert "per step (one exchange every 3), against 0.00" in summary
    assert "in 3 rounds" in summary


def test_the_verdict_compares_a_round_with_the_all_reduces_that_it_replaces():
    total = StepStats(sent_bytes=4_000_000, full_bytes=32_000_000.0, sync_s=4.0)
    line = verdict(total, 2, 0.5, period=10)
    assert (
        "paid off on this network: 0.2 MB and 0.2 s per step (one exchange every 10), against 16 MB" in line
    )
    assert line.endswith("; 0 non-finite buckets in 2 rounds")


def test_with_another_number_of_ranks_every_rank_begins_with_the_mean():
    saved = [
        {"parameters": {"w": torch.full((2,), value)}, "buffers": {"n": torch.tensor(number)},
         "optimizer_states": [number]}
        for value, number in ((1.0, 5), (4.0, 6))
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="what 2 ranks had of their own is given to 3"):
        found = [rank_states.for_rank(saved, rank, 3) for rank in range(3)]
    for own in found:
        same_bits(own["parameters"]["w"], torch.full((2,), 2.5))
        assert int(own["buffers"]["n"]) == 5 or own is found[1]
    assert [own["optimizer_states"] for own in found] == [[5], [6], [5]]
    assert rank_states.for_rank([], 0, 2) is None


@pytest.mark.parametrize("name", ["find_unused_parameters", "static_graph", "bucket_cap_mb"])
def test_what_only_ddp_could_do_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: got True, allowed with strategies that wrap the model"):
        LocalNUQSGDStrategy(**{name: True})


def test_bad_values_are_refused_in_one_line():
    for settings, message in (
        ({"period": 0}, "period: got 0, allowed are integers from 1"),
        ({"outer_lr": -1.0}, "outer_lr: got -1.0, allowed is above 0"),
        ({"bits": 7}, "bits"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalNUQSGDStrategy(**settings)


def test_the_strategy_is_registered_under_its_name():
    for name, bits in (("nuqsgd_local", 4), ("nuqsgd_local_2bit", 2), ("nuqsgd_local_1bit", 1)):
        strategy = StrategyRegistry.get(name)
        assert isinstance(strategy, LocalNUQSGDStrategy)
        assert (strategy.local.period, strategy.config.bits) == (10, bits)


class Waits(WithNorm):
    def __init__(self):
        super().__init__()
        self.norm = nn.SyncBatchNorm(4)


FREEZING = "callbacks: got OscillationControl, allowed with nuqsgd_local are callbacks that freeze no weights"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (WithNorm, {"callbacks": [OscillationControl()]}, FREEZING),
        (WithNorm, {"sync_batchnorm": True}, "sync_batchnorm: got True, allowed is False"),
        (Waits, {}, "module: got 'SyncBatchNorm norm'"),
    ],
    ids=["weights frozen by rank", "the Trainer's", "a layer"],
)
def test_what_needs_equal_ranks_in_every_step_is_refused(tmp_path, module, arguments, message):
    strategy = LocalNUQSGDStrategy()
    runner = Trainer(
        accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_progress_bar=False, **arguments,
    )  # fmt: skip
    strategy._lightning_module = strategy.model = module()
    runner.state.fn = "fit"
    with pytest.raises(ValueError, match=re.escape(message)):
        strategy.setup(runner)
