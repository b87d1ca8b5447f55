"""Finders that would go on into training are refused; what a Tuner finds is what is trained."""

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_n2uq.cli import main
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier

SHAPE = {"num_classes": 4, "image_size": 8, "in_channels": 1}


def parts(tmp_path, callbacks=(), **options):
    runner = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, callbacks=[*callbacks], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    data = SyntheticDataModule(batch_size=16, num_train=256, num_val=16, **SHAPE)
    return runner, QuantizedClassifier(**SHAPE), data


@pytest.mark.parametrize(
    ("finder", "argument"),
    [(BatchSizeFinder, "data.batch_size"), (LearningRateFinder, "model.lr")],
)
def test_a_finder_that_goes_on_into_training_is_refused(tmp_path, finder, argument):
    runner, model, data = parts(tmp_path, [finder()])
    line = (
        rf"trainer.callbacks: got {finder.__name__}, allowed is {argument} itself: search with .*Tuner first"
    )
    with pytest.raises(ValueError, match=line):
        runner.fit(model, data)
    assert runner.global_step == 0


@pytest.mark.parametrize("finder", ["BatchSizeFinder", "LearningRateFinder"])
def test_the_command_refuses_a_finder_in_one_line(tmp_path, finder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["fit", "--config", "digits/n2uq_w2a2.yaml", f"--trainer.callbacks+={finder}"])
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"trainer.callbacks: got {finder}, allowed is " in lines[0]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_what_a_tuner_finds_is_what_is_trained(tmp_path):
    runner, model, data = parts(tmp_path)
    found = Tuner(runner).scale_batch_size(
        model, datamodule=data, mode="power", init_val=2, max_trials=2, steps_per_trial=1, max_val=64
    )
    assert data.batch_size == found == 4
    rate = Tuner(runner).lr_find(model, datamodule=data, num_training=40).suggestion()
    assert model.hparams.lr == rate
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(max(group["lr"] for group in trainer.optimizers[0].param_groups))

    parts(tmp_path, [Rates()])[0].fit(model, data)
    steps = 2 * 256 // 4
    assert seen == pytest.approx([rate * (1 - step / steps) for step in range(steps)])
