import errno
import os
import shutil
import subprocess

import pytest
import torch

from lightning_n2uq._version import __version__
from lightning_n2uq.checkpointing import (
    AtomicCheckpointIO,
    CheckpointWriteError,
    DamagedCheckpointError,
    RefusedCheckpointError,
    atomic,
    newest_checkpoint,
    read_file,
)
from lightning_n2uq.cli import main
from lightning_n2uq.modules.checkpoints import read_checkpoint

CONTENT = {
    "state_dict": {"weight": torch.arange(5000.0)},
    "pytorch-lightning_version": "2.6.0",
    "optimizer_states": [],
}


class Payload:
    """Unpickling it would create the file: what an attacker's checkpoint does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(path, **more):
    AtomicCheckpointIO().save_checkpoint({**CONTENT, **more}, path)
    return path


def test_sealed_files_are_read_by_torch_and_carry_version_and_revision(tmp_path):
    path = save(tmp_path / "a.ckpt")
    for content in (torch.load(path, weights_only=True), AtomicCheckpointIO().load_checkpoint(path)):
        assert torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
        assert content["lightning_n2uq_version"] == __version__
        assert content["lightning_n2uq_revision"]
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_bit_anywhere_is_found(tmp_path, at):
    path = save(tmp_path / "a.ckpt")
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        read_file(str(path))


@pytest.mark.parametrize("length", [0, 1, 30, 1000, -1, -90])
def test_a_cut_short_file_is_found(tmp_path, length):
    path = save(tmp_path / "a.ckpt")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        read_file(str(path))


def test_older_files_without_a_digest_are_read(tmp_path):
    torch.save(CONTENT, tmp_path / "old.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt").keys() == CONTENT.keys()


@pytest.mark.integration
def test_a_checkpoint_with_code_is_refused_and_the_code_never_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace, path = tmp_path / "was-here", tmp_path / "evil.ckpt"
    torch.save({**CONTENT, "hyper_parameters": {}, "loops": Payload(trace)}, path)
    for read in (read_file, read_checkpoint):
        with pytest.raises(RefusedCheckpointError, match="more than tensors and plain values"):
            read(str(path))
    with pytest.raises(RefusedCheckpointError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    small = ["--config", "digits/n2uq_w2a2.yaml"]
    evil = str(path)
    commands = [[name, *small, "--ckpt_path", evil] for name in ("fit", "validate", "test", "predict")]
    commands += [
        ["fit", *small, "--model.init_from", evil],
        ["fit", *small, "--model.teacher", evil],
        ["export", "--ckpt", evil, "-o", "out.onnx"],
        ["convert", evil, "out.pt"],
    ]
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert error.count("n2uq: error: ") == 1, command
    assert not trace.exists()


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_an_error_of_the_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, when):
    path = save(tmp_path / "a.ckpt", step=1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    monkeypatch.setattr(*((atomic, "seal") if when == "writing" else (atomic.os, "replace")), fail)
    with pytest.raises(CheckpointWriteError, match=r"cannot write .* \(No space left on device\)"):
        save(path, step=2)
    assert read_file(str(path))["step"] == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system lets not even root mount")
    try:
        path = save(tmp_path / "a.ckpt", step=1)
        with pytest.raises(CheckpointWriteError, match="cannot write"):
            save(path, step=2, more=torch.zeros(200_000))
        assert read_file(str(path))["step"] == 1
        assert os.listdir(tmp_path) == ["a.ckpt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for age, name in ((40, "one/old"), (30, "two/last"), (20, "two/weights"), (10, "two/cut")):
        path = tmp_path / f"{name}.ckpt"
        if name == "two/weights":
            torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, path)
        else:
            save(path)
        if name == "two/cut":
            path.write_bytes(path.read_bytes()[:500])
        os.utime(path, (1e9 - age, 1e9 - age))
    found = newest_checkpoint(tmp_path)
    assert found.path == tmp_path / "two/last.ckpt"
    assert ["damaged" in found.rejected[0], "weights only" in found.rejected[1]] == [True, True]
    assert newest_checkpoint(tmp_path / "none").path is None
    own = save(tmp_path / "own.ckpt")
    os.utime(own, (1e9, 1e9))
    assert newest_checkpoint(tmp_path, tmp_path).path == own
    os.utime(own, (1e9 - 90, 1e9 - 90))
    assert newest_checkpoint(tmp_path, tmp_path).path == tmp_path / "two/last.ckpt"
    assert newest_checkpoint(tmp_path / "none", tmp_path).path == own


def test_the_newest_of_a_run_is_the_one_of_most_steps_whatever_the_clock_says(tmp_path):
    for step, age in ((10, 50), (20, 90), (5, 0)):
        path = save(tmp_path / f"run/{step}.ckpt")
        torch.save({**torch.load(path, weights_only=True), "global_step": step}, path)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_checkpoint(tmp_path).path == tmp_path / "run/20.ckpt"
    assert newest_checkpoint(tmp_path, wanted=lambda run: run.name != "run").path is None


def test_another_version_is_named_and_a_foreign_file_refused(tmp_path):
    path = save(tmp_path / "a.ckpt")
    content = {**torch.load(path, weights_only=True), "lightning_n2uq_version": "0.0.1"}
    torch.save(content, path)
    with pytest.warns(UserWarning, match=f"written by version 0.0.1 .*, this is {__version__}"):
        AtomicCheckpointIO().load_checkpoint(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this package's training"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_hyperparameters_with_which_no_file_can_be_read_again_are_said_when_it_is_saved(tmp_path):
    writer, content = AtomicCheckpointIO(), torch.load(save(tmp_path / "a.ckpt"), weights_only=True)
    content["hyper_parameters"] = {"lr": 0.1, "sizes": [1, 2], "net": torch.nn.Linear(1, 1)}
    with pytest.warns(
        UserWarning, match=r"hyper_parameters.net is a Linear, .* save_hyperparameters\(ignore="
    ):
        writer.save_checkpoint(content, tmp_path / "b.ckpt")
    writer.save_checkpoint(content, tmp_path / "c.ckpt")  # once is enough: warnings are errors here
    del content["hyper_parameters"]["net"]
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "d.ckpt")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--resume", "some.ckpt"], "resume: got 'some.ckpt', allowed is auto"),
        (["--ckpt_path", "none.ckpt"], "ckpt_path: no such file 'none.ckpt'"),
    ],
)
def test_misuse_is_answered_in_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "digits/n2uq_w2a2.yaml", *arguments]) == 2
    assert line in capsys.readouterr().err
