import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_run import SMALL

import warm
from lightning_n2uq.cli import main
from lightning_n2uq.cli.arguments import command_to_resume, with_saved_config
from lightning_n2uq.cli.run_lock import RunLock
from lightning_n2uq.modules import QuantizedClassifier


def run(command, *arguments):
    assert main([command, *arguments]) == 0
    folders = [path for path in Path("runs").glob("digits/*/*") if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime_ns)


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_run_leaves_config_metrics_and_checkpoints_in_one_folder(trained):
    folder, out = trained
    assert folder.parts[-4:-1] == ("runs", "digits", "n2uq_w2a2")
    assert {"0.ckpt", "3.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "hparams.yaml"} <= {
        path.name for path in folder.iterdir()
    }
    rows = read_rows(folder / "metrics.csv")
    assert {"train/acc", "val/acc", "val/acc5", "val/loss", "lr-Adam/quantizer", "lr-Adam/weights"} <= set(
        rows[0]
    )
    assert "val/acc (best) " in out
    assert f"files          runs/digits/n2uq_w2a2/{folder.name}\n" in out


@pytest.mark.integration
def test_the_saved_config_repeats_the_run(trained, in_empty_folder):
    folder, _ = trained
    text = (folder / "config.yaml").read_text()
    saved = yaml.safe_load(text)
    assert text.startswith("# name: digits/n2uq_w2a2\n")
    assert saved["model"]["init_args"]["backbone_args"] == {"width": 4}
    assert saved["trainer"]["max_epochs"] == 4
    assert folder.name not in text  # nothing that ties it to this run's folder
    again = run("fit", "--config", str(folder / "config.yaml"))
    assert again.parent.parts == ("runs", "digits", "n2uq_w2a2")
    first, second = weights(folder / "last.ckpt"), weights(again / "last.ckpt")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_config_reaches_the_logger(trained):
    logged = yaml.safe_load((trained[0] / "hparams.yaml").read_text())
    assert logged["config"]["data"]["class_path"].endswith("DigitsDataModule")
    assert logged["weight_bits"] == 2


def test_checkpoints_load_without_running_code_and_know_the_shapes_of_the_data(trained):
    path = trained[0] / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["in_channels"] == 1
    assert checkpoint["hyper_parameters"]["image_size"] == 8
    model = QuantizedClassifier.load_from_checkpoint(path).eval()
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.integration
def test_a_checkpoint_alone_is_enough_to_test_validate_and_predict(trained, in_empty_folder, capsys):
    ckpt = str(trained[0] / "last.ckpt")
    for command, metric in (("test", "test/acc"), ("validate", "val/acc")):
        capsys.readouterr()
        evaluated = run(command, "--ckpt_path", ckpt)
        assert evaluated.name.endswith(f"-{command}")
        assert f"\n{metric} " in capsys.readouterr().out
    predicted = run("predict", "--ckpt_path", ckpt, "--trainer.limit_predict_batches", "1")
    rows = read_rows(predicted / "predictions.csv")
    assert len(rows) == 128  # one batch
    assert sum(float(rows[0][f"probability_{c}"]) for c in range(10)) == pytest.approx(1, abs=1e-5)


@pytest.mark.integration
def test_predictions_of_two_ranks_are_those_of_one(trained, in_empty_folder):
    ckpt = ["--ckpt_path", str(trained[0] / "last.ckpt"), "--data.batch_size", "50"]
    one = run("predict", *ckpt)
    done = warm.n2uq(
        "predict", *ckpt, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir",
        "two", cwd=in_empty_folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = Path("two").rglob("predictions*.csv")
    rows = read_rows(path)
    assert [int(row["index"]) for row in rows] == list(range(180))
    assert [row["label"] for row in rows] == [row["label"] for row in read_rows(one / "predictions.csv")]


@pytest.mark.integration
def test_arguments_of_training_alone_are_free_in_evaluation(trained, in_empty_folder, capsys):
    ckpt = ["--ckpt_path", str(trained[0] / "last.ckpt")]
    free = ["--model.lr", "0.5", "--model.weight_gradient", "straight_through", "--model.schedule", "cosine"]
    assert main(["test", *SMALL, *free, *ckpt]) == 0
    assert "test/acc " in capsys.readouterr().out


@pytest.mark.integration
def test_a_checkpoint_called_best_uses_the_config_beside_it(trained, in_empty_folder, capsys):
    for name in ("config.yaml", "last.ckpt"):
        shutil.copy(trained[0] / name, in_empty_folder)
    Path("last.ckpt").rename("best.ckpt")
    assert main(["test", "--ckpt_path", "best.ckpt"]) == 0
    assert "test/acc " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "uses_it"),
    [
        (["--ckpt_path", "best.ckpt"], True),
        (["--ckpt_path=last.ckpt", "--data.batch_size", "3"], True),
        (["--trainer.default_root_dir", "my-c elsewhere", "--ckpt_path", "best.ckpt"], True),
        (["--ckpt_path", "best"], False),
        (["--ckpt_path", "best.ckpt", "-c", "digits/float"], False),
        (["--ckpt_path", "best.ckpt", "--model=QuantizedClassifier"], False),
        (["--ckpt_path", "best.ckpt", "--model.backbone", "resnet20"], False),
        (["--ckpt_path"], False),
        ([], False),
    ],
)
def test_when_the_config_beside_a_checkpoint_is_used(arguments, uses_it, in_empty_folder):
    Path("config.yaml").touch()
    assert with_saved_config(arguments) == (["--config", "config.yaml"] if uses_it else []) + arguments


def test_the_command_to_resume_leaves_out_where_the_run_started():
    started = ["--config", "a b.yaml", "--resume=auto", "--ckpt_path", "x.ckpt", "--model.lr", "0.1"]
    shown = "go on with: n2uq fit --config 'a b.yaml' --model.lr 0.1 --resume auto"
    assert command_to_resume(started) == shown


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_of_another_network_is_refused_in_one_line(trained, in_empty_folder, capsys, command):
    other = ["--model.weight_bits", "4", "--ckpt_path", str(trained[0] / "last.ckpt")]
    assert main([command, *SMALL, *other]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    message = "ckpt_path: the checkpoint's network has weight_bits 2, but the model has weight_bits 4"
    assert line == f"n2uq: error: {message}"
    assert not list(in_empty_folder.rglob("*.csv"))


@pytest.mark.integration
def test_test_after_fit_reports_the_best_checkpoint(in_empty_folder, capsys):
    run("fit", *SMALL, "--trainer.max_epochs", "1", "--test_after_fit", "true")
    out = capsys.readouterr().out
    assert "test/acc " in out
    assert "val/acc " in out


@pytest.mark.integration
def test_switches_of_the_trainer_turn_default_callbacks_off(in_empty_folder):
    off = ("logger", "enable_checkpointing", "enable_progress_bar")
    switches = [text for name in off for text in (f"--trainer.{name}", "false")]
    folder = run("fit", *SMALL, "--trainer.max_epochs", "1", *switches)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.integration
def test_the_command_itself_with_wandb_offline_by_default(in_empty_folder):
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    environment["OMP_NUM_THREADS"] = "1"  # two threads of a tiny network fight over a busy machine's cores
    command = [sys.executable, "-m", "lightning_n2uq", "fit", *SMALL]
    done = subprocess.run(
        [*command, "--trainer.max_epochs", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    folder = Path(done.stdout.split()[-1])
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"weight_quantizer" in content
    assert b"val/acc" in content


def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_one(trained, in_empty_folder):
    whole, _ = trained
    # The checkpoint after two epochs is what a run killed there leaves; the schedule spans four.
    resumed = run("fit", *SMALL, "--trainer.max_epochs", "4", "--ckpt_path", str(whole / "1.ckpt"))
    first, second = (torch.load(path / "last.ckpt", weights_only=True) for path in (whole, resumed))
    assert first["global_step"] == second["global_step"] == 16
    differing = [k for k, v in first["state_dict"].items() if not torch.equal(v, second["state_dict"][k])]
    assert differing == []
    half = torch.load(whole / "1.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(half["backbone.fc.weight"], first["state_dict"]["backbone.fc.weight"])
    for left, right in zip(
        first["optimizer_states"][0]["state"].values(),
        second["optimizer_states"][0]["state"].values(),
        strict=True,
    ):
        assert torch.equal(left["exp_avg_sq"], right["exp_avg_sq"])


@pytest.mark.integration
def test_resume_auto_finds_checkpoints_in_a_folder_of_their_own(in_empty_folder, capsys):
    own = ["--checkpoint.dirpath", "elsewhere", *SMALL]
    first = run("fit", *own, "--trainer.max_epochs", "1", "--resume", "auto")
    nothing = f"resume: no checkpoint in {first.parent} or elsewhere, starting afresh"
    assert nothing in capsys.readouterr().err
    second = run("fit", *own, "--trainer.max_epochs", "2", "--resume", "auto")
    assert "resume: going on from elsewhere/last.ckpt" in capsys.readouterr().err
    assert second != first
    saved = torch.load("elsewhere/last.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 8)


@pytest.mark.integration
def test_another_seed_is_another_run_and_joins_none(in_empty_folder, capsys):
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    first = run("fit", *SMALL, *short, "--resume", "auto")
    capsys.readouterr()
    second = run("fit", *SMALL, *short, "--resume", "auto", "--seed_everything", "2")
    assert second != first
    said = capsys.readouterr().err
    assert f"resume: {first} is another run (seed_everything 0, got 2)" in said
    assert "resume: no run of this config in runs/digits/n2uq_w2a2, starting afresh" in said
    assert "seed_everything: 0" in (first / "config.yaml").read_text()
    again = run("fit", *SMALL, *short, "--resume", "auto")
    assert again == first


def test_a_setting_that_a_resumed_run_would_not_follow_is_refused(trained, in_empty_folder, capsys):
    checkpoint = ["--ckpt_path", str(trained[0] / "1.ckpt"), "--trainer.max_epochs", "4"]
    assert main(["fit", *SMALL, *checkpoint, "--model.lr", "0.1", "--data.batch_size", "32"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.init_args.batch_size 128, got 32; model.init_args.lr 0.005, got 0.1" in line
    assert not list(in_empty_folder.rglob("*.ckpt"))


@pytest.mark.integration
def test_resuming_never_starts_over_where_checkpoints_cannot_be_used(in_empty_folder, capsys):
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    folder = run("fit", *SMALL, *short)
    for path in folder.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-200])
    capsys.readouterr()
    assert main(["fit", *SMALL, *short, "--resume", "auto"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("n2uq: error: resume: ")
    assert "is damaged" in line
    assert line.endswith("without --resume a new run starts")
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


@pytest.mark.integration
def test_a_folder_in_which_another_process_trains_is_left_alone(in_empty_folder, capsys):
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    folder = run("fit", *SMALL, *short)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert ".lock" not in {path.name for path in before}
    lock = RunLock()
    lock.take(str(folder))
    try:
        assert main(["fit", *SMALL, *short, "--resume", "auto"]) == 2
    finally:
        lock.release()
    assert f"{str(folder)!r} is being written by another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_command_that_finds_its_folder_taken_leaves_no_folder_of_its_own(in_empty_folder):
    lock = RunLock()
    lock.take("shared")
    try:
        assert main(["fit", *SMALL, "--checkpoint.dirpath", "shared"]) == 2
    finally:
        lock.release()
    assert not Path("runs").exists()


def test_a_run_that_wrote_nothing_names_no_folder(in_empty_folder, capsys):
    assert main(["fit", *SMALL, "--trainer.fast_dev_run", "1"]) == 0
    assert "\nfiles " not in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.integration
def test_a_terminal_without_unicode_shows_a_run_to_its_end(in_empty_folder):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lightning_n2uq", "fit", *SMALL, "--trainer.fast_dev_run", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert b"val/acc" in done.stdout
    assert b"\\u2022" in done.stdout + done.stderr  # what it cannot show
