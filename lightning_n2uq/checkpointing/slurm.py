"""Puts a SLURM job back into the queue after its out-of-time signal."""

from __future__ import annotations

import os
import subprocess


def requeue() -> str:
    """Asks SLURM to run this job again; returns one line that says how that went."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array is not None else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"job {job} was not put back into the queue ({error})"
    if done.returncode:
        return f"job {job} was not put back into the queue ({' '.join(done.stderr.split())})"
    return f"job {job} is back in the queue"
