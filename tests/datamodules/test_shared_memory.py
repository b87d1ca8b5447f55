"""Worker processes whose batches do not fit into shared memory."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.datamodules._data import shared_memory
from lightning_n2uq.datamodules._data.shared_memory import workers_with_room


@pytest.fixture
def free(monkeypatch):
    def be(size):
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=size, f_frsize=1))

    return be


def test_workers_whose_batches_fit_are_kept(free, tmp_path):
    free(500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert workers_with_room(2, 100, str(tmp_path)) == 2
        assert workers_with_room(0, 10**9, str(tmp_path)) == 0
        assert workers_with_room(4, 10**9, str(tmp_path / "none")) == 4


def test_workers_without_room_are_done_without_and_said(free, tmp_path):
    free(499)
    with pytest.warns(RuntimeWarning, match=r"num_workers: got 2, .*0\.0 MB free"):
        assert workers_with_room(2, 100, str(tmp_path)) == 0


def test_loaders_ask_for_room(free, monkeypatch, tmp_path):
    monkeypatch.setattr(workers_with_room, "__defaults__", (str(tmp_path),))
    data = DigitsDataModule(batch_size=128, num_workers=2)
    data.setup("fit")
    free(5 * 128 * 64 * 4)
    assert data.train_dataloader().num_workers == 2
    free(5 * 128 * 64 * 4 - 1)
    with pytest.warns(RuntimeWarning, match="num_workers"):
        assert data.train_dataloader().num_workers == 0


SCRIPT = """
from lightning_n2uq.datamodules import DigitsDataModule
data = DigitsDataModule(batch_size=128, num_workers=2)
data.setup("fit")
print(sum(len(images) for images, _ in data.train_dataloader()))
"""


@pytest.mark.integration
def test_a_shared_memory_of_64_kb_does_not_hang():
    """In a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=64k tmpfs {shared_memory.FOLDER}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000
    assert "num_workers: got 2" in done.stderr
