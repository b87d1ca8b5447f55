"""What `CommunicationMonitor` says of an exchange; that it hears of one is in the strategies' tests."""

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from tiny_training import TinyModule, loader, trainer

from lightning_n2uq.callbacks import CommunicationMonitor
from lightning_n2uq.callbacks.communication_monitor import figures, verdict
from lightning_n2uq.distributed.stats import StepStats
from lightning_n2uq.scaling.measured import of_checkpoint, of_run

TEN_STEPS = StepStats(coordinates=10_000_000, sent_bytes=6_000_000, full_bytes=40_000_000.0, sync_s=0.5)


@pytest.mark.parametrize(
    ("full_seconds", "outcome", "times"), [(0.2, "paid off", "4"), (0.025, "did not pay off", "0.5")]
)
def test_the_verdict_compares_seconds_per_step(full_seconds, outcome, times):
    assert verdict(TEN_STEPS, 10, full_seconds) == (
        f"Gradient compression {outcome} on this network: 0.6 MB and 0.05 s per step, against 4 MB and "
        f"{full_seconds:.3g} s in fp32 ({times} times as long, at {32 / full_seconds:.3g} Mbit/s); "
        "0 non-finite buckets in 10 steps"
    )


@pytest.mark.parametrize(
    ("exchanges", "period", "end"), [(1, 1, "1 step"), (1, 10, "1 round"), (2, 10, "2 rounds")]
)
def test_the_verdict_counts_rounds_or_steps(exchanges, period, end):
    assert verdict(TEN_STEPS, exchanges, 0.2, period).endswith(f"; 0 non-finite buckets in {end}")


def test_a_step_is_logged_with_its_ratio_and_an_error_where_one_was_measured():
    step = StepStats(sent_bytes=100, full_bytes=800.0, encode_s=1.0, exchange_s=2.0, decode_s=3.0, sync_s=4.0)
    expected = {"sent_bytes": 100, "ratio": 8, "encode_s": 1, "exchange_s": 2, "decode_s": 3, "sync_s": 4}
    assert figures(step) == {f"comm/{k}": v for k, v in {**expected, "nonfinite_buckets": 0}.items()}
    step.error_sq, step.norm_sq = 1.0, 4.0
    assert figures(step)["comm/relative_error"] == 0.25


def test_totals_continue_after_a_resume():
    first, second = CommunicationMonitor(), CommunicationMonitor()
    first._add(TEN_STEPS)
    second.load_state_dict(first.state_dict())
    second._add(TEN_STEPS)
    assert second.state_dict() == {
        "steps": 2, "coordinates": 20_000_000, "sent_bytes": 12_000_000, "full_bytes": 80_000_000.0,
        "sync_s": 1.0, "nonfinite": 0,
    }  # fmt: skip


def test_what_counts_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps: got 0, allowed are integers from 1"):
        CommunicationMonitor(0)
    with pytest.raises(
        MisconfigurationException, match="needs a nuqsgd strategy or ddp, got SingleDeviceStrategy"
    ):
        trainer(tmp_path, [CommunicationMonitor()]).fit(TinyModule(), loader(), loader())


def test_a_short_run_has_figures_in_its_logs_and_checkpoint(tmp_path):
    """Of which `n2uq advise` reads; the steps that are logged are not those of `log_every_n_steps`."""
    logger = CSVLogger(tmp_path, name="run", version="0")
    run = trainer(tmp_path, [CommunicationMonitor()], strategy="ddp", logger=logger, log_every_n_steps=50)
    try:
        run.fit(TinyModule(), loader(), loader())
        run.save_checkpoint(tmp_path / "end.ckpt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    logged, saved = of_run(str(tmp_path / "run" / "0")), of_checkpoint(str(tmp_path / "end.ckpt"))
    assert logged == saved
    assert logged.ranks == 1
    assert logged.step_s > 0
    assert logged.coordinates == sum(parameter.numel() for parameter in TinyModule().parameters())
