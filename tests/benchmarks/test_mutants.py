"""Mutants: tests have to import the package from the copy that is mutated."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.integration
@pytest.mark.parametrize(("early", "outcome"), [("", "passed"), ("import lightning_n2uq; ", "failed")])
def test_a_trial_runs_the_copy_or_fails(tmp_path: Path, early: str, outcome: str) -> None:
    test = "tests/utils/test_validation.py"
    code = (
        f"{early}from pathlib import Path; from benchmarks.mutants.trials import Workspace;"
        f"space = Workspace(Path({str(ROOT)!r}), Path({str(tmp_path / 'code')!r}));"
        f"print(space.run([{test!r}], 100.0, Path({str(tmp_path / 'log')!r}))[0])"
    )
    assert in_new_process(code).strip() == outcome
    if early:
        assert "imported before the fork" in (tmp_path / "log").read_text()
