import contextlib
import io
import logging
import sys
from pathlib import Path

import pytest
from small_run import EVERY_EPOCH, SMALL


class _CurrentStderr(logging.StreamHandler):
    """Lightning's handler keeps the stream it found at import, which pytest has closed by now."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value):
        pass


def _enter(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("N2UQ_DEBUG", raising=False)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [_CurrentStderr()])


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Run in a folder of its own, without W&B."""
    _enter(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of the example with four checkpoints, and what it printed; not to be changed."""
    from lightning_n2uq.cli import main

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        _enter(tmp_path_factory.mktemp("trained"), patch)
        assert main(["fit", *SMALL, "--trainer.max_epochs", "4", *EVERY_EPOCH]) == 0
        (folder,) = (path.resolve() for path in Path("runs").glob("digits/*/*") if path.is_dir())
    return folder, out.getvalue()
