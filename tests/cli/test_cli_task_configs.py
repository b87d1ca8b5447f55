"""Every config of `tasks/` trains one step with quantized layers, on data that is made up or at hand."""

from pathlib import Path

import pytest
import yaml

import lightning_n2uq.configs
from lightning_n2uq.cli import main

FOLDER = Path(lightning_n2uq.configs.__path__[0])
NAMES = sorted(path.stem for path in (FOLDER / "tasks").glob("*.yaml"))
SCENES = ["--data.image_size", "32", "--data.num_train", "4", "--data.num_val", "2", "--data.batch_size", "2"]
# Smaller data and networks of the same kind, for a test's time.
SMALLER = {
    "detection_n2uq_w4a4": [*SCENES, "--model.network_args", "{min_size: 32, max_size: 32}"],
    "language_modelling_seq_w2a8": ["--data.batch_size", "2", "--data.length", "16"],
    "segmentation_timm_n2uq_w4a4": [*SCENES, "--model.network", "timm/test_resnet"],
    "segmentation_torchvision_n2uq_w4a4": SCENES,
    "sequence_classification_lsq_w4a4": ["--data.batch_size", "4"],
}
METRICS = {
    "detection": "val/map",
    "language": "val/perplexity",
    "segmentation": "val/miou",
    "sequence": "val/acc",
}


def test_every_config_has_a_quick_form():
    assert sorted(SMALLER) == NAMES


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_every_task_trains_one_step_and_logs_its_metric(name, in_empty_folder, capsys):
    command = [
        "fit",
        "--config",
        f"tasks/{name}",
        "--trainer.fast_dev_run",
        "1",
        "--trainer.accelerator",
        "cpu",
    ]
    code = main([*command, "--trainer.enable_model_summary", "false", *SMALLER[name]])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert METRICS[name.partition("_")[0]] in out.out
    assert "QuantizeModel: " in out.err
    assert not list(in_empty_folder.iterdir())


@pytest.mark.integration
@pytest.mark.parametrize("name", ["segmentation_timm_n2uq_w4a4", "sequence_classification_lsq_w4a4"])
def test_a_trained_task_is_exported_from_its_run(name, in_empty_folder, capsys):
    """The number of classes comes from the data, batches hold labels, or names."""
    command = ["fit", "--config", f"tasks/{name}", "--wandb", "disabled", "--model.warmup_steps", "0"]
    for option in ("accelerator cpu", "max_epochs 1", "limit_train_batches 2", "limit_val_batches 1"):
        command += f"--trainer.{option}".split()
    assert main([*command, "--trainer.enable_model_summary", "false", *SMALLER[name]]) == 0
    (checkpoint,) = in_empty_folder.rglob("best.ckpt")
    capsys.readouterr()
    export = [
        "export",
        "--ckpt",
        str(checkpoint),
        "-o",
        "net.onnx",
        "--verify",
        "run",
        "--verify-images",
        "1",
    ]
    assert main(export) == 0
    out = capsys.readouterr().out
    assert "batch size any" in out
    assert "all differences are codes at thresholds and roundings" in out


@pytest.mark.parametrize("name", NAMES)
def test_task_configs_follow_the_house_form(name):
    text = (FOLDER / "tasks" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"n2uq fit --config tasks/{name}.yaml" in text
    config = yaml.safe_load(text)
    assert set(config) == {"seed_everything", "trainer", "checkpoint", "model", "data"}
    assert config["checkpoint"]["monitor"] == METRICS[name.partition("_")[0]]
    assert [callback["class_path"] for callback in config["trainer"]["callbacks"]] == ["QuantizeModel"]
