"""Batch-norm statistics of a second pass: what they are, what they leave alone, where they end up."""

import random

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from normed_training import Normed, by_hand, loader, statistics
from tiny_training import data, trainer
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_n2uq.callbacks import BatchNormReestimation, ProximalAnnealing, ThresholdAnnealing


class Judge(Callback):
    """Compares the statistics in use at each validation with those computed by hand."""

    def __init__(self, batches):
        self.batches, self.judged = batches, 0

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.sanity_checking or batch_idx:
            return
        for found, expected in zip(statistics(pl_module), by_hand(pl_module, self.batches), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        self.judged += 1


def test_the_statistics_are_averages_over_training_batches_with_the_weights_that_are_validated(tmp_path):
    batches = list(loader(shuffle=False))[:5]
    judge = Judge(batches)
    callbacks = [BatchNormReestimation(5), judge, ThresholdAnnealing(0, 1), ProximalAnnealing(0, 1)]
    options = {"num_sanity_val_steps": 1, "limit_val_batches": 2}
    trainer(tmp_path, callbacks, **options).fit(Normed(), loader(shuffle=False), loader(shuffle=False))
    assert judge.judged == 2


def run(tmp_path, callbacks, workers=0, **options):
    seed_everything(0, verbose=False)
    module = Normed()
    loaders = loader(num_workers=workers, persistent_workers=bool(workers)), loader(shuffle=False)
    runner = trainer(tmp_path, callbacks, **{"limit_val_batches": 2, "max_epochs": 3, **options})
    runner.fit(module, *loaders)
    return module, runner, (torch.rand(1).item(), random.random())


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}, {"workers": 1}])
def test_training_goes_on_as_without_bit_for_bit(tmp_path, options):
    ours, runner, drawn = run(tmp_path, [BatchNormReestimation(4)], **options)
    plain, other, expected = run(tmp_path, [], **options)
    assert drawn == expected
    assert ours.seen == plain.seen
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(statistics(ours), statistics(plain), strict=True))
    for name in ("train/loss_epoch", "train/twice"):
        assert runner.callback_metrics[name] == other.callback_metrics[name]
    assert runner.callback_metrics["val/loss"] != other.callback_metrics["val/loss"]


def test_generators_of_samplers_and_loaders_are_left_alone(tmp_path):
    def order(callbacks):
        own, samplers = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
        module = Normed()
        train = DataLoader(data(), 8, sampler=RandomSampler(data(), generator=samplers), generator=own)
        trainer(tmp_path, callbacks, limit_val_batches=1).fit(module, train, loader(shuffle=False))
        return module.seen, own.get_state().tolist(), samplers.get_state().tolist()

    assert order([BatchNormReestimation(3)]) == order([])


def test_collections_of_loaders_give_their_batches(tmp_path):
    class Paired(Normed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    judge = Judge(list(loader(shuffle=False))[:4])
    train = {"a": loader(shuffle=False), "b": loader(shuffle=False)}
    callbacks = [BatchNormReestimation(4), judge]
    trainer(tmp_path, callbacks, limit_val_batches=1).fit(Paired(), train, loader(shuffle=False))
    assert judge.judged == 2


def test_hooks_on_batches_see_training(tmp_path):
    class Prepared(Normed):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x if self.trainer.training else x + 100), y

        def on_validation_batch_start(self, *args):
            assert self.trainer.validating

    judge = Judge(list(loader(shuffle=False))[:4])
    callbacks = [BatchNormReestimation(4), judge]
    trainer(tmp_path, callbacks, limit_val_batches=1).fit(
        Prepared(), loader(shuffle=False), loader(shuffle=False)
    )
    assert judge.judged == 2


def test_norms_that_training_keeps_fixed_stay(tmp_path):
    module = Normed(fixed=True)
    before = statistics(module)
    trainer(tmp_path, [BatchNormReestimation(4)], limit_val_batches=1).fit(
        module, loader(), loader(shuffle=False)
    )
    after = statistics(module)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))


def test_checkpoints_hold_what_was_validated(tmp_path):
    module, runner, _ = run(tmp_path, [BatchNormReestimation(4)], enable_checkpointing=True)
    path = runner.checkpoint_callback.best_model_path
    again = Normed.load_from_checkpoint(path, weights_only=False)
    for a, b in zip(statistics(again), statistics(module), strict=True):
        assert torch.equal(a, b)
    (score,) = trainer(tmp_path, limit_val_batches=2).validate(again, loader(shuffle=False), verbose=False)
    assert score["val/loss"] == pytest.approx(float(runner.callback_metrics["val/loss"]))


def test_validation_alone_changes_nothing(tmp_path):
    module = Normed()
    before = statistics(module)
    trainer(tmp_path, [BatchNormReestimation(4)], limit_val_batches=1).validate(
        module, loader(shuffle=False), verbose=False
    )
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(module), strict=True))


def test_what_cannot_be_done_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="batches: got 0, allowed are integers from 1"):
        BatchNormReestimation(0)

    def fit(module, train):
        options = {"limit_val_batches": 1, "max_steps": 4, "val_check_interval": 2}
        trainer(tmp_path, [BatchNormReestimation()], **options).fit(module, train, loader(shuffle=False))

    plain = Normed()
    plain.net = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="model: got 'Normed', allowed are networks with batch norms"):
        fit(plain, loader())
    manual = Normed()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="model: got 'Normed', allowed are modules that optimize auto"):
        fit(manual, loader())

    class Once:
        def __init__(self):
            self.batches = iter(list(loader()) * 3)

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.batches)

    with pytest.raises(ValueError, match="train_dataloader: got 'an iterator', allowed is what can be read"):
        fit(Normed(), Once())


def test_iterable_data_sets_are_read_anew(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    judge = Judge(list(DataLoader(TensorDataset(*data().tensors), 8))[:3])
    train = DataLoader(Stream(), batch_size=8)
    trainer(tmp_path, [BatchNormReestimation(3), judge], limit_val_batches=1).fit(
        Normed(), train, loader(shuffle=False)
    )
    assert judge.judged == 2
