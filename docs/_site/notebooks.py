"""Makes notebooks with their output of `examples/tutorials/*.py`: `python docs/_site/notebooks.py`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "examples" / "tutorials"
NOTEBOOKS = ROOT / "examples" / "notebooks"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook_of(script: Path) -> nbformat.NotebookNode:
    """Returns a script in cells as a notebook without output."""
    book = jupytext.read(script)
    for i, cell in enumerate(book.cells):
        cell["id"] = f"cell-{i}"
        cell["metadata"] = {}
    book.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    return book


def executed(script: Path, timeout: int = 900) -> nbformat.NotebookNode:
    """Returns the notebook of a script after it has run in an empty folder.

    Raises:
        CellExecutionError: A cell fails.
    """
    book = notebook_of(script)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(book, timeout=timeout, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    for cell in book.cells:
        cell["metadata"] = {}  # times of execution, which differ from run to run
        if cell["cell_type"] == "code":
            kept = [o for o in cell["outputs"] if o.get("name") != "stderr"]  # logs
            cell["outputs"] = kept
    return book


def main(argv: Sequence[str] | None = None) -> int:
    """Executes the tutorials and writes their notebooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="tutorials (default: all)")
    parser.add_argument("--output", type=Path, default=NOTEBOOKS, help="where the notebooks go")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    scripts = [TUTORIALS / f"{name}.py" for name in options.names] or sorted(TUTORIALS.glob("*.py"))
    for script in scripts:
        path = options.output / f"{script.stem}.ipynb"
        nbformat.write(executed(script), path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
