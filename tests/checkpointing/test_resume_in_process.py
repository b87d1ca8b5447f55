"""Interruptions of a run in this process: at any step, with accumulation, beside a validation."""

import math
import signal

import pytest
import torch
from interrupting import StopAt
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_n2uq.callbacks import SimulatedRanks
from lightning_n2uq.checkpointing import AtomicCheckpointIO, ExactResume
from lightning_n2uq.checkpointing.exact_resume import RunInterrupted
from lightning_n2uq.datamodules import DigitsDataModule

OPTIONS = {
    "accelerator": "cpu", "devices": 1, "max_epochs": 2, "limit_train_batches": 6, "limit_val_batches": 1,
    "num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Net(LightningModule):
    """Draws random numbers in every step, so that one too many or too few shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10))
        self.seen: list[float] = []

    def training_step(self, batch, _) -> torch.Tensor:
        images, labels = batch[:2]
        self.seen.append(images.double().sum().item())
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, _) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def run(folder, resume=None, hint="go on", more=(), **options) -> tuple[Net, Trainer]:
    """One run of two epochs; the order of images and the random numbers depend on the seed alone."""
    seed_everything(0, verbose=False)
    model = Net()
    callbacks = [
        ExactResume(hint=hint), StopAt(), ModelCheckpoint(folder, save_top_k=0), *more,
    ]  # fmt: skip
    trainer = Trainer(
        default_root_dir=folder, callbacks=callbacks, plugins=[AtomicCheckpointIO()], **OPTIONS | options
    )
    trainer.fit(model, DigitsDataModule(batch_size=16, shift=1, num_workers=0), ckpt_path=resume)
    return model, trainer


def interrupted(folder, monkeypatch, capsys, at: str, **options) -> tuple[int, str]:
    """Exit code and the line on stderr of a run that gets a signal."""
    monkeypatch.setenv("STOP_AT", at)
    with pytest.raises(RunInterrupted) as ended:
        run(folder, hint="go on with {path}", **options)
    monkeypatch.delenv("STOP_AT")
    return ended.value.code, capsys.readouterr().err


pytestmark = pytest.mark.filterwarnings("ignore:.*is not empty", "ignore:.*smaller than the logging interval")


@pytest.mark.parametrize(
    ("at", "saved", "options"),
    [
        ("2 SIGTERM", 2, {}),
        ("6 SIGTERM", 6, {}),  # the epoch's last
        ("8 SIGINT", 8, {}),
        ("3 SIGUSR1", 3, {"val_check_interval": 3}),  # a validation follows
        ("2 SIGTERM", 2, {"accumulate_grad_batches": 2}),
        ("3 SIGTERM", 3, {"accumulate_grad_batches": 2}),  # the epoch's last
        # It validates before the step.
        ("0 SIGTERM", 1, {"accumulate_grad_batches": 4, "val_check_interval": 3}),
    ],
)
def test_an_interrupted_run_ends_like_a_whole_one(tmp_path, monkeypatch, capsys, at, saved, options) -> None:
    whole, _ = run(tmp_path / "whole", **options)
    name = at.split()[1]
    code, line = interrupted(tmp_path / "cut", monkeypatch, capsys, at, **options)
    path = tmp_path / "cut" / "interrupted.ckpt"
    assert code == 128 + getattr(signal, name)
    assert f"stopped by {name} after step {saved}, saved in {path}; go on with {path}" in line
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == saved
    assert len(content["exact_resume"]["ranks"]) == 1
    resumed, trainer = run(tmp_path / "cut", path, **options)
    accumulated = options.get("accumulate_grad_batches", 1)
    assert trainer.global_step == 2 * math.ceil(6 / accumulated)
    assert whole.seen[-len(resumed.seen) :] == resumed.seen
    assert len(resumed.seen) == 12 - saved * accumulated
    for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert not path.exists()  # the complete run has no use for it


@pytest.mark.parametrize(("at", "batches"), [("0 SIGTERM", 3), ("1 SIGTERM", 3)])
def test_a_signal_while_gradients_accumulate_waits_for_the_step(
    tmp_path, monkeypatch, capsys, at, batches
) -> None:
    code, line = interrupted(tmp_path, monkeypatch, capsys, at, accumulate_grad_batches=3)
    assert code == 143
    assert "after step 1, " in line
    loop = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert loop["epoch_loop.batch_progress"]["current"]["processed"] == batches


class SaveAtValidation(Callback):
    """Writes a checkpoint at every validation."""

    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{len(pl_module.seen)}.ckpt")


def test_a_checkpoint_between_accumulated_batches_keeps_their_gradients(tmp_path) -> None:
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3}
    whole, _ = run(tmp_path, more=[SaveAtValidation()], **options)
    sizes = {}
    for batches in (3, 6, 9):
        saved = torch.load(tmp_path / f"{batches}.ckpt", weights_only=True)["exact_resume"]["ranks"]
        sizes[batches] = len(saved[0].get("gradients", ()))
    for batches in (3, 9):
        resumed, _ = run(tmp_path, tmp_path / f"{batches}.ckpt", **options)
        assert resumed.seen == whole.seen[batches:]
        for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(expected, found)
    assert sizes == {3: 2, 6: 0, 9: 2}  # a weight and a bias; after a step there is nothing to keep


def test_a_checkpoint_between_simulated_ranks_keeps_what_they_have(tmp_path) -> None:
    def ranks() -> SimulatedRanks:
        return SimulatedRanks(4, "nuqsgd_rotated", {"error_feedback": True, "min_numel": 16})

    options = {"val_check_interval": 3}
    whole, _ = run(tmp_path, more=[ranks(), SaveAtValidation()], **options)
    for batches in (3, 6, 9):
        resumed, _ = run(tmp_path, tmp_path / f"{batches}.ckpt", more=[ranks()], **options)
        assert resumed.seen == whole.seen[batches:]
        for expected, found in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(expected, found)


def test_a_trial_run_saves_nothing(tmp_path, monkeypatch, capsys) -> None:
    code, line = interrupted(tmp_path, monkeypatch, capsys, "1 SIGTERM", fast_dev_run=2)
    assert code == 143
    assert line.endswith("stopped by SIGTERM after step 1, nothing saved\n")
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_handlers_are_given_back_after_a_run_and_after_an_error(tmp_path, monkeypatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    run(tmp_path, max_epochs=1)
    monkeypatch.setattr(Net, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, max_epochs=1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
