"""The remedies against oscillation on two ranks."""

import pytest
import torch
from lightning.pytorch import Callback
from normed_training import Normed, by_hand, loader, statistics
from ranked_training import train
from tiny_training import trainer

from lightning_n2uq.callbacks import BatchNormReestimation, OscillationControl

# Forked workers start in a fraction of the time that fresh interpreters need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def test_ranks_freeze_the_same_weights(tmp_path):
    train(tmp_path, 2, instead=OscillationControl(0.2, 0.002, dampening=0.1, momentum=0.001, start=0))
    one, two = ((tmp_path / f"rank{rank}.json").read_text() for rank in range(2))
    assert one == two


class Kept(Callback):
    """Leaves, on every rank, the statistics in use and those computed by hand from the rank's own batches."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        own = [batch for _, batch in zip(range(3), trainer.train_dataloader, strict=False)]
        kept = {"used": statistics(pl_module), "own": by_hand(pl_module, own)}
        torch.save(
            {name: torch.cat(values).clone() for name, values in kept.items()}, self.path(trainer.global_rank)
        )

    def path(self, rank):
        return self.folder / f"rank{rank}.pt"


def test_ranks_average_what_they_find_in_their_own_batches(tmp_path):
    kept = Kept(tmp_path)
    options = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 1, "max_epochs": 1}
    runner = trainer(tmp_path, [BatchNormReestimation(3), kept], **options)
    runner.fit(Normed(), loader(shuffle=False), loader(shuffle=False))
    one, two = (torch.load(kept.path(rank), weights_only=True) for rank in range(2))
    assert torch.equal(one["used"], two["used"])
    assert not torch.equal(one["own"], two["own"])
    torch.testing.assert_close(one["used"], (one["own"] + two["own"]) / 2, rtol=1e-4, atol=1e-5)
