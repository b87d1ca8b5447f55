import os
import subprocess
import sys

import pytest

from lightning_n2uq import __version__
from lightning_n2uq.cli import commands, main


def test_usage_names_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        for name in (*commands.TRAINING_COMMANDS, *commands.COMMANDS):
            assert f"\n  {name} " in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"n2uq {__version__}\n"


def test_a_registered_command_is_imported_when_it_runs(monkeypatch, capsys, tmp_path):
    (tmp_path / "extension_under_test.py").write_text(
        "def run(arguments):\n"
        "    if arguments == ['bad']:\n"
        "        raise ValueError(\"count: got 'bad', allowed numbers\")\n"
        "    print('ran', *arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        commands.COMMANDS, "extra", commands.Command("extension_under_test:run", "an extension")
    )
    assert main(["--help"]) == 0
    assert "an extension" in capsys.readouterr().out
    assert "extension_under_test" not in sys.modules
    assert main(["extra", "a", "b"]) == 0
    assert capsys.readouterr().out == "ran a b\n"
    assert main(["extra", "bad"]) == 2
    assert capsys.readouterr().err == "n2uq: error: count: got 'bad', allowed numbers\n"


@pytest.mark.parametrize("command", list(commands.TRAINING_COMMANDS))
def test_help_shows_the_options(command, capsys, in_empty_folder):
    assert main([command, "--help", "all"]) == 0
    text = capsys.readouterr().out
    for option in (
        "--config",
        "--trainer.max_epochs",
        "--model",
        "--data",
        "--checkpoint.monitor",
        "--wandb",
    ):
        assert option in text
    assert ("--test_after_fit" in text) == (command == "fit")


def test_help_of_the_model_lists_its_arguments(capsys, in_empty_folder):
    assert main(["fit", "--model.help", "QuantizedClassifier"]) == 0
    text = capsys.readouterr().out
    for name in ("weight_bits", "activation_quantizer", "{adam,adamw,sgd}", "quantizer_lr_multiplier"):
        assert name in text


def test_the_package_and_the_light_commands_import_nothing_heavy():
    heavy = ("torch", "lightning", "wandb", "sklearn", "matplotlib", "numba", "jsonargparse")
    code = (
        "import sys, lightning_n2uq\n"
        "from lightning_n2uq.cli import main\n"
        "main(['--help']), main(['configs'])\n"
        f"sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() in ("", "[]")


@pytest.mark.parametrize(("own", "policy"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_give_their_core_away_unless_the_user_says_otherwise(own, policy):
    """OpenMP reads the variable when torch is imported, so it has to be there before."""
    code = (
        "import os, sys\n"
        "from lightning_n2uq.cli import main\n"
        "main(['--version'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | ({"OMP_WAIT_POLICY": own} if own else {}),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == policy


@pytest.mark.integration
def test_the_training_part_imports_no_logger_data_or_plot_library():
    heavy = ("wandb", "sklearn", "numba", "plotly", "triton")
    code = (
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import lightning_n2uq.modules, lightning_n2uq.datamodules, lightning_n2uq.cli.training\n"
        f"print([m for m in (*{heavy}, 'matplotlib') if m in set(sys.modules) - before])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-u", "-m", "lightning_n2uq", "configs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # at once, so that the first line already meets a closed pipe
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 0
