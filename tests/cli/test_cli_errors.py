import io
import pickle

import pytest
import torch

from lightning_n2uq.cli import main

BASE = ["fit", "--config", "digits/n2uq_w2a2.yaml"]

# Arguments, and what the line has to name: the key, the value, what is allowed.
CASES = {
    "bits too small": (["--model.weight_bits", "0"], ["weight_bits", "0", "2", "8"]),
    "bits too large": (["--model.activation_bits", "9"], ["activation_bits", "9", "2", "8"]),
    "bits of a float": (["--model.weight_quantizer", "float"], ["weight_bits", "2", "32"]),
    "bits no number": (["--model.weight_bits", "x"], ["model.weight_bits", "'x'", "int"]),
    "unknown quantizer": (["--model.weight_quantizer", "foo"], ["weight_quantizer", "'foo'", "n2uq", "lsq"]),
    "unknown backbone": (["--model.backbone", "foo"], ["backbone", "'foo'", "resnet20"]),
    "unknown optimizer": (["--model.optimizer", "foo"], ["model.optimizer", "'foo'", "adam, adamw, sgd"]),
    "negative lr": (["--model.lr", "-1"], ["lr", "-1", "is above 0"]),
    "wrong backbone key": (["--model.backbone_args", "{widht: 3}"], ["resnet20", "widht"]),
    "wrong model key": (
        ["--model.weight_bit", "3"],
        ["model.weight_bit", "'3'", "'weight_bits'", "backbone"],
    ),
    "wrong data key": (["--data.batchsize", "3"], ["data.batchsize", "'3'", "'batch_size'"]),
    "wrong trainer key": (["--trainer.max_epoch", "3"], ["trainer.max_epoch", "'max_epochs'", "devices"]),
    "wrong key": (["--modle", "3"], ["modle", "'model'", "trainer", "data"]),
    "wrong trainer value": (["--trainer.max_epochs", "x"], ["trainer.max_epochs", "'x'", "int or null"]),
    "wrong model class": (["--model", "Foo"], ["model", "'Foo'", "QuantizedClassifier"]),
    "class of another kind": (["--model", "DigitsDataModule"], ["model", "'DigitsDataModule'", "Quantized"]),
    "wrong data class": (["--data", "foo.Bar"], ["data", "'foo.Bar'", "DigitsDataModule"]),
    "wrong callback": (["--trainer.callbacks", "Foo"], ["trainer.callbacks", "'Foo'", "EarlyStopping"]),
    "wrong callback key": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitr", "x"],
        ["trainer.callbacks.monitr", "'x'", "'monitor'"],
    ),
    "callback without its argument": (
        ["--trainer.callbacks+=EarlyStopping"],
        ["trainer.callbacks.monitor: missing", "EarlyStopping has no default"],
    ),
    "large batch": (["--data.batch_size", "100000"], ["batch_size", "100000", "is 1 to 1437"]),
    "no such checkpoint": (["--ckpt_path", "nope.ckpt"], ["ckpt_path", "'nope.ckpt'"]),
    "no such teacher": (["--model.teacher", "nope.ckpt"], ["teacher", "'nope.ckpt'"]),
    "no such init": (["--model.init_from", "nope.ckpt"], ["init_from", "'nope.ckpt'"]),
    "no such config": (
        ["--config", "digits/n2uq.yaml"],
        ["config", "'digits/n2uq.yaml'", "digits/n2uq_w2a2"],
    ),
    "wrong accelerator": (["--trainer.accelerator", "foo"], ["accelerator", "'foo'", "cpu"]),
    "linked from the data": (["--model.num_classes", "9"], ["model.num_classes", "9", "10", "data"]),
    "wandb mode": (["--wandb", "maybe"], ["wandb", "'maybe'", "online, offline, disabled"]),
}


def error_line(capsys, arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert code == 2
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("n2uq: error: ")
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gives_one_line_and_exit_code_2(case, capsys, in_empty_folder):
    arguments, named = CASES[case]
    line = error_line(capsys, BASE + arguments)
    assert [text for text in named if text not in line] == []
    if case not in ("no such teacher", "no such init"):  # noticed when the run has its folder
        assert not list(in_empty_folder.iterdir())


@pytest.mark.integration
def test_the_same_mistakes_in_yaml(capsys, in_empty_folder):
    config = in_empty_folder / "mine.yaml"
    text = "model:\n  class_path: {}\n  init_args:\n    {}\ndata:\n  class_path: DigitsDataModule\n"
    for name, line, named in (
        ("QuantizedClassifier", "weight_bit: 3", ["model.weight_bit", "got 3", "'weight_bits'"]),
        ("QuantizedClassifier", "weight_bits: two", ["model.weight_bits", "'two'", "int"]),
        ("QuantizedClassifier", "weight_bits: 9", ["weight_bits", "9", "8"]),
        ("QuantizedClassifer", "weight_bits: 2", ["'QuantizedClassifer'", "'QuantizedClassifier'"]),
        ("QuantizedClassifier", "weight_bits: [", ["mine.yaml"]),
    ):
        config.write_text(text.format(name, line))
        found = error_line(capsys, ["fit", "--config", str(config)])
        assert [text for text in named if text not in found] == []
    config.write_text("modle: {lr: 3}\n" + text.format("QuantizedClassifier", "lr: 0.1"))
    assert "modle" in error_line(capsys, ["fit", "--config", str(config)])
    assert [path.name for path in in_empty_folder.iterdir()] == ["mine.yaml"]


def test_damaged_and_foreign_checkpoints(capsys, in_empty_folder):
    (in_empty_folder / "cut.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    assert "cut.ckpt" in error_line(capsys, [*BASE, "--ckpt_path", "cut.ckpt"])
    torch.save({"weights": torch.zeros(1)}, "foreign.ckpt")
    line = error_line(capsys, [*BASE, "--model.init_from", "foreign.ckpt"])
    assert "init_from" in line
    assert "foreign.ckpt" in line


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.integration
def test_a_checkpoint_that_carries_code_is_refused(capsys, in_empty_folder):
    torch.save({"state_dict": {}, "hyper_parameters": {}, "x": _Code()}, "evil.ckpt", pickle_module=pickle)
    for flag in ("--model.init_from", "--model.teacher", "--ckpt_path"):
        code = main([*BASE, flag, "evil.ckpt"])
        captured = capsys.readouterr()
        assert code == 2
        assert "this must not run" not in captured.out
        assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["frobnicate"], ["fit"], ["fit", "--config"], ["test", "--ckpt_path"]])
def test_incomplete_commands(arguments, capsys, in_empty_folder):
    error_line(capsys, arguments)


def test_a_release_without_a_private_name_is_one_line(capsys, in_empty_folder, monkeypatch):
    from lightning_n2uq.cli import training
    from lightning_n2uq.utils import compat

    monkeypatch.setattr(training, "quiet_lightning", lambda: compat.require(training.LightningCLI, "_gone"))
    line = error_line(capsys, BASE)
    assert "lightning: got 2." in line
    assert "LightningCLI._gone; allowed is lightning>=2.5.5,<2.7" in line


def test_debug_keeps_the_traceback(in_empty_folder, monkeypatch):
    with pytest.raises(ValueError, match="weight_bits"):
        main([*BASE, "--model.weight_bits", "9", "--debug"])
    monkeypatch.setenv("N2UQ_DEBUG", "1")
    with pytest.raises(ValueError, match="weight_bits"):
        main([*BASE, "--model.weight_bits", "9"])


@pytest.mark.integration
def test_an_error_in_training_is_not_taken_for_a_mistake(in_empty_folder, monkeypatch):
    from lightning_n2uq.cli.failures import TrainingFailedError
    from lightning_n2uq.modules import QuantizedClassifier

    step = QuantizedClassifier.training_step

    def failing_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("inside of the training loop")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(QuantizedClassifier, "training_step", failing_step)
    with pytest.raises(TrainingFailedError, match="failed at step 1"):
        main(["fit", "--config", "digits/n2uq_w2a2", "--trainer.logger", "false", "--wandb", "disabled"])


@pytest.mark.integration
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_runs_out_in_a_step_is_one_line(error, in_empty_folder, monkeypatch, capsys):
    from lightning_n2uq.modules import QuantizedClassifier

    taken = []

    def step(self, batch, batch_idx):
        taken.append(batch_idx)
        if len(taken) > 2:
            raise error
        return self(batch[0]).square().mean()

    monkeypatch.setattr(QuantizedClassifier, "training_step", step)
    assert main(["fit", "--config", "digits/n2uq_w2a2.yaml", "--model.backbone_args", "{width: 4}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "n2uq: error" in line]
    assert lines == [f"n2uq: error: out of memory; a smaller data.batch_size needs less ({error})"]


def test_what_another_package_cannot_unpickle_is_not_taken_for_a_checkpoint():
    from lightning_n2uq.cli.errors import is_user_error

    def error_of(read):
        try:
            read()
        except pickle.UnpicklingError as error:
            return error
        raise AssertionError

    code = io.BytesIO()
    torch.save({"x": _Code()}, code, pickle_module=pickle)
    assert is_user_error(error_of(lambda: torch.load(io.BytesIO(code.getvalue()), weights_only=True)))
    assert not is_user_error(error_of(lambda: pickle.loads(b"\x80\x05\x8c\x08cut")))
