"""Ranks fit one range to the batches of all."""

import torch
from lightning.pytorch import Callback
from tiny_training import TinyModule, loader, trainer

from lightning_n2uq.callbacks import RangeInitialization
from lightning_n2uq.quantizers.ranges import best_range


class Kept(Callback):
    """Leaves what a rank's first layer has, and the end of the range of its own first batch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.own = best_range(batch[0].flatten(), 4)[1]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            scale = pl_module.net[0].activation_quantizer.scale_out.detach().clone()
            torch.save({"own": self.own, "scale": scale}, self.folder / f"rank{trainer.global_rank}.pt")


def test_ranks_average_the_ends_of_their_ranges(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    trainer(tmp_path, [RangeInitialization(), Kept(tmp_path)], **options).fit(
        TinyModule(), loader(), loader()
    )
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one["scale"], two["scale"])
    assert one["own"] != two["own"]
    torch.testing.assert_close(one["scale"], ((one["own"] + two["own"]) / 4).reshape(1))
