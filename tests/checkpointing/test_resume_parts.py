"""What exact resume is made of: random states, signals, rows of metrics.csv, digests, SLURM's queue."""

import csv
import errno
import hashlib
import io
import os
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_n2uq.checkpointing import identity, metrics_file, randomness, seal, slurm
from lightning_n2uq.checkpointing.atomic import disk_error
from lightning_n2uq.checkpointing.signals import RunInterrupted, StopSignals, name_of


def draws() -> list[object]:
    of_numpy = np.random.rand(2).tolist(), np.random.randn()  # noqa: NPY002  # the global generator is the point
    return [torch.rand(3).tolist(), torch.randn(1).item(), of_numpy, random.random(), random.gauss(0, 1)]


def test_random_numbers_go_on_where_they_were_captured() -> None:
    random.gauss(0, 1)  # leaves a second number behind, as numpy's does
    np.random.randn()  # noqa: NPY002
    file = io.BytesIO()
    torch.save(randomness.capture(), file)
    expected = draws(), draws()
    file.seek(0)
    randomness.restore(torch.load(file, weights_only=True))
    assert (draws(), draws()) == expected
    assert draws() not in expected


@pytest.fixture
def own_handlers() -> Iterator[list[object]]:
    """Handlers of the test's own for all signals that are watched, whatever the process began with."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    own = [signal.default_int_handler, lambda *_: None, lambda *_: None]
    for number, handler in zip(numbers, own, strict=True):
        signal.signal(number, handler)
    yield own
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_is_noted_and_handlers_come_back(name: str, own_handlers: list[object]) -> None:
    number, all_of_them = getattr(signal, name), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = own_handlers
    signals = StopSignals()
    signals.watch()
    signals.watch()  # a second call changes nothing
    try:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == number
        assert name_of(signals.received) == name
        with pytest.raises(RunInterrupted) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.code == 130
    finally:
        signals.release()
    assert [signal.getsignal(one) for one in all_of_them] == before
    signals.release()
    assert [signal.getsignal(one) for one in all_of_them] == before


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before, signals = signal.getsignal(signal.SIGTERM), StopSignals()
    thread = threading.Thread(target=signals.watch)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("code", "environment", "line"),
    [
        (0, {"SLURM_JOB_ID": "12"}, "job 12 is back in the queue"),
        (0, {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "job 7_3 is back"),
        (1, {"SLURM_JOB_ID": "12"}, "job 12 was not put back into the queue (said requeue 12 twice)"),
        (None, {"SLURM_JOB_ID": "12"}, "job 12 was not put back into the queue ([Errno 2]"),
    ],
)
def test_a_job_is_requeued(tmp_path, monkeypatch, code, environment, line) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if code is not None:
        script = tmp_path / "scontrol"
        script.write_text(f'#!/bin/sh\necho "said $1  $2\ntwice" >&2\nexit {code}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if code is not None else str(tmp_path))
    assert slurm.requeue().startswith(line)


# The warning is of files that `put_aside` saves.
aside = pytest.mark.filterwarnings("ignore:Experiment logs directory")


class Logger(CSVLogger):
    """Writes into the folder itself."""

    def __init__(self, folder) -> None:
        super().__init__(folder, name="", version="")


def write(logger: CSVLogger, *rows: dict[str, float]) -> None:
    for row in rows:
        logger.log_metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
    logger.save()


def rows_in(folder) -> list[tuple[int, list[str]]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), [k for k, v in row.items() if v and k != "step"]) for row in rows]


ROWS = [
    {"step": 1, "loss": 1.0},
    {"step": 3, "loss": 0.5},
    {"step": 4, "val/acc": 0.7},
    {"step": 5, "loss": 0.4},
]


@aside
def test_rows_of_the_checkpoint_stay_and_later_ones_that_come_again_go(tmp_path) -> None:
    """Written at 2 rows, after 4 steps: row 3 is a validation, row 4 belongs to a step that is repeated."""
    first = Logger(tmp_path)
    write(first, *ROWS[:2])
    assert metrics_file.count_rows([first]) == [2]
    write(first, {"step": 3, "lr": 0.1}, *ROWS[2:])
    second = Logger(tmp_path)
    metrics_file.put_aside([second])
    assert second.experiment.metrics_keys == []  # opens, where it would have deleted the file
    assert not (tmp_path / "metrics.csv").exists()
    metrics_file.bring_back([second], [2], step=4)
    assert rows_in(tmp_path) == [(1, ["loss"]), (3, ["loss"]), (3, ["lr"])]
    assert os.listdir(tmp_path) == ["metrics.csv"]
    write(second, {"step": 4, "loss": 0.3})
    assert [step for step, _ in rows_in(tmp_path)] == [1, 3, 3, 4]
    assert metrics_file.count_rows([second]) == [4]


@aside
def test_without_a_count_every_row_stays_and_a_file_put_aside_is_the_valid_one(tmp_path) -> None:
    first = Logger(tmp_path)
    write(first, *ROWS)
    metrics_file.put_aside([first])
    (tmp_path / "metrics.csv").write_text("step,loss\n9,9\n")  # of a run that died soon
    metrics_file.put_aside([first])
    second = Logger(tmp_path)
    assert second.experiment.metrics_keys == []
    metrics_file.bring_back([second])
    assert second.experiment.metrics_keys[:2] == ["loss", "step"]
    assert len(rows_in(tmp_path)) == 4
    metrics_file.bring_back([second])  # nothing is aside any more
    assert len(rows_in(tmp_path)) == 4


@pytest.mark.parametrize(("text", "rows"), [("", 0), ("step,loss\n", 0), ("step,loss\n1,0.5\n", 1)])
def test_a_header_is_no_row(tmp_path, text: str, rows: int) -> None:
    logger = Logger(tmp_path)
    logger.save()  # opens its file
    (tmp_path / "metrics.csv").write_text(text)
    assert metrics_file.count_rows([logger]) == [rows]


def test_a_logger_that_wrote_nothing_has_no_rows(tmp_path) -> None:
    logger = Logger(tmp_path)
    assert metrics_file.count_rows([logger]) == [0]
    metrics_file.put_aside([logger])
    metrics_file.bring_back([logger], [0], 1)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("size", [10, 1 << 18, 1 << 19])
def test_the_digest_is_of_the_file_that_torch_wrote(tmp_path, size) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"x": torch.randn(size)}, path)
    plain = path.read_bytes()
    assert seal.is_intact(path) is None
    with path.open("r+b") as file:
        seal.seal(file)
    sealed = path.read_bytes()
    assert sealed[: len(plain) - 2] == plain[:-2]
    assert sealed.endswith(b"n2uq-sha256:" + hashlib.sha256(plain).hexdigest().encode())
    assert seal.is_intact(path) is True
    assert torch.load(path, weights_only=True)["x"].shape == (size,)
    with path.open("r+b") as file, pytest.raises(ValueError, match="no plain zip archive"):
        seal.seal(file)  # it has a comment now
    for at in (0, len(plain) // 2, len(plain) - 3, len(plain) + 20, len(sealed) - 1):
        path.write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
        assert seal.is_intact(path) is False


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 21, b"x" * 500])
def test_what_is_no_archive_is_neither_sealed_nor_intact(tmp_path, content) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert seal.is_intact(path) is False
    with path.open("r+b") as file, pytest.raises(ValueError, match="no plain zip archive"):
        seal.seal(file)
    assert path.read_bytes() == content


def test_the_disks_error_is_found_behind_others() -> None:
    error, other = RuntimeError("torch"), RuntimeError("torch")
    error.__cause__ = other.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_error(error) == disk_error(other) == "No space left on device"
    assert disk_error(OSError("no number")) == "no number"
    assert disk_error(RuntimeError("[enforce fail] PytorchStreamWriter failed")) == (
        "the disk took only a part of it"
    )
    assert disk_error(RuntimeError("a shape")) is None


def test_a_file_says_who_wrote_it_and_what_it_lacks() -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    assert identity.other_version(content) is None
    identity.stamp(content)
    assert identity.other_version(content) is None
    old = content | {"lightning_n2uq_version": "0.0.1"}
    assert identity.other_version(old).startswith(
        f"written by version 0.0.1 ({old['lightning_n2uq_revision']}), "
    )
    del old["lightning_n2uq_revision"]
    assert "(unknown)" in identity.other_version(old)
    identity.check_training_file(content, "a", "it", resuming=False)
    identity.check_training_file(content | {"optimizer_states": []}, "a", "it", resuming=True)
    with pytest.raises(ValueError, match="it: 'a' holds weights only"):
        identity.check_training_file(content, "a", "it", resuming=True)
    for bad, lacks in (({"state_dict": 1}, "no pytorch"), ([], "no state_dict, pytorch-lightning_version")):
        with pytest.raises(ValueError, match=rf"it: 'a' is not a checkpoint of .*\({lacks}"):
            identity.check_training_file(bad, "a", "it", resuming=False)
