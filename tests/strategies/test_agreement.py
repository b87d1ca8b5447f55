"""Ranks started with different arguments stop before the first step, in one line that names both values."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_n2uq.callbacks import EntropyRegularizer, QuantizationMonitor
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.distributed.collectives import require_agreement
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.strategies import agreement

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[1] / "support" / "ranks_apart.py"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(folder, *arguments, limit=150):
    """Returns exit code and output of every rank."""
    port, processes = free_port(), []
    for rank, own in enumerate(arguments):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments)),
            "NODE_RANK": "0", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), str(folder), json.dumps(own)]
        with open(folder / f"output_{rank}", "w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        codes = [process.wait(limit) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return codes, [(folder / f"output_{rank}").read_text() for rank in range(len(arguments))]


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        ({}, {"model": {"lr": 0.1}}, "`model.lr`: rank 0 has 0.00125, rank 1 has 0.1"),
        (
            {"own": {"lr": 0.5, "batch_size": 8}},
            {"own": {"lr": 0.5, "batch_size": 4}},
            "`training batches`: rank 0 has 4, rank 1 has 8",
        ),
    ],
    ids=["named argument", "own module"],
)
def test_ranks_that_disagree_stop_before_the_first_step(tmp_path, first, second, line):
    codes, outputs = run(tmp_path, first, second)
    for code, output in zip(codes, outputs, strict=True):
        assert code != 0
        assert f"ranks disagree on {line}" in output
        assert "\nsteps" not in output


def test_a_rank_on_plain_ddp_is_named_and_nothing_hangs(tmp_path):
    began = time.monotonic()
    codes, outputs = run(tmp_path, {"wait": 5}, {"trainer": {"strategy": "ddp"}})
    assert time.monotonic() - began < 140
    assert all(code != 0 for code in codes)
    line = "strategy: rank 1 did not come to the handshake within 5 s, allowed is the same strategy on every"
    assert line in outputs[0]


def facts(strategy="NUQSGDStrategy", model=None, data=None, callbacks=(), **trainer):
    module = QuantizedClassifier(image_size=8, num_classes=4, **(model or {}))
    runner = Trainer(accelerator="cpu", logger=False, callbacks=[*callbacks], **{"max_epochs": 1, **trainer})
    runner.datamodule = SyntheticDataModule(**(data or {}))
    return agreement.settings(runner, module, strategy)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"model": {"schedule": "cosine"}}, "`model.schedule`: rank 0 has 'linear', rank 1 has 'cosine'"),
        ({"data": {"batch_size": 4}}, "`data.batch_size`: rank 0 has 64, rank 1 has 4"),
        ({"data": {"num_val": 64}}, "`data.sizes`: rank 0 has {'train': 512, 'val': 128,"),
        ({"max_epochs": 2}, "`trainer.max_epochs`: rank 0 has 1, rank 1 has 2"),
        ({"accumulate_grad_batches": 2}, "`trainer.accumulate_grad_batches`: rank 0 has 1, rank 1 has 2"),
        ({"gradient_clip_val": 0.5}, "`trainer.gradient_clip_val`: rank 0 has None, rank 1 has 0.5"),
        ({"precision": "bf16-mixed"}, "`trainer.precision`: rank 0 has '32-true', rank 1 has 'bf16-mixed'"),
        ({"limit_train_batches": 3}, "`trainer.limit_train_batches`: rank 0 has 1.0, rank 1 has 3"),
        ({"strategy": "TorchHookStrategy"}, "`strategy`: rank 0 has 'NUQSGDStrategy', rank 1 has 'TorchHook"),
        ({"callbacks": [EntropyRegularizer(0.1)]}, "`callbacks.EntropyRegularizer`: rank 0 has None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_the_training_is_compared(changed, line):
    with pytest.raises(ValueError, match=re.escape(f"ranks disagree on {line}")):
        require_agreement([facts(), facts(**changed)], [0, 1])


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"memory_format": "channels_last"}},
        {"data": {"num_workers": 2}},
        {"enable_progress_bar": False},
        {"callbacks": [QuantizationMonitor()]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_decides_about_speed_or_watching_alone_may_differ(changed):
    require_agreement([facts(), facts(**changed)], [0, 1])


def test_paths_are_compared_by_their_last_part_and_objects_by_their_class():
    assert agreement.plain("/mnt/a/teacher.ckpt") == agreement.plain("/data/b/teacher.ckpt") == "teacher.ckpt"
    assert agreement.plain([1, {"x": object()}]) == [1, {"x": "object"}]
    assert agreement.plain(float("nan")) == agreement.plain(float("nan"))
