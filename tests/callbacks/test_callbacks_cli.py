import pytest

from lightning_n2uq.cli import main

FIT = ["fit", "--config", "digits/n2uq_w2a2", "--wandb", "disabled", "--trainer.max_epochs", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ThresholdAnnealing", "start=0.9"], "start: got 0.9, allowed is at most end, which is 0.5"),
        (
            ["ThresholdAnnealing", "schedule=quadratic"],
            "schedule: got 'quadratic', allowed are linear, cosine,",
        ),
        (["EntropyRegularizer", "layers=[fc]"], "layers: 'fc' matches no quantized layer"),
        (["QuantizationMonitor", "every_n_steps=0"], "every_n_steps: got 0, allowed are integers from 1"),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_clear_line(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    name, option = arguments
    assert main([*FIT, f"--trainer.callbacks+={name}", f"--trainer.callbacks.{option}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("n2uq: error:")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.integration
def test_the_annealed_config_trains_with_all_three_callbacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--wandb", "disabled", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    small = ["--model.init_args.backbone_args={width: 4}", "--trainer.limit_val_batches", "1"]
    penalty = ["--trainer.callbacks+=EntropyRegularizer", "--trainer.callbacks.weight", "10"]
    assert main(["fit", "--config", "digits/n2uq_w2a2_annealed", *options, *small, *penalty]) == 0
    (folder,) = (tmp_path / "runs" / "digits" / "n2uq_w2a2_annealed").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.csv", "quantization.jsonl", "confusion.json", "config.yaml"} <= names
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "quant/layer1.0.conv1/threshold_1" in header


@pytest.mark.integration
def test_the_remedies_against_oscillation_work_together_and_evaluation_stays_as_deployed(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    options = [
        "--wandb",
        "disabled",
        "--trainer.max_epochs",
        "2",
        "--model.init_args.backbone_args={width: 4}",
    ]
    freezing = ["--trainer.callbacks+=OscillationControl", "--trainer.callbacks.momentum", "0.005"]
    norms = ["--trainer.callbacks+=BatchNormReestimation", "--trainer.callbacks.batches", "2"]
    assert main(["fit", "--config", "digits/n2uq_w2a2", *options, *freezing, *norms]) == 0
    (folder,) = (tmp_path / "runs" / "digits" / "n2uq_w2a2").iterdir()
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"oscillation/frozen", "oscillation/layer1.0.conv1/oscillating"} <= set(header)
    said = [record.getMessage() for record in caplog.records]
    assert any("weights are frozen" in line for line in said)
    assert [line for line in said if line.startswith("evaluation:")] == [
        "evaluation: the integer network, as deployed"
    ]
