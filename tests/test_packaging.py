"""The package's own list of packages and files is whole."""

import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
ROOT = Path(__file__).resolve().parent.parent


def test_every_folder_with_code_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    top = ("lightning_n2uq", "callbacks", "datamodules", "configs")
    found = {p.parent.relative_to(ROOT) for name in top for p in (ROOT / name).rglob("__init__.py")}
    # Folders of data alone count as packages too: setuptools warns of every one that is not listed.
    found |= {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    names = {".".join(path.parts) for path in found}
    assert listed == {n if n.startswith("lightning_n2uq") else f"lightning_n2uq.{n}" for n in names}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lightning_n2uq\n"
        "heavy = {'wandb', 'sklearn', 'matplotlib', 'numba', 'triton', 'plotly', 'onnx', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_top_folders_are_not_importable_by_their_short_names() -> None:
    command = [sys.executable, "-c", "import callbacks"]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert "No module named 'callbacks'" in result.stderr
