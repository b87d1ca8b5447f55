"""The remedies against oscillation on two ranks."""

import pytest
import torch
from lightning.pytorch import Callback
from normed_training import Normed, by_hand, loader, statistics
from tiny_training import trainer

from lightning_n2uq.callbacks import BatchNormReestimation, OscillationControl

# Forked workers start in a fraction of the time that fresh interpreters need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


class Flipped(Callback):
    """Flips the signs of half of the first layer's weights in every step, and leaves what is frozen."""

    def __init__(self, folder, control):
        self.folder, self.control = folder, control

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with torch.no_grad():
            pl_module.net[0].weight[::2] *= -1

    def on_train_end(self, trainer, pl_module):
        frozen = self.control.state_dict()["layers"]["0"]["frozen"].clone()
        kept = {"frozen": frozen, "weight": pl_module.net[0].weight.detach().clone()}
        torch.save(kept, self.folder / f"rank{trainer.global_rank}.pt")


def test_ranks_freeze_the_same_weights(tmp_path):
    control = OscillationControl(0.2, 0.2, dampening=0.1, momentum=0.1, start=0)
    options = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 0}
    runner = trainer(tmp_path, [control, Flipped(tmp_path, control)], **options)
    runner.fit(Normed(), loader(shuffle=False), loader(shuffle=False))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one["frozen"][::2].float().mean() > 0.8
    assert not one["frozen"].all()
    assert torch.equal(one["frozen"], two["frozen"])
    assert torch.equal(one["weight"], two["weight"])


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


@pytest.mark.integration
def test_ranks_average_what_they_find_in_their_own_batches(tmp_path):
    kept = Kept(tmp_path)
    options = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 1, "max_epochs": 1}
    runner = trainer(tmp_path, [BatchNormReestimation(3), kept], **options)
    runner.fit(Normed(), loader(shuffle=False), loader(shuffle=False))
    one, two = (torch.load(kept.path(rank), weights_only=True) for rank in range(2))
    assert torch.equal(one["used"], two["used"])
    assert not torch.equal(one["own"], two["own"])
    torch.testing.assert_close(one["used"], (one["own"] + two["own"]) / 2, rtol=1e-4, atol=1e-5)
