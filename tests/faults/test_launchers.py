"""Lightning's own launcher and torchrun, with a process killed: nothing is left over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(HERE)}


def alive(pid):
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, limit):
    deadline = time.monotonic() + limit
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_n2uq_fit_leaves_no_children_when_one_process_dies(tmp_path, victim):
    """Rank 0 is the command itself; its children see their connections break."""
    command = [
        *(sys.executable, "-m", "lightning_n2uq", "fit"),
        *("--config", str(HERE / "fault_fit.yaml")),
        *("--trainer.callbacks", "fault_callback.Marker", f"--trainer.callbacks.folder={tmp_path}"),
        f"--trainer.default_root_dir={tmp_path}",
    ]
    output = (tmp_path / "output").open("w")
    process = subprocess.Popen(
        command, env=os.environ | QUIET, stdout=output, stderr=output, cwd=tmp_path, start_new_session=True
    )
    try:
        marks = [tmp_path / f"pid{rank}" for rank in range(4)]
        deadline = time.monotonic() + 180
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert process.poll() is None, (tmp_path / "output").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.1)
        pids = [int(mark.read_text()) for mark in marks]
        assert pids[0] == process.pid
        os.kill(pids[victim], signal.SIGKILL)
        assert process.wait(timeout=20) != 0
        assert gone(pids, limit=20.0), [pid for pid in pids if alive(pid)]
        text = (tmp_path / "output").read_text()
        assert f"rank {victim} is gone" in text, text[-3000:]
        assert "gradient exchange of step" in text
    finally:
        output.close()
        for pid in [process.pid, *pids_of(tmp_path)]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def pids_of(folder):
    return [int(path.read_text() or 0) for path in folder.glob("pid*")]


@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_checkpoint(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            *("--max-restarts", "1", str(HERE / "fault_elastic_script.py"), str(tmp_path)),
        ],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"result{rank}").read_text()) for rank in range(4)]
    assert {found["steps"] for found in results} == {30}
    assert {found["restarts"] for found in results} == {"1"}
    assert {Path(found["start"]).name for found in results} == {"at=10.ckpt"}
    assert len({found["total"] for found in results}) == 1
    pids = [json.loads((tmp_path / f"progress{rank}").read_text())["pid"] for rank in range(4)]
    assert gone(pids, limit=10.0)
