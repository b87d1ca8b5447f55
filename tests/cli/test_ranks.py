"""Ranks that cannot meet or are lost: one line, a documented exit code, no process left over."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from small_run import SMALL

from lightning_n2uq.cli import main
from lightning_n2uq.cli.rank_failures import MeetingError, RankFailureError, rank_failure

GLOO = "[/torch/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:5: Connection reset by peer."


@pytest.fixture
def environment(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (
            dist.DistStoreError("Timed out after 13 seconds waiting for clients. 1/2 clients joined."),
            RankFailureError,
            "ranks: 1 of 2 came to 10.0.0.1:29500 in time",
        ),
        (
            dist.DistNetworkError("failed to listen. port: 29500, name: EADDRINUSE Exception raised from f"),
            MeetingError,
            "MASTER_PORT: got 29500, allowed is a port that no other process listens on",
        ),
        (
            RuntimeError(f"{GLOO} This is typically caused by a remote worker hanging."),
            RankFailureError,
            "rank 0 lost another one at step 7 (Read error [127.0.0.1]:5: Connection reset by peer.)",
        ),
        (
            RuntimeError(
                "Got the following error when running the callback: RuntimeError: gradient exchange "
                f"failed on rank 0 in the gradient exchange of step 7: rank 1 is gone ({GLOO})\nAt:\n  x"
            ),
            RankFailureError,
            "gradient exchange failed on rank 0 in the gradient exchange of step 7: rank 1 is gone",
        ),
        (
            ValueError("ranks disagree on `bits`: rank 0 has 4, rank 1 has 3"),
            MeetingError,
            "ranks disagree on `bits`: rank 0 has 4, rank 1 has 3",
        ),
    ],
)
def test_failures_among_ranks_are_one_line(environment, error, kind, line):
    environment.setenv("MASTER_ADDR", "10.0.0.1")
    environment.setenv("MASTER_PORT", "29500")
    shown = rank_failure(error, 0, 7)
    assert type(shown) is kind
    assert str(shown).startswith(line)
    assert "\n" not in str(shown)
    assert getattr(shown, "exit_code", 2) == (3 if kind is RankFailureError else 2)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("lr"), ValueError("lr: got 0")])
def test_other_errors_are_not_taken_for_failures_among_ranks(error):
    assert rank_failure(error, 0, 7) is None


def _error_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "n2uq: error" in line]
    return line


TWO = ["fit", *SMALL, "--trainer.max_epochs", "1", "--trainer.devices", "2"]


@pytest.mark.parametrize("strategy", ["ddp", "nuqsgd"])
def test_a_taken_port_is_said_before_any_process_is_started(in_empty_folder, environment, capsys, strategy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment.setenv("MASTER_PORT", str(port))
        began = time.monotonic()
        assert main([*TWO, "--trainer.strategy", strategy]) == 2
    assert f"MASTER_PORT: got {port}" in _error_line(capsys)
    assert time.monotonic() - began < 60


def test_an_address_without_a_host_is_said_at_once(in_empty_folder, environment, capsys):
    environment.setenv("MASTER_ADDR", "nowhere.invalid")
    environment.setenv("MASTER_PORT", "29511")
    assert main([*TWO, "--trainer.num_nodes", "2"]) == 2
    assert "MASTER_ADDR: got 'nowhere.invalid'" in _error_line(capsys)


CHILD = """
import os, sys, time
from lightning_n2uq.cli import processes
processes._GRACE_S = 0.5
processes.watch_launcher()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys, time
from lightning_n2uq.cli import processes
processes._GRACE_S = 0.5
processes.announce_launcher()
command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
child = subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": "1"})
processes.observe_children([child])
if sys.argv[3:]:
    processes.ending.set(); time.sleep(1); sys.exit(7)
time.sleep(60)
"""


def _launch(folder, child, *more):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder / "pid"), child, *more],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def _pid(folder):
    deadline = time.monotonic() + 30
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int((folder / "pid").read_text())


def _ends(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":  # only waits to be collected
            return True
        time.sleep(0.05)
    return False


def test_a_child_ends_with_the_process_that_started_it(tmp_path):
    launcher = _launch(tmp_path, CHILD)
    child = _pid(tmp_path)
    launcher.kill()
    _, said = launcher.communicate(timeout=20)  # until the child has closed the pipe, too
    assert f"rank 1: the process that started it ({launcher.pid}) is gone" in said
    assert _ends(child)


def test_a_killed_child_ends_the_command_with_its_own_code_and_name(tmp_path):
    launcher = _launch(tmp_path, CHILD)
    os.kill(_pid(tmp_path), signal.SIGKILL)
    _, said = launcher.communicate(timeout=20)
    assert said.splitlines() == ["n2uq: error: rank 1 was killed by SIGKILL"]
    assert launcher.returncode == 3


@pytest.mark.parametrize(("code", "lines"), [(1, ["n2uq: error: rank 1 ended with exit code 1"]), (2, [])])
def test_a_childs_exit_code_is_the_commands(tmp_path, code, lines):
    launcher = _launch(tmp_path, f"raise SystemExit({code})")
    _, said = launcher.communicate(timeout=20)
    assert (launcher.returncode, said.splitlines()) == (code, lines)


def test_a_command_that_knows_why_it_ends_says_so_itself(tmp_path):
    launcher = _launch(tmp_path, "raise SystemExit(1)", "ending")
    _, said = launcher.communicate(timeout=20)
    assert (launcher.returncode, said) == (7, "")
