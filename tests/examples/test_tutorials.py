"""The tutorials run as scripts, and their notebooks hold the same code, with output."""

import json
import os
import sys
from pathlib import Path

import pytest

import apart

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "examples" / "tutorials").glob("*.py"))
NAMES = {"quickstart", "own_data", "own_module", "many_devices", "deploy"}


def test_every_tutorial_is_there() -> None:
    assert {path.stem for path in TUTORIALS} == NAMES


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, marks=pytest.mark.integration if path.stem == "own_module" else pytest.mark.slow)
        for path in TUTORIALS
    ],
    ids=lambda path: path.stem,
)
def test_a_tutorial_runs(script: Path, tmp_path: Path) -> None:
    printed = apart.run([sys.executable, str(script)], tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert printed.strip()


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_holds_the_tutorials_code_and_its_output(script: Path) -> None:
    book = json.loads((ROOT / "examples" / "notebooks" / f"{script.stem}.ipynb").read_text())
    source = script.read_text()
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    missing = ["".join(cell["source"]) for cell in code if "".join(cell["source"]) not in source]
    assert missing == []
    lines = sum(len("".join(cell["source"]).splitlines()) for cell in code)
    wanted = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert lines >= len(wanted)
    assert any(cell["outputs"] for cell in code)
    errors = [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert errors == []
