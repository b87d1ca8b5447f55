"""The order of two ranks that are forked from the test's process."""

from itertools import chain

import pytest
import torch
from checksum_training import digits, fit
from lightning.pytorch.callbacks import Callback


class Recorder(Callback):
    """Writes the labels of every rank to a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        sampler = trainer.train_dataloader.sampler
        rows = (type(sampler).__name__, sampler.order(), pl_module.seen)
        torch.save(rows, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("inject", [True, False])
def test_two_processes_share_one_order(tmp_path, inject):
    fit(
        digits(batch_size=100),
        epochs=2,
        callbacks=[Recorder(tmp_path)],
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=inject,
    )

    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    data = digits()
    data.setup("fit")
    labels = data.splits["train"].labels
    for rank, (name, order, seen) in enumerate(ranks):
        assert name == "SampleIdSampler"
        mine = labels[(order + order[:1])[rank::2]].tolist()
        assert list(chain.from_iterable(row[3] for row in seen if row[0] == 1)) == mine
