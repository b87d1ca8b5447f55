"""Every precision of the Trainer that a CPU has, with the model summary on."""

import pytest

from lightning_n2uq.cli import main

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_run_in_another_precision_trains_and_summarizes(precision, in_empty_folder, capsys):
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    optimizer = ["--model.optimizer", "sgd", "--model.lr", "1e-3"]  # Adam's epsilon is 0 in float16
    network = ["--config", "digits/n2uq_w2a2.yaml", "--model.backbone_args", "{width: 4}"]
    code = main(["fit", *network, *optimizer, *short, "--trainer.precision", precision])
    captured = capsys.readouterr()
    assert code == 0, captured.err[-1000:]
    assert "backbone" in captured.out  # a row of the summary
    assert "val/acc" in captured.out
