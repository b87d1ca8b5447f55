import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import exchange_jobs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """One job under Lightning's own launcher, on two CPU processes."""
    folder = tmp_path_factory.mktemp("trainer")
    script = Path(exchange_jobs.__file__).with_name("trainer_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", ["automatic", "manual", "bf16-mixed", "accumulate", "powersgd"])
def test_trainer_modes_keep_replicas_equal(ranks, mode):
    assert [found["modes"][mode] for found in ranks] == [True, True]


def test_resume_restores_the_rank_s_residuals(ranks):
    for found in ranks:
        assert found["resume"] == {"own residual": True, "own chunk": True, "steps": [4, 8], "replicas": True}


def test_communication_monitor(ranks):
    metrics = ranks[0]["monitored"]["metrics"]
    assert 5.0 < metrics["comm/ratio"] < 8.0
    assert metrics["comm/sent_bytes"] == 1456  # 1-D parameters in fp32, the rest in 4 bits, aligned
    assert 0.01 < metrics["comm/relative_error"] < 0.2
    assert metrics["comm/nonfinite_buckets"] == 0
    summary = ranks[0]["monitored"]["summary"]
    assert "pay off" in summary or "paid off" in summary
    assert "Mbit/s" in summary
