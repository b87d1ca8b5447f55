import os
import shutil
import subprocess

import pytest

import runs
from lightning_n2uq.checkpointing import newest_checkpoint, read_file
from lightning_n2uq.modules import QuantizedClassifier

SIZE = 3 * 2**20  # bytes: room for a few checkpoints of the tiny network


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds `SIZE` bytes."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system lets not even root mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("whole_run", [False, True], ids=["checkpoints on it", "the whole run on it"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path, small_disk, whole_run):
    folder = small_disk if whole_run else tmp_path
    callbacks = [{"class_path": "ThresholdAnnealing"}]
    runs.write_config(folder, callbacks=callbacks, max_epochs=400)
    kept = [
        "--checkpoint.every_n_train_steps",
        "5",
        "--checkpoint.save_top_k",
        "-1",
        "--checkpoint.monitor",
        "null",
    ]
    kept += ["--checkpoint.filename", "at-{step}"]
    where = [] if whole_run else ["--checkpoint.dirpath", str(small_disk / "kept")]
    ended = runs.fit(folder, *kept, *where)
    errors = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith("n2uq: error: ")
    assert "No space left on device" in errors[0] or "took only a part" in errors[0]
    assert ".ckpt" in errors[0]
    assert str(small_disk if not whole_run else "runs/tiny") in errors[0]
    assert "Traceback" not in ended.stderr + ended.stdout

    files = sorted(small_disk.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) > 2
    assert not list(small_disk.rglob("*.partial"))
    assert all("state_dict" in read_file(str(path)) for path in files)
    found = newest_checkpoint(small_disk if not whole_run else small_disk / "runs/tiny")
    assert found.path == files[-1]
    assert found.rejected == []
    model = QuantizedClassifier.from_checkpoint(str(files[-1]))
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000
