"""`run.json`: the facts of a run that neither its config nor its metrics tell."""

import json

from small_run import SMALL

from lightning_n2uq.cli import main
from lightning_n2uq.cli.run_record import RunRecord


def test_a_run_keeps_its_facts(trained):
    folder, _ = trained
    record = json.loads((folder / "run.json").read_text())
    quantized, floats = record["layers"]
    assert (quantized["weight_method"], quantized["weight_bits"], quantized["activation_bits"]) == (
        "n2uq",
        2,
        2,
    )
    assert (floats["weight_method"], floats["count"]) == ("float", 2)
    assert record["data"] == "DigitsDataModule"
    assert record["num_classes"] == 10
    assert set(record["samples"]) == {"train", "val"}
    assert 0 < record["packed_bytes"] < record["float_bytes"] == 4 * record["parameters"]
    assert record["seconds"] > 0


def test_seconds_of_a_resumed_run_add_up(tmp_path):
    record = RunRecord(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"seconds": 100.0}))
    trainer, module = _trainer(ckpt_path="last.ckpt"), _module()
    record.on_train_start(trainer, module)
    assert json.loads((tmp_path / "run.json").read_text())["seconds"] >= 100.0
    fresh = RunRecord(str(tmp_path))
    fresh.on_train_start(_trainer(ckpt_path=None), module)
    assert json.loads((tmp_path / "run.json").read_text())["seconds"] < 100.0


def test_a_run_that_keeps_no_files_has_no_record(in_empty_folder):
    off = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1", *off]) == 0
    assert not list(in_empty_folder.rglob("run.json"))


def _module():
    from lightning_n2uq.modules import QuantizedClassifier

    return QuantizedClassifier(backbone="resnet20", backbone_args={"width": 4})


def _trainer(**attributes):
    class Trainer:
        world_size, is_global_zero, loggers, checkpoint_callback, fast_dev_run = 1, True, [1], None, False
        datamodule = None

    trainer = Trainer()
    trainer.__dict__.update(attributes)
    return trainer
