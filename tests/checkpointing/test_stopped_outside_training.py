"""A signal outside of the training steps ends a command with the signal's exit code, never with 0."""

import pytest

import runs

CODES = {"SIGTERM": 143, "SIGINT": 130}


@pytest.mark.parametrize(
    ("command", "hook", "name"),
    [
        ("fit", "setup", "SIGTERM"),
        ("fit", "setup", "SIGINT"),
        ("fit", "on_validation_batch_end", "SIGTERM"),  # of the sanity check
        ("test", "on_test_batch_end", "SIGTERM"),
        ("test", "on_test_batch_end", "SIGINT"),
        ("validate", "on_validation_batch_end", "SIGTERM"),
        ("predict", "on_predict_batch_end", "SIGTERM"),
    ],
)
def test_a_signal_outside_of_training_ends_with_its_code(tmp_path, command, hook, name):
    runs.write_config(tmp_path)
    done = runs.command(command, tmp_path, STOP_IN=f"{hook} {name}")
    assert done.returncode == CODES[name], done.stderr
    assert f"stopped by {name}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_in_the_test_after_fit_ends_with_its_code(tmp_path):
    runs.write_config(tmp_path, max_epochs=1)
    done = runs.command("fit", tmp_path, "--test_after_fit", "true", STOP_IN="on_test_batch_end SIGTERM")
    assert done.returncode == 143, done.stderr
    (folder,) = runs.run_folders(tmp_path)
    assert (folder / "last.ckpt").is_file()
