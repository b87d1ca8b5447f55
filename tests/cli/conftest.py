import logging
import sys

import pytest


class _CurrentStderr(logging.StreamHandler):
    """Lightning's handler keeps the stream it found at import, which pytest has closed by now."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value):
        pass


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Run in a folder of its own, without W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("N2UQ_DEBUG", raising=False)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [_CurrentStderr()])
    return tmp_path
