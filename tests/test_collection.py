"""Plain `pytest` finds every test's modules, from any folder, without the repository's root on `sys.path`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import importlib.util
import multiprocessing
import sys


def seen() -> list[bool]:
    names = "callbacks", "benchmarks.netlab", "ptx_emulator"
    return [importlib.util.find_spec(name) is not None for name in names]


def test_probe() -> None:
    assert seen() == [False, True, True]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(seen) == [False, True, True]
"""


def pytest_alone(folder: Path, *arguments: object) -> str:
    command = [Path(sys.executable).with_name("pytest"), "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_every_file_is_collected_from_the_root() -> None:
    assert "tests/ops/test_compiled_kernels.py" in pytest_alone(ROOT, "--collect-only", "-m", "")


def test_files_are_collected_from_another_folder(tmp_path: Path) -> None:
    found = pytest_alone(
        tmp_path, "--collect-only", "-m", "", ROOT / "tests" / "ops", ROOT / "tests" / "benchmarks"
    )
    assert "tests/ops/test_compiled_kernels.py" in found


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests" / "ops"])
def test_the_root_is_not_on_the_path(folder: Path, tmp_path: Path) -> None:
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE)
    assert "1 passed" in pytest_alone(folder, "-c", ROOT / "pyproject.toml", probe)
