"""A row of the entropies is logged once, also where a run was interrupted amid accumulated batches."""

from types import SimpleNamespace

import pytest

from lightning_n2uq.callbacks import entropy_regularizer
from lightning_n2uq.callbacks.entropy_regularizer import EntropyRegularizer


@pytest.mark.parametrize("resumed_at", [1, 50])
def test_a_run_resumed_amid_accumulated_batches_logs_no_row_twice(monkeypatch, resumed_at):
    rows = []
    monkeypatch.setattr(
        entropy_regularizer.log_sink, "log_metrics", lambda trainer, _: rows.append(trainer.global_step)
    )
    regularizer = EntropyRegularizer(log_every_n_steps=50)
    trainer = SimpleNamespace(global_step=resumed_at)
    regularizer.on_train_start(trainer, None)
    regularizer.on_train_batch_end(trainer, None, None, None, 0)  # a batch that is accumulated
    assert rows == []
    for trainer.global_step in (100, 100):
        regularizer.on_train_batch_end(trainer, None, None, None, 1)
    assert rows == [100]
