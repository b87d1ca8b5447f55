"""Starts worker bodies in fresh processes and collects what they return."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import warm


def _call(body, rank, world_size, folder, answers):
    try:
        answers.put((rank, body(rank, world_size, folder), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def launch(body, world_size, expected=None, limit=120.0):
    """Run ``body(rank, world_size, folder)`` on every rank; return the answers of the ``expected`` ranks."""
    context = warm.context()
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_call, args=(body, rank, world_size, folder, answers), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(answers, expected or range(world_size), time.monotonic() + limit)
        finally:
            for process in processes:
                process.join(5.0)
                process.kill()
                process.join()


def _collect(answers, expected, deadline):
    found = {}
    while set(found) != set(expected):
        rank, answer, failure = answers.get(timeout=max(0.1, deadline - time.monotonic()))
        if failure is not None:
            raise AssertionError(f"rank {rank}:\n{failure}")
        found[rank] = answer
    return [found[rank] for rank in expected]


def run_script(name, folder, limit):
    """Runs a script of this folder under Lightning's own launcher; returns what its two ranks saved."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
