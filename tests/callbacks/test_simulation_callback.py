"""`SimulatedRanks` trains as ranks with a strategy would, refuses what it cannot do, and resumes."""

import csv
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from tiny_training import TinyModule as Validated
from tiny_training import loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from exchange_jobs.launch import run_script
from exchange_jobs.simulated_script import RANKS, SETTINGS, Normed, batches, fit
from lightning_n2uq.callbacks import SimulatedRanks


class TinyModule(Validated):
    validation_step = LightningModule.validation_step  # none


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Watch(Callback):
    """The gradients of every optimizer step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


@pytest.mark.integration
def test_training_ends_where_two_real_ranks_end(tmp_path):
    ranks = run_script("simulated_script.py", tmp_path, 240)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = fit(tmp_path, batches(), callbacks=[SimulatedRanks(RANKS, settings=SETTINGS)], devices=1)
    finally:
        torch.set_num_threads(threads)
    for name, value in ranks[0].items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        if "running" not in name:
            assert torch.equal(ranks[1][name], value)
    assert not torch.equal(found["net.0.weight"], Normed().net[0].weight)


def test_the_exact_mean_is_that_of_one_large_batch(tmp_path):
    large, small = TinyModule(), TinyModule()
    trainer(tmp_path).fit(large, loader(batch_size=32))
    trainer(tmp_path, [SimulatedRanks(4, "ddp")]).fit(small, loader(batch_size=8))
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=1e-6)


def test_compression_changes_the_mean_by_its_error_and_sends_its_bytes(tmp_path):
    exact, lossy = Watch(), Watch()
    settings = {"bucket_size": 64, "min_numel": 16, "bits": 2, "norm": "linf"}
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, [SimulatedRanks(2, "ddp"), exact], max_steps=1).fit(TinyModule(), loader())
    trainer(tmp_path, [SimulatedRanks(2, settings=settings, every_n_steps=2), lossy], logger=logger).fit(
        TinyModule(), loader()
    )
    one, other = (torch.cat([g.flatten() for g in watch.steps[0]]) for watch in (exact, lossy))
    assert 0.1 < float((one - other).norm() / one.norm()) < 2.0
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["comm/sent_bytes"]]
    assert [int(row["step"]) for row in logged] == [0, 2, 4, 6]
    assert all(float(row["comm/ratio"]) > 1.5 and float(row["comm/relative_error"]) > 0 for row in logged)


def test_running_statistics_are_those_of_the_first_rank(tmp_path):
    """What is left out with one rank: its batches alone, with the weights of all."""
    module, own = Normed(), batches()
    seen = nn.BatchNorm1d(48)

    class Repeat(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % RANKS == 0:
                with torch.no_grad():
                    seen(pl_module.net[0](batch[0]))

    run = trainer(tmp_path, [SimulatedRanks(RANKS), Repeat()], max_epochs=1)
    run.fit(module, DataLoader(own, batch_size=None))
    torch.testing.assert_close(module.net[1].running_mean, seen.running_mean)
    torch.testing.assert_close(module.net[1].running_var, seen.running_var)
    assert int(module.net[1].num_batches_tracked) == len(own) // RANKS


def test_every_rank_s_forward_pass_starts_from_the_first_one_s_buffers(tmp_path):
    seen = []

    class Counting(TinyModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            seen.append(float(self.calls))
            self.calls += 1
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, [SimulatedRanks(4)], max_epochs=1).fit(Counting(), loader())
    assert seen == [0.0] * 4 + [1.0] * 4


def test_an_epoch_that_ends_within_a_step_repeats_what_there_is(tmp_path):
    watch = Watch()
    run = trainer(tmp_path, [SimulatedRanks(3, "ddp"), watch], max_epochs=1, limit_train_batches=5)
    module = TinyModule()
    run.fit(module, loader(count=64))
    assert run.global_step == len(watch.steps) == 2
    twin, plain = TinyModule(), Watch()
    batches_of_8 = list(loader())
    begin = _after_one_step(tmp_path)
    with torch.no_grad():  # the weights that the second step began with
        for mine, first in zip(twin.parameters(), begin, strict=True):
            mine.copy_(first)
    parts = [batches_of_8[index] for index in (3, 4, 3)]
    large = (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    trainer(tmp_path, [plain], max_steps=1).fit(twin, DataLoader([large], batch_size=None))
    for one, other in zip(watch.steps[1], plain.steps[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def _after_one_step(tmp_path):
    module = TinyModule()
    run = trainer(tmp_path, [SimulatedRanks(3, "ddp")], max_steps=1)
    run.fit(module, loader())
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    def ranks():
        return SimulatedRanks(2, "nuqsgd_rotated_2bit", {"error_feedback": True, "min_numel": 16})

    whole = TinyModule()
    trainer(tmp_path, [ranks()]).fit(whole, loader())
    first = trainer(tmp_path, [ranks()], max_epochs=1)
    first.fit(TinyModule(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = TinyModule()
    trainer(tmp_path, [ranks()]).fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(rest), weights(whole))
    with pytest.raises(ValueError, match="ranks: got 4, allowed is the checkpoint's number, 2"):
        trainer(tmp_path, [SimulatedRanks(4)]).fit(TinyModule(), loader(), ckpt_path=tmp_path / "half.ckpt")


def test_parameters_that_no_rank_uses_get_no_gradient(tmp_path):
    module = TinyModule()
    module.unused = nn.Linear(2, 2)
    trainer(tmp_path, [SimulatedRanks(2)], max_epochs=1).fit(module, loader())
    assert module.unused.weight.grad is None


def test_steps_and_schedules_count_steps_of_all_ranks(tmp_path):
    seen = []

    class Scheduled(TinyModule):
        def configure_optimizers(self):
            seen.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    run = trainer(tmp_path, [SimulatedRanks(4)])
    run.fit(Scheduled(), loader())
    assert seen == [4] == [run.global_step]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 1}, "ranks: got 1, allowed are integers from 2"),
        ({"ranks": 4, "strategy": "ddp_fp16"}, "strategy: got 'ddp_fp16', allowed are ddp, nuqsgd, "),
        ({"ranks": 4, "settings": {"bit": 2}}, "settings: got 'bit', allowed are method, bits, "),
        ({"ranks": 4, "settings": {"bits": 5}}, "bits: got 5"),
        ({"ranks": 4, "strategy": "ddp", "settings": {"bits": 2}}, "allowed are none with strategy='ddp'"),
        ({"ranks": 4, "every_n_steps": 0}, "every_n_steps: got 0, allowed are integers from 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimulatedRanks(**arguments)


def test_runs_that_it_cannot_stand_for_are_refused(tmp_path):
    class Manual(TinyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    cases = (
        ("accumulate_grad_batches: allowed", TinyModule(), {"accumulate_grad_batches": 3}, []),
        ("accumulate_grad_batches: allowed", TinyModule(), {}, [GradientAccumulationScheduler({0: 1, 1: 2})]),
        ("automatic_optimization: got False", Manual(), {}, []),
    )
    for message, module, options, callbacks in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, [SimulatedRanks(2), *callbacks], **options).fit(module, loader())
    assert (
        trainer(tmp_path, [SimulatedRanks(2)], accumulate_grad_batches=2, max_epochs=1).fit(
            TinyModule(), loader()
        )
        is None
    )


def test_a_strategy_beside_it_is_refused(tmp_path):
    try:
        with pytest.raises(ValueError, match="strategy: got NUQSGDStrategy on 1 devices, allowed with"):
            trainer(tmp_path, [SimulatedRanks(2)], strategy="nuqsgd").fit(TinyModule(), loader())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_parameters_that_are_unfrozen_later_are_refused_as_ddp_would_have_to(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    module = TinyModule()
    module.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="require gradients only since training began"):
        trainer(tmp_path, [SimulatedRanks(2), Unfreeze()]).fit(module, loader())
