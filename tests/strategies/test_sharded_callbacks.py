"""Which callbacks `nuqsgd_fsdp` refuses before training, without ranks."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_n2uq import callbacks as our_callbacks
from lightning_n2uq.strategies import ShardedNUQSGDStrategy

REFUSED = {
    "QuantizationMonitor": {},
    "ThresholdAnnealing": {},
    "EntropyRegularizer": {"weight": 0.1},
    "ProximalAnnealing": {},
    "OscillationControl": {},
    "BatchNormReestimation": {},
    "RangeInitialization": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "WeightAveraging": {},
    "EMAWeightAveraging": {},
}
TAKEN = ("CommunicationMonitor", "NonFiniteGuard", "ModelCheckpoint", "LearningRateMonitor")


def made(name, **arguments):
    kind = getattr(our_callbacks, name, None) or getattr(lightning_callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    return kind(**arguments)


@pytest.fixture
def set_up(monkeypatch):
    """What a trainer of one process does before it starts; there is no module, so nothing is sharded."""
    monkeypatch.setattr(ModelParallelStrategy, "setup", lambda self, trainer: None)

    def run(*callbacks, stage=TrainerFn.FITTING):
        trainer = SimpleNamespace(callbacks=list(callbacks), state=SimpleNamespace(fn=stage))
        ShardedNUQSGDStrategy().setup(trainer)

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_need_whole_weights_are_refused_in_one_line(set_up, name):
    callback = made(name, **REFUSED[name])
    with pytest.raises(
        ValueError, match=rf"^callbacks: got {name}, allowed with nuqsgd_fsdp are "
    ) as refused:
        set_up(made("NonFiniteGuard"), callback)
    assert "\n" not in str(refused.value)
    set_up(callback, stage=TrainerFn.TESTING)


def test_so_are_subclasses(set_up):
    class Mine(our_callbacks.QuantizationMonitor):
        pass

    with pytest.raises(ValueError, match=r"^callbacks: got Mine, allowed with nuqsgd_fsdp are "):
        set_up(Mine())


def test_others_are_taken(set_up):
    set_up(*(made(name) for name in TAKEN), made("EarlyStopping", monitor="val/loss"))
